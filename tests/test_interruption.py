"""Signals in blocked libraries, under nohup and during waits; training in a thread, with foreign environment variables, without output."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from pipelines.image_folders import write_images
from stage1_tokenizer import train as train_tokenizer
from stage1_tokenizer.data.folder_source import FolderSource
from stage1_tokenizer.data.image_batches import MAX_CLOSE_SECONDS, TrainingImages, ValidationImages
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage1_tokenizer.validation import validate
from tests.image_folders import write_classes, write_image
from tests.test_two_processes import run_own_stage
from tests.tiny import ROOT, command, tiny_overrides, tiny_recipe
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import DataConfig
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig
from vqmosaic.runs import launch
from vqmosaic.runs.accelerator import set_threads
from vqmosaic.runs.interruption import EXIT_CODES, GRACE_SECONDS, Interrupted, StopFlag
from vqmosaic.runs.launch import KILL_SECONDS, RANK_VARIABLES, exit_code_of

BLOCKED_PROCESS = """
import ctypes, sys
from vqmosaic.runs.interruption import StopFlag
libc, lock = ctypes.CDLL(None), (ctypes.c_char * 64)()
libc.pthread_mutex_init(lock, None)
libc.pthread_mutex_lock(lock)
with StopFlag():
    print("stuck", flush=True)
    libc.pthread_mutex_lock(lock)  # blocks forever, like a collective that another process never joins; Python's handlers do not run
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_ends_a_process_that_is_blocked_in_a_library(number):
    process = subprocess.Popen([sys.executable, "-c", BLOCKED_PROCESS], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "stuck\n"
    time.sleep(0.5)  # until it waits for the lock
    process.send_signal(number)
    time.sleep(0.3)
    assert process.poll() is None, "the first signal does not end the process"
    process.send_signal(number)
    started = time.monotonic()
    assert process.wait(timeout=20) == EXIT_CODES[number]
    assert time.monotonic() - started < GRACE_SECONDS + 2


@pytest.mark.slow
def test_blocked_workers_are_killed_after_a_second_signal(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    sent_at = []

    def send() -> None:
        while len(list(tmp_path.glob("*.ready"))) < 2:
            time.sleep(0.05)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        sent_at.append(time.monotonic())

    threading.Thread(target=send, daemon=True).start()
    assert run_own_stage("stuck", tmp_path) == 143
    assert time.monotonic() - sent_at[0] < KILL_SECONDS + 3
    pids = [int(path.read_text()) for path in tmp_path.glob("*.ready")]
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_sighup_stops_training_except_under_nohup():
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal == signal.SIGHUP
    assert Interrupted(signal.SIGHUP, "x").exit_code == 129
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    try:
        with StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.signal
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_stop_flag_leaves_no_threads_files_or_handlers():
    def threads_and_files() -> tuple[int, int]:
        return sum(thread.name == "signals" for thread in threading.enumerate()), len(os.listdir("/proc/self/fd"))

    handlers, files = {number: signal.getsignal(number) for number in EXIT_CODES}, threads_and_files()[1]
    for _ in range(20):
        with StopFlag():
            pass
    deadline = time.monotonic() + 5
    while (threads_and_files()[0] or threads_and_files()[1] > files) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads_and_files()[0] == 0 and threads_and_files()[1] <= files and {number: signal.getsignal(number) for number in EXIT_CODES} == handlers


def test_training_works_in_a_thread(tmp_path):
    errors = []

    def train() -> None:
        try:
            train_tokenizer.train(tiny_recipe(tmp_path, tokenizer_training__max_steps=1))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert not errors and (tmp_path / "tokenizer/config.json").is_file()


@pytest.mark.slow
def test_rank_variables_of_another_launcher_are_ignored_with_a_note(tmp_path):
    variables = dict.fromkeys(RANK_VARIABLES, "4") | {"MASTER_ADDR": "192.0.2.1"}
    result = command("train-tokenizer", "digits", *tiny_overrides(tmp_path, tokenizer_training__max_steps=1), **variables)
    assert result.returncode == 0, result.stderr
    assert "note: ignoring RANK=4, WORLD_SIZE=4" in result.stderr


@pytest.mark.slow
def test_workers_do_not_import_modules_from_the_working_directory(tmp_path, monkeypatch, capfd):
    """As in an installation: vqmosaic is on the Python path and runs in a folder of the user."""
    for name in ("accelerate.py", "pipelines.py", "yaml.py", "stage1_tokenizer.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong module')")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    assert run_own_stage("all is well", tmp_path / "out") == 0
    assert "the wrong module" not in capfd.readouterr().err


@pytest.mark.slow
def test_workers_that_do_not_start_are_not_reported_as_killed(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(launch, "protect_imports", lambda environment: environment.update(PYTHONPATH=str(tmp_path), PYTHONSAFEPATH="1"))
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['accelerate'] = None")
    assert run_own_stage("all is well", tmp_path) == 1
    err = capfd.readouterr().err
    assert "the worker processes did not start; see the output above" in err and "memory" not in err


@pytest.mark.parametrize(("text", "threads"), [("2", 2), ("1,4", 1), (" 2 , 1 ", 2)])
def test_omp_num_threads_may_be_a_list(text, threads, monkeypatch):
    previous = set_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    try:
        assert set_threads() == threads
    finally:
        set_threads(previous)


@pytest.mark.parametrize("text", ["many", "0", "-1", "2.5"])
def test_invalid_omp_num_threads_is_refused(text, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    with pytest.raises(InputError, match=f"OMP_NUM_THREADS is '{text}'"):
        set_threads()


def run_in_shell(tmp_path, arguments: str, **environment: str) -> subprocess.CompletedProcess:
    overrides = " ".join(f"'{override}'" for override in tiny_overrides(tmp_path, tokenizer_training__max_steps=1))
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(["bash", "-c", f"{sys.executable} -m vqmosaic train-tokenizer digits {overrides} {arguments}"], cwd=tmp_path, env=variables,
                          capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [">&-", ">&- 2>&-", "< /dev/null"])
def test_training_works_with_closed_output_or_empty_input(arguments, tmp_path):
    result = run_in_shell(tmp_path, arguments)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "tokenizer/config.json").is_file()


@pytest.mark.slow
def test_training_works_without_docstrings_and_assertions(tmp_path):
    result = run_in_shell(tmp_path, "", PYTHONOPTIMIZE="2")
    assert result.returncode == 0, result.stderr


def test_a_broken_pipe_gives_an_error_message():
    def broken() -> None:
        raise BrokenPipeError

    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert exit_code_of(broken) == 1
    assert "the output was closed by the program that read it" in err.getvalue()


# --- interrupted waits ---------------------------------------------------------------------------------------------------------------------


def signal_soon(number: int = signal.SIGTERM, seconds: float = 0.3) -> None:
    threading.Timer(seconds, lambda: os.kill(os.getpid(), number)).start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_ends_a_wait(number):
    with StopFlag() as stop:
        assert stop.wait_for(lambda: 3) == 3
        signal_soon(number)
        started = time.monotonic()
        assert stop.wait_for(threading.Event().wait) is None and stop.signal == number
        assert time.monotonic() - started < 5
        assert stop.wait_for(lambda: 3) is None, "nothing starts after a signal"
        with pytest.raises(Interrupted, match="all is kept") as caught:
            stop.wait_or_raise(lambda: 3, "all is kept")
        assert caught.value.exit_code == EXIT_CODES[number]


def test_a_signal_ends_the_wait_for_the_next_item():
    def items():
        yield from range(3)
        signal_soon()
        time.sleep(60)  # as if a network file system did not answer

    with StopFlag() as stop:
        assert list(stop.until_signal(iter(range(3)))) == [0, 1, 2]
        started = time.monotonic()
        assert list(stop.until_signal(items())) == [0, 1, 2] and stop.signal == signal.SIGTERM
        assert time.monotonic() - started < 5 and list(stop.until_signal(iter(range(3)))) == []


@pytest.mark.parametrize("cache_megabytes", [0, 128])
def test_the_first_signal_ends_a_validation_that_waits_for_images(cache_megabytes, tmp_path, monkeypatch):
    write_classes(tmp_path, {"cat": 40, "dog": 40})
    source, read, finish = open_splits(DataConfig(path=str(tmp_path), validation_fraction=0.5)).validation, FolderSource.read, threading.Event()
    monkeypatch.setattr(FolderSource, "read", lambda self, index: (finish.wait(60) if index >= 8 else None, read(self, index))[1])
    tokenizer = ImageTokenizer(TokenizerConfig(channels=32, channel_multipliers=[1, 1], code_dim=8, latent_channels=8), ImageTransform(16))
    with StopFlag() as stop:
        signal_soon(signal.SIGINT, 1.0)
        started = time.monotonic()
        assert validate(tokenizer, ValidationImages(source, ImageTransform(16), cache_megabytes=cache_megabytes), 4, Accelerator(cpu=True), None,
                        stop) is None
        assert stop.signal == signal.SIGINT and time.monotonic() - started < 10
    finish.set()


@pytest.mark.parametrize("workers", [0, 3])
def test_closing_the_batches_does_not_wait_for_images_that_are_stuck(workers, tmp_path, monkeypatch):
    """After a signal during a step, training closes the batches, although nobody waits for the next one."""
    write_classes(tmp_path, {"cat": 4, "dog": 4})
    data = DataConfig(path=str(tmp_path), image_size=16, workers=workers, cache_megabytes=0)
    stuck_at = time.monotonic() + (4 if workers else 1)  # worker processes take a while to start
    images = TrainingImages(open_splits(data).train, ImageTransform(16), data, 0)
    read = images.source.read
    monkeypatch.setattr(images.source, "read", lambda index: (time.sleep(0 if time.monotonic() < stuck_at else 15), read(index))[1])
    batches = images.batches(0, 4)
    while time.monotonic() < stuck_at:
        next(batches)
    time.sleep(1)  # until all images that are read ahead are stuck
    closed = time.monotonic()
    batches.close()
    assert time.monotonic() - closed < MAX_CLOSE_SECONDS + 1


def test_the_first_signal_ends_a_reconstruction_that_waits_for_an_image(tiny_run, tmp_path):
    write_image(tmp_path / "image.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write_images, "read_image", lambda path, **_: time.sleep(60))
        signal_soon(signal.SIGTERM, 1.0)
        started = time.monotonic()
        with pytest.raises(Interrupted, match="0 of 1 reconstruction are written"):
            write_images.write_reconstructions(tiny_run / "tokenizer", [tmp_path / "image.png"], tmp_path / "out", "cpu", "float32")
        assert time.monotonic() - started < 10


def test_except_exception_does_not_catch_an_interruption():
    assert not issubclass(Interrupted, Exception)


BLOCKED_READS = """
import os, sys, time
from pathlib import Path
from stage1_tokenizer.data.folder_source import FolderSource
from stage1_tokenizer import train
from vqmosaic.runs.launch import run_worker
from vqmosaic.recipes.recipe_files import load_recipe
folder, read = Path(sys.argv[1]), FolderSource.read
def stuck(self, index):
    if (folder / "hang").exists():
        (folder / "hangs").touch()
        time.sleep(1000)  # as if a network file system did not answer
    return read(self, index)
FolderSource.read = stuck
run_worker(train.main, sys.argv[2:])
"""


def train_until_blocked(tmp_path, workers: int) -> subprocess.Popen:
    """Start training, block all image reads after step 2, and return the process once it waits for them. No images are cached."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(400):
        Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(tmp_path / f"photos/{number}.png")
    overrides = tiny_overrides(tmp_path / "run", data__source="folder", data__path=tmp_path / "photos", data__workers=workers,
                               data__cache_megabytes=0, tokenizer_training__max_steps=1000, tokenizer_training__checkpoint_every=1000,
                               tokenizer_training__validate_every=1000)
    process = subprocess.Popen([sys.executable, "-c", BLOCKED_READS, str(tmp_path), "digits", *overrides], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    metrics = tmp_path / "run/logs/tokenizer/metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.02)
    (tmp_path / "hang").touch()
    steps = -1
    while steps != (steps := metrics.read_text().count("\n")) or not (tmp_path / "hangs").exists():
        assert time.monotonic() < deadline
        time.sleep(2.0)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_signal_ends_the_wait_for_images_and_saves_a_checkpoint(workers, tmp_path):
    process = train_until_blocked(tmp_path, workers)
    steps = (tmp_path / "run/logs/tokenizer/metrics.jsonl").read_text().count('"train"')
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert time.monotonic() - started < 20, "the process does not wait for its data workers"
    assert f"stopped by SIGINT; tokenizer saved at step {steps}" in err
    [checkpoint] = (tmp_path / "run/checkpoints/tokenizer").glob("step-*")
    assert checkpoint.name == f"step-{steps:08d}" and (checkpoint / "checksums.json").is_file()


def test_an_interrupted_compiler_is_not_reported_as_broken(tmp_path, monkeypatch):
    """Ctrl-C in a terminal also reaches the compiler, which then fails."""
    def interrupted_compiler(*_, **__):
        def fail(_):
            with contextlib.suppress(Interrupted):  # as if the library ran the compiler in its own thread
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            raise RuntimeError("g++ returned -2")
        return fail

    monkeypatch.setattr(torch, "compile", interrupted_compiler)
    with pytest.raises(Interrupted) as caught:
        train_tokenizer.train(tiny_recipe(tmp_path, tokenizer_training__compile="true"))
    assert caught.value.exit_code == 130 and "SIGINT" in str(caught.value)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: lambda _: (_ for _ in ()).throw(RuntimeError("no g++")))
    with pytest.raises(InputError, match=r"torch\.compile does not work on this machine: no g\+\+"):
        train_tokenizer.train(tiny_recipe(tmp_path, tokenizer_training__compile="true"))
