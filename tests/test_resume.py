"""Training that is killed with SIGKILL and rerun, at any moment and any number of times, gives the same result bit for bit.

The fast tests kill children of a fork server that has imported the modules. The slow tests also kill the real command.
"""

import functools
import importlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import HIERARCHICAL, ROOT, copy_tokens, tiny_overrides, tiny_recipe
from vqmosaic.runs.run_folder import RunFolder

MODULES = {"tokenizer": "stage1_tokenizer.train", "prior": "stage2_prior.train"}
STEP = "vqmosaic.training.training_run:TrainingRun.optimizer_step"
CHECKPOINT, HALF_WRITTEN = "vqmosaic.training.checkpoints:publish", "vqmosaic.training.checkpoints:write_json"
EXPORTS = {"tokenizer": "stage1_tokenizer.tokenizer_protocol:publish", "prior": "stage2_prior.prior:publish"}
RANDOM = {"data__shift": 1, "tokenizer__dropout": 0.1, "prior__dropout": 0.1, "prior_training__label_drop": 0.3}
"""Settings that enable all sources of randomness."""
GRID_TRANSFORMER = {"prior__architecture": "grid_transformer", "prior__layers": 2, "prior__options": '{"embedding_blocks": 1}',
                    "prior_training__optimizer": "muon"}
"""The grid transformer, with one block that embeds all ids and one that embeds only the classes, trained with Muon."""


def die_at(place: str, nth: int) -> None:
    """Make the nth call of `module:name` kill this process, like a power failure."""
    module, _, name = place.partition(":")
    owner, _, attribute = name.rpartition(".")
    parent = functools.reduce(getattr, filter(None, owner.split(".")), importlib.import_module(module))
    original, calls = getattr(parent, attribute), []

    @functools.wraps(original)
    def killing(*arguments, **keywords):
        calls.append(None)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)

    setattr(parent, attribute, killing)


def train(stage: str, run_dir: Path, changes: dict, log: Path, kill_at: tuple[str, int] | None) -> None:
    """Train in a child process and write its output to `log`."""
    with open(log, "w") as sys.stdout:
        if kill_at:
            die_at(*kill_at)
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
    """call(stage, run_dir, changes, kill_at) trains in a child process and returns its exit code and output."""
    def run(stage: str, run_dir: Path, changes: dict, kill_at: tuple[str, int] | None = None) -> tuple[int, str]:
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        process = fork_server.Process(target=train, args=(stage, run_dir, changes, log, kill_at))
        process.start()
        process.join(120)
        return process.exitcode, log.read_text()

    return run


def weight_files(run_dir: Path, stage: str) -> dict[str, bytes]:
    """All weight files of a training: the export, the best and last weights, and the weights and averages of the newest checkpoint."""
    checkpoints = RunFolder(run_dir).checkpoints(stage)
    newest = sorted(checkpoints.glob("step-*"))[-1]
    paths = [run_dir / stage / "model.safetensors", newest / "model.safetensors", newest / "weights_ema.safetensors"]
    if stage == "prior":
        paths += [newest / "best.safetensors", checkpoints / "best.safetensors"]
        paths += [folder / "model.safetensors" for folder in (checkpoints / "best", checkpoints / "last") if folder.exists()]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in paths}


def metrics_without_times(run_dir: Path, stage: str) -> list[dict]:
    lines = (RunFolder(run_dir).logs(stage) / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def resumed_step(output: str) -> int:
    return int(re.search(r"resumed at step (\d+)", output)[1])


def assert_killed_equals_uninterrupted(stage: str, uninterrupted: Path, killed: Path, changes: dict, call) -> None:
    """Kill training four times: in a step, while a checkpoint is half written, before it is renamed, during the export. It saves every 2 steps."""
    section = f"{stage}_training"
    changes = {**RANDOM, f"{section}__max_steps": 8, **changes}
    assert call(stage, uninterrupted, changes)[0] == 0
    checkpoints = RunFolder(killed).checkpoints(stage)

    code, output = call(stage, killed, changes, (STEP, 4))  # in step 3, after the checkpoint of step 2
    assert code == -signal.SIGKILL and "resumed" not in output
    assert [path.name for path in checkpoints.glob("step-*")] == ["step-00000002"]

    code, output = call(stage, killed, changes, (HALF_WRITTEN, 1))  # the weights of step 4 are written, trainer_state.json is not
    assert code == -signal.SIGKILL and resumed_step(output) == 2
    assert (checkpoints / ".partial-step-00000004").is_dir() and not (checkpoints / "step-00000004").exists()

    code, output = call(stage, killed, changes, (CHECKPOINT, 2))  # step 4 is complete, step 6 is written under its temporary name
    assert code == -signal.SIGKILL and resumed_step(output) == 2
    assert (checkpoints / ".partial-step-00000006/checksums.json").exists() and not (checkpoints / "step-00000006").exists()

    code, output = call(stage, killed, changes, (EXPORTS[stage], 1))
    assert code == -signal.SIGKILL and resumed_step(output) == 4

    code, output = call(stage, killed, changes)
    assert code == 0 and resumed_step(output) == 8
    assert not list(checkpoints.glob(".partial-*"))
    expected, found = weight_files(uninterrupted, stage), weight_files(killed, stage)
    assert expected.keys() == found.keys()
    for name, content in expected.items():
        assert found[name] == content, f"{name} differs"
    assert metrics_without_times(killed, stage) == metrics_without_times(uninterrupted, stage)
    code, output = call(stage, killed, changes)
    assert code == 0 and "finished already" in output


@pytest.mark.parametrize("stage", MODULES)
def test_killed_training_equals_uninterrupted_training(stage, tiny_run, tmp_path, call):
    uninterrupted, killed = copy_tokens(tiny_run, tmp_path / "uninterrupted"), copy_tokens(tiny_run, tmp_path / "killed")
    assert_killed_equals_uninterrupted(stage, uninterrupted, killed, {}, call)


def test_killed_training_of_two_levels_equals_uninterrupted_training(tmp_path, call):
    assert_killed_equals_uninterrupted("tokenizer", tmp_path / "uninterrupted", tmp_path / "killed", HIERARCHICAL, call)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "changes"), [
    ("tokenizer", {"data__crop_scale": 0.7, "data__workers": 1, "tokenizer_training__accumulation_steps": 2, "tokenizer__l2_normalize": True,
                   "tokenizer__middle_attention": True}),
    ("tokenizer", {"tokenizer_training__mixed_precision": "bf16", "tokenizer_training__log_every": 2}),
    ("prior", {"prior_training__mixed_precision": "bf16", "prior_training__accumulation_steps": 4, "prior_training__export": "last"}),
    ("prior", {"prior__architecture": "gpt2", "prior_training__window_shards": 1}),
    ("prior", {**GRID_TRANSFORMER, "prior_training__mixed_precision": "bf16", "prior_training__accumulation_steps": 2}),
    ("prior", {**GRID_TRANSFORMER, "prior_training__order": "annealed", "prior_training__order_annealing": [0.2, 0.9]}),
], ids=["crops, workers, accumulation, l2, attention", "bf16", "bf16, accumulation, last", "gpt2, windows",
        "grid_transformer, bf16, accumulation", "annealed order"])
def test_killed_training_with_other_settings_equals_uninterrupted_training(stage, changes, tiny_run, tmp_path, call):
    uninterrupted, killed = copy_tokens(tiny_run, tmp_path / "uninterrupted"), copy_tokens(tiny_run, tmp_path / "killed")
    assert_killed_equals_uninterrupted(stage, uninterrupted, killed, changes, call)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, GRID_TRANSFORMER, {**GRID_TRANSFORMER, "prior_training__mixed_precision": "bf16"}],
                         ids=["llama, adamw", "grid_transformer", "grid_transformer, bf16"])
def test_prior_killed_five_times_at_random_equals_uninterrupted_training(settings, tiny_run, tmp_path, fork_server, call):
    """Kill the process in steps, validations, writes or removals, each time after it has written a checkpoint."""
    changes = {**RANDOM, **settings, "prior_training__max_steps": 240, "prior_training__validate_every": 10, "prior_training__checkpoint_every": 5}
    uninterrupted, killed = copy_tokens(tiny_run, tmp_path / "uninterrupted"), copy_tokens(tiny_run, tmp_path / "killed")
    assert call("prior", uninterrupted, changes)[0] == 0
    rng, log, checkpoints = random.Random(7), tmp_path / "log", RunFolder(killed).checkpoints("prior")
    resumed = []
    for number in range(5):
        before = max(checkpoints.glob("step-*"), default=checkpoints / "step-00000000").name
        process = fork_server.Process(target=train, args=("prior", killed, changes, log, None))
        process.start()
        while process.is_alive() and not any(path.name > before for path in checkpoints.glob("step-*")):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the training ended before it was killed"
        resumed += [resumed_step(log.read_text())] if number else []
    code, output = call("prior", killed, changes)
    assert code == 0 and 0 < resumed[0] < resumed[1] < resumed[2] < resumed[3] < resumed_step(output) <= 240
    expected, found = weight_files(uninterrupted, "prior"), weight_files(killed, "prior")
    assert expected.keys() == found.keys()
    assert [name for name, content in expected.items() if found[name] != content] == []
    assert metrics_without_times(killed, "prior") == metrics_without_times(uninterrupted, "prior")


@pytest.mark.slow
@pytest.mark.parametrize("stage", MODULES)
def test_killed_training_without_weight_average_equals_uninterrupted_training(stage, tiny_run, tmp_path, call):
    changes = {**RANDOM, f"{stage}_training__weight_ema_decay": 0}
    exports = []
    for name, kill_points in (("uninterrupted", []), ("killed", [(STEP, 4), (CHECKPOINT, 2)])):
        run_dir = copy_tokens(tiny_run, tmp_path / name)
        for kill_at in kill_points:
            assert call(stage, run_dir, changes, kill_at)[0] == -signal.SIGKILL
        assert call(stage, run_dir, changes)[0] == 0
        exports.append((run_dir / stage / "model.safetensors").read_bytes())
    assert exports[0] == exports[1]


@pytest.mark.slow
def test_chain_killed_in_all_stages_equals_uninterrupted_chain(tiny_run, tmp_path):
    """Kill the real command in both trainings, inside and between shards, and in the bundle, and rerun it each time."""
    driver = "import sys; from tests.test_resume import die_at; nth = int(sys.argv.pop()); die_at(sys.argv.pop(), nth)\n" \
             "from pipelines.command_line import main; main()"
    command = ["run", "digits", *tiny_overrides(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    kill_points = [(STEP, 4), (CHECKPOINT, 2), ("token_shards.writer:ShardInProgress.add", 600), ("token_shards.writer:publish", 2),
              (CHECKPOINT, 1), (STEP, 5), ("pipelines.bundle:publish", 1)]
    outputs = []
    for place, nth in kill_points:
        result = subprocess.run([sys.executable, "-c", driver, *command, place, str(nth)], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == -signal.SIGKILL, (place, result.stdout, result.stderr)
        outputs.append(result.stdout)
    assert resumed_step(outputs[1]) == 2
    assert "tokenizer: finished already" in outputs[3] and "1 of 4 shards is already complete" in outputs[3]
    assert resumed_step(outputs[6].partition("tokens: finished already")[2]) > 0
    result = subprocess.run([sys.executable, "-m", "pipelines.command_line", *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for folder in ("tokenizer", "tokens", "prior", "pipeline"):
        expected = {path.relative_to(tiny_run): path.read_bytes() for path in sorted((tiny_run / folder).rglob("*")) if path.is_file()}
        found = {path.relative_to(tmp_path / "run"): path.read_bytes() for path in sorted((tmp_path / "run" / folder).rglob("*")) if path.is_file()}
        assert expected.keys() == found.keys()
        assert [str(name) for name in expected if expected[name] != found[name]] == []
