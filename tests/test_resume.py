"""Kill -9 at any moment of a training, run it again: the result is the same to the last bit, as often as it happens.

The fast tests kill processes that a fork server makes, which has only imported; the slow ones kill the real command.
"""

import functools
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import ROOT, tiny_overrides, tiny_recipe
from vqmosaic.runs.run_folder import RunFolder

MODULES = {"tokenizer": "stage1_tokenizer.train", "prior": "stage2_prior.train"}
STEP = "vqmosaic.training.training_run:TrainingRun.optimizer_step"
CHECKPOINT, HALF_WRITTEN = "vqmosaic.training.checkpoints:publish", "vqmosaic.training.checkpoints:write_json"
EXPORTS = {"tokenizer": "stage1_tokenizer.tokenizer:publish", "prior": "stage2_prior.prior:publish"}
RANDOM = {"data__shift": 1, "tokenizer__dropout": 0.1, "prior__dropout": 0.1, "prior_training__label_drop": 0.3}
"""Everything random is on."""
OWN = {"prior__architecture": "grid_transformer", "prior__layers": 2, "prior__options": '{"embedding_blocks": 1}',
       "prior_training__optimizer": "muon"}
"""The project's own model, with one block that has embeddings of all ids and one that has those of the classes alone, and its own optimizer."""


def die_at(place: str, nth: int) -> None:
    """Make the nth call of `module:name` kill this process, like a power cut."""
    module, _, name = place.partition(":")
    owner, _, attribute = name.rpartition(".")
    holder = functools.reduce(getattr, filter(None, owner.split(".")), importlib.import_module(module))
    original, calls = getattr(holder, attribute), []

    @functools.wraps(original)
    def dying(*arguments, **keywords):
        calls.append(None)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)

    setattr(holder, attribute, dying)


def train(stage: str, run_dir: Path, changes: dict, log: Path, death: tuple[str, int] | None) -> None:
    """One training in this process, which is not the tests' own."""
    with open(log, "w") as sys.stdout:
        if death:
            die_at(*death)
        importlib.import_module(MODULES[stage]).train(tiny_recipe(run_dir, **changes))
        sys.stdout.flush()
        os._exit(0)


@pytest.fixture(scope="module")
def fork_server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*MODULES.values(), __name__])
    return context


@pytest.fixture
def call(fork_server, tmp_path):
    """call(stage, run_dir, changes, death) trains in a process of its own; returns its exit code and what it printed."""
    def run(stage: str, run_dir: Path, changes: dict, death: tuple[str, int] | None = None) -> tuple[int, str]:
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        process = fork_server.Process(target=train, args=(stage, run_dir, changes, log, death))
        process.start()
        process.join(120)
        return process.exitcode, log.read_text()

    return run


def make_run(tiny_run: Path, run_dir: Path) -> Path:
    shutil.copytree(tiny_run / "tokens", run_dir / "tokens")
    return run_dir


def results(run_dir: Path, stage: str) -> dict[str, bytes]:
    """All files with weights that a training leaves: its export, best and last, the averages and weights of the newest checkpoint."""
    checkpoints = RunFolder(run_dir).checkpoints(stage)
    newest = sorted(checkpoints.glob("step-*"))[-1]
    paths = [run_dir / stage / "model.safetensors", newest / "model.safetensors", newest / "weights_ema.safetensors"]
    if stage == "prior":
        paths += [newest / "best.safetensors", checkpoints / "best.safetensors"]
        paths += [folder / "model.safetensors" for folder in (checkpoints / "best", checkpoints / "last") if folder.exists()]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in paths}


def log_without_times(run_dir: Path, stage: str) -> list[dict]:
    lines = (RunFolder(run_dir).logs(stage) / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def resumed_step(output: str) -> int:
    return int(re.search(r"resumed at step (\d+)", output)[1])


def assert_killed_equals_straight(stage: str, straight: Path, killed: Path, changes: dict, call) -> None:
    """Four deaths: in a step, while a checkpoint is half written, before it is renamed, during the export. Checkpoints come every 2 of 8 steps."""
    section = f"{stage}_training"
    changes = {**RANDOM, f"{section}__max_steps": 8, **changes}
    assert call(stage, straight, changes)[0] == 0
    checkpoints = RunFolder(killed).checkpoints(stage)

    code, output = call(stage, killed, changes, (STEP, 4))  # in step 3, after the checkpoint of step 2
    assert code == -signal.SIGKILL and "resumed" not in output
    assert [path.name for path in checkpoints.glob("step-*")] == ["step-00000002"]

    code, output = call(stage, killed, changes, (HALF_WRITTEN, 1))  # the weights of step 4 are written, nothing says what they are
    assert code == -signal.SIGKILL and resumed_step(output) == 2
    assert (checkpoints / ".partial-step-00000004").is_dir() and not (checkpoints / "step-00000004").exists()

    code, output = call(stage, killed, changes, (CHECKPOINT, 2))  # step 4 is whole, step 6 is validated and written under its hidden name
    assert code == -signal.SIGKILL and resumed_step(output) == 2
    assert (checkpoints / ".partial-step-00000006/checksums.json").exists() and not (checkpoints / "step-00000006").exists()

    code, output = call(stage, killed, changes, (EXPORTS[stage], 1))
    assert code == -signal.SIGKILL and resumed_step(output) == 4

    code, output = call(stage, killed, changes)
    assert code == 0 and resumed_step(output) == 8
    assert not list(checkpoints.glob(".partial-*"))
    expected, found = results(straight, stage), results(killed, stage)
    assert expected.keys() == found.keys()
    for name, content in expected.items():
        assert found[name] == content, f"{name} differs"
    assert log_without_times(killed, stage) == log_without_times(straight, stage)
    code, output = call(stage, killed, changes)
    assert code == 0 and "finished already" in output


@pytest.mark.parametrize("stage", MODULES)
def test_a_killed_training_ends_like_a_straight_one(stage, tiny_run, tmp_path, call):
    assert_killed_equals_straight(stage, make_run(tiny_run, tmp_path / "straight"), make_run(tiny_run, tmp_path / "killed"), {}, call)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "changes"), [
    ("tokenizer", {"data__crop_scale": 0.7, "data__workers": 1, "tokenizer_training__accumulation_steps": 2, "tokenizer__l2_normalize": True,
                   "tokenizer__middle_attention": True}),
    ("tokenizer", {"tokenizer_training__mixed_precision": "bf16", "tokenizer_training__log_every": 2}),
    ("prior", {"prior_training__mixed_precision": "bf16", "prior_training__accumulation_steps": 4, "prior_training__export": "last"}),
    ("prior", {"prior__architecture": "gpt2", "prior_training__window_shards": 1}),
    ("prior", {**OWN, "prior_training__mixed_precision": "bf16", "prior_training__accumulation_steps": 2}),
], ids=["crops, workers, accumulation, l2, attention", "bf16", "bf16, accumulation, last", "gpt2, windows", "own, bf16, accumulation"])
def test_a_killed_training_of_another_kind_ends_like_a_straight_one(stage, changes, tiny_run, tmp_path, call):
    assert_killed_equals_straight(stage, make_run(tiny_run, tmp_path / "straight"), make_run(tiny_run, tmp_path / "killed"), changes, call)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{}, OWN, {**OWN, "prior_training__mixed_precision": "bf16"}], ids=["llama, adamw", "own", "own, bf16"])
def test_a_prior_killed_five_times_at_random_moments_ends_like_a_straight_one(kind, tiny_run, tmp_path, fork_server, call):
    """From outside, while it steps, validates, writes or removes; each time after it has written a checkpoint of its own."""
    changes = {**RANDOM, **kind, "prior_training__max_steps": 240, "prior_training__validate_every": 10, "prior_training__checkpoint_every": 5}
    straight, killed = make_run(tiny_run, tmp_path / "straight"), make_run(tiny_run, tmp_path / "killed")
    assert call("prior", straight, changes)[0] == 0
    moments, log, checkpoints = random.Random(7), tmp_path / "log", RunFolder(killed).checkpoints("prior")
    resumed = []
    for number in range(5):
        before = max(checkpoints.glob("step-*"), default=checkpoints / "step-00000000").name
        process = fork_server.Process(target=train, args=("prior", killed, changes, log, None))
        process.start()
        while process.is_alive() and not any(path.name > before for path in checkpoints.glob("step-*")):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the training had ended before"
        resumed += [resumed_step(log.read_text())] if number else []
    code, output = call("prior", killed, changes)
    assert code == 0 and 0 < resumed[0] < resumed[1] < resumed[2] < resumed[3] < resumed_step(output) <= 240
    expected, found = results(straight, "prior"), results(killed, "prior")
    assert expected.keys() == found.keys()
    assert [name for name, content in expected.items() if found[name] != content] == []
    assert log_without_times(killed, "prior") == log_without_times(straight, "prior")


@pytest.mark.slow
@pytest.mark.parametrize("stage", MODULES)
def test_without_a_weight_average(stage, tiny_run, tmp_path, call):
    changes = {**RANDOM, f"{stage}_training__weight_ema_decay": 0}
    exports = []
    for name, deaths in (("straight", []), ("killed", [(STEP, 4), (CHECKPOINT, 2)])):
        run_dir = make_run(tiny_run, tmp_path / name)
        for death in deaths:
            assert call(stage, run_dir, changes, death)[0] == -signal.SIGKILL
        assert call(stage, run_dir, changes)[0] == 0
        exports.append((run_dir / stage / "model.safetensors").read_bytes())
    assert exports[0] == exports[1]


@pytest.mark.slow
def test_a_chain_killed_in_every_stage_ends_like_a_straight_one(tiny_run, tmp_path):
    """The real command, killed in both trainings, inside and between shards, and in the bundle; each call is the same."""
    driver = "import sys; from tests.test_resume import die_at; nth = int(sys.argv.pop()); die_at(sys.argv.pop(), nth)\n" \
             "from pipelines.command_line import main; main()"
    command = ["run", "digits", *tiny_overrides(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    deaths = [(STEP, 4), (CHECKPOINT, 2), ("token_shards.writer:ShardInProgress.add", 600), ("token_shards.writer:publish", 2),
              (CHECKPOINT, 1), (STEP, 5), ("pipelines.bundle:publish", 1)]
    outputs = []
    for place, nth in deaths:
        done = subprocess.run([sys.executable, "-c", driver, *command, place, str(nth)], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, (place, done.stdout, done.stderr)
        outputs.append(done.stdout)
    assert resumed_step(outputs[1]) == 2
    assert "tokenizer: finished already" in outputs[3] and "1 of 4 shards is already complete" in outputs[3]
    assert resumed_step(outputs[6].partition("tokens: finished already")[2]) > 0
    done = subprocess.run([sys.executable, "-m", "pipelines.command_line", *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder in ("tokenizer", "tokens", "prior", "pipeline"):
        expected = {path.relative_to(tiny_run): path.read_bytes() for path in sorted((tiny_run / folder).rglob("*")) if path.is_file()}
        found = {path.relative_to(tmp_path / "run"): path.read_bytes() for path in sorted((tmp_path / "run" / folder).rglob("*")) if path.is_file()}
        assert expected.keys() == found.keys()
        assert [str(name) for name in expected if expected[name] != found[name]] == []
