"""Runs the chain of `make quickstart` (recipe mnist) with several seeds, and checks each run with .ci/check_quickstart.py.

    python -m benchmarks.quickstart                       # one seed, two CPU threads, about five minutes
    python -m benchmarks.quickstart --seeds 3 --record    # also write to RESULTS.md, and the pictures of the first seed to docs/

The recipe has a fixed number of steps, so only the times depend on what else the machine does. The first seed is that of the recipe. Finished runs
in --folder are kept and not trained again.
"""

import argparse
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measuring import record, use_two_cpu_threads

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "mnist"
PICTURES = {"samples.png": "digits_samples.png", "edited.png": "digits_edited.png"}
"""Picture of a run -> its name in docs/."""


def run_chain(run: Path, seed: int) -> None:
    """Run all stages with the command that `make quickstart` uses, in a process of its own."""
    command = [sys.executable, "-m", "pipelines.command_line", "run", RECIPE, "--run_dir", str(run), "--seed", str(seed)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


def describe(summaries: dict[int, dict[str, Any]]) -> list[str]:
    """Tables of the quality and the time of each seed."""
    lines = ["| seed | PSNR | codebook used | prior, nats per token | samples of the requested class | copies | distinct | spread |",
             "|---|---|---|---|---|---|---|---|"]
    for seed, summary in summaries.items():
        tokenizer = summary["tokenizer"]
        for name, samples in summary["generation"].items():
            first = name == "recommended"
            figures = [f"{tokenizer['psnr']:.2f} dB", f"{tokenizer['codebook_usage']:.0%}", f"{summary['prior']['nll']:.3f}"] if first else [""] * 3
            lines.append(f"| {seed if first else name} | {' | '.join(figures)} | {samples['class_agreement']:.1%} | {samples['copies']:.1%} "
                         f"| {samples['distinct']:.1%} | {samples['spread']:.2f} |")
    stages = list(next(iter(summaries.values()))["seconds_of_this_call"])
    lines += ["", f"| seed | {' | '.join(f'{stage}, s' for stage in stages)} | total, s |", f"|---|{'---|' * (len(stages) + 1)}"]
    for seed, summary in summaries.items():
        seconds = summary["seconds_of_this_call"]
        lines.append(f"| {seed} | {' | '.join(f'{seconds[stage]:.0f}' for stage in stages)} | {sum(seconds.values()):.0f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="number of runs, with seeds from 0")
    parser.add_argument("--folder", type=Path, help="keep the run folders here; by default they are temporary")
    parser.add_argument("--record", action="store_true", help="write the results to RESULTS.md, and pictures to docs/")
    arguments = parser.parse_args()
    use_two_cpu_threads()
    promises = runpy.run_path(str(ROOT / ".ci" / "check_quickstart.py"))["promises"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        runs = {seed: folder / f"seed-{seed}" for seed in range(arguments.seeds)}
        for seed, run in runs.items():
            run_chain(run.absolute(), seed)
        summaries = {seed: json.loads((run / "summary.json").read_text()) for seed, run in runs.items()}
        found = {seed: promises(run) for seed, run in runs.items()}
        if arguments.record:
            for name, documented in PICTURES.items():
                shutil.copyfile(runs[0] / name, ROOT / "docs" / documented)
    accuracy = next(iter(summaries.values()))["classifier_accuracy_on_held_out_digits"]
    broken = [f"- NOT kept with seed {seed}: {promise}: {value}" for seed, kept_by in found.items() for promise, (value, kept) in kept_by.items()
              if not kept]
    record("Quickstart", [*describe(summaries), "",
                          f"500 samples per row, with the recommended settings and, below, with others. The classifier assigns {accuracy:.1%} of the "
                          "held-out real digits to their class.", "",
                          *(broken or [f"- kept with every seed: all {len(next(iter(found.values())))} promises of .ci/check_quickstart.py"])],
           ("transformers", "scikit-learn"))
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
