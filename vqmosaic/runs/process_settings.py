"""What a process settles before torch is loaded."""

import contextlib
import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def set_up_process() -> None:
    """What is to be settled before torch is loaded: how output is written, how threads of CPUs wait, and under Linux that freed memory is kept.

    Names of files and classes may hold what the encoding of the output cannot show; they are printed with escapes.

    Threads that wait for each other by spinning lose whole time slices to any other program: with libgomp's usual 300,000 turns, two trainings on
    two cores took over 20 times as long as one. Without any, each of the thousands of short operations of a step in bf16 has to wake a
    thread: half as long again. 6,000 turns cost a twentieth on a quiet machine, and let two trainings on two cores take 2.7 times as long as one;
    with 3,000 it is a fifth, and 2.3 times (a prior's step on an Intel Xeon). GOMP_SPINCOUNT and OMP_WAIT_POLICY go first.

    The buffers of a training step come and go; given back to the system in between, each of their pages is cleared again, a tenth of a step.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before the program began, as by `vqmosaic ... >&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, open to the end of the process
    with contextlib.suppress(AttributeError, ValueError):  # output that was closed, or is no text stream of Python's own
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.platform != "linux":  # other systems have other libraries, which know no such number
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    elif "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "6000")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # glibc's; others have none
    if mallopt is not None and (mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)):  # older versions allow 32 MiB
        mallopt(M_TRIM_THRESHOLD, 2**30)
