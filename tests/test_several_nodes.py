"""Training on two machines, simulated by two launches over gloo on one machine. Each launch has its own configuration, as on a real cluster."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.test_two_processes import COMMANDS, ENVIRONMENT, finish, read_until, start
from tests.tiny import ROOT, copy_tokens, tiny_overrides
from vqmosaic.runs import launch

pytestmark = pytest.mark.slow
SHIPPED = ROOT / "configs/accelerate/several_nodes.yaml"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def two_machines(folder: Path, *arguments: str) -> Iterator[list[subprocess.Popen]]:
    """Start the command on both machines, with one process each. Kills launches that still run at the end, such as one waiting for the other."""
    changes = {"num_processes": 2, "main_process_ip": "127.0.0.1", "main_process_port": free_port(), "use_cpu": True}
    shipped = yaml.safe_load(SHIPPED.read_text())
    assert shipped["num_machines"] == 2 and changes.keys() <= shipped.keys()
    launches = []
    try:
        for machine in range(2):
            config = folder / f"machine-{machine}.yaml"
            config.write_text(yaml.safe_dump({**shipped, **changes, "machine_rank": machine}))
            command = [sys.executable, "-m", "pipelines.command_line", *arguments, "--accelerate_config", str(config)]
            launches.append(subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        yield launches
    finally:
        for launched in launches:
            launched.kill()
            launched.wait()


def on_two_machines(folder: Path, *arguments: str) -> str:
    """Run the command on both machines, without errors, and return the output of the first."""
    with two_machines(folder, *arguments) as launches:
        (second_code, second_out, second_err), (code, out, err) = map(finish, reversed(launches))
    assert (code, second_code) == (0, 0), err + second_err
    assert "Traceback" not in err and not second_out, "only the first machine reports"  # torch sometimes warns that the first machine exited first
    return out


def test_two_machines_write_the_same_tokens_as_one(tiny_run, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(tiny_run / "tokenizer", run_dir / "tokenizer")
    out = on_two_machines(tmp_path, "preprocess", "digits", *tiny_overrides(run_dir))
    assert " x 2, float32, 1 thread each" in out
    expected, found = ({str(path.relative_to(folder)): path.read_bytes() for path in sorted((folder / "tokens").rglob("*")) if path.is_file()}
                       for folder in (tiny_run, run_dir))
    assert expected.keys() == found.keys() and len([name for name in expected if name.endswith(".tar")]) == 5
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.parametrize("stage", COMMANDS)
def test_two_machines_train_the_same_weights_as_two_processes(stage, tiny_run, tmp_path):
    """The weights are equal bit for bit, although one machine was stopped: both save a checkpoint and exit with the same code."""
    one, two = copy_tokens(tiny_run, tmp_path / "one"), copy_tokens(tiny_run, tmp_path / "two")
    changes = {f"{stage}_training__{name}": 80 for name in ("max_steps", "checkpoint_every", "validate_every")}  # enough to be stopped in between
    code, _, err = finish(start(stage, one, 2, **changes))
    assert code == 0, err
    arguments = [COMMANDS[stage], "digits", *tiny_overrides(two, **changes)]
    with two_machines(tmp_path, *arguments) as launches:
        read_until(launches[0], "expected time")
        launches[1].send_signal(signal.SIGTERM)
        stopped = [finish(process) for process in launches]
    assert [code for code, _, _ in stopped] == [143, 143] and all("saved at step" in err for _, _, err in stopped), stopped
    on_two_machines(tmp_path, *arguments)
    weights = [(run_dir / stage / "model.safetensors").read_bytes() for run_dir in (one, two)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("worker_exit_code", "statement", "expected"), [
    (0, "time.sleep(600)", 0), (143, "time.sleep(600)", 143), (2, "time.sleep(600)", 2), (0, "sys.exit(1)", 0),
    (143, "sys.exit(1)", 143), (None, "sys.exit(1)", 1), (2, "sys.exit(1)", 2)])
def test_exit_code_of_workers_takes_precedence_over_the_launcher(worker_exit_code, statement, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "LAUNCHER_EXIT_SECONDS", 0.5)
    write_exit_code = "" if worker_exit_code is None else f"; (folder / '0.exit').write_text('{worker_exit_code}')"
    program = (f"import os, pathlib, sys, time; folder = pathlib.Path({str(tmp_path)!r}); "
               f"(folder / '0.pid').write_text(str(os.getpid())){write_exit_code}; {statement}")
    started = time.monotonic()
    assert launch.run_workers([sys.executable, "-c", program], dict(os.environ), tmp_path, 1) == expected
    assert time.monotonic() - started < 30
