"""Signals and surroundings that a process meets: stuck in a library, under nohup, in a thread, with foreign variables, without output."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from stage1_tokenizer import train as train_tokenizer
from tests.test_two_processes import run_own_stage
from tests.tiny import ROOT, command, tiny_overrides, tiny_recipe
from vqmosaic import launch
from vqmosaic.devices import set_threads
from vqmosaic.errors import InputError
from vqmosaic.interruption import EXIT_CODES, GRACE_SECONDS, Interrupted, StopFlag
from vqmosaic.launch import INHERITED_RANKS, KILL_SECONDS, guarded

STUCK = """
import ctypes, sys
from vqmosaic.interruption import StopFlag
libc, lock = ctypes.CDLL(None), (ctypes.c_char * 64)()
libc.pthread_mutex_init(lock, None)
libc.pthread_mutex_lock(lock)
with StopFlag():
    print("stuck", flush=True)
    libc.pthread_mutex_lock(lock)  # waits for ever, as for a process that never joins a collective; Python's handlers never run
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_ends_a_process_that_is_stuck_inside_a_library(number):
    process = subprocess.Popen([sys.executable, "-c", STUCK], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "stuck\n"
    time.sleep(0.5)  # from the line to the lock
    process.send_signal(number)
    time.sleep(0.3)
    assert process.poll() is None, "the first signal asks"
    process.send_signal(number)
    started = time.monotonic()
    assert process.wait(timeout=20) == EXIT_CODES[number]
    assert time.monotonic() - started < GRACE_SECONDS + 2


@pytest.mark.slow
def test_workers_that_are_stuck_are_killed_after_a_second_signal(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    sent = []

    def send() -> None:
        while len(list(tmp_path.glob("*.ready"))) < 2:
            time.sleep(0.05)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        sent.append(time.monotonic())

    threading.Thread(target=send, daemon=True).start()
    assert run_own_stage("stuck", tmp_path) == 143
    assert time.monotonic() - sent[0] < KILL_SECONDS + 3
    pids = [int(path.read_text()) for path in tmp_path.glob("*.ready")]
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_the_end_of_a_terminal_saves_like_sigterm_but_not_under_nohup():
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal == signal.SIGHUP
    assert Interrupted(signal.SIGHUP, "x").exit_code == 129
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    try:
        with StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.signal
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_flag_leaves_nothing_behind():
    def left() -> tuple[int, int]:
        return sum(thread.name == "signals" for thread in threading.enumerate()), len(os.listdir("/proc/self/fd"))

    handlers, files = {number: signal.getsignal(number) for number in EXIT_CODES}, left()[1]
    for _ in range(20):
        with StopFlag():
            pass
    deadline = time.monotonic() + 5
    while (left()[0] or left()[1] > files) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left()[0] == 0 and left()[1] <= files and {number: signal.getsignal(number) for number in EXIT_CODES} == handlers


def test_a_stage_can_be_trained_in_a_thread(tmp_path):
    failed = []

    def train() -> None:
        try:
            train_tokenizer.train(tiny_recipe(tmp_path, tokenizer_training__max_steps=1))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert not failed and (tmp_path / "tokenizer/config.json").is_file()


@pytest.mark.slow
def test_rank_variables_of_another_launcher_are_ignored_with_a_note(tmp_path):
    variables = dict.fromkeys(INHERITED_RANKS, "4") | {"MASTER_ADDR": "192.0.2.1"}
    result = command("train-tokenizer", "digits", *tiny_overrides(tmp_path, tokenizer_training__max_steps=1), **variables)
    assert result.returncode == 0, result.stderr
    assert "note: RANK=4, WORLD_SIZE=4" in result.stderr and "ignored" in result.stderr


@pytest.mark.slow
def test_modules_of_the_working_directory_are_not_imported_by_workers(tmp_path, monkeypatch, capfd):
    """As where vqmosaic is installed: found by the interpreter's path, and called in a folder of the user's own."""
    for name in ("accelerate.py", "pipelines.py", "yaml.py", "stage1_tokenizer.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong module')")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    assert run_own_stage("all is well", tmp_path / "out") == 0
    assert "the wrong module" not in capfd.readouterr().err


@pytest.mark.slow
def test_workers_that_do_not_start_are_not_said_to_be_killed(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(launch, "protect_imports", lambda environment: environment.update(PYTHONPATH=str(tmp_path), PYTHONSAFEPATH="1"))
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['accelerate'] = None")
    assert run_own_stage("all is well", tmp_path) == 1
    err = capfd.readouterr().err
    assert "the worker processes did not start; what is printed above says why" in err and "memory" not in err


@pytest.mark.parametrize(("text", "threads"), [("2", 2), ("1,4", 1), (" 2 , 1 ", 2)])
def test_the_number_of_threads_may_be_a_list_for_nested_levels(text, threads, monkeypatch):
    before = set_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    try:
        assert set_threads() == threads
    finally:
        set_threads(before)


@pytest.mark.parametrize("text", ["many", "0", "-1", "2.5"])
def test_another_number_of_threads_is_refused_by_name(text, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    with pytest.raises(InputError, match=f"OMP_NUM_THREADS is '{text}'"):
        set_threads()


def run_in_shell(tmp_path, arguments: str, **environment: str) -> subprocess.CompletedProcess:
    overrides = " ".join(f"'{each}'" for each in tiny_overrides(tmp_path, tokenizer_training__max_steps=1))
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(["bash", "-c", f"{sys.executable} -m vqmosaic train-tokenizer digits {overrides} {arguments}"], cwd=tmp_path, env=variables,
                          capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [">&-", ">&- 2>&-", "< /dev/null"])
def test_a_closed_output_does_not_stop_a_stage(arguments, tmp_path):
    result = run_in_shell(tmp_path, arguments)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "tokenizer/config.json").is_file()


@pytest.mark.slow
def test_python_without_docstrings_and_assertions_works(tmp_path):
    result = run_in_shell(tmp_path, "", PYTHONOPTIMIZE="2")
    assert result.returncode == 0, result.stderr


def test_an_output_that_is_closed_meanwhile_ends_with_a_sentence():
    def broken() -> None:
        raise BrokenPipeError

    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert guarded(broken) == 1
    assert "the output was closed by the program that read it" in err.getvalue()
