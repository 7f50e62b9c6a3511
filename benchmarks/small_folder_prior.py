"""Compares measures against overfitting of the prior on a small folder of images: stored views, token noise, dropout.

    python -m benchmarks.small_folder_prior                         # 500 images of CIFAR-10 in two classes, about 15 minutes
    python -m benchmarks.small_folder_prior --images 3000 --record

One tokenizer, trained with the recipe image_folder at 32 pixels, encodes the same images in different sets of views. The recipe's prior is trained
on each set for the same number of steps, with the same schedule. The metrics are the NLL of the best and of the last weights on other training images
of CIFAR-10 (no test images) and, for 500 samples of the best weights, the fraction that a classifier assigns to the requested class and the fraction
of copies.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import cifar10
from benchmarks.classifier import train_classifier
from benchmarks.image_folder import to_uint8
from benchmarks.measuring import record, use_two_cpu_threads
from pipelines.stages.count_images import count_images
from pipelines.stages.measures import token_measures, training_grids
from pipelines.stages.preprocess import preprocess
from stage1_tokenizer.tokenizer_protocol import load_tokenizer
from stage1_tokenizer.train import train as train_tokenizer
from stage2_prior.prior import TokenPrior
from stage2_prior.train import train as train_prior
from token_shards.reader import TokenShardReader
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.seeding import image_seeds
from vqmosaic.training.tracking import read_metrics

LABELS = (3, 8)
"""Cats and ships."""
HELD_OUT, SAMPLES = 1000, 500
PRIORS = {  # views, token noise, dropout
    "flip": ("flip", 0.0, 0.1), "flip, token noise 0.2": ("flip", 0.2, 0.1), "flip, dropout 0.3": ("flip", 0.0, 0.3),
    "flip+shifts": ("flip+shifts", 0.0, 0.1), "flip+shifts, token noise 0.1": ("flip+shifts", 0.1, 0.1),
    "flip+wide-shifts": ("flip+wide-shifts", 0.0, 0.1), "flip+wide-shifts, dropout 0.2": ("flip+wide-shifts", 0.0, 0.2),
}


def write_images(root: Path, count: int) -> None:
    """Write PNG files to root/train and root/validation, with a folder for each class."""
    from PIL import Image

    images_NHWC, labels_N = cifar10.load("train")
    for label in LABELS:
        chosen_N = (labels_N == label).nonzero()[:, 0]
        per_class = count // len(LABELS)
        for split, part_N in (("train", chosen_N[:per_class]), ("validation", chosen_N[-HELD_OUT // len(LABELS):])):
            for number in part_N.tolist():
                path = root / split / f"class{label}" / f"{number:05d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images_NHWC[number].numpy()).save(path)


def main() -> int:
    """Train, evaluate and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=2.0, help="training time of the tokenizer")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--only", nargs="+", choices=list(PRIORS), default=list(PRIORS))
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    use_two_cpu_threads()
    work = Path(tempfile.mkdtemp(prefix="small-folder-"))
    write_images(work / "images", options.images)
    classifier = train_classifier(*two_classes())

    def recipe(run: str, *overrides: str):
        return load_recipe("image_folder", [f"--run_dir={work / run}", f"--data.path={work / 'images'}", "--data.image_size=32", *overrides],
                           count_images=count_images)

    train_tokenizer(recipe("tokenizer", f"--tokenizer_training.max_minutes={options.minutes}"))
    tokenizer = load_tokenizer(work / "tokenizer/tokenizer")
    lines = ["| views | token noise | dropout | best NLL, nats a token | at step | NLL at the end | of the class asked for | copies |",
             "|---|---|---|---|---|---|---|---|"]
    for number, name in enumerate(options.only):
        views, noise, dropout = PRIORS[name]
        if not (work / views).exists():
            preprocess(recipe(views, f"--tokens.tokenizer={work / 'tokenizer/tokenizer'}", f"--tokens.views={views}"))
        prior_recipe = recipe(f"prior{number}", f"--prior_training.tokens={work / views / 'tokens'}", f"--prior_training.token_noise={noise}",
                     f"--prior.dropout={dropout}", "--prior_training.max_minutes=null", "--prior_training.validate_every=25",
                     f"--prior_training.max_steps={-(-options.epochs * options.images // 32)}", "--prior_training.validation_images=1000")
        train_prior(prior_recipe)
        validations = read_metrics(work / f"prior{number}/logs/prior/metrics.jsonl", "validation")
        best = min(validations, key=lambda metrics: metrics["nll"])
        prior = TokenPrior.from_pretrained(work / f"prior{number}/prior")
        classes = [index for index in range(len(LABELS)) for _ in range(SAMPLES // len(LABELS))]
        with torch.no_grad():
            ids_BT = prior.sample(classes, SamplingConfig(), image_seeds(0, len(classes)))
            images_BCHW = to_uint8(tokenizer.decode(tokenizer.split_tokens(ids_BT)))
            predictions_B = classifier.head(classifier(images_BCHW))[:, :len(LABELS)].argmax(1)
        agreement = float((predictions_B == torch.tensor(classes)).float().mean())
        copies = token_measures(ids_BT, training_grids(TokenShardReader(work / views / "tokens/train")))["copies"]
        lines.append(f"| {views} | {noise} | {dropout} | {best['nll']:.4f} | {best['step']:,} of {validations[-1]['step']:,} | "
                     f"{validations[-1]['nll']:.4f} | {agreement:.1%} | {copies:.1%} |")
    lines += ["", f"{options.images:,} training images, {options.epochs} epochs in batches of 32; a tokenizer of {options.minutes:g} minutes. "
                  "Sampled at temperature 1 without guidance."]
    record(f"Priors of {options.images:,} images", lines, ("transformers",))
    return 0


def two_classes() -> tuple[torch.Tensor, torch.Tensor]:
    """All training images of the two classes, with labels 0 and 1 for the classifier."""
    images_NHWC, labels_N = cifar10.load("train")
    chosen_N = torch.isin(labels_N, torch.tensor(LABELS))
    return images_NHWC[chosen_N], (labels_N[chosen_N] == LABELS[1]).long()


if __name__ == "__main__":
    sys.exit(main())
