"""Which device, number format, thread count and processes a stage computes with."""

import contextlib
import os
import time
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, reduce

from vqmosaic.runs.devices import default_device
from vqmosaic.errors import InputError
from vqmosaic.runs.launch import check_world_size
from vqmosaic.recipes.recipe_sections import TrainingConfig
from vqmosaic.runs.run_folder import RunFolder

GROUPS_KEPT: list[torch.distributed.ProcessGroup] = []
THREADS_AT_START = torch.get_num_threads()  # a stage that ran before in this process may have set another number


@cache
def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices in hardware (avx512_bf16 or amx_bf16), where bf16 pays."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def resolve_precision(mixed_precision: str, device: torch.device) -> str:
    """no, bf16 or fp16 for a recipe's mixed_precision on this device; fp16 is refused on a CPU."""
    if mixed_precision == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"  # emulated bf16 is slower than float32
        return "bf16" if device.type == "cpu" and cpu_has_bf16() else "no"
    if mixed_precision == "fp16" and device.type == "cpu":
        raise InputError("mixed_precision is 'fp16', which needs a GPU; on a CPU set it to auto, bf16 or no.")
    return mixed_precision


def check_compiler(field: str, device: torch.device) -> None:
    """Raise InputError, naming the field that asks for it, unless torch.compile works here: it needs a C++ compiler, or Triton on a GPU.

    Call this through TrainingRun.wait_before_training: Ctrl-C in a terminal also ends the compiler, which does not mean that it is broken.
    """
    try:
        # a size that was hardly met before: the caches on disk may be from times when there was a compiler
        torch.compile(lambda x: x * 2 + 1, dynamic=False)(torch.ones(16 + time.time_ns() % 100_000, device=device))
    except Exception as error:  # of many kinds, from a missing program to a missing header
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{field} is true, but torch.compile does not work on this machine: {reason}. Install a C++ compiler (and Triton for a "
                         f"GPU), or set {field} false.") from error


def set_threads(threads: int | None = None) -> int:
    """Fix and return the number of CPU threads; results are bitwise the same only at the same number."""
    if threads is None:
        threads = threads_of_environment() or THREADS_AT_START
    torch.set_num_threads(threads)
    return threads


def threads_of_environment() -> int | None:
    """OMP_NUM_THREADS, of a list for nested levels such as 4,2 the first one; None where it is not set. Raises InputError for anything else."""
    text = os.environ.get("OMP_NUM_THREADS", "").strip()
    if not text:
        return None
    first = text.partition(",")[0].strip()
    if not first.isdecimal() or int(first) < 1:
        raise InputError(f"OMP_NUM_THREADS is {text!r} in the environment; allowed: a number of threads, or several with commas between.")
    return int(first)


def make_accelerator(training: TrainingConfig, log_folder: str) -> Accelerator:
    """Accelerate's handle for one training stage; the world size is checked against the one asked for."""
    AcceleratorState._reset_state(reset_partial_state=True)  # a stage that ran before in this process may have used another precision
    GradientState._reset_state()
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)  # accelerate has no other name for it
    use_cpu = default_device().type == "cpu"
    precision = resolve_precision(training.mixed_precision, default_device())
    accelerator = Accelerator(
        cpu=use_cpu, mixed_precision=precision, gradient_accumulation_steps=training.accumulation_steps,
        log_with=training.trackers or None, project_dir=log_folder if training.trackers else None,
        # the quantizer keeps its buffers equal itself, with one all-reduce a step
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    check_world_size(accelerator.num_processes)
    return accelerator


def keep_process_group() -> None:
    """Keep torch's object of the process group, if there is one, for as long as this process lives; to be called before the group is destroyed.

    Gloo's object waits for its threads when it goes, and one of them may be waiting for Python's lock, to let go of the last collective's
    tensors. A model wrapped for several processes takes the object with it while it holds that lock: both would wait for ever.
    """
    if torch.distributed.is_initialized():
        GROUPS_KEPT.append(torch.distributed.group.WORLD)


@contextlib.contextmanager
def held_by_main_process(run: RunFolder) -> Iterator[None]:
    """Hold the run folder in a stage's main process; no other process looks into it before that, and all stop where it is refused."""
    state, refusal = PartialState(), None
    with contextlib.ExitStack() as held:
        if state.is_main_process:
            try:
                held.enter_context(run.lock())
            except InputError as error:
                refusal = error
        if float(reduce(torch.tensor(float(refusal is not None), device=state.device), "sum")):
            raise refusal or InputError(f"run_dir {run.root} was refused to the main process.")
        yield
