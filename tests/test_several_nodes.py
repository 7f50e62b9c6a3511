"""Two machines, played by two launches on this one over gloo: each with the command and the configuration that its user copies to it."""

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

from tests.test_two_processes import COMMANDS, ENVIRONMENT, finish, make_run, read_until, start
from tests.tiny import ROOT, tiny_overrides
from vqmosaic.runs import launch

pytestmark = pytest.mark.slow
SHIPPED = ROOT / "configs/accelerate/several_nodes.yaml"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def two_machines(folder: Path, *arguments: str) -> Iterator[list[subprocess.Popen]]:
    """The launches on both, each with one process; none is left at the end, not even one whose partner was refused and that would wait for it."""
    own = {"num_processes": 2, "main_process_ip": "127.0.0.1", "main_process_port": free_port(), "use_cpu": True}
    shipped = yaml.safe_load(SHIPPED.read_text())
    assert shipped["num_machines"] == 2 and own.keys() <= shipped.keys()
    launches = []
    try:
        for machine in range(2):
            config = folder / f"machine-{machine}.yaml"
            config.write_text(yaml.safe_dump({**shipped, **own, "machine_rank": machine}))
            command = [sys.executable, "-m", "pipelines.command_line", *arguments, "--accelerate_config", str(config)]
            launches.append(subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        yield launches
    finally:
        for each in launches:
            each.kill()
            each.wait()


def on_two_machines(folder: Path, *arguments: str) -> str:
    """What the first of two machines prints; both run to their end without complaint."""
    with two_machines(folder, *arguments) as launches:
        (other_code, other_out, other_err), (code, out, err) = map(finish, reversed(launches))
    assert (code, other_code) == (0, 0), err + other_err
    assert "Traceback" not in err and not other_out, "only the first machine reports"  # torch says at times that the first one was gone first
    return out


def test_two_machines_write_the_tokens_of_one(tiny_run, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(tiny_run / "tokenizer", run_dir / "tokenizer")
    out = on_two_machines(tmp_path, "preprocess", "digits", *tiny_overrides(run_dir))
    assert " x 2, float32, 1 thread each" in out
    expected, found = ({str(path.relative_to(folder)): path.read_bytes() for path in sorted((folder / "tokens").rglob("*")) if path.is_file()}
                       for folder in (tiny_run, run_dir))
    assert expected.keys() == found.keys() and len([name for name in expected if name.endswith(".tar")]) == 5
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.parametrize("stage", COMMANDS)
def test_two_machines_train_what_two_processes_of_one_do(stage, tiny_run, tmp_path):
    """To the last bit, by way of a stop of one machine, which both save at and end with the same code."""
    one, two = make_run(tiny_run, tmp_path / "one"), make_run(tiny_run, tmp_path / "two")
    changes = {f"{stage}_training__{name}": 80 for name in ("max_steps", "checkpoint_every", "validate_every")}  # long enough to be stopped within
    code, _, err = finish(start(stage, one, 2, **changes))
    assert code == 0, err
    arguments = [COMMANDS[stage], "digits", *tiny_overrides(two, **changes)]
    with two_machines(tmp_path, *arguments) as launches:
        read_until(launches[0], "expected time")
        launches[1].send_signal(signal.SIGTERM)
        stopped = [finish(each) for each in launches]
    assert [code for code, _, _ in stopped] == [143, 143] and all("saved at step" in err for _, _, err in stopped), stopped
    on_two_machines(tmp_path, *arguments)
    weights = [(run_dir / stage / "model.safetensors").read_bytes() for run_dir in (one, two)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("worker_says", "then", "expected"), [
    (0, "time.sleep(600)", 0), (143, "time.sleep(600)", 143), (2, "time.sleep(600)", 2), (0, "sys.exit(1)", 0),
    (143, "sys.exit(1)", 143), (None, "sys.exit(1)", 1), (2, "sys.exit(1)", 2)])
def test_a_launcher_that_loses_the_other_machine_does_not_decide_what_became_of_the_workers(worker_says, then, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "LAUNCHER_EXIT_SECONDS", 0.5)
    said = "" if worker_says is None else f"; (folder / '0.exit').write_text('{worker_says}')"
    program = (f"import os, pathlib, sys, time; folder = pathlib.Path({str(tmp_path)!r}); "
               f"(folder / '0.pid').write_text(str(os.getpid())){said}; {then}")
    started = time.monotonic()
    assert launch.wait_for_workers([sys.executable, "-c", program], dict(os.environ), tmp_path, 1) == expected
    assert time.monotonic() - started < 30
