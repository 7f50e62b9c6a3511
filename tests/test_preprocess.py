"""From images to token shards: the same bytes whoever writes them and however often it is killed, and nothing left out in silence."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.stages import preprocess as module
from pipelines.stages.preprocess import preprocess
from pipelines.tokens.audit_command import audit_run
from stage1_tokenizer import ImageTokenizer
from stage1_tokenizer.data import digits_source
from stage1_tokenizer.data.folder_source import FolderSource
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.images import CENTER_VIEW, training_views
from tests.test_resume import die_at
from tests.test_two_processes import processes_with
from tests.tiny import ROOT, tiny_overrides, tiny_recipe
from token_shards import TokenShardManifest, TokenShardReader
from token_shards.manifest import ORDER_SEED
from token_shards.order import permuted_sources
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_files import save_recipe
from vqmosaic.runs.interruption import Interrupted
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.runs.stage_records import redo

COUNT, PER_SHARD = 34, 6
CLASSES = ["ant", "bee"]


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of small pictures in two classes."""
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        path = tmp_path / "photos" / CLASSES[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5), dtype=np.uint8))
        coarse.resize((24, 20), Image.Resampling.BICUBIC).save(path)
    return tmp_path / "photos"


def fields(tiny_run: Path, photos: Path, **changes) -> dict:
    return {"data__source": "folder", "data__path": photos, "data__validation_fraction": 0.2, "tokens__tokenizer": tiny_run / "tokenizer",
            "tokens__images_per_shard": PER_SHARD, "tokens__batch_size": 8, "tokens__views": "shifts", **changes}


def files(run_dir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in sorted((run_dir / "tokens").rglob("*")) if path.is_file()}


def assert_same_files(first: Path, second: Path) -> None:
    expected, found = files(first), files(second)
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []


def training_source(photos: Path):
    return open_splits(tiny_recipe("unused", data__source="folder", data__path=photos, data__validation_fraction=0.2).data).train


def index_in(photos: Path, shard: int, place: int) -> int:
    """The source index of the n-th training image of a shard."""
    return int(sorted(permuted_sources(len(training_source(photos)), ORDER_SEED)[shard * PER_SHARD:(shard + 1) * PER_SHARD])[place])


def corrupt(photos: Path, *places: tuple[int, int]) -> list[str]:
    """Cut the n-th training image of these shards short; returns their names."""
    source = training_source(photos)
    names = [source.source_name(index_in(photos, *place)) for place in places]
    for name in names:
        path = photos / name
        path.write_bytes(path.read_bytes()[:60])
    return names


# --- what is stored ----------------------------------------------------------------------------------------------------------------


LISTED = [{"crop_scale": 0.75, "position": "top-left"}, {"flip": True, "shift": [2, 0]}]


@pytest.mark.parametrize("views", ["none", "flip+shifts", "ten-crop", LISTED], ids=str)
def test_stored_ids_are_those_of_the_views_that_the_manifest_names(views, tiny_run, photos, tmp_path):
    recipe = tiny_recipe(tmp_path / "run", **fields(tiny_run, photos, tokens__views=views))
    preprocess(recipe)
    tokenizer, splits = ImageTokenizer.from_pretrained(tiny_run / "tokenizer"), open_splits(recipe.data)
    expected_views = {"train": training_views(recipe.tokens), "validation": [CENTER_VIEW]}
    for split, source in (("train", splits.train), ("validation", splits.validation)):
        reader = TokenShardReader(tmp_path / "run/tokens" / split)
        manifest = reader.manifest
        assert manifest.views == [view.to_dict() for view in expected_views[split]]
        assert manifest.token_fingerprint == tokenizer.token_fingerprint and manifest.class_names == CLASSES
        assert manifest.num_samples == len(source) and manifest.dataset == source.identity and not manifest.skipped
        assert [(grid.codebook_size, grid.height, grid.width, grid.depth) for grid in manifest.grids] == [(32, 4, 4, 1)]
        assert len(manifest.shards) == -(-len(source) // PER_SHARD)
        order = reader.indices_N.tolist()
        assert sorted(order) == list(range(len(source)))
        assert (order != sorted(order)) == (len(manifest.shards) > 1), "permuted over the shards, and ascending inside each shard"
        assert reader.labels_N.tolist() == [source.label(index) for index in order]
        for number, view in enumerate(expected_views[split]):
            images_BCHW = torch.stack([tokenizer.transform(source.read(index), view) for index in order])
            stored_BT = torch.from_numpy(reader.sequential(0, len(reader), number).ids_BT)
            same = stored_BT == tokenizer.encode(images_BCHW).flatten(1)
            assert same.float().mean() > 0.998, "beyond rounding at a near tie, in a batch of another shape"


def test_rows_are_encoded_at_one_shape_whatever_their_number(tiny_run):
    tokenizer, shapes = ImageTokenizer.from_pretrained(tiny_run / "tokenizer"), []
    tokenizer.encoder.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    rows_NCHW = torch.rand(19, 1, 16, 16) * 2 - 1
    ids_NT = module.encode_rows(rows_NCHW, tokenizer, 8)
    assert ids_NT.shape == (19, 16) and set(shapes) == {(8, 1, 16, 16)} and len(shapes) == 3
    assert np.array_equal(ids_NT[16:], module.encode_rows(rows_NCHW[16:], tokenizer, 8))


@pytest.mark.parametrize(("threads", "ahead"), [(1, 2), (3, 0), (3, 2), (2, 5)])
def test_any_number_of_threads_decodes_the_same_rows_in_the_same_order(threads, ahead, tiny_run, photos, tmp_path):
    """Which of these a machine takes depends on its cores."""
    corrupt(photos, (0, 2), (1, 1))
    recipe = tiny_recipe(tmp_path / "run", **fields(tiny_run, photos))
    source, views = open_splits(recipe.data).train, training_views(recipe.tokens)[:2]
    tokenizer = ImageTokenizer.from_pretrained(tiny_run / "tokenizer")
    batches = [[index_in(photos, shard, place) for place in places] for shard, places in ((0, range(4)), (1, range(4)), (2, range(1)))]

    def results(threads: int, ahead: int) -> list[tuple[list[int], list[float], list[str | None]]]:
        return [(batch, rows_NVCHW.tolist(), [reason and str(reason) for reason in reasons])
                for batch, rows_NVCHW, reasons in module.decode_batches(source, batches, views, tokenizer, threads, ahead)]

    expected = results(1, 0)
    assert [batch for batch, _, _ in expected] == batches and sum(reason is not None for _, _, reasons in expected for reason in reasons) == 2
    assert results(threads, ahead) == expected


def test_a_second_call_does_nothing_but_say_so(tiny_run, photos, tmp_path, capsys):
    recipe = tiny_recipe(tmp_path / "run", **fields(tiny_run, photos))
    preprocess(recipe)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/tokens").rglob("*")}
    preprocess(recipe)
    assert "finished already" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "run/tokens").rglob("*")}


# --- shards of version 0.1.0, which did not permute ------------------------------------------------------------------------------------


def as_version_0_1_0_left_it(run_dir: Path) -> None:
    """Its stage record does not mention an order."""
    path = RunFolder(run_dir).record("tokens")
    record = json.loads(path.read_text())
    del record["inputs"][module.SOURCE_ORDER]
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("lost", ["nothing", "shards", "all tokens"])
def test_shards_that_version_0_1_0_wrote_or_began_keep_their_order(lost, tiny_run, photos, tmp_path, monkeypatch, capsys):
    recipe = tiny_recipe(tmp_path / "run", **fields(tiny_run, photos))
    with monkeypatch.context() as patch:
        patch.setattr(module, "ORDER_SEED", None)
        preprocess(recipe)
    as_version_0_1_0_left_it(tmp_path / "run")
    before = files(tmp_path / "run")
    assert TokenShardManifest.load(tmp_path / "run/tokens/train").order_seed is None
    train = tmp_path / "run/tokens/train"
    if lost == "shards":  # killed in the middle
        path = RunFolder(tmp_path / "run").record("tokens")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": False}))
        for path in [*train.glob("manifest.json"), *train.glob("shard-00000[2-9].*"), *(tmp_path / "run/tokens/validation").iterdir()]:
            path.unlink()
    elif lost == "all tokens":
        shutil.rmtree(tmp_path / "run/tokens")
    capsys.readouterr()
    for _ in range(2):
        preprocess(recipe)
        assert files(tmp_path / "run") == before
    words = capsys.readouterr().out
    assert words.count("started in the order of the data set") == (lost != "nothing") and words.count("finished already") == 1 + (lost == "nothing")
    redo(RunFolder(tmp_path / "run"), "tokens")
    preprocess(recipe)
    assert TokenShardManifest.load(train).order_seed == ORDER_SEED


# --- what is refused -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "given", "needed"), [("image_size", 32, 16), ("channels", 3, 1)])
def test_images_that_the_tokenizer_was_not_made_for_are_refused(field, given, needed, tiny_run, photos, tmp_path):
    with pytest.raises(InputError, match=rf"data.{field} is {given}.*trained with {needed}\. Set data.{field} to {needed}"):
        preprocess(tiny_recipe(tmp_path / "run", **fields(tiny_run, photos, **{f"data__{field}": given})))
    assert not (tmp_path / "run/tokens").exists()


def test_another_tokenizer_under_finished_tokens_is_refused(tiny_run, photos, tmp_path):
    preprocess(tiny_recipe(tmp_path / "run", **fields(tiny_run, photos)))
    other = ImageTokenizer.from_pretrained(tiny_run / "tokenizer")
    other.quantizer.codebook[0] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"stage tokens was run with tokenizer = .*--redo tokens"):
        preprocess(tiny_recipe(tmp_path / "run", **fields(tiny_run, photos, tokens__tokenizer=tmp_path / "other")))


def test_other_images_under_finished_tokens_are_refused(tiny_run, photos, tmp_path):
    recipe = tiny_recipe(tmp_path / "run", **fields(tiny_run, photos))
    preprocess(recipe)
    Image.new("L", (20, 20)).save(photos / "ant/new.png")
    with pytest.raises(InputError, match=r"stage tokens was run with data set = .*--redo tokens"):
        preprocess(recipe)


def test_a_corrupt_image_is_listed_as_skipped_with_the_reason(tiny_run, photos, tmp_path, capsys):
    name, = corrupt(photos, (1, 2))
    recipe = tiny_recipe(tmp_path / "run", **fields(tiny_run, photos))
    preprocess(recipe)  # one of 28, more than data.max_unreadable = 1 %: but a single one stops nothing
    manifest = TokenShardManifest.load(tmp_path / "run/tokens/train")
    assert [(entry["index"], entry["source"]) for entry in manifest.skipped] == [(index_in(photos, 1, 2), name)]
    assert "truncated" in manifest.skipped[0]["reason"] or "corrupt" in manifest.skipped[0]["reason"]
    assert manifest.num_samples == manifest.num_sources - 1
    assert f"skipped {name}" in capsys.readouterr().out
    save_recipe(recipe, RunFolder(tmp_path / "run").recipe)
    assert audit_run(tmp_path / "run/tokens") == 0


@pytest.mark.parametrize(("places", "limit", "stops"), [
    ([(0, 1), (0, 3)], 0.01, True), ([(0, 1), (3, 3)], 0.01, True), ([(0, 1), (3, 3)], 0.1, False), ([(2, 0)], 0.0, True)])
def test_past_the_limit_the_run_stops_in_words_and_is_not_complete(places, limit, stops, tiny_run, photos, tmp_path):
    names = corrupt(photos, *places)
    recipe = tiny_recipe(tmp_path / "run", **fields(tiny_run, photos, data__max_unreadable=limit))
    if not stops:
        preprocess(recipe)
        assert len(TokenShardManifest.load(tmp_path / "run/tokens/train").skipped) == 2
        return
    with pytest.raises(InputError, match=rf"{len(names)} of \d+ images are unreadable, more than data.max_unreadable") as error:
        preprocess(recipe)
    assert all(name in str(error.value) for name in names)
    assert not list((tmp_path / "run/tokens").rglob("manifest.json"))
    in_one_shard = len({shard for shard, _ in places}) == 1
    assert bool(list((tmp_path / "run/tokens").rglob("shard-*"))) == (places[0][0] > 0 or not in_one_shard), "it stops where it is known"
    assert not json.loads(RunFolder(tmp_path / "run").record("tokens").read_text())["finished"]


def test_the_limit_counts_what_earlier_calls_and_other_processes_skipped(tiny_run, photos, tmp_path, monkeypatch):
    """Each call meets one unreadable image, which it may; together there are two, which is too many."""
    corrupt(photos, (0, 1), (3, 3))
    recipe = tiny_recipe(tmp_path / "run", **fields(tiny_run, photos))
    at_image(2 * PER_SHARD, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    with pytest.raises(Interrupted):
        preprocess(recipe)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"2 of \d+ images are unreadable"):
        preprocess(recipe)
    assert not list((tmp_path / "run/tokens").rglob("manifest.json"))


# --- audit ---------------------------------------------------------------------------------------------------------------------------


def test_audit_passes_and_fails_after_the_data_set_was_relabelled(tiny_copy, monkeypatch, capsys):
    assert audit_run(tiny_copy / "tokens") == 0
    assert "train: 1,418 samples in 4 shards, 0 skipped: no problems" in capsys.readouterr().out
    load_scans = digits_source.load_scans

    def relabelled():
        pixels_NHW, labels_N = load_scans()
        labels_N = labels_N.copy()
        labels_N[17] = (labels_N[17] + 1) % 10
        return pixels_NHW, labels_N

    monkeypatch.setattr(digits_source, "load_scans", relabelled)
    assert audit_run(tiny_copy / "tokens") == 1
    assert "label" in capsys.readouterr().out


# --- stopped and killed --------------------------------------------------------------------------------------------------------------


def at_image(number: int, action, monkeypatch) -> None:
    """Do something when this many images have been added to shards."""
    original, added = module.encode_sources, []

    def encoded(*arguments):
        for result in original(*arguments):
            added.append(None)
            if len(added) == number:
                action()
            yield result

    monkeypatch.setattr(module, "encode_sources", encoded)


def run_and_die(run_dir: Path, changes: dict, death: tuple[str, int] | None) -> None:
    """One preprocessing in this process, which is not the tests' own."""
    with open(os.devnull, "w") as sys.stdout:
        if death:
            die_at(*death)
        preprocess(tiny_recipe(run_dir, **changes))
        os._exit(0)


@pytest.fixture(scope="module")
def fork_server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stage1_tokenizer.train", "stage2_prior.train", "tests.test_resume", __name__])
    return context


FINISH = "token_shards.writer:TokenShardWriter.finish"
DEATHS = [("token_shards.writer:ShardInProgress.add", PER_SHARD + 4), ("token_shards.writer:publish", 2),
          ("token_shards.sidecar:ShardSidecar.save", 1), (FINISH, 1), (FINISH, 2), ("pipelines.stages.preprocess:write_record", 2)]
"""Inside a shard, between its last byte and its rename, between rename and sidecar, before each manifest, before the record."""


def test_killed_at_any_moment_it_goes_on_and_writes_the_same_bytes(tiny_run, photos, tmp_path, fork_server):
    corrupt(photos, (0, 2))
    changes = fields(tiny_run, photos)
    preprocess(tiny_recipe(tmp_path / "straight", **changes))
    killed, finished_before = tmp_path / "killed", {}
    for death in [*DEATHS, None]:
        process = fork_server.Process(target=run_and_die, args=(killed, changes, death))
        process.start()
        process.join(60)
        assert process.exitcode == (-signal.SIGKILL if death else 0), death
        finished = {path: path.stat().st_mtime_ns for path in (killed / "tokens").rglob("shard-*") if path.with_suffix(".json").exists()}
        assert finished_before.items() <= finished.items(), f"finished shards were written again after {death}"
        assert not death or len(finished) > len(finished_before) or len(finished) >= 10 or death == DEATHS[2]
        finished_before = finished
    assert_same_files(tmp_path / "straight", killed)


@pytest.mark.parametrize(("number", "code", "cores"), [(signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 64)])
def test_a_signal_keeps_finished_shards_and_the_rerun_completes_them(number, code, cores, tiny_run, photos, tmp_path, monkeypatch, capsys):
    """On a processor with one core and with many, by turns and decoding ahead, which write the same bytes."""
    changes = fields(tiny_run, photos)
    preprocess(tiny_recipe(tmp_path / "straight", **changes))
    monkeypatch.setattr(module, "available_cores", lambda: cores)
    at_image(2 * PER_SHARD + 3, lambda: os.kill(os.getpid(), number), monkeypatch)
    with pytest.raises(Interrupted, match="finished shards are kept") as stopped:
        preprocess(tiny_recipe(tmp_path / "stopped", **changes))
    assert stopped.value.exit_code == code
    assert not list((tmp_path / "stopped/tokens").rglob(".partial-*"))
    monkeypatch.undo()
    preprocess(tiny_recipe(tmp_path / "stopped", **changes))
    assert "2 of 5 shards are already complete" in capsys.readouterr().out
    assert_same_files(tmp_path / "straight", tmp_path / "stopped")


# --- several processes -----------------------------------------------------------------------------------------------------------------


def start(run_dir: Path, changes: dict, processes: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "pipelines.command_line", "preprocess", "digits", *tiny_overrides(run_dir, **changes),
               "--processes", str(processes)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_any_number_of_processes_writes_the_same_bytes(tiny_run, photos, tmp_path):
    corrupt(photos, (1, 2))
    changes = fields(tiny_run, photos)
    preprocess(tiny_recipe(tmp_path / "one", **changes))
    for processes in (2, 3):
        process = start(tmp_path / str(processes), changes, processes)
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0 and not err, err
        assert f"x {processes}" in out
        assert_same_files(tmp_path / "one", tmp_path / str(processes))


@pytest.mark.slow
def test_two_processes_together_may_not_skip_too_many(tiny_run, photos, tmp_path):
    corrupt(photos, (0, 1), (1, 3))  # one for each of them
    process = start(tmp_path / "run", fields(tiny_run, photos), 2)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2 and err.count("error: 2 of ") == 1 and "images are unreadable" in err and "Traceback" not in err
    assert not list((tmp_path / "run/tokens").rglob("manifest.json"))


def caught_in_the_middle(tiny_run: Path, tmp_path: Path) -> tuple[dict[str, object], subprocess.Popen, Path]:
    """What the recipe changes, two processes at work in tmp_path/killed, and where some shards of theirs lie; the whole is in tmp_path/one."""
    changes = {"tokens__tokenizer": tiny_run / "tokenizer", "tokens__images_per_shard": 50, "tokens__views": "shifts"}
    preprocess(tiny_recipe(tmp_path / "one", **changes))
    process = start(tmp_path / "killed", changes, 2)
    train = tmp_path / "killed/tokens/train"
    while len(list(train.glob("shard-*.json"))) < 4 and process.poll() is None:
        pass
    return changes, process, train


@pytest.mark.slow
def test_two_killed_processes_are_taken_over_by_three_and_leave_what_one_writes(tiny_run, tmp_path):
    """The digits, whose shards take long enough to be caught in the middle."""
    changes, process, train = caught_in_the_middle(tiny_run, tmp_path)
    process.kill()
    process.communicate()
    finished = {path: path.stat().st_mtime_ns for path in train.glob("shard-*.json")}
    assert 4 <= len(finished) < 29
    process = start(tmp_path / "killed", changes, 3)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())
    assert_same_files(tmp_path / "one", tmp_path / "killed")


@pytest.mark.slow
def test_a_single_process_that_dies_ends_the_others_and_the_rest_is_done_by_one(tiny_run, tmp_path):
    changes, process, train = caught_in_the_middle(tiny_run, tmp_path)
    command_lines = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in processes_with(str(tmp_path / "killed"))}
    workers = [pid for pid, line in command_lines.items() if "pipelines.stages.preprocess" in line and "launch_quietly" not in line]
    os.kill(max(workers), signal.SIGKILL)
    _, err = process.communicate(timeout=200)
    assert len(workers) == 2 and process.returncode == 1 and "a worker process was killed (often: out of memory)" in err and "Traceback" not in err
    finished = {path: path.stat().st_mtime_ns for path in train.glob("shard-*.json")}
    assert 4 <= len(finished) < 29 and not (train / "manifest.json").exists()
    preprocess(tiny_recipe(tmp_path / "killed", **changes))
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())
    assert_same_files(tmp_path / "one", tmp_path / "killed")


def test_dataclass_fields_of_the_transform_are_all_compared(tiny_run):
    """check_tokenizer_fits reads the recipe's fields by the transform's names; a renamed one would be compared no more."""
    recipe = tiny_recipe("unused")
    assert all(hasattr(recipe.data, field.name) for field in dataclasses.fields(ImageTokenizer.from_pretrained(tiny_run / "tokenizer").transform))


@pytest.mark.parametrize("cores", [1, 64])
def test_the_first_signal_ends_the_wait_for_an_image(cores, tiny_run, photos, tmp_path, monkeypatch):
    """As if a network file system did not answer, in the main thread or in the threads that decode ahead of the encoder."""
    file_system_is_back, read, seen = threading.Event(), FolderSource.read, []

    def stuck(self, index):
        seen.append(index)
        if len(seen) == 2 * PER_SHARD + 1:
            threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
            file_system_is_back.wait()
        return read(self, index)

    monkeypatch.setattr(module, "available_cores", lambda: cores)
    monkeypatch.setattr(FolderSource, "read", stuck)
    started = time.monotonic()
    with pytest.raises(Interrupted, match="finished shards are kept"):
        preprocess(tiny_recipe(tmp_path / "run", **fields(tiny_run, photos)))
    assert time.monotonic() - started < 30
    file_system_is_back.set()
