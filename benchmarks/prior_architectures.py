"""Compares grid_transformer, the prior of recipe cifar10, with architectures of transformers, trained for the same wall-clock time.

    python -m benchmarks.prior_architectures --tokens runs/c10            # tokenizer and tokens of a finished run; 6 trainings of 4 minutes
    python -m benchmarks.prior_architectures --tokens runs/c10 --record   # also write to RESULTS.md

The code of `train-prior` trains all of them on the same tokens, in the size of preset tiny, with the recipe's optimizer, the batch size of
prior_quality and no dropout. The recipe's learning rate was not chosen for the architectures of transformers, so they are also trained with half of
it. The metric is the NLL on all test images, averaged over the seeds. Our worst seed must be better than the best seed of the others.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch

from benchmarks.measuring import record, use_two_cpu_threads
from benchmarks.prior_quality import nll, train_ours
from vqmosaic.recipes.recipe_files import load_recipe

OWN = "grid_transformer"


def main() -> int:
    """Print the table. Returns exit code 1 if another architecture is as good."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=Path, required=True, help="a run folder with tokenizer/ and tokens/ of CIFAR-10")
    parser.add_argument("--against", nargs="+", default=["llama"], help="model types of transformers")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--seeds", type=int, default=2, help="trainings per architecture and learning rate")
    parser.add_argument("--record", action="store_true")
    options, extra = parser.parse_known_args()
    if OWN in options.against:
        parser.error(f"--against must not contain {OWN}")
    use_two_cpu_threads()
    rate = load_recipe("cifar10").prior_training.learning_rate
    rows = {}
    for architecture, learning_rate in ((OWN, rate), *((other, other_rate) for other in options.against for other_rate in (rate, rate / 2))):
        for seed in range(options.seeds):
            prior, _, seen = train_ours(options.tokens, options.minutes, [
                f"--prior.architecture={architecture}", f"--prior_training.learning_rate={learning_rate}", f"--seed={seed}", *extra])
            with torch.no_grad():
                rows.setdefault((architecture, learning_rate), []).append((prior.num_parameters, seen, nll(prior.eval(), options.tokens)))
    own = max(value for _, _, value in rows[OWN, rate])
    best_other = min(value for (name, _), results in rows.items() if name != OWN for _, _, value in results)
    lines = ["| | learning rate | parameters | sequences seen | NLL, nats a token, by seed | mean |", "|---|---|---|---|---|---|"]
    for (name, learning_rate), results in rows.items():
        counts, seen, values = zip(*results, strict=True)
        lines.append(f"| {name} | {learning_rate:g} | {counts[0] / 1e6:.2f}M | {statistics.mean(seen):,.0f} | "
                     f"{', '.join(f'{value:.4f}' for value in values)} | {statistics.mean(values):.4f} |")
    lines += ["", f"- {'kept' if own < best_other else 'NOT kept'}: {OWN} has the lower NLL: {own:.4f} at worst against {best_other:.4f} at best", "",
              f"Each trained for {options.minutes:g} minutes."]
    record("Architectures of the prior in equal time", lines, ("transformers",))
    return int(own >= best_other)


if __name__ == "__main__":
    sys.exit(main())
