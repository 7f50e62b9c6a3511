"""How the benchmarks measure: contestants in turn within one process, medians of their times, and on what machine that was."""

import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"


def use_two_cpu_threads() -> None:
    """All contestants on two CPU threads, the project's own stages included, and on no GPU. To be called before anything is computed."""
    os.environ["OMP_NUM_THREADS"] = "2"  # what a stage sets its number of threads by
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(2)


def in_turn(contestants: dict[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; they take turns, so that what else the machine does meets all of them alike."""
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
    """How many times faster one contestant is: the median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def processor() -> str:
    """Name of the processor and what of it decides speed here."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    name = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), platform.processor())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, bf16 products {'yes' if 'avx512_bf16' in text or 'amx_bf16' in text else 'no'}"


def machine(*packages: str) -> str:
    """One line on date, hardware and versions, for the record of a result."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", *packages)]
    gpu = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{date.today()}; {processor()}, {torch.get_num_threads()} threads{gpu}; Python {platform.python_version()}, {', '.join(versions)}"


def record(title: str, lines: list[str], packages: tuple[str, ...] = ()) -> None:
    """Print a result and, with --record on the command line, put it into RESULTS.md in place of the last one of this title."""
    words = ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *(word for word in sys.argv[1:] if word != "--record")]
    text = "\n".join([f"## {title}", "", f"`{' '.join(words)}`  ",
                      machine(*packages), "", *lines, ""])
    print(text)
    if "--record" not in sys.argv:
        return
    sections = RESULTS.read_text().split("\n## ") if RESULTS.exists() else ["# Results\n"]
    kept = [sections[0], *(f"## {section}" for section in sections[1:] if not section.startswith(f"{title}\n"))]
    RESULTS.write_text("\n".join([*(part.rstrip() + "\n" for part in kept), text]))
