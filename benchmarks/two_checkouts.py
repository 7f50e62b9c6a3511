"""Compares the speed of this checkout with that of another one, such as the one before a change.

    git worktree add /tmp/before v0.2.0
    python -m benchmarks.two_checkouts /tmp/before               # two CPU threads, about ten minutes
    python -m benchmarks.two_checkouts /tmp/before --record      # also write to RESULTS.md

Measures training steps (benchmarks.prior_step, benchmarks.tokenizer_step), sampling (benchmarks.sampling) and the quantizer (benchmarks.quantizer).
Each checkout has its own process. The two processes take turns: one waits while the other one runs.
"""

import argparse
import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROUNDS, STEPS_PER_ROUND = 15, 5
TASKS = ("prior, bf16", "prior, float32", "tokenizer, bf16", "tokenizer, bf16, compiled", "tokenizer, float32", "sampling tiny, float32",
         "sampling tiny, bf16", "sampling tiny llama, float32", "sampling tiny llama, bf16", "sampling B, float32", "sampling B, bf16",
         "sampling B llama, float32", "sampling B llama, bf16", "quantizer 16384 x 8", "quantizer 1024 x 64")


def make_task(name: str) -> Callable[[], object]:
    """A function that runs one round of a task, with the code of the checkout in the current folder."""
    import torch

    from benchmarks import cifar10, measuring, prior_step, sampling, tokenizer_step
    from stage1_tokenizer.quantizers import QUANTIZERS

    measuring.use_two_cpu_threads()
    kind, *options = name.replace(",", "").split()
    precision = "bf16" if "bf16" in options else "no"
    generator = torch.Generator().manual_seed(0)
    if kind == "prior":
        ids_BT = torch.randint(prior_step.CODES, (prior_step.BATCH, prior_step.TOKENS), generator=generator)
        classes_B = torch.randint(prior_step.CLASSES, (prior_step.BATCH,), generator=generator)
        return repeat(functools.partial(prior_step.Ours("grid_transformer", "adamw", precision).step, ids_BT, classes_B))
    if kind == "tokenizer":
        images_BCHW = cifar10.to_float(cifar10.load("train", 256)[0])
        contestant = tokenizer_step.Ours(precision, True, images_BCHW, compiled="compiled" in options)
        return repeat(functools.partial(contestant.step, images_BCHW[:tokenizer_step.BATCH]))
    if kind == "sampling":
        preset = sampling.PRESETS[options[0]]
        prior = sampling.make_prior(preset, "llama" if "llama" in options else "grid_transformer")
        return sampling.our_sampling(prior.to(torch.bfloat16 if precision == "bf16" else torch.float32), preset.batch)
    codes, dim = int(options[0]), int(options[2])
    latents_BDhw = torch.randn(128, dim, 8, 8, generator=generator)
    quantizer = QUANTIZERS["ema"](codes, dim).train()
    quantizer.codebook.copy_(torch.randn(codes, dim, generator=generator))

    def step() -> None:
        quantizer(latents_BDhw)
        quantizer.commit()
    return repeat(step)


def repeat(step: Callable[[], object]) -> Callable[[], None]:
    """A function that runs a step several times, as in training."""
    def run() -> None:
        for _ in range(STEPS_PER_ROUND):
            step()
    return run


def work() -> None:
    """For each line of standard input, run a round of the current task and print the seconds.

    A line with the name of a task makes it the current one. The seconds then include making the task and a round to warm up.
    """
    sys.path[0] = os.getcwd()  # in place of the folder of this file
    run: Callable[[], object] = int  # until the first line names a task
    for line in sys.stdin:
        started = time.perf_counter()
        if line.strip():
            run = make_task(line.strip())
            run()
        run()
        print(f"seconds {time.perf_counter() - started}", flush=True)


class Worker:
    """A process that runs the tasks with the code of a checkout."""

    def __init__(self, checkout: Path):
        settings = {"GOMP_SPINCOUNT": "6000", "MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}  # as set_up_process does
        self.process = subprocess.Popen([sys.executable, "-W", "ignore", Path(__file__).resolve(), "--work"], cwd=checkout, text=True,
                                        env=os.environ | settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, task: str = "") -> float:
        """Run a round of the current task and return the seconds. With a name, start that task first (see `work`)."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{task}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError(f"the process ended during {task}")


def main() -> int:
    """Time the tasks with both checkouts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path, help="another checkout of vqmosaic")
    parser.add_argument("--only", default="", help="run only the tasks whose names contain this text")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--record", action="store_true", help="write the result to RESULTS.md")
    options = parser.parse_args()
    from benchmarks.measuring import ratio, record, use_two_cpu_threads
    use_two_cpu_threads()
    checkouts = {"before": options.before, "now": Path(__file__).resolve().parents[1]}
    workers = {name: Worker(checkout) for name, checkout in checkouts.items()}
    commits = {name: subprocess.run(["git", "describe", "--always", "--dirty"], cwd=checkout, capture_output=True, text=True).stdout.strip()
               for name, checkout in checkouts.items()}
    lines = [f"Before: {commits['before']}. Now: {commits['now']}.", "", "| | before, ms | now, ms | time before / time now |", "|---|---|---|---|"]
    for task in (name for name in TASKS if options.only in name):
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for worker in workers.values():
            worker.run(task)
        for number in range(max(1, options.rounds // (3 if "sampling B" in task else 1))):
            for name in list(workers) if number % 2 else list(workers)[::-1]:  # each is first in every second round
                seconds[name].append(workers[name].run())
        steps = 1 if task.startswith("sampling") else STEPS_PER_ROUND
        before, now = (statistics.median(seconds[name]) / steps * 1000 for name in ("before", "now"))
        lines.append(f"| {task} | {before:.1f} | {now:.1f} | {ratio(seconds, 'before', 'now'):.3f} |")
        print(lines[-1], flush=True)
    for worker in workers.values():
        assert worker.process.stdin is not None
        worker.process.stdin.close()
    record("Two checkouts", lines, ("transformers", "accelerate"))
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--work"]:
        work()
    else:
        sys.exit(main())
