"""Times contestants alternately in one process, describes the machine, and records results in RESULTS.md."""

import importlib.metadata
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"


def use_two_cpu_threads() -> None:
    """Run all contestants, including vqmosaic's own stages, on two CPU threads without a GPU. Must be called before any computation."""
    os.environ["OMP_NUM_THREADS"] = "2"  # read by the stages
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(2)


def time_alternately(contestants: dict[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each contestant in each round. Contestants alternate, so that other load on the machine affects all of them equally."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(warm_up + rounds):
        for name, run in contestants.items():
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """The speed-up of `fast` over `slow`: the median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def describe_processor() -> str:
    """Name and vector instructions of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    name = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), platform.processor())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, bf16 instructions {'yes' if 'avx512_bf16' in text or 'amx_bf16' in text else 'no'}"


def describe_machine(*packages: str) -> str:
    """One line with date, hardware and versions."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", *packages)]
    gpu = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (f"{date.today()}; {describe_processor()}, {torch.get_num_threads()} threads{gpu}; "
            f"Python {platform.python_version()}, {', '.join(versions)}")


def record(title: str, lines: list[str], packages: tuple[str, ...] = ()) -> None:
    """Print a result and, with --record on the command line, write it to RESULTS.md, replacing the last result with this title."""
    words = ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *(word for word in sys.argv[1:] if word != "--record")]
    command = f"`{shlex.join(words)}`  "  # two spaces at the end: a line break in Markdown
    text = "\n".join([f"## {title}", "", command, describe_machine(*packages), "", *lines, ""])
    print(text)
    if "--record" not in sys.argv:
        return
    sections = RESULTS.read_text().split("\n## ") if RESULTS.exists() else ["# Results\n"]
    kept = [sections[0], *(f"## {section}" for section in sections[1:] if not section.startswith(f"{title}\n"))]
    RESULTS.write_text("\n".join([*(part.rstrip() + "\n" for part in kept), text]))
