"""Process settings that must be made before torch is loaded: output encoding, waiting threads, malloc."""

import contextlib
import ctypes
import io
import os
import sys
from typing import cast

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def set_up_process() -> None:
    """Set the output encoding, how CPU threads wait and, on Linux, that malloc keeps freed memory. Call this before torch is loaded.

    Names of files and classes may contain characters that the output encoding lacks. These are printed as escapes.

    Threads that spin while they wait for each other lose whole time slices to other programs. With libgomp's default of 300,000 spins, two trainings
    on two cores took over 20 times as long as one. Without spinning, each of the thousands of short operations of a bf16 step has to wake a thread,
    and a step takes 1.5 times as long. 6,000 spins cost 5 % on a quiet machine, and two trainings on two cores take 2.7 times as long as one. With
    3,000 spins it is 20 %, and 2.3 times (a prior's step on an Intel Xeon). GOMP_SPINCOUNT and OMP_WAIT_POLICY in the environment take precedence.

    A training step allocates and frees its buffers again and again. If malloc returned them to the system, the system would clear each page again,
    which takes 10 % of a step.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as in `vqmosaic ... >&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, open until the process ends
    with contextlib.suppress(AttributeError, ValueError):  # closed, or not a text stream of Python
        cast(io.TextIOWrapper, sys.stdout).reconfigure(errors="backslashreplace")
    if sys.platform != "linux":  # other systems have other OpenMP libraries, without a spin count
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    elif "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "6000")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # only glibc has it
    if mallopt is not None and (mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)):  # older glibc allows 32 MiB
        mallopt(M_TRIM_THRESHOLD, 2**30)
