"""Full disks: errors name the folder and the needed bytes, no partial files remain, and the same command continues once there is space."""

import errno
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import make_bundle
from pipelines.tokens.export_tokens import export_tokens
from stage1_tokenizer import ImageTokenizer
from stage1_tokenizer.pictures import save_picture
from stage1_tokenizer.train import train
from stage2_prior.prior import TokenPrior
from tests.tiny import command, tiny_overrides, tiny_recipe
from token_shards import TokenShardManifest
from token_shards.writer import TokenShardWriter
from vqmosaic.files.durable_files import TEMPORARY_PREFIX, copy_folder, write_json
from vqmosaic.files.full_disks import DiskFull, explain_full_disk, size_text
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.runs.launch import exit_code_of, write_note
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.training.best_weights import save_weights
from vqmosaic.training.tracking import MetricsLog
from vqmosaic.training.training_run import TrainingRun


def write_to_full_device() -> None:
    with open("/dev/full", "wb") as file:
        file.write(b"x")


def save_to_full_device() -> None:
    with open("/dev/full", "wb") as file:
        torch.save({"weight": torch.zeros(100_000)}, file)


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("write", [
    write_to_full_device, save_to_full_device,
    lambda: fail(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")),  # safetensors
    lambda: fail(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")),  # torch, if it opens the file itself
    lambda: fail(OSError(errno.EDQUOT, "Disk quota exceeded")),
])
def test_all_errors_for_full_disks_are_recognized(write, tmp_path):
    with pytest.raises(DiskFull) as caught, explain_full_disk(tmp_path, 3 * 2**20):
        write()
    assert f"no space left in {tmp_path}" in str(caught.value) and "3.0 MiB needed" in str(caught.value)
    assert "quota" in str(caught.value) or " free, about" in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), OSError(errno.EIO, "Input/output error"), ValueError("28")])
def test_other_errors_are_not_changed(error, tmp_path):
    with pytest.raises(type(error)) as caught, explain_full_disk(tmp_path, 1):
        fail(error)
    assert caught.value is error


def test_the_outermost_known_size_is_reported(tmp_path):
    with pytest.raises(DiskFull, match=rf"in {tmp_path}: .* 5\.0 GiB needed"), explain_full_disk(tmp_path, 5 * 2**30), \
            explain_full_disk(tmp_path / "inner", 10):
        write_to_full_device()
    with pytest.raises(DiskFull, match=rf"in {tmp_path}/inner: .* 10 bytes needed"), explain_full_disk(tmp_path), \
            explain_full_disk(tmp_path / "inner", 10):
        write_to_full_device()


def test_the_command_reports_a_full_disk_without_traceback(tmp_path, capsys):
    assert exit_code_of(write_to_full_device) == 2
    assert exit_code_of(lambda: fail(OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "file")))) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and "Free space: " in err and f"error: no space left in {tmp_path}: " in err


def test_sizes_have_units():
    assert [size_text(count) for count in (0, 1023, 1024, 1_500_000, 3 * 2**40)] == ["0 bytes", "1023 bytes", "1.0 KiB", "1.4 MiB", "3072.0 GiB"]


def write_shard(folder: Path, run: Path) -> None:
    header = TokenShardManifest.load(run / "tokens/validation").header
    with TokenShardWriter(folder, header).shard(0) as shard:
        for index in header.source_indices(0):
            shard.skip(index=index, source=str(index), reason="none")


WRITERS = {
    "record": lambda folder, run: write_json(folder / "file.json", {}),
    "picture": lambda folder, run: save_picture(Image.new("L", (8, 8)), folder / "picture.png"),
    "tokenizer": lambda folder, run: ImageTokenizer.from_pretrained(run / "tokenizer").save_pretrained(folder / "tokenizer"),
    "prior": lambda folder, run: TokenPrior.from_pretrained(run / "prior").save_pretrained(folder / "prior"),
    "pipeline": lambda folder, run: make_bundle(run / "tokenizer", run / "prior", folder / "pipeline", SamplingConfig()),
    "shard": write_shard,
    "lines": lambda folder, run: export_tokens(run / "tokens/validation", folder / "lines.jsonl"),
    "weights": lambda folder, run: save_weights(torch.nn.Linear(2, 2), folder / "best.safetensors"),
    "checkpoint": lambda folder, run: train(tiny_recipe(folder / "run", tokenizer_training__max_steps=2)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_writers_report_a_full_disk_and_leave_no_partial_files(writer, tmp_path, tiny_run, monkeypatch):
    def fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if writer != "checkpoint" or path.name == f"{TEMPORARY_PREFIX}step-00000002":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DiskFull, match=f"no space left in {tmp_path}.* free.*the same command again"):
        WRITERS[writer](tmp_path, tiny_run)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TEMPORARY_PREFIX in str(path)]


def test_copying_reports_the_size_of_the_whole_folder(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    for name in "ab":
        (tmp_path / "source" / name).write_bytes(bytes(2048))
    monkeypatch.setattr(shutil, "copyfile", lambda *_: write_to_full_device())
    with pytest.raises(DiskFull, match=rf"no space left in {tmp_path}: .* about 4\.0 KiB needed"):
        copy_folder(tmp_path / "source", tmp_path / "copy")


def test_metrics_and_locks_report_their_folder(tmp_path, monkeypatch):
    from vqmosaic.training.tracking import MetricsLog

    class Accelerator:
        is_main_process, log_with = True, []

    log = MetricsLog(Accelerator(), tmp_path, 0, 0, {})
    log.path = Path("/dev/full")
    with pytest.raises(DiskFull, match=r"no space left in /dev: .* needed"):
        log.write(1, "train", loss=1.0)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: fail(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(DiskFull, match=f"no space left in {tmp_path}/run"), RunFolder(tmp_path / "run").lock():
        pass


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 KB. Skips the test if this user cannot mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() or not shutil.which("mount") or \
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root may make a small file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_training_stops_on_a_full_disk_and_continues_later(small_disk):
    arguments = ("train-tokenizer", "digits", *tiny_overrides(small_disk / "run", tokenizer_training__keep_checkpoints=8))
    stopped = command(*arguments)
    assert stopped.returncode == 2 and "Traceback" not in stopped.stderr
    assert f"error: no space left in {small_disk}/run" in stopped.stderr and "needed" in stopped.stderr
    subprocess.run(["mount", "-o", "remount,size=60m", small_disk], check=True)
    continued = command(*arguments)
    assert continued.returncode == 0, continued.stderr
    assert (small_disk / "run/tokenizer/model.safetensors").exists()


@pytest.mark.slow
def test_generation_stops_on_a_full_disk_and_works_later(small_disk, tiny_run):
    filler = small_disk / "filler"
    with suppress(OSError), open(filler, "wb") as file:
        for _ in range(200):
            file.write(np.random.default_rng(0).bytes(4096))
            file.flush()
    with open(filler, "r+b") as file:
        file.truncate(filler.stat().st_size - 16384)
    arguments = ("generate", tiny_run, "--num", "4", "--out", small_disk / "samples")
    stopped = command(*arguments)
    assert stopped.returncode == 2 and f"error: no space left in {small_disk}/samples" in stopped.stderr and "Traceback" not in stopped.stderr
    filler.unlink()
    assert command(*arguments).returncode == 0


class TrackersWithFullDisk:
    """The part of an Accelerator that MetricsLog and TrainingRun.end use. Its methods raise an error for a full disk without a file name."""

    log_with, is_main_process = ["tensorboard"], True

    def init_trackers(self, *_, **__) -> None:
        pass

    def log(self, *_, **__) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    end_training = log


def test_full_disks_in_trackers_are_reported(tmp_path):
    metrics = MetricsLog(TrackersWithFullDisk(), tmp_path / "logs", 0, 0, {})
    with pytest.raises(DiskFull, match=rf"no space left in {tmp_path}/logs: "):
        metrics.write(1, "train", loss=1.0)
    run = SimpleNamespace(accelerator=TrackersWithFullDisk(), folder=RunFolder(tmp_path), stage="prior")
    with pytest.raises(DiskFull, match=rf"no space left in {tmp_path}/logs/prior: "):
        TrainingRun.end(run)


def test_full_disks_in_notes_of_workers_are_reported(tmp_path, capsys):
    (tmp_path / "0.pid").symlink_to("/dev/full")
    (tmp_path / "0.words").symlink_to("/dev/full")
    assert exit_code_of(lambda: write_note(tmp_path / "0.pid", "1"), tmp_path / "0.words") == 2
    assert f"error: no space left in {tmp_path}: " in capsys.readouterr().err, "the message is printed if it cannot be written to the file"
