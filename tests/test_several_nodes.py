"""Two machines, played by two launches on this one over gloo: each with the command and the configuration that its user copies to it."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.test_two_processes import finish
from tests.tiny import ROOT, tiny_overrides

pytestmark = pytest.mark.slow
SHIPPED = ROOT / "configs/accelerate/several_nodes.yaml"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def on_two_machines(folder: Path, *arguments: str) -> str:
    """What the first of two machines prints; both have one process and run to their end without complaint."""
    own = {"num_processes": 2, "main_process_ip": "127.0.0.1", "main_process_port": free_port(), "use_cpu": True}
    shipped = yaml.safe_load(SHIPPED.read_text())
    assert shipped["num_machines"] == 2 and own.keys() <= shipped.keys()
    launches = []
    try:
        for machine in range(2):
            config = folder / f"machine-{machine}.yaml"
            config.write_text(yaml.safe_dump({**shipped, **own, "machine_rank": machine}))
            command = [sys.executable, "-m", "pipelines.command_line", *arguments, "--accelerate_config", str(config)]
            launches.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
                                             stderr=subprocess.PIPE, text=True))
        (other_code, other_out, other_err), (code, out, err) = map(finish, reversed(launches))
    finally:
        for launch in launches:  # one whose partner was refused would wait for it
            launch.kill()
            launch.wait()
    assert (code, other_code) == (0, 0), err + other_err
    assert "Traceback" not in err and not other_out, "only the first machine reports"  # torch says at times that the first one was gone first
    return out


def test_two_machines_write_the_tokens_of_one(tiny_run, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(tiny_run / "tokenizer", run_dir / "tokenizer")
    out = on_two_machines(tmp_path, "preprocess", "digits", *tiny_overrides(run_dir))
    assert " x 2, float32, 1 threads each" in out
    expected, found = ({str(path.relative_to(folder)): path.read_bytes() for path in sorted((folder / "tokens").rglob("*")) if path.is_file()}
                       for folder in (tiny_run, run_dir))
    assert expected.keys() == found.keys() and len([name for name in expected if name.endswith(".tar")]) == 5
    assert [name for name in expected if found[name] != expected[name]] == []
