"""When a stage starts, resumes, is skipped or is refused, and what --redo removes."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.command_line import dispatch
from pipelines.stages.chain import delete_stages_from, run_chain
from pipelines.stages.stage_checks import check_before_start, check_chain
from pipelines.stages.stage_inputs import input_fingerprints
from stage1_tokenizer.data.folder_source import FolderSource
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.train import train
from tests.tiny import run_tiny_chain, tiny_overrides, tiny_recipe
from vqmosaic.errors import InputError
from vqmosaic.runs.run_folder import STAGES, RunFolder
from vqmosaic.runs.stage_records import decide_action, fields_read, has_grown, load_record, redo, write_record


def run_with(folder: Path, stage: str, *, finished: bool = True, inputs: dict[str, str] | None = None, **changes) -> RunFolder:
    """A run folder with the record of one stage of the tiny recipe."""
    run = RunFolder(folder)
    write_record(run, tiny_recipe(folder, **changes), stage, inputs or {}, finished=finished, seconds=1.25)
    if finished:
        run.export(stage).mkdir()
    return run


def refusal_message(run: RunFolder, stage: str, inputs: dict[str, str] | None = None, **changes) -> str:
    with pytest.raises(InputError) as caught:
        decide_action(run, tiny_recipe(run.root, **changes), stage, inputs or {})
    return str(caught.value)


# --- start, resume, skip -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_starts_then_resumes_then_is_skipped(stage, tmp_path):
    run, recipe = RunFolder(tmp_path), tiny_recipe(tmp_path)
    assert load_record(run, stage) is None and decide_action(run, recipe, stage, {}) == "start"
    run_with(tmp_path, stage, finished=False)
    assert decide_action(run, recipe, stage, {}) == "resume"
    run_with(tmp_path, stage)
    assert decide_action(run, recipe, stage, {}) == decide_action(run, recipe, stage, None) == "skip"
    record = load_record(run, stage)
    assert record.finished and record.seconds == 1.25 and record.stage == stage


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_stage_without_its_export_resumes(stage, tmp_path):
    run = run_with(tmp_path, stage)
    run.export(stage).rmdir()
    assert decide_action(run, tiny_recipe(tmp_path), stage, {}) == "resume"


@pytest.mark.parametrize("place", ["elsewhere", "project"])
def test_a_run_folder_works_from_another_directory(place, tmp_path, monkeypatch, capsys):
    """Stages, audit and longer training neither resolve the relative data path against the new directory nor treat it as changed."""
    rng = np.random.default_rng(0)
    for number in range(24):
        path = tmp_path / f"project/photos/{'ab'[number % 2]}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20), dtype=np.uint8)).save(path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    given = tiny_overrides("runs/x", tokenizer_training__max_steps=2, tokenizer_training__batch_size=4, data__path="photos", data__source="folder")
    for stage in ("train-tokenizer", "preprocess"):
        assert dispatch([stage, "digits", *given]) == 0
    monkeypatch.chdir(tmp_path / place)
    run = str(tmp_path / "project/runs/x")
    capsys.readouterr()
    assert dispatch(["train-tokenizer", run]) == dispatch(["preprocess", run]) == 0
    assert capsys.readouterr().out.count("finished already") == 2
    assert dispatch(["audit", run]) == 0 and f"compared with the data set of {run}" in capsys.readouterr().out
    assert dispatch(["train-tokenizer", run, "--tokenizer_training.max_steps", "3"]) == 0
    assert "resumed at step 2" in capsys.readouterr().out


# --- changes -----------------------------------------------------------------------------------------------------------------


def test_fields_missing_from_a_record_have_their_default(tmp_path):
    """A field that a later version adds does not change a resumed training."""
    run = run_with(tmp_path, "tokenizer", finished=False)
    content = json.loads(run.record("tokenizer").read_text())
    del content["fields"]["tokenizer.diveq"]
    run.record("tokenizer").write_text(json.dumps(content))
    assert decide_action(run, tiny_recipe(tmp_path), "tokenizer", {}) == "resume"
    message = refusal_message(run, "tokenizer", **{"tokenizer.diveq": True})
    assert "tokenizer.diveq = false, now it is true" in message


@pytest.mark.parametrize("finished", [True, False])
def test_a_larger_budget_resumes(finished, tmp_path):
    run = run_with(tmp_path, "tokenizer", finished=finished)
    assert decide_action(run, tiny_recipe(tmp_path, tokenizer_training__max_steps=7), "tokenizer", {}) == "resume"
    unlimited = tiny_recipe(tmp_path, tokenizer_training__max_steps="null", tokenizer_training__max_minutes=1)
    with pytest.raises(InputError, match="max_minutes"):  # a new time limit does not extend an unlimited budget
        decide_action(run, unlimited, "tokenizer", {})


def test_has_grown_compares_budgets():
    assert has_grown(3, 4) and has_grown(3, None) and not has_grown(4, 3) and not has_grown(3, 3) and not has_grown(None, 3)


def test_a_smaller_budget_is_refused(tmp_path):
    message = refusal_message(run_with(tmp_path, "prior"), "prior", prior_training__max_steps=5)
    assert "prior_training.max_steps = 6, now it is 5" in message and "a budget can only grow" in message and "--redo prior" in message


@pytest.mark.parametrize(("stage", "changes", "change"), [
    ("tokenizer", {"tokenizer__code_dim": 9}, "tokenizer.code_dim = 8, now it is 9"),
    ("tokenizer", {"seed": 3}, "seed = 0, now it is 3"),
    ("tokenizer", {"data__shift": 2}, "data.shift = 1, now it is 2"),
    ("tokenizer", {"tokenizer__channel_multipliers": [1, 1]}, "tokenizer.channel_multipliers = [1, 1, 1], now it is [1, 1]"),
    ("tokens", {"tokens__views": "shifts"}, "tokens.views = 'none', now it is 'shifts'"),
    ("tokens", {"data__validation_fraction": 0.5}, "data.validation_fraction = 0.2, now it is 0.5"),
    ("prior", {"prior__layers": 2}, "prior.layers = 1, now it is 2"),
    ("prior", {"prior__options": '{"rope_theta": 5}'}, "prior.options = {}, now it is {'rope_theta': 5}"),
    ("prior", {"prior_training__label_drop": 0.2}, "prior_training.label_drop = 0.1, now it is 0.2"),
    ("pipeline", {"sampling__top_k": 5}, "sampling.top_k = 0, now it is 5"),
])
def test_a_changed_field_is_refused_with_both_values(stage, changes, change, tmp_path):
    run = run_with(tmp_path, stage)
    message = refusal_message(run, stage, **changes)
    assert change in message and f"stage {stage}" in message and f"--redo {stage}" in message and "--run_dir" in message and str(tmp_path) in message


@pytest.mark.parametrize(("stage", "changes"), [
    ("tokenizer", {"data__workers": 3, "tokenizer_training__checkpoint_every": 5, "tokenizer_training__resume": "never",
                   "tokenizer_training__log_every": 7, "tokenizer_training__keep_checkpoints": 9, "data__cache_megabytes": 1}),
    ("tokenizer", {"tokenizer_training__trackers": "[tensorboard]", "run_dir": "elsewhere"}),
    ("tokenizer", {"prior__layers": 2, "tokens__views": "shifts", "sampling__top_k": 5}),  # fields of other stages
    ("tokens", {"tokens__tokenizer": "a/tokenizer", "data__shift": 2, "tokenizer_training__max_steps": 5, "seed": 3}),
    ("prior", {"prior_training__tokens": "some/tokens", "data__shift": 2, "tokenizer__code_dim": 9}),
    ("pipeline", {"prior__layers": 2, "seed": 3}),
])
def test_fields_that_do_not_affect_results_may_change(stage, changes, tmp_path):
    assert decide_action(run_with(tmp_path, stage), tiny_recipe(**{"run_dir": tmp_path, **changes}), stage, {}) == "skip"


def test_a_changed_input_is_refused_with_both_fingerprints(tmp_path):
    run = run_with(tmp_path, "tokens", inputs={"tokenizer": "aaa", "data set": "ddd"})
    recipe = tiny_recipe(tmp_path)
    assert decide_action(run, recipe, "tokens", {"tokenizer": "aaa"}) == "skip", "a data set without a fingerprint is not compared"
    assert decide_action(run, recipe, "tokens", {"tokenizer": "aaa", "data set": "ddd"}) == "skip"
    message = refusal_message(run, "tokens", {"tokenizer": "bbb"})
    assert "tokenizer = 'aaa', now it is 'bbb'" in message and "--redo tokens" in message


def test_a_moved_data_set_is_accepted_if_it_is_the_same(tmp_path):
    run = run_with(tmp_path, "tokens", inputs={"data set": "ddd"}, data__source="auto", data__path="here")
    moved = {"data__source": "auto", "data__path": "there"}
    recipe = tiny_recipe(tmp_path, **moved)
    assert decide_action(run, recipe, "tokens", None) == "compare", "the stage itself must compare the data set"
    assert decide_action(run, recipe, "tokens", {"data set": "ddd"}) == "skip"
    assert "data set = 'ddd', now it is 'eee'" in refusal_message(run, "tokens", {"data set": "eee"}, **moved)
    unfinished = run_with(tmp_path / "2", "tokenizer", finished=False, inputs={"data set": "ddd"}, data__source="auto", data__path="here")
    assert decide_action(unfinished, recipe, "tokenizer", None) == "resume"
    unknown = run_with(tmp_path / "3", "tokens", data__source="auto", data__path="here")
    assert "data.path = 'here', now it is 'there'" in refusal_message(unknown, "tokens", **moved), "no fingerprint was recorded"


@pytest.fixture
def photos(tmp_path) -> Path:
    for number in range(20):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def recorded_data_set(run: Path) -> str:
    return load_record(RunFolder(run), "tokenizer").inputs["data set"]


def test_training_resumes_with_a_moved_data_set_but_not_with_a_changed_one(photos, tmp_path, capsys):
    def recipe(**changes):
        return tiny_recipe(tmp_path / "run", data__source="folder", **changes)

    train(recipe(data__path=photos, tokenizer_training__max_steps=2))
    moved = photos.rename(tmp_path / "scratch")
    assert check_before_start(recipe(data__path=moved, tokenizer_training__max_steps=2), "tokenizer") == "compare"
    capsys.readouterr()
    train(recipe(data__path=moved, tokenizer_training__max_steps=2))
    assert "finished already" in capsys.readouterr().out
    train(recipe(data__path=moved, tokenizer_training__max_steps=4))
    assert "resumed at step 2" in capsys.readouterr().out
    changed = moved / "a/0.bmp"
    content = changed.read_bytes()
    changed.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for steps in (4, 6):
        with pytest.raises(InputError, match="was started with data set = "):
            train(recipe(data__path=moved, tokenizer_training__max_steps=steps))


def test_training_of_version_0_1_0_resumes_and_then_records_contents(photos, tmp_path, monkeypatch, capsys):
    def recipe(steps: int):
        return tiny_recipe(tmp_path / "run", data__source="folder", data__path=photos, tokenizer_training__max_steps=steps)

    with monkeypatch.context() as patch:
        patch.setattr(FolderSource, "identity", FolderSource.former_identity)
        train(recipe(2))
    before = recorded_data_set(tmp_path / "run")
    capsys.readouterr()
    train(recipe(2))
    assert "finished already" in capsys.readouterr().out and recorded_data_set(tmp_path / "run") == before
    train(recipe(4))
    assert "resumed at step 2" in capsys.readouterr().out
    assert recorded_data_set(tmp_path / "run") == open_splits(recipe(4).data).fingerprint != before
    train(recipe(4))
    assert "finished already" in capsys.readouterr().out


def test_records_with_other_fields_are_accepted(tmp_path):
    run = run_with(tmp_path, "prior")
    content = json.loads(run.record("prior").read_text())
    del content["fields"]["prior.options"]
    content["fields"]["prior.of_old"] = 3
    run.record("prior").write_text(json.dumps(content))
    assert decide_action(run, tiny_recipe(tmp_path), "prior", {}) == "skip"


def test_recorded_fields_belong_to_stages(tmp_path):
    recipe = tiny_recipe(tmp_path)
    read = {name for stage in STAGES for name in fields_read(recipe, stage)}
    assert {"seed", "data.shift", "tokenizer.quantizer", "tokens.views", "prior.width", "sampling.top_p"} <= read
    assert "run_dir" not in read and "data.workers" not in read and "tokenizer_training.resume" not in read
    steps = fields_read(recipe, "tokenizer")["tokenizer_training.max_steps"]
    assert (steps.value, steps.change_policy) == (6, "budget")
    assert "data.shift" not in fields_read(recipe, "tokens")


# --- redo --------------------------------------------------------------------------------------------------------------------


def stages_with_files(run: RunFolder) -> set[str]:
    """The stages of which any file or folder exists."""
    parts = {stage: (run.record(stage), run.export(stage), run.checkpoints(stage), run.logs(stage)) for stage in STAGES}
    return {stage for stage, paths in parts.items() if any(path.exists() for path in paths)}


def full_run(folder: Path) -> RunFolder:
    run = RunFolder(folder)
    for stage in STAGES:
        write_record(run, tiny_recipe(folder), stage, {}, finished=True)
        for part in (run.export(stage), run.checkpoints(stage) / "step-00000002", run.logs(stage)):
            part.mkdir(parents=True)
            (part / "file").write_text("x")
    return run


@pytest.mark.parametrize("stage", STAGES)
def test_redo_removes_the_stage_and_all_later_stages(stage, tmp_path):
    run = full_run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    removed = list(STAGES[STAGES.index(stage):])
    assert redo(run, stage) == removed
    assert stages_with_files(run) == set(STAGES) - set(removed)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert redo(run, stage) == []


def test_an_interrupted_redo_can_be_repeated(tmp_path, monkeypatch):
    run = full_run(tmp_path)

    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("vqmosaic.runs.stage_records.shutil.rmtree", interrupt)
    with pytest.raises(KeyboardInterrupt):
        redo(run, "tokens")
    monkeypatch.undo()
    assert stages_with_files(run) == set(STAGES), "only files of the last stage may be missing"
    assert run.record("tokenizer").exists() and run.record("tokens").exists()
    assert redo(run, "tokens") == ["tokens", "prior", "pipeline"] and stages_with_files(run) == {"tokenizer"}


def test_redo_removes_nothing_if_a_check_fails(tiny_copy):
    run = RunFolder(tiny_copy)
    with pytest.raises(InputError, match="is not divisible by 7 processes"):
        run_chain(tiny_recipe(tiny_copy), processes=7, redo_stage="tokenizer")
    assert stages_with_files(run) == set(STAGES)
    with pytest.raises(InputError, match=r"tokenizer\.code_dim = 8, now it is 9"):  # in a stage before the one to redo
        run_chain(tiny_recipe(tiny_copy, tokenizer__code_dim=9), redo_stage="prior")
    assert stages_with_files(run) == set(STAGES)


# --- the chain ---------------------------------------------------------------------------------------------------------------


def test_rerunning_a_finished_run_does_nothing(tiny_run, capsys):
    recipe = tiny_recipe(tiny_run)
    assert {stage: check_before_start(recipe, stage) for stage in STAGES} == dict.fromkeys(STAGES, "skip")
    assert run_chain(recipe) == 0
    output = capsys.readouterr().out
    assert output.count("finished already") == 4 and "nothing to do" in output


def test_a_larger_budget_is_refused_if_it_makes_later_stages_stale(tiny_copy):
    longer = tiny_recipe(tiny_copy, tokenizer_training__max_steps=8)
    with pytest.raises(InputError, match=r"stage tokenizer has grown.*Add --redo tokens"):
        check_chain(longer, 1, None)
    check_chain(longer, 1, "tokens")
    with pytest.raises(InputError, match=r"stage prior has grown.*Add --redo pipeline"):
        check_chain(tiny_recipe(tiny_copy, prior_training__max_steps=8), 1, None)


def test_redo_with_a_larger_budget_resumes_from_the_checkpoint(tiny_copy, capsys):
    before = json.loads((tiny_copy / "summary.json").read_text())
    assert run_tiny_chain(tiny_recipe(tiny_copy, prior_training__max_steps=8), redo_stage="pipeline") == 0
    output = capsys.readouterr().out
    assert "--redo pipeline: removed pipeline" in output and "resumed at step 6" in output
    assert output.count("finished already") == 2
    after = json.loads((tiny_copy / "summary.json").read_text())
    assert before["prior"]["step"] <= 6 < after["prior"]["step"]
    assert check_before_start(tiny_recipe(tiny_copy, prior_training__max_steps=8), "pipeline") == "skip"


def test_deleted_exports_are_restored_bit_for_bit(tiny_copy, tiny_run, capsys):
    shutil.rmtree(tiny_copy / "prior")
    shutil.rmtree(tiny_copy / "tokens")
    assert run_tiny_chain(tiny_recipe(tiny_copy)) == 0
    for name in ("prior/model.safetensors", "prior/vocabulary.json", "tokens/train/manifest.json", "tokens/train/shard-000001.tar"):
        assert (tiny_copy / name).read_bytes() == (tiny_run / name).read_bytes(), name


def test_missing_inputs_of_a_stage_are_named(tmp_path):
    recipe = tiny_recipe(tmp_path)
    assert input_fingerprints(recipe, "tokenizer") == {}
    for stage, command in (("tokens", "train-tokenizer"), ("prior", "preprocess"), ("pipeline", "train-prior")):
        with pytest.raises(InputError, match=f"{re.escape(str(tmp_path))}.*vqmosaic {command}"):
            input_fingerprints(recipe, stage)


def test_a_locked_run_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("vqmosaic.runs.run_folder.LOCK_WAIT_SECONDS", 0.3)
    run = RunFolder(tmp_path)
    with run.lock(), pytest.raises(InputError, match=r"is in use by process \d+"), run.lock():
        pass
    with run.lock():
        pass
    with run.lock(), pytest.raises(InputError, match="in use"):
        delete_stages_from(tiny_recipe(tmp_path), "tokens")


def test_a_run_folder_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=r"run_dir.*file"):
            check_before_start(tiny_recipe(run_dir), "tokenizer")
        with pytest.raises(InputError, match="run_dir"), RunFolder(run_dir).lock():
            pass


def test_tokens_of_an_earlier_tokenizer_are_refused_before_anything_is_removed(tiny_copy):
    """Only the tokenizer was trained again, with a larger budget. The pipeline has the only copy of the earlier tokenizer."""
    longer = {"tokenizer_training__max_steps": 8, "prior_training__max_steps": 8}
    train(tiny_recipe(tiny_copy, **longer))
    recipe = tiny_recipe(tiny_copy, **longer)
    for redo_stage in (None, "pipeline", "prior"):
        with pytest.raises(InputError, match=r"stage tokens was started with tokenizer.*--redo tokens"):
            run_chain(recipe, redo_stage=redo_stage)
    assert (tiny_copy / "pipeline/pipeline.json").is_file() and (tiny_copy / "prior/config.json").is_file()
    with pytest.raises(InputError, match=r"tokens was made with another tokenizer than .*--redo tokens"):
        check_before_start(recipe, "prior")
    check_chain(recipe, 1, "tokens")
