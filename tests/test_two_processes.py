"""Two processes under the real launcher, on CPUs over gloo: the same result as one, exit codes that come back, nobody left behind.

Run as a module this file is a stage of its own, whose workers end in ways that no real stage can be made to end at will.
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

from tests.tiny import ROOT, tiny_overrides
from vqmosaic.errors import InputError
from vqmosaic.runs.interruption import Interrupted, StopFlag
from vqmosaic.runs.launch import run_stage, run_worker

pytestmark = pytest.mark.slow
COMMANDS = {"tokenizer": "train-tokenizer", "prior": "train-prior"}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
EVEN = {"tokenizer__channels": 64, "tokenizer__dropout": 0, "prior__dropout": 0, "prior_training__label_drop": 0.3, "data__shift": 1,
        "tokenizer_training__validation_images": 63, "prior_training__validation_images": 63}
"""No noise that depends on the rank; 64 channels, since with one channel a group biases before a norm are steps of rounding errors."""


def start(stage: str, run_dir: Path, processes: int, accelerate_config: str | None = None, **changes) -> subprocess.Popen:
    how = ["--processes", str(processes)] if accelerate_config is None else ["--accelerate_config", f"configs/accelerate/{accelerate_config}.yaml"]
    command = [sys.executable, "-m", "pipelines.command_line", COMMANDS[stage], "digits", *tiny_overrides(run_dir, **changes), *how]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code and output; of what hangs, everybody's stacks."""
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        for each in reversed(family(process.pid)):
            os.kill(each, signal.SIGABRT)
        _, err = process.communicate(timeout=30)
        raise AssertionError(f"{process.args} hung: {err}") from None
    return process.returncode, out, err


def family(process: int) -> list[int]:
    """A process, its children and theirs."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(each for child in children for each in family(int(child)))]


def read_until(process: subprocess.Popen, words: str) -> None:
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"{words!r} was never printed; {process.stderr.read()}")


def processes_with(text: str) -> list[int]:
    """Living processes whose command line has the text in it, this one aside."""
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


def make_run(tiny_run: Path, run_dir: Path) -> Path:
    shutil.copytree(tiny_run / "tokens", run_dir / "tokens")
    return run_dir


def checkpoint(run_dir: Path, stage: str, step: int):
    from safetensors.torch import load_file

    return load_file(run_dir / f"checkpoints/{stage}/step-{step:08d}/model.safetensors")


# --- one result --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", COMMANDS)
def test_two_processes_on_halves_equal_one_on_the_whole(stage, tiny_run, tmp_path):
    """The two also work through their halves in two parts each."""
    import torch

    from vqmosaic.runs.run_folder import RunFolder
    from vqmosaic.training.tracking import read_metrics

    one, two = make_run(tiny_run, tmp_path / "one"), make_run(tiny_run, tmp_path / "two")
    in_parts = EVEN | {f"{stage}_training__accumulation_steps": 2}
    for run_dir, processes, changes in ((one, 1, EVEN), (two, 2, in_parts)):
        code, out, err = finish(start(stage, run_dir, processes, **changes))
        assert code == 0, err
        assert re.search(rf"threads? x {processes}\b", out) and "Traceback" not in err
    for step in (4, 6):
        expected, found = checkpoint(one, stage, step), checkpoint(two, stage, step)
        assert expected.keys() == found.keys()
        assert stage != "tokenizer" or "quantizer.codebook" in expected
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=f"{name} at step {step}")
    for kind in ("train", "validation"):
        of_one, of_two = (read_metrics(RunFolder(run_dir).logs(stage) / "metrics.jsonl", kind) for run_dir in (one, two))
        assert len(of_one) == len(of_two) == {"train": 6, "validation": 2}[kind]
        for first, second in zip(of_one, of_two, strict=True):
            assert {**second, "seconds": 0} == {name: pytest.approx(value, rel=1e-3) if isinstance(value, float) else value
                                                for name, value in {**first, "seconds": 0}.items()}
    code, _, err = finish(start(stage, two, 1, **in_parts, **{f"{stage}_training__max_steps": 8}))
    assert code == 2 and "written by 2 processes, now there is 1. Continue with --processes 2" in err and "Traceback" not in err


def test_two_processes_train_a_discriminator_like_one(tiny_run, tmp_path):
    """With the balance fixed: the adaptive one is the mean of what each process finds on its own half."""
    import torch
    from safetensors.torch import load_file

    rival = EVEN | {"adversarial__weight": 0.2, "adversarial__balance": "fixed", "adversarial__start": 0.2, "adversarial__warmup": 0.1,
                    "adversarial__ramp": 0.2, "adversarial__layers": 1, "adversarial__channels": 32, "data__shift": 0,
                    "tokenizer_training__perceptual_loss": "discriminator_features", "tokenizer_training__perceptual_weight": 0.1}
    one, two = tmp_path / "one", tmp_path / "two"
    for run_dir, processes, changes in ((one, 1, rival), (two, 2, rival | {"tokenizer_training__accumulation_steps": 2})):
        code, out, err = finish(start("tokenizer", run_dir, processes, **changes))
        assert code == 0, err
        assert out.count("the discriminator joins at step 2") == 1 and "Traceback" not in err
    for name in ("model", "model_1"):
        expected, found = (load_file(run_dir / f"checkpoints/tokenizer/step-00000006/{name}.safetensors") for run_dir in (one, two))
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-4, msg=f"{name}: {key}")
    other = rival | {"adversarial__balance": "adaptive", "tokenizer__quantizer": "gradient"}  # its replicas are compared at each checkpoint
    code, _, err = finish(start("tokenizer", tmp_path / "adaptive", 2, **other))
    assert code == 0, err


# --- accelerate configurations -----------------------------------------------------------------------------------------------------


def test_shipped_accelerate_configurations_do_what_processes_does(tiny_run, tmp_path):
    exports = {}
    for name, processes, config in (("plain", 1, None), ("one", 1, "one_gpu"), ("two", 2, None), ("two by config", 2, "two_cpu_processes")):
        code, out, err = finish(start("prior", make_run(tiny_run, tmp_path / name), processes, config))
        assert code == 0 and re.search(rf"threads? x {processes}\b", out), err
        exports[name] = (tmp_path / name / "prior/model.safetensors").read_bytes()
    assert exports["one"] == exports["plain"] and exports["two by config"] == exports["two"]


def test_fsdp_on_cpus_is_refused_instead_of_silently_left_out(tiny_run, tmp_path):
    code, _, err = finish(start("prior", make_run(tiny_run, tmp_path / "run"), 4, "fsdp2"))
    assert code == 2 and err.count("enables FSDP, which accelerate supports only on several GPUs, but this is 4 x cpu") == 1
    assert "Traceback" not in err and not (tmp_path / "run/checkpoints").exists()


def divide_weights() -> None:
    """Make accelerate believe that FSDP2 was set up on these CPUs, which torch can do over gloo and accelerate leaves to GPUs."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from vqmosaic.training import training_run

    make = training_run.make_accelerator

    def make_accelerator(*arguments):
        accelerator = make(*arguments)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", state_dict_type="FULL_STATE_DICT", cpu_ram_efficient_loading=False)
        accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        return accelerator

    training_run.make_accelerator = make_accelerator


@pytest.mark.parametrize("changes", [
    {"prior_training__accumulation_steps": 2},
    {"prior_training__weight_ema_decay": 0, "prior_training__export": "last", "prior_training__activation_checkpointing": True},
], ids=["accumulated, with an average", "recomputed activations, without an average"])
def test_divided_weights_end_like_whole_ones_and_resume(changes, tiny_run, tmp_path, capfd, monkeypatch):
    """FSDP2: training, validation, the average, checkpoints and export; without noise that depends on the rank nothing may differ."""
    import torch
    from safetensors.torch import load_file

    monkeypatch.chdir(ROOT)
    fields = EVEN | changes
    whole, divided = make_run(tiny_run, tmp_path / "whole"), make_run(tiny_run, tmp_path / "divided")
    code, _, err = finish(start("prior", whole, 2, **fields))
    assert code == 0, err

    def run_divided() -> str:
        arguments = ["divided prior", str(tmp_path), "digits", *tiny_overrides(divided, **fields)]
        assert run_stage("tests.test_two_processes", arguments, processes=2) == 0, capfd.readouterr().err
        return capfd.readouterr().out

    assert "on each of 2 processes (FSDP)" in run_divided()
    export = (divided / "prior/model.safetensors").read_bytes()
    expected, found = load_file(whole / "prior/model.safetensors"), load_file(divided / "prior/model.safetensors")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert (divided / "checkpoints/prior/best.safetensors").is_file()
    shutil.rmtree(divided / "checkpoints/prior/step-00000006")
    shutil.rmtree(divided / "prior")
    assert "resumed at step 4" in run_divided()
    assert (divided / "prior/model.safetensors").read_bytes() == export


# --- stopped, killed, gone on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", COMMANDS)
def test_stopped_killed_and_resumed_ends_like_a_straight_run_and_leaves_nobody_behind(stage, tiny_run, tmp_path):
    many = {f"{stage}_training__max_steps": 40, f"{stage}_training__validate_every": 10, f"{stage}_training__checkpoint_every": 5,
            "tokenizer__dropout": 0.1, "prior__dropout": 0.1}
    straight, stopped = make_run(tiny_run, tmp_path / "straight"), make_run(tiny_run, tmp_path / "stopped")
    code, _, err = finish(start(stage, straight, 2, **many))
    assert code == 0, err

    process = start(stage, stopped, 2, **many)
    read_until(process, "step 10:")
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 143
    assert err.count("stopped by SIGTERM") == 1 and "saved at step" in err and "Traceback" not in err
    assert not processes_with(str(stopped))

    process = start(stage, stopped, 2, **many)
    read_until(process, "resumed at step")
    read_until(process, "step 20:")
    assert len(processes_with(str(stopped))) == 4  # the command, the launcher and two workers
    process.kill()
    process.wait()
    assert wait_for(lambda: not processes_with(str(stopped)), 10), "workers outlived the command"

    if stage == "prior":  # and once while the workers are still importing
        process = start(stage, stopped, 2, **many)
        assert wait_for(lambda: len(processes_with(str(stopped))) == 4)
        process.kill()
        process.wait()
        assert wait_for(lambda: not processes_with(str(stopped)), 20), "workers outlived the command"

    code, out, err = finish(start(stage, stopped, 2, **many))
    assert code == 0, err
    assert "resumed at step" in out
    for name in (f"{stage}/model.safetensors", *(["checkpoints/prior/last/model.safetensors"] if stage == "prior" else [])):
        assert (stopped / name).read_bytes() == (straight / name).read_bytes()


def part_with_models(folder: Path, rank: int) -> None:
    """A hundred times what happens at the end of a training, or after a stop, at the moment when gloo's thread is about to let go of tensors."""
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
        sys.setswitchinterval(600)  # a thread that waits for Python's lock gets it when it is free, and not before
        distributed.all_gather(gathered, torch.ones(8))
        distributed.barrier()
        keep_process_group()
        distributed.destroy_process_group()
        del model
        sys.setswitchinterval(switch_interval)


# --- words and codes -------------------------------------------------------------------------------------------------------------------


def worker(arguments: list[str]) -> None:
    """What the workers of this file's own stage do."""
    how, folder, *more = arguments
    rank = os.environ["RANK"]
    if how == "divided prior":
        from stage2_prior.train import main

        divide_weights()
        main(more)
        return
    (Path(folder) / rank).touch()
    world_size = int(os.environ["WORLD_SIZE"])
    wait_for(lambda: len(list(Path(folder).glob("[01]"))) == world_size)  # the launcher ends the slower one as soon as the other fails
    if how == "refuse on rank 1":
        if rank == "1":
            raise InputError("rank 1 has seen something that rank 0 has not.")
        time.sleep(60)
    if how == "refuse on both":
        raise InputError("neither of us can use that.")
    if how == "part with models right after collectives":
        part_with_models(Path(folder), int(rank))
    if how == "killed":
        if rank == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    if how == "stuck":
        libc, lock = ctypes.CDLL(None), (ctypes.c_char * 64)()
        libc.pthread_mutex_init(lock, None)
        libc.pthread_mutex_lock(lock)
        with StopFlag():
            (Path(folder) / f"{rank}.ready").write_text(str(os.getpid()))
            libc.pthread_mutex_lock(lock)  # waits for ever inside a library
    if how == "wait":
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _frame: (_ for _ in ()).throw(Interrupted(number, "saved nothing")))
        (Path(folder) / f"{rank}.ready").touch()
        time.sleep(60)


def run_own_stage(how: str, folder: Path, processes: int = 2, **options) -> int:
    return run_stage("tests.test_two_processes", [how, str(folder)], processes, **options)


def test_processes_goes_before_what_an_accelerate_configuration_says(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert run_own_stage("run", tmp_path, 1, accelerate_config="two_cpu_processes") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"0"}


@pytest.mark.parametrize(("how", "code", "words"), [
    ("all is well", 0, ""), ("part with models right after collectives", 0, ""), ("refuse on both", 2, "error: neither of us can use that."),
    ("refuse on rank 1", 2, "error: rank 1 has seen something that rank 0 has not."),
    ("killed", 1, "error: a worker process was killed (often: out of memory)")])
def test_exit_codes_and_words_come_back_once(how, code, words, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert run_own_stage(how, tmp_path) == code
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"0", "1"}
    err = capfd.readouterr().err
    assert err.count(words) == 1 if words else not err
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


def test_a_signal_before_there_is_a_launcher_reaches_it(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    start_launcher = subprocess.Popen

    def signal_first(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGTERM)
        return start_launcher(*arguments, **keywords)

    monkeypatch.setattr(subprocess, "Popen", signal_first)
    assert run_own_stage("wait", tmp_path) == 143
    assert wait_for(lambda: not processes_with(str(tmp_path)), 10)


def test_another_number_of_processes_than_asked_for_is_refused(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VQMOSAIC_PROCESSES": "2"}
    done = subprocess.run([sys.executable, "-m", "stage1_tokenizer.train", "digits", *tiny_overrides(tmp_path / "run")], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "--processes is 2, but 1 were started" in done.stderr


def test_a_run_in_use_and_a_stage_that_is_finished_are_said_once_by_two_processes(tiny_copy):
    from vqmosaic.runs.run_folder import RunFolder

    with RunFolder(tiny_copy).lock():
        code, _, err = finish(start("prior", tiny_copy, 2))
    assert code == 2 and err.count(f"in use by process {os.getpid()}") == 1 and "Traceback" not in err
    code, out, err = finish(start("prior", tiny_copy, 2))
    assert code == 0 and out.count("finished already") == 1 and not err


if __name__ == "__main__":
    run_worker(worker, sys.argv[1:])
