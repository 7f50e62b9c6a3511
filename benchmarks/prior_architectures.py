"""Whether grid_transformer earns its place: the recipe cifar10's prior beside stock architectures of transformers, in equal wall-clock time.

    python -m benchmarks.prior_architectures --tokens runs/c10            # tokenizer and tokens of a finished run; 6 minutes each
    python -m benchmarks.prior_architectures --tokens runs/c10 --record   # and into RESULTS.md

All are trained by `train-prior`'s own code from the same tokens, in the size of preset tiny, with the recipe's optimizer, the batch of prior_quality
and no dropout. Stock ones, which the recipe's learning rate was not chosen for, also get a run at half of it. Judged by NLL on all test images.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.measuring import record, use_two_cpu_threads
from benchmarks.prior_quality import nll, train_ours
from vqmosaic.recipe_files import load_recipe

OWN = "grid_transformer"


def main() -> int:
    """Print the table; exit code 1 where a stock architecture is as good."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=Path, required=True, help="a run folder with tokenizer/ and tokens/ of CIFAR-10")
    parser.add_argument("--against", nargs="+", default=["llama"], help="model types of transformers")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--record", action="store_true")
    options, extra = parser.parse_known_args()
    if OWN in options.against:
        parser.error(f"--against takes others than {OWN}")
    use_two_cpu_threads()
    rate = load_recipe("cifar10").prior_training.learning_rate
    rows = {}
    for architecture, learning_rate in ((OWN, rate), *((other, each) for other in options.against for each in (rate, rate / 2))):
        prior, _, seen = train_ours(options.tokens, options.minutes, [f"--prior.architecture={architecture}",
                                                                      f"--prior_training.learning_rate={learning_rate}", *extra])
        with torch.no_grad():
            rows[architecture, learning_rate] = (prior.num_parameters, seen, nll(prior.eval(), options.tokens))
    own, best_other = rows[OWN, rate][2], min(value for (name, _), (_, _, value) in rows.items() if name != OWN)
    lines = ["| | learning rate | parameters | sequences seen | NLL, nats a token |", "|---|---|---|---|---|",
             *(f"| {name} | {learning_rate:g} | {count / 1e6:.2f}M | {seen:,} | {value:.4f} |"
               for (name, learning_rate), (count, seen, value) in rows.items()), "",
             f"- {'kept' if own < best_other else 'NOT kept'}: {OWN} has the lower NLL: {own:.4f} against {best_other:.4f}", "",
             f"Each trained for {options.minutes:g} minutes."]
    record("Architectures of the prior in equal time", lines, ("transformers",))
    return int(own >= best_other)


if __name__ == "__main__":
    sys.exit(main())
