"""Behaviour of both trainings: refused steps, budgets, weight averages, checkpoints, sample pictures, signals, locks and devices."""

import dataclasses
import functools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from pipelines.stages.stage_checks import check_before_start
from pipelines.stages.train_prior import COLUMNS, ROWS, make_picture_saver
from pipelines.stages.train_prior import main as train_prior_with_pictures
from stage1_tokenizer import ImageTokenizer
from stage1_tokenizer import train as train_tokenizer
from stage1_tokenizer import validation as tokenizer_validation
from stage1_tokenizer.pictures import GAP_PIXELS
from stage2_prior import train as train_prior
from stage2_prior.generation.sampling import sample_tokens
from stage2_prior.prior import TokenPrior
from tests.run_files import records
from tests.tiny import ROOT, tiny_overrides, tiny_recipe
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import sha256_of_file, write_json
from vqmosaic.runs import accelerator as devices
from vqmosaic.runs import run_folder
from vqmosaic.runs.accelerator import lock_run_folder, make_accelerator, resolve_precision, set_threads
from vqmosaic.runs.interruption import Interrupted, StopFlag
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.training import budget as budget_module
from vqmosaic.training.budget import Budget, format_duration, remaining_seconds
from vqmosaic.training.checkpoints import CheckpointFolder, checkpoint_problems, read_state
from vqmosaic.training.learning_rate import learning_rate_share
from vqmosaic.training.tracking import tracker_resume_arguments, truncate_metrics
from vqmosaic.training.training_run import TrainingRun
from vqmosaic.training.weight_averaging import make_average

STAGES = {"tokenizer": train_tokenizer, "prior": train_prior}
both_stages = pytest.mark.parametrize("stage", STAGES)


def train(stage: str, run_dir: Path, **changes) -> Path:
    """Train a stage in this process and return its checkpoint folder. `changes` without a section are fields of the stage's training."""
    section = f"{stage}_training"
    fields = {name if "__" in name else f"{section}__{name}": value for name, value in changes.items()}
    STAGES[stage].train(tiny_recipe(run_dir, **fields))
    return RunFolder(run_dir).checkpoints(stage)


def steps(checkpoints: Path) -> list[int]:
    return [read_state(path)["step"] for path in CheckpointFolder(checkpoints).all()]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def rewrite_checksums(checkpoint: Path) -> None:
    """Update the checksums of a modified checkpoint, so that it counts as complete."""
    files = [path for path in checkpoint.iterdir() if path.name != "checksums.json"]
    write_json(checkpoint / "checksums.json", {path.name: {"size": path.stat().st_size, "sha256": sha256_of_file(path)} for path in files})


def metrics(run_dir: Path, stage: str) -> list[tuple[str, int]]:
    lines = (RunFolder(run_dir).logs(stage) / "metrics.jsonl").read_text().splitlines()
    return [(record["kind"], record["step"]) for record in map(json.loads, lines)]


def at_step(number: int, action: Callable[[], None], monkeypatch) -> None:
    """Call `action` in the middle of training step `number`."""
    original = TrainingRun.optimizer_step

    def optimizer_step(self, loss, progress, *commit, **keywords):
        if self.state.step == number:
            action()
        return original(self, loss, progress, *commit, **keywords)

    monkeypatch.setattr(TrainingRun, "optimizer_step", optimizer_step)


# --- refused steps ---------------------------------------------------------------------------------------------------------------


def make_non_finite(stage: str, when: Callable[[int], bool], kind: str, monkeypatch) -> None:
    """Make the loss, or only its gradient, non-finite in steps for which `when(step)` is true."""
    module, name = STAGES[stage], {"tokenizer": "reconstruction_loss", "prior": "next_token_loss"}[stage]
    original, started_steps = getattr(module, name), []
    monkeypatch.setattr(module, "reseed_step", lambda *parts: started_steps.append(parts[2]))

    def loss(*arguments):
        result = original(*arguments)
        if started_steps and when(started_steps[-1]):
            if kind == "gradient":
                result.register_hook(lambda gradient: gradient * torch.nan)
            else:
                result = result * (torch.nan if kind == "loss" else torch.inf)
        return result

    monkeypatch.setattr(module, name, loss)


@pytest.mark.parametrize(("stage", "kind"), [("tokenizer", "loss"), ("tokenizer", "gradient"), ("prior", "loss"), ("prior", "infinity"),
                                            ("prior", "gradient")])
def test_a_non_finite_step_changes_nothing_and_is_counted(stage, kind, run_dir, monkeypatch, capsys):
    make_non_finite(stage, lambda step: step == 2, kind, monkeypatch)
    checkpoints = train(stage, run_dir, max_steps=4, checkpoint_every=1, keep_checkpoints=9)
    before, after = (checkpoints / f"step-{step:08d}" for step in (2, 3))
    for name in ("model.safetensors", "weights_ema.safetensors"):
        assert (before / name).read_bytes() == (after / name).read_bytes(), name
    moments = [torch.load(folder / "optimizer.bin", weights_only=True)["state"] for folder in (before, after)]
    for parameter, values in moments[0].items():
        for name, value in values.items():
            assert torch.equal(value, moments[1][parameter][name])
    assert [read_state(path)["refused_steps"] for path in CheckpointFolder(checkpoints).all()] == [0, 0, 1, 1]
    assert "step 2 refused" in capsys.readouterr().out
    final = weights(checkpoints / "step-00000004")
    assert all(torch.isfinite(tensor).all() for tensor in final.values() if tensor.is_floating_point())
    assert any(not torch.equal(tensor, weights(after)[name]) for name, tensor in final.items()), "the next step updates the weights"


@both_stages
def test_too_many_refused_steps_end_the_run_with_an_error(stage, run_dir, monkeypatch):
    make_non_finite(stage, lambda step: step >= 1, "loss", monkeypatch)
    with pytest.raises(InputError, match=rf"3 steps had a non-finite.*{stage}_training.max_refused_steps = 2.*learning_rate"):
        train(stage, run_dir, max_refused_steps=2)
    assert not RunFolder(run_dir).export(stage).exists()


def test_a_prior_without_any_finite_validation_is_exported_with_a_warning(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(train_prior, "validate", lambda *arguments: {"nll": math.nan, "bits_per_image": math.nan, "accuracy": 0.0})
    checkpoints = train("prior", run_dir, max_steps=2)
    assert "no validation had a finite NLL" in capsys.readouterr().out
    exported, last = (load_file(folder / "model.safetensors") for folder in (run_dir / "prior", checkpoints / "last"))
    assert all(torch.equal(exported[name], last[name]) for name in last)


# --- averages, learning rate, budget ---------------------------------------------------------------------------------------------


def test_weight_average_warms_up_its_decay_and_copies_buffers():
    model = nn.BatchNorm1d(1)  # one weight, one bias and buffers
    average = make_average(model, decay=0.6)
    expected = None
    for n, value in enumerate([5.0, 7.0, 2.0, 9.0, 4.0, 1.0, 8.0, 3.0, 6.0, 10.0, 2.0, 5.0, 5.0, 1.0]):
        with torch.no_grad():
            model.weight.fill_(value)
            model.running_mean.fill_(-value)
        average.update_parameters(model)
        decay = min(0.6, (1 + n) / (10 + n))
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert float(average.module.weight) == pytest.approx(expected, rel=1e-5)
        assert float(average.module.running_mean) == -value
    assert (1 + 13) / (10 + 13) > 0.6, "the last decay reached the limit"
    assert not average.module.training and not any(parameter.requires_grad for parameter in average.parameters())


def test_learning_rate_warmup_and_schedules():
    assert learning_rate_share(0.0, 0.1, 0.05) == pytest.approx(1e-3)
    assert learning_rate_share(0.05, 0.1, 0.05) == pytest.approx(0.5)
    assert learning_rate_share(0.1, 0.1, 0.05) == pytest.approx(1.0)
    assert learning_rate_share(0.55, 0.1, 0.05) == pytest.approx((1 + 0.05) / 2)
    assert learning_rate_share(1.0, 0.1, 0.05) == pytest.approx(0.05)
    assert learning_rate_share(0.0, 0.0, 0.0) == pytest.approx(1.0)
    for schedule, at_a_quarter in (("cosine", 0.05 + 0.95 * (1 + 0.5**0.5) / 2), ("linear", 0.05 + 0.95 * 0.75)):
        assert learning_rate_share(0.325, 0.1, 0.05, schedule) == pytest.approx(at_a_quarter)
        values = [learning_rate_share(step / 100, 0.1, 0.05, schedule) for step in range(101)]
        assert values[:11] == sorted(values[:11]) and values[10:] == sorted(values[10:], reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_learning_rate_of_each_step_is_logged(run_dir, schedule):
    train("prior", run_dir, max_steps=5, warmup_fraction=0.4, learning_rate=0.01, learning_rate_schedule=schedule, final_learning_rate=0.1)
    logged = [record["learning_rate"] for record in records(run_dir, "prior", "train")]
    assert logged == pytest.approx([0.01 * learning_rate_share(step / 5, 0.4, 0.1, schedule) for step in range(5)], rel=1e-4)


def test_progress_by_steps_and_by_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(budget_module.time, "monotonic", lambda: now[0])
    both = Budget(100, 1.0, elapsed_seconds=12.0)
    now[0] += 7  # the start-up does not count
    both.start()
    now[0] += 18
    both.start()  # a second call has no effect
    assert both.elapsed_seconds == pytest.approx(30)
    assert both.progress(10, both.elapsed_seconds) == pytest.approx(0.5)
    assert both.progress(80, both.elapsed_seconds) == pytest.approx(0.8)
    assert both.progress(10, 500) == 1.0
    assert Budget(None, 1.0).progress(10**9, 15) == pytest.approx(0.25)
    assert Budget(8, None).progress(8, 1e9) == 1.0 and Budget(8, None).progress(7, 1e9) < 1
    assert remaining_seconds(2.0, both, 90) == pytest.approx(20) and remaining_seconds(2.0, both, 10) == pytest.approx(30)
    assert [format_duration(seconds) for seconds in (42, 185, 7800)] == ["42 s", "3 min 05 s", "2 h 10 min"]


def test_a_time_budget_ends_with_validation_and_export_and_can_be_extended(run_dir, capsys):
    stage = "prior"
    checkpoints = train(stage, run_dir, max_steps="null", max_minutes=0.01, checkpoint_every=1)
    state = read_state(CheckpointFolder(checkpoints).all()[-1])
    assert state["elapsed_seconds"] >= 0.6 and state["validated_step"] == state["step"] > 0
    assert RunFolder(run_dir).export(stage).is_dir()
    train(stage, run_dir, max_steps="null", max_minutes=0.01)
    assert "finished already" in capsys.readouterr().out
    train(stage, run_dir, max_steps="null", max_minutes=0.03, checkpoint_every=1)
    later = read_state(CheckpointFolder(checkpoints).all()[-1])
    assert 1.8 <= later["elapsed_seconds"] < 1.8 + state["elapsed_seconds"] and later["step"] > state["step"]


@both_stages
def test_gradient_accumulation_equals_one_batch(stage, run_dir, tmp_path):
    """64 channels: with 32, one per group of the norms, biases before a norm have no effect, and Adam amplifies their rounding errors."""
    shutil.copytree(run_dir, tmp_path / "accumulated")
    fields = {"max_steps": 4, "validate_every": 4, "tokenizer__channels": 64, "tokenizer__dropout": 0, "prior__dropout": 0}
    full_batch = weights(train(stage, run_dir, **fields) / "step-00000004")
    accumulated = weights(train(stage, tmp_path / "accumulated", accumulation_steps=4, **fields) / "step-00000004")
    for name in full_batch:
        torch.testing.assert_close(accumulated[name], full_batch[name], rtol=1e-5, atol=1e-5, msg=name)


def test_an_indivisible_batch_size_is_refused(run_dir):
    with pytest.raises(InputError, match=r"batch_size is 12.*accumulation_steps is 8"):
        train("prior", run_dir, batch_size=12, accumulation_steps=8)


# --- checkpoints -----------------------------------------------------------------------------------------------------------------


def truncated(checkpoint: Path) -> None:
    path = checkpoint / "optimizer.bin"
    path.write_bytes(path.read_bytes()[:-100])


def changed(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def without_a_file(checkpoint: Path) -> None:
    (checkpoint / "weights_ema.safetensors").unlink()


def without_checksums(checkpoint: Path) -> None:
    (checkpoint / "checksums.json").write_text('{"model.saf')


@pytest.mark.parametrize(("stage", "damage"), [("tokenizer", truncated), ("prior", truncated), ("prior", changed), ("prior", without_a_file),
                                               ("prior", without_checksums)])
def test_auto_resume_skips_a_damaged_checkpoint(stage, damage, run_dir, capsys):
    checkpoints = train(stage, run_dir, max_steps=4)
    assert steps(checkpoints) == [2, 4]
    damage(checkpoints / "step-00000004")
    assert checkpoint_problems(checkpoints / "step-00000004")
    train(stage, run_dir, max_steps=6)
    output = capsys.readouterr().out
    assert re.search(r"warning: .*step-00000004 is not complete", output) and "resumed at step 2" in output
    assert steps(checkpoints) == [4, 6] and not checkpoint_problems(checkpoints / "step-00000004")
    for kind in ("train", "validation"):
        recorded = [step for recorded_kind, step in metrics(run_dir, stage) if recorded_kind == kind]
        assert recorded == sorted(set(recorded)), "metrics.jsonl was cut back to the checkpoint"


@pytest.mark.parametrize(("stage", "lose"), [
    ("tokenizer", shutil.rmtree), ("prior", shutil.rmtree),
    ("prior", lambda checkpoints: [shutil.rmtree(path) for path in checkpoints.glob("step-*")]),
    ("prior", lambda checkpoints: [truncated(path) for path in checkpoints.glob("step-*")])], ids=["tokenizer-all", "all", "steps", "damaged"])
def test_training_with_lost_checkpoints_does_not_replace_its_export(stage, lose, run_dir, tmp_path):
    checkpoints = train(stage, run_dir, max_steps=4)
    shutil.copytree(checkpoints, tmp_path / "safe")
    export = {path.name: path.read_bytes() for path in (run_dir / stage).iterdir()}
    record = (run_dir / f"stages/{stage}.json").read_bytes()
    lose(checkpoints)
    with pytest.raises(InputError, match=rf"stage {stage} has written .*, but (there is no checkpoint left|none of .* is complete)") as caught:
        train(stage, run_dir, max_steps=6)
    assert f"--redo {stage}" in str(caught.value)
    assert export == {path.name: path.read_bytes() for path in (run_dir / stage).iterdir()}
    assert record == (run_dir / f"stages/{stage}.json").read_bytes(), "the record keeps the old budget"
    if not list(checkpoints.glob("step-*")):
        with pytest.raises(InputError, match="has written"):  # this check does not load torch
            check_before_start(tiny_recipe(run_dir, **{f"{stage}_training__max_steps": 6}), stage, alone=False)
    shutil.rmtree(checkpoints, ignore_errors=True)
    shutil.copytree(tmp_path / "safe", checkpoints)
    train(stage, run_dir, max_steps=6)
    assert steps(checkpoints) == [4, 6]


def test_training_with_lost_export_and_checkpoints_restarts_only_with_resume_never(run_dir):
    checkpoints = train("prior", run_dir, max_steps=2)
    shutil.rmtree(checkpoints)
    shutil.rmtree(run_dir / "prior")
    with pytest.raises(InputError, match=r"an export in .*prior, which is gone, but there is no checkpoint left"):
        train("prior", run_dir, max_steps=2)
    train("prior", run_dir, max_steps=2, resume="never")
    assert (run_dir / "prior/model.safetensors").exists()


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_are_kept(keep, run_dir):
    checkpoints = train("prior", run_dir, max_steps=5, checkpoint_every=1, keep_checkpoints=keep)
    assert steps(checkpoints) == [1, 2, 3, 4, 5][-keep:]
    assert not list(checkpoints.glob(".partial-*"))


def test_resume_never_is_refused_if_a_checkpoint_exists(run_dir):
    train("prior", run_dir, max_steps=2, resume="never")
    with pytest.raises(InputError, match=r"resume is 'never', but .*step-00000002 exists"):
        train("prior", run_dir, max_steps=4, resume="never")


def test_resuming_from_an_older_checkpoint_removes_newer_ones(run_dir, capsys, monkeypatch):
    stage = "prior"
    checkpoints = train(stage, run_dir, max_steps=6, keep_checkpoints=9)
    earlier = weights(checkpoints / "step-00000006")
    older = checkpoints / "step-00000002"
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)  # after step-00000004 is written again
    with pytest.raises(Interrupted):
        train(stage, run_dir, max_steps=7, keep_checkpoints=9, resume=older)
    assert steps(checkpoints) == [2, 4, 5], "step 6 was from the earlier training"
    monkeypatch.undo()
    train(stage, run_dir, max_steps=7, keep_checkpoints=9)
    assert "resumed at step 5" in capsys.readouterr().out
    assert steps(checkpoints) == [2, 4, 5, 6, 7]
    assert not all(torch.equal(tensor, earlier[name]) for name, tensor in weights(checkpoints / "step-00000006").items()), "the learning rates differ"


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newly_written_checkpoint_is_never_removed(keep, run_dir):
    checkpoints = train("prior", run_dir, max_steps=8, keep_checkpoints=9)
    train("prior", run_dir, max_steps=9, keep_checkpoints=keep, resume=checkpoints / "step-00000002", checkpoint_every=3)
    assert steps(checkpoints) == [6, 9][-keep:]


def test_resume_refuses_missing_checkpoints_and_those_of_other_stages(run_dir):
    checkpoints = train("prior", run_dir, max_steps=2)
    with pytest.raises(InputError, match=r"not a complete checkpoint.*Complete checkpoints here.*step-00000002"):
        train("prior", run_dir, max_steps=4, resume=run_dir / "nowhere")
    with pytest.raises(InputError, match=r"does not fit this recipe.*tokenizer_training.resume"):
        train("tokenizer", run_dir, max_steps=4, resume=checkpoints / "step-00000002")


@both_stages
def test_a_checkpoint_of_another_number_of_processes_is_refused(stage, run_dir):
    checkpoint = train(stage, run_dir, max_steps=2) / "step-00000002"
    write_json(checkpoint / "trainer_state.json", read_state(checkpoint) | {"processes": 2})
    rewrite_checksums(checkpoint)
    with pytest.raises(InputError, match=r"written by 2 processes, now there is 1\. Continue with --processes 2"):
        train(stage, run_dir, max_steps=4)


def test_resumed_training_keeps_its_number_of_threads(run_dir):
    checkpoints = train("prior", run_dir, max_steps=2)
    assert read_state(checkpoints / "step-00000002")["threads"] == 1
    write_json(checkpoints / "step-00000002/trainer_state.json", read_state(checkpoints / "step-00000002") | {"threads": 2})
    rewrite_checksums(checkpoints / "step-00000002")
    try:
        train("prior", run_dir, max_steps=4)
        assert torch.get_num_threads() == 2 and read_state(checkpoints / "step-00000004")["threads"] == 2
    finally:
        torch.set_num_threads(1)


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["VQMOSAIC_TEST_TRACE"],)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl"])
@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_checkpoints_cannot_run_code(name, form, run_dir, tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    monkeypatch.setenv("VQMOSAIC_TEST_TRACE", str(marker))
    checkpoint = train("prior", run_dir, max_steps=2) / "step-00000002"
    if form == "torch":
        torch.save({"state": Malicious()}, checkpoint / name)
    else:
        (checkpoint / name).write_bytes(pickle.dumps(Malicious()))
    rewrite_checksums(checkpoint)
    if name == "optimizer.bin":
        with pytest.raises(InputError, match="more than tensors and numbers"):
            train("prior", run_dir, max_steps=4)
    else:  # random states are not loaded, because randomness depends on the step only
        train("prior", run_dir, max_steps=4)
    assert not marker.exists()


def test_best_weights_come_from_the_resumed_checkpoint(run_dir, monkeypatch):
    """A killed training may leave better weights beside the checkpoints, which a resumed training on a GPU or with a time budget may not reach."""
    checkpoints = train("prior", run_dir, max_steps=3)
    best = load_file(checkpoints / "step-00000003/best.safetensors")
    stale = {name: tensor + 1 for name, tensor in best.items()}
    (checkpoints / "best.safetensors").unlink()  # it is a hard link to the file in the checkpoint
    save_file(stale, checkpoints / "best.safetensors")
    monkeypatch.setattr(train_prior, "validate", lambda *arguments: {"nll": 99.0, "bits_per_image": 99.0, "accuracy": 0.0})
    train("prior", run_dir, max_steps=5)
    exported = load_file(run_dir / "prior/model.safetensors")
    assert exported.keys() == {name.removeprefix("model.") for name in best}
    assert all(torch.equal(tensor, exported[name.removeprefix("model.")]) for name, tensor in best.items())


def test_metrics_are_truncated_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [("train", 1), ("train", 2), ("validation", 2), ("train", 3), ("train", 4), ("validation", 4), ("train", 5)]
    path.write_text("".join(json.dumps({"step": step, "kind": kind}) + "\n" for kind, step in records) + '{"step": 6, "ki')
    truncate_metrics(path, 4, validated_step=2)
    assert [(json.loads(line)["kind"], json.loads(line)["step"]) for line in path.read_text().splitlines()] == records[:5]
    truncate_metrics(tmp_path / "none.jsonl", 4, 4)
    assert not (tmp_path / "none.jsonl").exists()


# --- sample pictures -------------------------------------------------------------------------------------------------------------


def assert_shows_images(picture: Path, size: int = 16) -> None:
    """Check that each cell of the picture contains an image with some contrast, and that not all images are equal."""
    scale, step = 64 // size, size + GAP_PIXELS
    with Image.open(picture) as image:
        canvas = np.asarray(image)[::scale, ::scale]
    assert canvas.shape == (ROWS * step + GAP_PIXELS, COLUMNS * step + GAP_PIXELS)
    images_NHW = canvas[GAP_PIXELS:, GAP_PIXELS:].reshape(ROWS, step, COLUMNS, step)[:, :size, :, :size].swapaxes(1, 2).reshape(-1, size, size)
    assert (np.ptp(images_NHW, axis=(1, 2)) > 0).all() and len(np.unique(images_NHW, axis=0)) > 1


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (10, [7])])
def test_sample_pictures_are_saved_at_validations_and_at_the_end(every, expected, tiny_run, run_dir):
    train_prior_with_pictures(["digits", *tiny_overrides(run_dir, tokens__tokenizer=tiny_run / "tokenizer", prior_training__max_steps=7,
                                                         prior_training__validate_every=every)])
    pictures = sorted((RunFolder(run_dir).logs("prior") / "samples").iterdir())
    assert [path.name for path in pictures] == [f"step-{step:08d}.png" for step in expected]
    for path in pictures:
        assert_shows_images(path)


# --- signals ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "number", "code"), [("tokenizer", signal.SIGTERM, 143), ("prior", signal.SIGTERM, 143),
                                                       ("prior", signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint_and_the_rerun_equals_an_uninterrupted_run(stage, number, code, run_dir, tmp_path, monkeypatch, capsys):
    shutil.copytree(run_dir, tmp_path / "uninterrupted")
    train(stage, tmp_path / "uninterrupted")
    handler = signal.getsignal(number)
    at_step(3, lambda: os.kill(os.getpid(), number), monkeypatch)
    with pytest.raises(Interrupted, match="saved at step 4") as caught:
        train(stage, run_dir)
    assert caught.value.exit_code == code
    assert signal.getsignal(number) is handler
    monkeypatch.undo()
    train(stage, run_dir)
    assert "resumed at step 4" in capsys.readouterr().out
    assert (run_dir / stage / "model.safetensors").read_bytes() == (tmp_path / "uninterrupted" / stage / "model.safetensors").read_bytes()
    assert metrics(run_dir, stage) == metrics(tmp_path / "uninterrupted", stage)


@both_stages
def test_a_signal_interrupts_a_validation_and_the_rerun_repeats_it(stage, run_dir, tmp_path, monkeypatch, capsys):
    shutil.copytree(run_dir, tmp_path / "uninterrupted")
    train(stage, tmp_path / "uninterrupted")
    seen = []

    def interrupt_at_the_second_batch(batches):
        for number, batch in enumerate(batches):
            seen.append(number)
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    if stage == "tokenizer":
        images, original = tokenizer_validation.ValidationImages, tokenizer_validation.ValidationImages.batches
        monkeypatch.setattr(images, "batches", lambda *arguments: interrupt_at_the_second_batch(original(*arguments)))
    else:
        original = train_prior.validation_batches
        monkeypatch.setattr(train_prior, "validation_batches", lambda *arguments: interrupt_at_the_second_batch(original(*arguments)))
    with pytest.raises(Interrupted):
        train(stage, run_dir)
    assert seen == [0, 1], "there were four batches"
    state = read_state(CheckpointFolder(RunFolder(run_dir).checkpoints(stage)).all()[-1])
    assert state | {"elapsed_seconds": 0, "validation_seconds": 0, "guard": {}} == {
        "step": 3, "elapsed_seconds": 0, "refused_steps": 0, "validated_step": 0, "validated_seconds": 0.0, "validation_seconds": 0, "validations": 0,
        "validation_images": 0, "seconds_per_validation": 0.0, "best_step": 0,
        "validated_on": "64, rule 1" if stage == "prior" else "64, rule 0", "best_validation": math.inf,
        "guard": {}, "processes": 1, "threads": 1}
    monkeypatch.undo()
    train(stage, run_dir)
    assert "resumed at step 3" in capsys.readouterr().out
    assert (run_dir / stage / "model.safetensors").read_bytes() == (tmp_path / "uninterrupted" / stage / "model.safetensors").read_bytes()
    assert metrics(run_dir, stage) == metrics(tmp_path / "uninterrupted", stage)


def test_a_signal_stops_sample_pictures(tiny_run, run_dir, tmp_path):
    """Also checks that guidance is left out if the prior has no null class."""
    recipe = tiny_recipe(run_dir, tokens__tokenizer=tiny_run / "tokenizer", sampling__guidance_scale=2.0)
    save, prior = make_picture_saver(recipe), TokenPrior.from_pretrained(tiny_run / "prior")
    with StopFlag() as stop:
        save(prior, 1, tmp_path, stop)
        for vocabulary in (dataclasses.replace(prior.vocabulary, label_drop=0.0), dataclasses.replace(prior.vocabulary, token_fingerprint="other")):
            save(SimpleNamespace(vocabulary=vocabulary, sample=functools.partial(sample_tokens, prior.model, vocabulary)), 2, tmp_path, stop)
        stop.signal = signal.SIGINT
        save(prior, 3, tmp_path, stop)
    pictures = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in pictures] == ["step-00000001.png", "step-00000002.png"]
    for path in pictures:
        assert_shows_images(path)


def test_the_first_signal_restores_the_default_handlers():
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_sigterm_exits_with_143_and_the_same_recipe_resumes(tmp_path, capsys):
    changes = {"max_steps": 20, "checkpoint_every": 50}
    command = [sys.executable, "-m", "stage1_tokenizer.train", "digits",
               *tiny_overrides(tmp_path / "run", **{f"tokenizer_training__{name}": value for name, value in changes.items()})]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "step 3:" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopped by SIGTERM; tokenizer saved at step" in err and "Traceback" not in err
    train("tokenizer", tmp_path / "run", **changes)
    output = capsys.readouterr().out
    assert "resumed at step" in output and "after 20 steps" in output


# --- one process at a time, devices ----------------------------------------------------------------------------------------------


@both_stages
def test_a_run_in_use_is_refused(stage, run_dir, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_WAIT_SECONDS", 0.3)
    with RunFolder(run_dir).lock(), pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
        train(stage, run_dir)
    assert not RunFolder(run_dir).record(stage).exists(), "nothing is written"


def test_a_restart_waits_for_the_running_process(run_dir):
    holder = subprocess.Popen([sys.executable, "-c", "import sys, time; from pathlib import Path; from vqmosaic.runs.run_folder import RunFolder\n"
                               f"with RunFolder(Path({str(run_dir)!r})).lock(): print('held', flush=True); time.sleep(1.5)"],
                              cwd=ROOT, stdout=subprocess.PIPE, text=True)
    holder.stdout.readline()
    started = time.monotonic()
    with lock_run_folder(RunFolder(run_dir)):
        assert time.monotonic() - started > 1
    holder.wait()


def test_stages_of_one_process_may_differ_in_precision_and_threads(run_dir, monkeypatch):
    """`vqmosaic run` runs all stages in one process, so the settings of one stage must not affect the next."""
    recipe = tiny_recipe(run_dir, tokenizer_training__mixed_precision="no", prior_training__mixed_precision="bf16",
                         prior_training__accumulation_steps=2)
    first, second = (recipe.tokenizer_training, "no", 1), (recipe.prior_training, "bf16", 2)
    for training, precision, accumulation_steps in (first, second, first):
        accelerator = make_accelerator(training, str(run_dir))
        assert (accelerator.mixed_precision, accelerator.gradient_accumulation_steps) == (precision, accumulation_steps)
        accelerator.end_training()
    monkeypatch.delenv("OMP_NUM_THREADS")
    try:
        assert set_threads(3) == 3 == torch.get_num_threads()  # as preprocessing does
        assert set_threads() == devices.INITIAL_THREADS
    finally:
        torch.set_num_threads(1)


def test_precision_by_device(monkeypatch):
    monkeypatch.setattr(devices, "cpu_has_bf16", lambda: True)
    assert resolve_precision("auto", torch.device("cpu")) == "bf16"
    monkeypatch.setattr(devices, "cpu_has_bf16", lambda: False)
    assert resolve_precision("auto", torch.device("cpu")) == "no"
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"
    assert resolve_precision("auto", torch.device("mps")) == "no"
    with pytest.raises(InputError, match=r"fp16.*needs a GPU"):
        resolve_precision("fp16", torch.device("cpu"))


@both_stages
def test_bf16_training_on_a_cpu_validates_in_float32(stage, run_dir, monkeypatch):
    """Without a weight average, validation uses the trained model itself, which Accelerate has wrapped with autocast."""
    if stage == "tokenizer":
        dtypes = []
        original = ImageTokenizer.latents
        monkeypatch.setattr(ImageTokenizer, "latents", lambda self, *given: dtypes.append(
            (self.training, (latents := original(self, *given)).dtype)) or latents)
    train(stage, run_dir, mixed_precision="bf16", weight_ema_decay=0, max_steps=2)
    exported = load_file(run_dir / stage / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    if stage == "tokenizer":
        assert {dtype for training, dtype in dtypes if training} == {torch.bfloat16}
        assert {dtype for training, dtype in dtypes if not training} == {torch.float32}


def test_trackers_continue_with_a_resumed_training(tmp_path):
    """TensorBoard purges repeated steps, and wandb gets the id of the existing run. A new training gets a new id."""
    first = tracker_resume_arguments(tmp_path, 0)
    resumed = tracker_resume_arguments(tmp_path, 40)
    assert first["tensorboard"] == {} and resumed["tensorboard"] == {"purge_step": 41}
    assert resumed["wandb"] == first["wandb"] == {"id": first["wandb"]["id"], "resume": "allow"}
    assert tracker_resume_arguments(tmp_path, 0)["wandb"]["id"] != first["wandb"]["id"]
