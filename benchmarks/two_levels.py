"""Compares the tokenizer with two levels (recipe cifar10_vqvae2) with the one with one level (recipe cifar10), each with a prior of its own.

    python -m benchmarks.two_levels                          # 12 minutes per tokenizer and per prior, samples: an hour and a half
    python -m benchmarks.two_levels --run runs/two_levels    # keeps tokenizers, tokens and priors, and continues with them
    python -m benchmarks.two_levels --minutes 0.2 --samples 200   # checks that the benchmark works

Both recipes have 576 bits per image, the same networks at the resolution of the 8x8 grid, and the same settings for training and for the prior. Each
tokenizer and each prior trains for the same time. A tenth of the training images is held out. On them, the scale of linear guidance with the lowest
Frechet distance is chosen for each prior. The table has the PSNR of the 10,000 test images and the Frechet distances of their reconstructions and of
10,000 samples to the test images, in the features of a small classifier that this script trains.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import cifar10
from benchmarks.classifier import Classifier, train_classifier
from benchmarks.measuring import RESULTS, record, use_two_cpu_threads
from benchmarks.parallel_sampling import (
    CLASSES,
    GUIDANCE_SCALES,
    HELD_OUT_SAMPLES,
    MINUTES,
    SAMPLES,
    SHOWN,
    Judge,
    make_recipe,
    make_tokens,
    sample_images,
    settings_of,
    train,
)
from stage1_tokenizer.image_files.images import to_uint8
from stage1_tokenizer.pictures import save_picture, tile_images
from stage1_tokenizer.tokenizer_protocol import Tokenizer, load_tokenizer
from token_shards.manifest import describe_grids
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.training.tracking import read_metrics

ONE, TWO = "cifar10", "cifar10_vqvae2"
BATCH = 250
SCHEDULE = "linear"
"""The guidance schedule."""


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer, images_NHWC: torch.Tensor) -> torch.Tensor:
    """Reconstructions (N, H, W, C), uint8, of images."""
    return torch.cat([torch.from_numpy(to_uint8(tokenizer.reconstruct(cifar10.to_float(part)))) for part in images_NHWC.split(BATCH)])


def best_scale(prior, tokenizer: Tokenizer, chooser: Judge, count: int) -> float:
    """The guidance scale whose samples have the lowest Frechet distance to the held-out images."""
    distances = {scale: chooser.distance_of(sample_images(prior, tokenizer, settings_of(None, SCHEDULE, scale), count)[0])
                 for scale in GUIDANCE_SCALES[SCHEDULE]}
    print("Frechet distance to the held-out images by guidance scale:", distances, flush=True)
    return min(distances, key=lambda scale: distances[scale])


def measure(name: str, run_dir: Path, minutes: float, samples: int, classifier: Classifier, train_NHWC: torch.Tensor,
            test_NHWC: torch.Tensor) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Train the tokenizer and the prior of a recipe. Returns a row of the table, and reconstructions and samples (N, H, W, C)."""
    make_tokens(run_dir, name, minutes)
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    validation = read_metrics(RunFolder(run_dir).logs("tokenizer") / "metrics.jsonl", "validation")[-1]
    restored_NHWC = reconstruct(tokenizer, test_NHWC)
    prior, metrics = train(name, run_dir, minutes)
    held_out_NHWC = train_NHWC[cifar10.held_out_rows(make_recipe(name, run_dir))]
    scale = best_scale(prior, tokenizer, Judge(tokenizer, classifier, held_out_NHWC), min(samples, HELD_OUT_SAMPLES))
    images_NHWC, classes, _ = sample_images(prior, tokenizer, settings_of(None, SCHEDULE, scale), samples)
    judge = Judge(tokenizer, classifier, test_NHWC)
    usage = {grid.name: validation.get(f"codebook_usage_{grid.name}", validation["codebook_usage"]) for grid in tokenizer.grids}
    row = {"grids": describe_grids(tokenizer.grids), "bits": sum(grid.num_tokens * math.log2(grid.codebook_size) for grid in tokenizer.grids),
           "tokenizer_steps": validation["step"], "usage": " and ".join(f"{share:.0%}" for share in usage.values()),
           "psnr": cifar10.psnr(cifar10.to_float(restored_NHWC), cifar10.to_float(test_NHWC)), "reconstructions": judge.distance_of(restored_NHWC),
           "prior_steps": metrics["step"], "prior_bits": metrics["bits_per_image"], "scale": scale, "samples": judge.distance_of(images_NHWC),
           "agreement": judge.agreement(images_NHWC, classes)}
    print(name, row, flush=True)
    return row, [restored_NHWC, images_NHWC]


def main() -> int:
    """Train, evaluate and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, help="a folder for tokenizers, tokens and priors; default: a temporary one")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="minutes of training per tokenizer and per prior")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="number of samples")
    parser.add_argument("--record", action="store_true", help="write the result to RESULTS.md")
    options = parser.parse_args()
    use_two_cpu_threads()
    run_dir = (options.run or Path(tempfile.mkdtemp())) / f"{options.minutes:g}_minutes"
    train_NHWC, labels_N = cifar10.load("train")
    test_NHWC, _ = cifar10.load("test")
    classifier = train_classifier(train_NHWC, labels_N)
    rows, pictures = {}, [test_NHWC]
    for name in (ONE, TWO):
        rows[name], shown = measure(name, run_dir / name, options.minutes, options.samples, classifier, train_NHWC, test_NHWC)
        pictures += shown
    real = Judge(load_tokenizer(run_dir / ONE / "tokenizer"), classifier, test_NHWC).distance_of(train_NHWC[:options.samples])
    lines = [f"Each tokenizer and each prior trained for {options.minutes:g} minutes; {options.samples:,} samples.", "",
             "| | tokens | bits | steps of the tokenizer | codebook used | PSNR, dB | Frechet distance, reconstructions | steps of the prior | "
             "bits of the prior, held-out images | guidance, chosen on held-out images | Frechet distance, samples | requested class |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    lines += [f"| recipe {name} | {row['grids']} | {row['bits']:g} | {row['tokenizer_steps']:,} | {row['usage']} | {row['psnr']:.2f} | "
              f"{row['reconstructions']:.3f} | {row['prior_steps']:,} | {row['prior_bits']:.1f} | {row['scale']:g} | {row['samples']:.3f} | "
              f"{row['agreement']:.1%} |" for name, row in rows.items()]
    lines += ["", f"The Frechet distance of {options.samples:,} real training images is {real:.3f}."]
    folder = RESULTS.parent if options.record else Path(tempfile.gettempdir())
    save_picture(tile_images([images_NHWC[:SHOWN * CLASSES].numpy() for images_NHWC in pictures], 2), folder / "two_levels.png")
    lines += ["", "Pictures: [two_levels.png](two_levels.png). From top to bottom: test images; reconstructions and samples of one level; those "
                  "of two levels."]
    record("One and two levels of tokens on CIFAR-10", lines, ("transformers", "torchmetrics"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
