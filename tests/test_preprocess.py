"""Preprocessing images to token shards: reproducible bytes, resuming, unreadable images and several processes."""

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

from pipelines.stages import encode_images
from pipelines.stages import preprocess as module
from pipelines.stages.encode_images import decode_batches, encode_rows
from pipelines.stages.preprocess import preprocess
from pipelines.tokens.audit_command import audit_run
from stage1_tokenizer import ImageTokenizer
from stage1_tokenizer.data import digits_source
from stage1_tokenizer.data.folder_source import FolderSource
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.views import CENTER_VIEW, training_views
from tests.run_files import edit_json, token_files
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


def assert_same_files(first: Path, second: Path) -> None:
    expected, found = token_files(first), token_files(second)
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []


def training_source(photos: Path):
    return open_splits(tiny_recipe("unused", data__source="folder", data__path=photos, data__validation_fraction=0.2).data).train


def index_in(photos: Path, shard: int, place: int) -> int:
    """The source index of the n-th training image in a shard."""
    return int(sorted(permuted_sources(len(training_source(photos)), ORDER_SEED)[shard * PER_SHARD:(shard + 1) * PER_SHARD])[place])


def corrupt(photos: Path, *places: tuple[int, int]) -> list[str]:
    """Truncate training images, given by shard and place in the shard. Returns their names."""
    source = training_source(photos)
    names = [source.source_name(index_in(photos, *place)) for place in places]
    for name in names:
        path = photos / name
        path.write_bytes(path.read_bytes()[:60])
    return names


# --- stored tokens -----------------------------------------------------------------------------------------------------------------


LISTED = [{"crop_scale": 0.75, "position": "top-left"}, {"flip": True, "shift": [2, 0]}]


@pytest.mark.parametrize("views", ["none", "flip+shifts", "ten-crop", LISTED], ids=str)
def test_stored_ids_match_the_views_in_the_manifest(views, tiny_run, photos, tmp_path):
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
        assert (order != sorted(order)) == (len(manifest.shards) > 1), "permuted over shards, ascending within a shard"
        assert reader.labels_N.tolist() == [source.label(index) for index in order]
        for number, view in enumerate(expected_views[split]):
            images_BCHW = torch.stack([tokenizer.transform(source.read(index), view) for index in order])
            stored_BT = torch.from_numpy(reader.sequential(0, len(reader), number).ids_BT)
            same = stored_BT == tokenizer.encode(images_BCHW).flatten(1)
            assert same.float().mean() > 0.998, "equal except for near ties, which round differently in another batch shape"


def test_rows_are_encoded_in_batches_of_fixed_shape(tiny_run):
    tokenizer, shapes = ImageTokenizer.from_pretrained(tiny_run / "tokenizer"), []
    tokenizer.encoder.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    rows_NCHW = torch.rand(19, 1, 16, 16) * 2 - 1
    ids_NT = encode_rows(rows_NCHW, tokenizer, 8)
    assert ids_NT.shape == (19, 16) and set(shapes) == {(8, 1, 16, 16)} and len(shapes) == 3
    assert np.array_equal(ids_NT[16:], encode_rows(rows_NCHW[16:], tokenizer, 8))


@pytest.mark.parametrize(("threads", "ahead"), [(1, 2), (3, 0), (3, 2), (2, 5)])
def test_decoding_does_not_depend_on_the_number_of_threads(threads, ahead, tiny_run, photos, tmp_path):
    """The values in use depend on the number of cores."""
    corrupt(photos, (0, 2), (1, 1))
    recipe = tiny_recipe(tmp_path / "run", **fields(tiny_run, photos))
    source, views = open_splits(recipe.data).train, training_views(recipe.tokens)[:2]
    tokenizer = ImageTokenizer.from_pretrained(tiny_run / "tokenizer")
    batches = [[index_in(photos, shard, place) for place in places] for shard, places in ((0, range(4)), (1, range(4)), (2, range(1)))]

    def results(threads: int, ahead: int) -> list[tuple[list[int], list[float], list[str | None]]]:
        return [(batch, rows_NVCHW.tolist(), [reason and str(reason) for reason in reasons])
                for batch, [rows_NVCHW], reasons in decode_batches(source, batches, views, tokenizer, threads, ahead)]

    expected = results(1, 0)
    assert [batch for batch, _, _ in expected] == batches and sum(reason is not None for _, _, reasons in expected for reason in reasons) == 2
    assert results(threads, ahead) == expected


def test_rerunning_a_finished_run_does_nothing(tiny_run, photos, tmp_path, capsys):
    recipe = tiny_recipe(tmp_path / "run", **fields(tiny_run, photos))
    preprocess(recipe)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/tokens").rglob("*")}
    preprocess(recipe)
    assert "finished already" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "run/tokens").rglob("*")}


# --- shards of version 0.1.0, which did not permute ------------------------------------------------------------------------------------


def remove_recorded_source_order(run_dir: Path) -> None:
    """Remove the source order from the stage record. Version 0.1.0 did not record it."""
    path = RunFolder(run_dir).record("tokens")
    record = json.loads(path.read_text())
    del record["inputs"][module.SOURCE_ORDER]
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("lost", ["nothing", "shards", "all tokens"])
def test_shards_of_version_0_1_0_keep_their_order(lost, tiny_run, photos, tmp_path, monkeypatch, capsys):
    recipe = tiny_recipe(tmp_path / "run", **fields(tiny_run, photos))
    with monkeypatch.context() as patch:
        patch.setattr(module, "ORDER_SEED", None)
        preprocess(recipe)
    remove_recorded_source_order(tmp_path / "run")
    before = token_files(tmp_path / "run")
    assert TokenShardManifest.load(tmp_path / "run/tokens/train").order_seed is None
    train = tmp_path / "run/tokens/train"
    if lost == "shards":  # the run was killed
        edit_json(RunFolder(tmp_path / "run").record("tokens"), finished=False)
        for path in [*train.glob("manifest.json"), *train.glob("shard-00000[2-9].*"), *(tmp_path / "run/tokens/validation").iterdir()]:
            path.unlink()
    elif lost == "all tokens":
        shutil.rmtree(tmp_path / "run/tokens")
    capsys.readouterr()
    for _ in range(2):
        preprocess(recipe)
        assert token_files(tmp_path / "run") == before
    output = capsys.readouterr().out
    assert output.count("started in the order of the data set") == (lost != "nothing") and output.count("finished already") == 1 + (lost == "nothing")
    redo(RunFolder(tmp_path / "run"), "tokens")
    preprocess(recipe)
    assert TokenShardManifest.load(train).order_seed == ORDER_SEED


# --- invalid input and unreadable images ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "given", "needed"), [("image_size", 32, 16), ("channels", 3, 1)])
def test_image_settings_that_differ_from_the_tokenizer_are_rejected(field, given, needed, tiny_run, photos, tmp_path):
    with pytest.raises(InputError, match=rf"data.{field} is {given}.*trained with {needed}\. Set data.{field} to {needed}"):
        preprocess(tiny_recipe(tmp_path / "run", **fields(tiny_run, photos, **{f"data__{field}": given})))
    assert not (tmp_path / "run/tokens").exists()


def test_another_tokenizer_is_rejected_for_finished_tokens(tiny_run, photos, tmp_path):
    preprocess(tiny_recipe(tmp_path / "run", **fields(tiny_run, photos)))
    other = ImageTokenizer.from_pretrained(tiny_run / "tokenizer")
    other.quantizer.codebook[0] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"stage tokens was started with tokenizer = .*--redo tokens"):
        preprocess(tiny_recipe(tmp_path / "run", **fields(tiny_run, photos, tokens__tokenizer=tmp_path / "other")))


def test_other_images_are_rejected_for_finished_tokens(tiny_run, photos, tmp_path):
    recipe = tiny_recipe(tmp_path / "run", **fields(tiny_run, photos))
    preprocess(recipe)
    Image.new("L", (20, 20)).save(photos / "ant/new.png")
    with pytest.raises(InputError, match=r"stage tokens was started with data set = .*--redo tokens"):
        preprocess(recipe)


def test_corrupt_image_is_skipped_with_a_reason(tiny_run, photos, tmp_path, capsys):
    name, = corrupt(photos, (1, 2))
    recipe = tiny_recipe(tmp_path / "run", **fields(tiny_run, photos))
    preprocess(recipe)  # 1 of 28 exceeds data.max_unreadable = 1 %, but a single image is allowed
    manifest = TokenShardManifest.load(tmp_path / "run/tokens/train")
    assert [(entry["index"], entry["source"]) for entry in manifest.skipped] == [(index_in(photos, 1, 2), name)]
    assert "truncated" in manifest.skipped[0]["reason"] or "corrupt" in manifest.skipped[0]["reason"]
    assert manifest.num_samples == manifest.num_sources - 1
    assert f"skipped {name}" in capsys.readouterr().out
    save_recipe(recipe, RunFolder(tmp_path / "run").recipe)
    assert audit_run(tmp_path / "run/tokens") == 0


@pytest.mark.parametrize(("places", "limit", "stops"), [
    ([(0, 1), (0, 3)], 0.01, True), ([(0, 1), (3, 3)], 0.01, True), ([(0, 1), (3, 3)], 0.1, False), ([(2, 0)], 0.0, True)])
def test_too_many_unreadable_images_stop_the_run(places, limit, stops, tiny_run, photos, tmp_path):
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
    assert bool(list((tmp_path / "run/tokens").rglob("shard-*"))) == (places[0][0] > 0 or not in_one_shard), "stops as soon as the limit is exceeded"
    assert not json.loads(RunFolder(tmp_path / "run").record("tokens").read_text())["finished"]


def test_limit_includes_images_skipped_by_earlier_runs(tiny_run, photos, tmp_path, monkeypatch):
    """Each run finds one unreadable image, which is allowed. Two images exceed the limit."""
    corrupt(photos, (0, 1), (3, 3))
    recipe = tiny_recipe(tmp_path / "run", **fields(tiny_run, photos))
    at_image(2 * PER_SHARD + 3, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    with pytest.raises(Interrupted):
        preprocess(recipe)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"2 of \d+ images are unreadable"):
        preprocess(recipe)
    assert not list((tmp_path / "run/tokens").rglob("manifest.json"))


# --- audit ---------------------------------------------------------------------------------------------------------------------------


def test_audit_detects_relabelled_images(tiny_copy, monkeypatch, capsys):
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


# --- interruption --------------------------------------------------------------------------------------------------------------------


def at_image(number: int, action, monkeypatch) -> None:
    """Call `action` when this many images have been encoded."""
    original, added = module.encode_sources, []

    def encoded(*arguments):
        for result in original(*arguments):
            added.append(None)
            if len(added) == number:
                action()
            yield result

    monkeypatch.setattr(module, "encode_sources", encoded)


def preprocess_in_child(run_dir: Path, changes: dict, kill_point: tuple[str, int] | None) -> None:
    """Preprocess in a child process and kill it at `kill_point`, if given."""
    with open(os.devnull, "w") as sys.stdout:
        if kill_point:
            die_at(*kill_point)
        preprocess(tiny_recipe(run_dir, **changes))
        os._exit(0)


@pytest.fixture(scope="module")
def fork_server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stage1_tokenizer.train", "stage2_prior.train", "tests.test_resume", __name__])
    return context


FINISH = "token_shards.writer:TokenShardWriter.finish"
KILL_POINTS = [("token_shards.writer:ShardInProgress.add", PER_SHARD + 4), ("token_shards.writer:publish", 2),
               ("token_shards.sidecar:ShardSidecar.save", 1), (FINISH, 1), (FINISH, 2), ("pipelines.stages.preprocess:write_record", 2)]
"""Inside a shard, before its rename, before its sidecar, before each manifest, and before the stage record."""


def test_killed_runs_resume_and_write_the_same_bytes(tiny_run, photos, tmp_path, fork_server):
    corrupt(photos, (0, 2))
    changes = fields(tiny_run, photos)
    preprocess(tiny_recipe(tmp_path / "straight", **changes))
    killed, finished_before = tmp_path / "killed", {}
    for kill_point in [*KILL_POINTS, None]:
        process = fork_server.Process(target=preprocess_in_child, args=(killed, changes, kill_point))
        process.start()
        process.join(60)
        assert process.exitcode == (-signal.SIGKILL if kill_point else 0), kill_point
        finished = {path: path.stat().st_mtime_ns for path in (killed / "tokens").rglob("shard-*") if path.with_suffix(".json").exists()}
        assert finished_before.items() <= finished.items(), f"finished shards were rewritten after {kill_point}"
        assert not kill_point or len(finished) > len(finished_before) or len(finished) >= 10 or kill_point == KILL_POINTS[2]
        finished_before = finished
    assert_same_files(tmp_path / "straight", killed)


@pytest.mark.parametrize(("number", "code", "cores"), [(signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 64)])
def test_signal_keeps_finished_shards_for_the_next_run(number, code, cores, tiny_run, photos, tmp_path, monkeypatch, capsys):
    """With one core, decoding and encoding alternate. With many cores, images are decoded ahead. Both write the same bytes."""
    changes = fields(tiny_run, photos)
    preprocess(tiny_recipe(tmp_path / "straight", **changes))
    monkeypatch.setattr(encode_images, "available_cores", lambda: cores)
    at_image(3, lambda: os.kill(os.getpid(), number), monkeypatch)
    with pytest.raises(Interrupted, match="no shard was finished"):
        preprocess(tiny_recipe(tmp_path / "stopped", **changes))
    at_image(2 * PER_SHARD + 3, lambda: os.kill(os.getpid(), number), monkeypatch)
    with pytest.raises(Interrupted, match="2 finished shards are kept") as stopped:
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
def test_limit_applies_to_all_processes_together(tiny_run, photos, tmp_path):
    corrupt(photos, (0, 1), (1, 3))  # one for each process
    process = start(tmp_path / "run", fields(tiny_run, photos), 2)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2 and err.count("error: 2 of ") == 1 and "images are unreadable" in err and "Traceback" not in err
    assert not list((tmp_path / "run/tokens").rglob("manifest.json"))


def start_and_wait_for_shards(tiny_run: Path, tmp_path: Path) -> tuple[dict[str, object], subprocess.Popen, Path]:
    """(changes, process, train): two workers that have written some shards to `train` in tmp_path/killed. tmp_path/one has the complete tokens."""
    changes = {"tokens__tokenizer": tiny_run / "tokenizer", "tokens__images_per_shard": 50, "tokens__views": "shifts"}
    preprocess(tiny_recipe(tmp_path / "one", **changes))
    process = start(tmp_path / "killed", changes, 2)
    train = tmp_path / "killed/tokens/train"
    while len(list(train.glob("shard-*.json"))) < 4 and process.poll() is None:
        pass
    return changes, process, train


@pytest.mark.slow
def test_three_processes_complete_a_killed_run_of_two(tiny_run, tmp_path):
    """Preprocessing the digits takes long enough to kill it halfway."""
    changes, process, train = start_and_wait_for_shards(tiny_run, tmp_path)
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
def test_killed_worker_stops_the_run_and_one_process_completes_it(tiny_run, tmp_path):
    changes, process, train = start_and_wait_for_shards(tiny_run, tmp_path)
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


def test_recipe_has_all_fields_of_the_transform(tiny_run):
    """check_tokenizer_fits looks up recipe fields by the names of the transform's fields. A renamed field would no longer be compared."""
    recipe = tiny_recipe("unused")
    assert all(hasattr(recipe.data, field.name) for field in dataclasses.fields(ImageTokenizer.from_pretrained(tiny_run / "tokenizer").transform))


@pytest.mark.parametrize("cores", [1, 64])
def test_first_signal_interrupts_a_blocked_read(cores, tiny_run, photos, tmp_path, monkeypatch):
    """Simulates a network file system that does not respond, in the main thread or in the threads that decode ahead."""
    unblock, read, indices = threading.Event(), FolderSource.read, []

    def blocking_read(self, index):
        indices.append(index)
        if len(indices) == 2 * PER_SHARD + 1:
            threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
            unblock.wait()
        return read(self, index)

    monkeypatch.setattr(encode_images, "available_cores", lambda: cores)
    monkeypatch.setattr(FolderSource, "read", blocking_read)
    started = time.monotonic()
    with pytest.raises(Interrupted, match=r"finished shards? (is|are) kept|no shard was finished"):
        preprocess(tiny_recipe(tmp_path / "run", **fields(tiny_run, photos)))
    assert time.monotonic() - started < 30
    unblock.set()
