"""Two processes under the real launcher, on CPUs over gloo: same results as one process, exit codes, no processes left behind.

Trainings by one process run in the process of the tests, because each new process spends seconds on imports.

Run as a module, this file is a stage whose workers end in ways that are hard to provoke in a real stage.
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.command_line import dispatch
from tests.run_files import records
from tests.tiny import HIERARCHICAL, ROOT, copy_tokens, tiny_overrides
from vqmosaic.errors import InputError
from vqmosaic.runs.interruption import Interrupted, StopFlag
from vqmosaic.runs.launch import run_stage, run_worker

pytestmark = pytest.mark.slow
COMMANDS = {"tokenizer": "train-tokenizer", "prior": "train-prior"}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
RANK_INDEPENDENT = {
    "tokenizer__channels": 64, "tokenizer__dropout": 0, "prior__dropout": 0, "prior_training__label_drop": 0.3, "data__shift": 1,
    "tokenizer_training__validation_images": 63, "prior_training__validation_images": 63,
}
"""Settings without noise that depends on the rank. 64 channels are two per GroupNorm group: with one, the gradient of a bias before the norm would be
only a rounding error, which Adam amplifies."""
ANNEALED = {"prior__architecture": "grid_transformer", "prior__layers": 2, "prior_training__order": "annealed",
            "prior_training__order_annealing": [0.2, 0.9]}


def start(stage: str, run_dir: Path, processes: int | None, accelerate_config: str | None = None, **changes) -> subprocess.Popen:
    flags = [] if processes is None else ["--processes", str(processes)]
    flags += [] if accelerate_config is None else ["--accelerate_config", f"configs/accelerate/{accelerate_config}.yaml"]
    command = [sys.executable, "-m", "pipelines.command_line", COMMANDS[stage], "digits", *tiny_overrides(run_dir, **changes), *flags]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def train_here(stage: str, run_dir: Path, **changes) -> int:
    """Train with one process, this one, and return the exit code."""
    return dispatch([COMMANDS[stage], "digits", *tiny_overrides(run_dir, **changes)])


def train_by_two(stage: str, run_dir: Path, changes: dict[str, object]) -> Path:
    """Train with two processes, check their output, and return the run folder."""
    code, out, err = finish(start(stage, run_dir, 2, **changes))
    assert code == 0, err
    assert re.search(r"threads? x 2\b", out) and "Traceback" not in err
    return run_dir


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Wait for a process and return exit code, stdout and stderr. If it hangs, fail with the stacks of all its processes."""
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        for pid in reversed(process_tree(process.pid)):
            os.kill(pid, signal.SIGABRT)
        _, err = process.communicate(timeout=30)
        raise AssertionError(f"{process.args} hung: {err}") from None
    return process.returncode, out, err


def process_tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(descendant for child in children for descendant in process_tree(int(child)))]


def read_until(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was never printed; {process.stderr.read()}")


def processes_with(text: str) -> list[int]:
    """Ids of other living processes with `text` in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            if alive and text in (entry / "cmdline").read_text() and int(entry.name) != os.getpid():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def checkpoint_weights(run_dir: Path, stage: str, step: int):
    from safetensors.torch import load_file

    return load_file(run_dir / f"checkpoints/{stage}/step-{step:08d}/model.safetensors")


# --- same results ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_by_two(tiny_run, tmp_path_factory) -> Callable[[str, dict[str, object]], Path]:
    """trained_by_two(stage, changes) is a run folder whose stage two processes have trained. Tests with equal settings share it."""
    folders: dict[str, Path] = {}

    def trained(stage: str, changes: dict[str, object]) -> Path:
        key = f"{stage} {sorted(changes.items())}"
        if key not in folders:
            folders[key] = train_by_two(stage, copy_tokens(tiny_run, tmp_path_factory.mktemp("two") / "run"), changes)
        return folders[key]

    return trained


@pytest.mark.parametrize(("stage", "changes"), [*((stage, {}) for stage in COMMANDS), ("prior", ANNEALED), ("tokenizer", HIERARCHICAL)],
                         ids=[*COMMANDS, "prior, annealed order", "tokenizer with two levels"])
def test_two_processes_train_the_same_weights_as_one(stage, changes, tiny_run, trained_by_two, tmp_path, capsys):
    two = trained_by_two(stage, accumulated(stage, changes))
    assert_two_processes_equal_one(stage, copy_tokens(tiny_run, tmp_path / "one"), two, changes, capsys)


def test_two_processes_train_a_prior_with_conditions_as_one(tmp_path, capsys):
    from tests.conditioned import write_shards
    from tests.test_condition_training import IMAGE, LOW, RECORDS, TEXT, made_up_ids

    ids = made_up_ids()
    tokens = write_shards(tmp_path / "tokens", [IMAGE, LOW, TEXT], ids, RECORDS, [number % 2 for number in range(len(ids["image"]))])
    changes = {"prior_training__tokens": tokens, "prior__architecture": "grid_transformer", "prior__layers": 2, "sampling__guidance_scale": 1.0,
               "prior_training__drop_rates": "{class: 0.3, low: 0.3, text: 0.3}"}
    two = train_by_two("prior", tmp_path / "two", accumulated("prior", changes))
    assert_two_processes_equal_one("prior", tmp_path / "one", two, changes, capsys)


def accumulated(stage: str, changes: dict[str, object]) -> dict[str, object]:
    """The settings of the two processes, which also accumulate gradients over two micro-batches each."""
    return RANK_INDEPENDENT | changes | {f"{stage}_training__accumulation_steps": 2}


def assert_two_processes_equal_one(stage: str, one: Path, two: Path, changes: dict[str, object], capsys) -> None:
    """Train in the folder `one` and compare weights and metrics with those of `two`, which two processes trained with the settings `accumulated`.

    Continuing the training of two processes with one is an error.
    """
    import torch

    assert train_here(stage, one, **RANK_INDEPENDENT | changes) == 0
    assert re.search(r"threads? x 1\b", capsys.readouterr().out)
    for step in (4, 6):
        expected, found = checkpoint_weights(one, stage, step), checkpoint_weights(two, stage, step)
        assert expected.keys() == found.keys()
        assert stage != "tokenizer" or any(name.endswith("quantizer.codebook") for name in expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=f"{name} at step {step}")
    for kind in ("train", "validation"):
        records_of_one, records_of_two = (records(run_dir, stage, kind) for run_dir in (one, two))
        assert len(records_of_one) == len(records_of_two) == {"train": 6, "validation": 2}[kind]
        for first, second in zip(records_of_one, records_of_two, strict=True):
            assert {**second, "seconds": 0} == {name: pytest.approx(value, rel=1e-3) if isinstance(value, float) else value
                                                for name, value in {**first, "seconds": 0}.items()}
    assert train_here(stage, two, **accumulated(stage, changes), **{f"{stage}_training__max_steps": 8}) == 2
    err = capsys.readouterr().err
    assert "written by 2 processes, now there is 1. Continue with --processes 2" in err and "Traceback" not in err


def test_two_processes_train_the_same_discriminator_as_one(tmp_path, capsys):
    """The balance is fixed, because the adaptive balance is a mean over the processes, each with its own half of the batch."""
    import torch
    from safetensors.torch import load_file

    adversarial = RANK_INDEPENDENT | {
        "adversarial__weight": 0.2, "adversarial__balance": "fixed", "adversarial__start": 0.2, "adversarial__warmup": 0.1, "adversarial__ramp": 0.2,
        "adversarial__layers": 1, "adversarial__channels": 32, "data__shift": 0, "tokenizer_training__perceptual_loss": "discriminator_features",
        "tokenizer_training__perceptual_weight": 0.1,
    }
    one, two = tmp_path / "one", tmp_path / "two"
    assert train_here("tokenizer", one, **adversarial) == 0
    assert capsys.readouterr().out.count("the discriminator joins at step 2") == 1
    code, out, err = finish(start("tokenizer", two, 2, **adversarial, tokenizer_training__accumulation_steps=2))
    assert code == 0, err
    assert out.count("the discriminator joins at step 2") == 1 and "Traceback" not in err
    for name in ("model", "model_1"):  # the tokenizer and the discriminator
        expected, found = (load_file(run_dir / f"checkpoints/tokenizer/step-00000006/{name}.safetensors") for run_dir in (one, two))
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-4, msg=f"{name}: {key}")
    adaptive = adversarial | {"adversarial__balance": "adaptive", "tokenizer__quantizer": "gradient"}  # each checkpoint compares the replicas
    code, _, err = finish(start("tokenizer", tmp_path / "adaptive", 2, **adaptive))
    assert code == 0, err


# --- accelerate configurations -----------------------------------------------------------------------------------------------------


def test_shipped_accelerate_configurations_equal_the_processes_option(tiny_run, tmp_path):
    assert train_here("prior", copy_tokens(tiny_run, tmp_path / "plain")) == 0
    exports = {"plain": (tmp_path / "plain/prior/model.safetensors").read_bytes()}
    for name, processes, config in (("one", 1, "one_gpu"), ("two", 2, None), ("two by config", 2, "two_cpu_processes")):
        code, out, err = finish(start("prior", copy_tokens(tiny_run, tmp_path / name), None if config else processes, config))
        assert code == 0 and re.search(rf"threads? x {processes}\b", out), err
        exports[name] = (tmp_path / name / "prior/model.safetensors").read_bytes()
    assert exports["one"] == exports["plain"] and exports["two by config"] == exports["two"]


def test_fsdp_on_cpus_is_refused(tiny_run, tmp_path):
    code, _, err = finish(start("prior", copy_tokens(tiny_run, tmp_path / "run"), 2, "fsdp2"))
    assert code == 2 and err.count("enables FSDP, which accelerate supports only on several GPUs, but this is 2 x cpu") == 1
    assert "Traceback" not in err and not (tmp_path / "run/checkpoints").exists()


def enable_fsdp_on_cpus() -> None:
    """Make accelerate use FSDP2 on CPUs. torch supports it over gloo, but accelerate enables it on GPUs only."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from vqmosaic.training import training_run

    original = training_run.make_accelerator

    def make_accelerator(*arguments):
        accelerator = original(*arguments)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", state_dict_type="FULL_STATE_DICT", cpu_ram_efficient_loading=False)
        accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        return accelerator

    training_run.make_accelerator = make_accelerator


@pytest.mark.parametrize("changes", [
    {"prior_training__accumulation_steps": 2},
    {"prior_training__weight_ema_decay": 0, "prior_training__export": "last", "prior_training__activation_checkpointing": True},
    ANNEALED,
], ids=["accumulated, with an average", "recomputed activations, without an average", "annealed order"])
def test_fsdp_equals_replicated_training_and_resumes(changes, tiny_run, trained_by_two, tmp_path, capfd, monkeypatch):
    """Training, validation, weight average, checkpoints and export with FSDP2. Without noise that depends on the rank, nothing may differ."""
    import torch
    from safetensors.torch import load_file

    monkeypatch.chdir(ROOT)
    fields = RANK_INDEPENDENT | changes
    replicated, sharded = trained_by_two("prior", fields), copy_tokens(tiny_run, tmp_path / "sharded")

    def run_sharded() -> str:
        arguments = ["sharded prior", str(tmp_path), "digits", *tiny_overrides(sharded, **fields)]
        assert run_stage("tests.test_two_processes", arguments, processes=2) == 0, capfd.readouterr().err
        return capfd.readouterr().out

    assert "on each of 2 processes (FSDP)" in run_sharded()
    export = (sharded / "prior/model.safetensors").read_bytes()
    expected, found = load_file(replicated / "prior/model.safetensors"), load_file(sharded / "prior/model.safetensors")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert (sharded / "checkpoints/prior/best.safetensors").is_file()
    shutil.rmtree(sharded / "checkpoints/prior/step-00000006")
    shutil.rmtree(sharded / "prior")
    assert "resumed at step 4" in run_sharded()
    assert (sharded / "prior/model.safetensors").read_bytes() == export


# --- stop, kill and resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", COMMANDS)
def test_stopped_and_killed_training_equals_uninterrupted_training(stage, tiny_run, tmp_path):
    changes = {f"{stage}_training__max_steps": 40, f"{stage}_training__validate_every": 10, f"{stage}_training__checkpoint_every": 5,
               "tokenizer__dropout": 0.1, "prior__dropout": 0.1}
    uninterrupted, stopped = copy_tokens(tiny_run, tmp_path / "uninterrupted"), copy_tokens(tiny_run, tmp_path / "stopped")
    code, _, err = finish(start(stage, uninterrupted, 2, **changes))
    assert code == 0, err

    process = start(stage, stopped, 2, **changes)
    read_until(process, "step 10:")
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 143
    assert err.count("stopped by SIGTERM") == 1 and "saved at step" in err and "Traceback" not in err
    assert not processes_with(str(stopped))

    process = start(stage, stopped, 2, **changes)
    read_until(process, "resumed at step")
    read_until(process, "step 20:")
    assert len(processes_with(str(stopped))) == 4  # the command, the launcher and two workers
    process.kill()
    process.wait()
    assert wait_for(lambda: not processes_with(str(stopped)), 10), "workers outlived the command"

    if stage == "prior":  # also kill it while the workers are still importing
        process = start(stage, stopped, 2, **changes)
        assert wait_for(lambda: len(processes_with(str(stopped))) == 4)
        process.kill()
        process.wait()
        assert wait_for(lambda: not processes_with(str(stopped)), 20), "workers outlived the command"

    code, out, err = finish(start(stage, stopped, 2, **changes))
    assert code == 0, err
    assert "resumed at step" in out
    for name in (f"{stage}/model.safetensors", *(["checkpoints/prior/last/model.safetensors"] if stage == "prior" else [])):
        assert (stopped / name).read_bytes() == (uninterrupted / name).read_bytes()


def destroy_models_after_collectives(folder: Path, rank: int) -> None:
    """Repeat the end of a training 100 times, each time while gloo's thread is about to release tensors."""
    import faulthandler

    import torch
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    from vqmosaic.runs.accelerator import keep_process_group

    (folder / "stores").mkdir(exist_ok=True)
    switch_interval = sys.getswitchinterval()
    for turn in range(100):
        faulthandler.dump_traceback_later(60, exit=True)
        distributed.init_process_group("gloo", store=distributed.FileStore(str(folder / "stores" / str(turn)), 2), rank=rank, world_size=2)
        model = DistributedDataParallel(torch.nn.Linear(2, 2))
        gathered = [torch.ones(8), torch.ones(8)]
        sys.setswitchinterval(600)  # no forced switches: other threads get the GIL only when it is released
        distributed.all_gather(gathered, torch.ones(8))
        distributed.barrier()
        keep_process_group()
        distributed.destroy_process_group()
        del model
        sys.setswitchinterval(switch_interval)


# --- messages and exit codes -----------------------------------------------------------------------------------------------------------


def worker(arguments: list[str]) -> None:
    """The worker function of the stage in this file. A mode that is not listed here ends without an error."""
    mode, folder, *stage_arguments = arguments
    rank = os.environ["RANK"]
    if mode == "sharded prior":
        from stage2_prior.train import main

        enable_fsdp_on_cpus()
        main(stage_arguments)
        return
    (Path(folder) / rank).touch()
    world_size = int(os.environ["WORLD_SIZE"])
    wait_for(lambda: len(list(Path(folder).glob("[01]"))) == world_size)  # the launcher ends all workers as soon as one fails
    if mode == "refuse on rank 1":
        if rank == "1":
            raise InputError("rank 1 has seen something that rank 0 has not.")
        time.sleep(60)
    if mode == "refuse on both":
        raise InputError("neither of us can use that.")
    if mode == "destroy models right after collectives":
        destroy_models_after_collectives(Path(folder), int(rank))
    if mode == "killed":
        if rank == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    if mode == "stuck":
        libc, lock = ctypes.CDLL(None), (ctypes.c_char * 64)()
        libc.pthread_mutex_init(lock, None)
        libc.pthread_mutex_lock(lock)
        with StopFlag():
            (Path(folder) / f"{rank}.ready").write_text(str(os.getpid()))
            libc.pthread_mutex_lock(lock)  # blocks forever in a library
    if mode == "wait":
        def interrupt(number, _frame):
            raise Interrupted(number, "saved nothing")

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, interrupt)
        (Path(folder) / f"{rank}.ready").touch()
        time.sleep(60)


def run_own_stage(mode: str, folder: Path, processes: int = 2, **options) -> int:
    return run_stage("tests.test_two_processes", [mode, str(folder)], processes, **options)


def test_processes_overrides_the_accelerate_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert run_own_stage("run", tmp_path, 1, accelerate_config="two_cpu_processes") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"0"}


@pytest.mark.parametrize(("mode", "code", "message"), [
    ("all is well", 0, ""), ("destroy models right after collectives", 0, ""), ("refuse on both", 2, "error: neither of us can use that."),
    ("refuse on rank 1", 2, "error: rank 1 has seen something that rank 0 has not."),
    ("killed", 1, "error: a worker process was killed (often: out of memory)")])
def test_exit_codes_and_messages_are_reported_once(mode, code, message, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert run_own_stage(mode, tmp_path) == code
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"0", "1"}
    err = capfd.readouterr().err
    assert err.count(message) == 1 if message else not err
    assert "Traceback" not in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("when", ["as the launcher starts", "as the workers run"])
def test_a_signal_at_any_time_gives_its_exit_code(when, number, code, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)

    def send() -> None:
        if when == "as the workers run":
            wait_for(lambda: len(list(tmp_path.glob("*.ready"))) == 2)
        else:
            wait_for(lambda: bool(processes_with(str(tmp_path))))
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    started = time.monotonic()
    assert run_own_stage("wait", tmp_path) == code
    sender.join()
    assert time.monotonic() - started < 40 and "Traceback" not in capfd.readouterr().err
    assert wait_for(lambda: not processes_with(str(tmp_path)), 10)


def test_a_signal_before_the_launcher_starts_is_forwarded(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    start_launcher = subprocess.Popen

    def signal_first(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGTERM)
        return start_launcher(*arguments, **keywords)

    monkeypatch.setattr(subprocess, "Popen", signal_first)
    assert run_own_stage("wait", tmp_path) == 143
    assert wait_for(lambda: not processes_with(str(tmp_path)), 10)


def test_a_wrong_number_of_processes_is_refused(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VQMOSAIC_PROCESSES": "2"}
    result = subprocess.run([sys.executable, "-m", "stage1_tokenizer.train", "digits", *tiny_overrides(tmp_path / "run")], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert result.returncode == 2 and "--processes is 2, but 1 were started" in result.stderr


def test_two_processes_report_locked_and_finished_runs_once(tiny_copy):
    from vqmosaic.runs.run_folder import RunFolder

    with RunFolder(tiny_copy).lock():
        code, _, err = finish(start("prior", tiny_copy, 2))
    assert code == 2 and err.count(f"in use by process {os.getpid()}") == 1 and "Traceback" not in err
    code, out, err = finish(start("prior", tiny_copy, 2))
    assert code == 0 and out.count("finished already") == 1 and not err


if __name__ == "__main__":
    run_worker(worker, sys.argv[1:])
