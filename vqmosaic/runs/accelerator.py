"""Sets up how a stage computes: number format, torch.compile, CPU threads, Accelerate and its process group."""

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

from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import TrainingConfig
from vqmosaic.runs.devices import default_device
from vqmosaic.runs.launch import check_world_size
from vqmosaic.runs.run_folder import RunFolder

KEPT_PROCESS_GROUPS: list[torch.distributed.ProcessGroup] = []
INITIAL_THREADS = torch.get_num_threads()  # read at import: an earlier stage in this process may change it


@cache
def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (avx512_bf16 or amx_bf16). bf16 is only worth using if it does."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def resolve_precision(mixed_precision: str, device: torch.device) -> str:
    """The precision for a recipe's mixed_precision on this device: no, bf16 or fp16. Raises InputError for fp16 on a CPU."""
    if mixed_precision == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"  # emulated bf16 is slower than float32
        return "bf16" if device.type == "cpu" and cpu_has_bf16() else "no"
    if mixed_precision == "fp16" and device.type == "cpu":
        raise InputError("mixed_precision is 'fp16', which needs a GPU. On a CPU, set it to auto, bf16 or no.")
    return mixed_precision


def check_compiler(field: str, device: torch.device) -> None:
    """Raise InputError, naming `field`, unless torch.compile works on this machine. It needs a C++ compiler, or Triton on a GPU.

    Call this through TrainingRun.wait_before_training: Ctrl-C in a terminal also ends the compiler, which does not mean that it is broken.
    """
    try:
        # a random size, so that a result cached on disk does not hide a missing compiler
        torch.compile(lambda x: x * 2 + 1, dynamic=False)(torch.ones(16 + time.time_ns() % 100_000, device=device))
    except Exception as error:  # many types, from a missing program to a missing header
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{field} is true, but torch.compile does not work on this machine: {reason}. Install a C++ compiler (and Triton for a "
                         f"GPU), or set {field} false.") from error


def set_threads(threads: int | None = None) -> int:
    """Set and return the number of CPU threads; None uses OMP_NUM_THREADS or torch's default. Results are bitwise equal only for equal numbers."""
    if threads is None:
        threads = threads_from_environment() or INITIAL_THREADS
    torch.set_num_threads(threads)
    return threads


def threads_from_environment() -> int | None:
    """The number in OMP_NUM_THREADS, or the first of a nested list such as 4,2; None if it is not set. Raises InputError if it is invalid."""
    text = os.environ.get("OMP_NUM_THREADS", "").strip()
    if not text:
        return None
    first = text.partition(",")[0].strip()
    if not first.isdecimal() or int(first) < 1:
        raise InputError(f"OMP_NUM_THREADS is {text!r} in the environment; allowed: a number of threads, or several separated by commas.")
    return int(first)


def make_accelerator(training: TrainingConfig, log_folder: str) -> Accelerator:
    """Create the Accelerator of one training stage. Raises InputError if the number of processes differs from --processes."""
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier stage in this process may have used another precision
    GradientState._reset_state()
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)  # accelerate has no newer name for it
    use_cpu = default_device().type == "cpu"
    precision = resolve_precision(training.mixed_precision, default_device())
    accelerator = Accelerator(
        cpu=use_cpu, mixed_precision=precision, gradient_accumulation_steps=training.accumulation_steps,
        log_with=training.trackers or None, project_dir=log_folder if training.trackers else None,
        # the quantizer synchronizes its buffers itself, with one all-reduce per step
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    check_world_size(accelerator.num_processes)
    return accelerator


def keep_process_group() -> None:
    """Keep a reference to torch's process group, if there is one, until this process ends. Call this before the group is destroyed.

    The destructor of a Gloo group joins the group's threads, and one of them may be waiting for the GIL to free the tensors of the last
    collective. A DDP model would run that destructor while it holds the GIL, which is a deadlock.
    """
    if (group := torch.distributed.group.WORLD) is not None:
        KEPT_PROCESS_GROUPS.append(group)


@contextlib.contextmanager
def lock_run_folder(run: RunFolder) -> Iterator[None]:
    """Lock the run folder in the main process. The other processes wait for the lock. All raise InputError if the folder cannot be locked."""
    state, lock_error = PartialState(), None
    with contextlib.ExitStack() as locks:
        if state.is_main_process:
            try:
                locks.enter_context(run.lock())
            except InputError as error:
                lock_error = error
        if float(reduce(torch.tensor(float(lock_error is not None), device=state.device), "sum")):
            raise lock_error or InputError(f"The main process could not lock run_dir {run.root}.")
        yield
