"""Recognizes errors for too little memory, says how much there is, and splits batches that do not fit.

Does not import torch before there is such an error, so commands can use it in their error handling.
"""

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from vqmosaic.errors import InputError

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")
# CUDA, the CPU allocator of torch on Linux and on Windows, cuBLAS and cuDNN. Only CUDA and numpy have classes for them.
MEMORY_PATTERN = re.compile(r"out of memory|can't allocate memory|not enough memory|_ALLOC_FAILED", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error reports too little memory on any device."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and (type(error).__name__ == "OutOfMemoryError" or MEMORY_PATTERN.search(str(error)) is not None)


def describe_memory(device: "torch.device | None") -> str:
    """The device with its free and total memory, as far as they are known, such as "cuda:0 (1.2 of 79.1 GiB free)"."""
    name = "this machine" if device is None or device.type == "cpu" else str(device)
    try:
        if device is not None and device.type == "cuda":
            import torch

            free, total = torch.cuda.mem_get_info(device)
        elif device is None or device.type == "cpu":
            page = os.sysconf("SC_PAGE_SIZE")
            free, total = os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
        else:
            return name
    except (OSError, ValueError, AttributeError, RuntimeError):  # not known on this system, or the device does not answer any more
        return name
    return f"{name} ({free / 2**30:.1f} of {total / 2**30:.1f} GiB free)"


class TooLittleMemory(InputError):
    """Not even one image fits into memory."""


class FittingBatches:
    """Computes batches. One that does not fit into memory is split in halves, and all later batches are at most as large as those that fit."""

    def __init__(self, device: "torch.device", name: str | None = None):
        """`name` is the argument that sets the size of a batch, for the warning. None if there is no such argument."""
        self.device, self.name = device, name
        self.limit: int | None = None
        """The largest size of a batch from now on."""

    def run(self, batches: Iterable[range], compute: Callable[[range], Result]) -> Iterator[tuple[range, Result]]:
        """Yield each batch, or the parts into which it is split, with its result, in order.

        Raises TooLittleMemory if a batch of one image does not fit.
        """
        for batch in batches:
            start = batch.start
            while start < batch.stop:
                part = range(start, batch.stop if self.limit is None else min(batch.stop, start + self.limit))
                results = self._try(part, compute)
                if results:
                    start = part.stop
                    yield part, results.pop()  # not kept here, so that only the caller holds it while the next batch is computed

    def _try(self, part: range, compute: Callable[[range], Result]) -> list[Result]:
        """The result of a batch in a list, which is empty if the batch does not fit."""
        try:
            return [compute(part)]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(part) == 1:
                raise TooLittleMemory(f"one image does not fit into the memory of {describe_memory(self.device)}. Close other programs that use it, "
                                      "choose another device, or give the dtype bfloat16.") from error
        # outside of the except block: the traceback of the error would keep the tensors of the failed batch
        self.limit = len(part) // 2
        free_cached_memory(self.device)
        remedy = f" Give {self.name}={self.limit} to begin with it." if self.name is not None else ""
        warnings.warn(f"a batch of {len(part)} images does not fit into the memory of {describe_memory(self.device)}. Continuing with batches of "
                      f"{self.limit}. The images are the same.{remedy}", stacklevel=2)
        return []


def free_cached_memory(device: "torch.device") -> None:
    """Give memory back that torch has reserved on a GPU and does not use."""
    if device.type == "cuda" and "torch" in sys.modules:
        import torch

        torch.cuda.empty_cache()


def ranges(total: int, size: int) -> Iterator[range]:
    """The numbers from 0 to below `total` in batches of a size."""
    return (range(start, min(start + size, total)) for start in range(0, total, size))
