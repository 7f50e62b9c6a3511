"""Compares models trained on a folder of images for the same time: recipe image_folder, the recipe of that name in version 0.1.0, and plain peers.

    git clone https://github.com/karpathy/nanoGPT /tmp/nanogpt
    python -m benchmarks.image_folder --nanogpt /tmp/nanogpt --images 3000 --size 32 --minutes 4     # 4 minutes for the tokenizer, 4 for the prior
    python -m benchmarks.image_folder --nanogpt /tmp/nanogpt --images 20000 --size 64 --minutes 4
    python -m benchmarks.image_folder --images 3000 --size 64 --minutes 15 --only new before --record

The images are training images of CIFAR-10, the same number from each class, written as PNG files with one folder for each class. At 64 pixels they
are upscaled, as the recipe does with images of any size. All contestants make 8x8 tokens of 512 codes (576 bits per image). At 32 pixels, the former
recipe therefore has one level less. The peers are diffusers' VQModel and nanoGPT's GPT, with the settings of benchmarks.tokenizer_quality and
benchmarks.prior_quality. nanoGPT uses the dropout of its own configuration for small data. Like our recipes, it keeps the weights with the lowest
loss on 5 % of the images.

The test images of CIFAR-10, which no contestant trained on, give PSNR, SSIM and Frechet distance of reconstructions, and the Frechet distance of
samples. The features come from a small classifier that this script trains at that size. The script also measures the fraction of samples that the
classifier assigns to the requested class, and the fraction whose tokens equal those of a training image in any view.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from benchmarks import cifar10
from benchmarks.classifier import Classifier, train_classifier
from benchmarks.measuring import record, use_two_cpu_threads
from benchmarks.prior_quality import BATCH, train_nanogpt
from benchmarks.tokenizer_quality import train_peer
from pipelines.generate import ImageGenerationPipeline
from pipelines.stages.chain import run_chain
from pipelines.stages.count_images import count_images
from pipelines.stages.measures import grid_digests, token_measures, training_grids
from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.pictures import save_picture, tile_images
from stage1_tokenizer.validation import reconstruction_picture
from token_shards.reader import TokenShardReader
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.training.tracking import read_metrics

CLASSES, CODES, SAMPLES_PER_CLASS, TEST_IMAGES = 10, 512, 100, 2000
BEFORE_RECIPE = Path(__file__).with_name("image_folder_before.yaml")
TITLES = {"new": "vqmosaic, recipe image_folder", "before": "vqmosaic, recipe image_folder of 0.1.0", "peers": "diffusers VQModel, nanoGPT"}


@dataclass
class Contestant:
    """A trained tokenizer and prior."""

    restore: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    """Maps images (B, C, H, W) in [-1, 1] to their reconstructions and ids."""
    sample: Callable[[list[int]], tuple[torch.Tensor, torch.Tensor]]
    """Maps class indices to images (B, C, H, W) in [-1, 1] and ids (B, h, w)."""
    training_digests: set[bytes]
    """Digests of the tokens of all training images."""
    images_seen: tuple[int, int]
    """Number of images processed in training by the tokenizer and by the prior."""


def at_size(images_NHWC: torch.Tensor, size: int) -> torch.Tensor:
    """Resize uint8 images to `size` pixels as the recipe does."""
    transform = ImageTransform(image_size=size, channels=3)
    return images_NHWC if size == 32 else torch.from_numpy(np.stack([transform.resize(Image.fromarray(image)) for image in images_NHWC.numpy()]))


def write_folder(root: Path, images_NHWC: torch.Tensor, labels_N: torch.Tensor) -> None:
    """Write the images as PNG files, with one folder for each class."""
    for number, (image, label) in enumerate(zip(images_NHWC.numpy(), labels_N.tolist(), strict=True)):
        path = root / f"class{label}" / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def train_recipe(name: str, folder: Path, run_dir: Path, options: argparse.Namespace, extra: list[str]) -> Contestant:
    """Train a recipe, "new" or "before", with vqmosaic's own chain."""
    arguments = [f"--run_dir={run_dir}", f"--data.path={folder}", f"--data.image_size={options.size}",
                 f"--tokenizer_training.max_minutes={options.minutes}", f"--prior_training.max_minutes={options.minutes}"]
    if name == "before":
        arguments += ["--tokenizer_training.max_steps=null", "--prior_training.max_steps=null"]
        arguments += ["--tokenizer.channel_multipliers=[1,1,2]"] if options.size == 32 else []
    recipe = load_recipe("image_folder" if name == "new" else str(BEFORE_RECIPE), [*arguments, *(extra if name == "new" else [])],
                         count_images=count_images)
    if run_chain(recipe):
        raise SystemExit(f"the chain of {name} failed")
    pipe = ImageGenerationPipeline.from_pretrained(run_dir / "pipeline")

    def restore(images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = pipe.tokenizer(images_BCHW)
        return output.reconstructions, output.quantizer.ids

    def sample(classes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        out = pipe(classes, seed=0, output_type="pt")
        return out.images, out.token_ids

    steps = [read_metrics(run_dir / "logs" / stage / "metrics.jsonl", "validation")[-1]["step"] for stage in ("tokenizer", "prior")]
    return Contestant(restore, sample, training_grids(TokenShardReader(run_dir / "tokens/train")),
                      (steps[0] * recipe.tokenizer_training.batch_size, steps[1] * recipe.prior_training.batch_size))


def train_peers(images_NHWC: torch.Tensor, labels_N: torch.Tensor, options: argparse.Namespace) -> Contestant:
    """Train diffusers' VQModel and nanoGPT's GPT in plain loops."""
    restore, seen, model = train_peer(options.minutes, images_NHWC, (32, 64, 128) if options.size == 32 else (32, 64, 128, 128))

    def ids_of(images_NHWC: torch.Tensor) -> torch.Tensor:
        return torch.cat([restore(cifar10.to_float(part))[1].view(len(part), -1) for part in images_NHWC.split(100)])

    with torch.no_grad():
        ids_NT = ids_of(images_NHWC)
    order_N = torch.randperm(len(ids_NT), generator=torch.Generator().manual_seed(0))
    held_out_N, trained_N = order_N[:len(order_N) // 20], order_N[len(order_N) // 20:]

    def read_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, first = divmod(step * BATCH, len(trained_N) - BATCH)
        chosen_B = trained_N[torch.randperm(len(trained_N), generator=torch.Generator().manual_seed(epoch))[first:first + BATCH]]
        return ids_NT[chosen_B], labels_N[chosen_B]

    _, draw, sequences = train_nanogpt(options.nanogpt, read_batch, options.minutes, dropout=0.2,
                                       held_out=(ids_NT[held_out_N[:500]], labels_N[held_out_N[:500]]))

    def sample(classes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        ids_Bhw = draw(classes).view(len(classes), 8, 8)
        codes_BDhw = model.quantize.embedding(ids_Bhw).permute(0, 3, 1, 2)
        return torch.cat([model.decode(part, force_not_quantize=True).sample for part in codes_BDhw.split(100)]).clamp(-1, 1), ids_Bhw

    return Contestant(restore, sample, set(grid_digests(ids_NT.numpy())), (seen, sequences))


def to_uint8(images_BCHW: torch.Tensor) -> torch.Tensor:
    """Convert images in [-1, 1] to uint8."""
    return images_BCHW.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


@torch.no_grad()
def evaluate(contestant: Contestant, test_NHWC: torch.Tensor, classifier: Classifier) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
    """Metrics of reconstructions and samples on test images, a picture of reconstructions, and the first samples of each class."""
    size = test_NHWC.shape[1]

    def frechet_distance() -> FrechetInceptionDistance:
        metric = FrechetInceptionDistance(feature=classifier, normalize=False, input_img_size=(3, size, size), antialias=False)
        for part_NHWC in test_NHWC.split(100):
            metric.update(part_NHWC.permute(0, 3, 1, 2), real=True)
        return metric

    distance_restored, distance_samples = frechet_distance(), frechet_distance()
    used_K, squared_error, similarity = torch.zeros(CODES), 0.0, 0.0
    for part_NHWC in test_NHWC.split(100):
        images_BCHW = cifar10.to_float(part_NHWC)
        restored_BCHW, ids = contestant.restore(images_BCHW)
        restored_BCHW = restored_BCHW.clamp(-1, 1)
        squared_error += float((restored_BCHW - images_BCHW).square().mean()) * len(images_BCHW)
        similarity += float(structural_similarity_index_measure((restored_BCHW + 1) / 2, (images_BCHW + 1) / 2, data_range=1.0)) * len(images_BCHW)
        used_K += torch.bincount(ids.flatten(), minlength=CODES)
        distance_restored.update(to_uint8(restored_BCHW), real=False)
    classes = [label for label in range(CLASSES) for _ in range(SAMPLES_PER_CLASS)]
    samples_BCHW, ids_Bhw = contestant.sample(classes)
    samples_BCHW = to_uint8(samples_BCHW)
    correct = 0
    for part_BCHW, labels_B in zip(samples_BCHW.split(100), torch.tensor(classes).split(100), strict=True):
        distance_samples.update(part_BCHW, real=False)
        correct += int((classifier.head(classifier(part_BCHW)).argmax(1) == labels_B).sum())
    figures = {"psnr": float(10 * torch.log10(torch.tensor(4 / (squared_error / len(test_NHWC))))), "ssim": similarity / len(test_NHWC),
               "usage": float((used_K > 0).float().mean()), "restored": float(distance_restored.compute()),
               "samples": float(distance_samples.compute()), "agreement": correct / len(classes),
               **token_measures(ids_Bhw, contestant.training_digests)}
    some_BCHW = cifar10.to_float(test_NHWC[:16])
    picture = reconstruction_picture(some_BCHW, contestant.restore(some_BCHW)[0].clamp(-1, 1))
    return figures, picture, samples_BCHW.view(CLASSES, SAMPLES_PER_CLASS, *samples_BCHW.shape[1:])[:, :10]


def main() -> int:
    """Train, evaluate and print the table. Returns exit code 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--size", type=int, choices=(32, 64), default=32)
    parser.add_argument("--minutes", type=float, default=4.0, help="minutes for each of the two training stages")
    parser.add_argument("--only", choices=list(TITLES), nargs="+", default=list(TITLES))
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT, for the peers")
    parser.add_argument("--work", type=Path, help="folder for images and runs; default: a temporary folder")
    parser.add_argument("--record", action="store_true")
    options, extra = parser.parse_known_args()
    if "peers" in options.only and options.nanogpt is None:
        parser.error("the peers need --nanogpt, a checkout of https://github.com/karpathy/nanoGPT. To omit them, give --only new before")
    use_two_cpu_threads()
    work = options.work or Path(tempfile.mkdtemp(prefix="image-folder-"))
    all_NHWC, all_labels_N = cifar10.load("train")
    chosen_N = torch.cat([(all_labels_N == label).nonzero()[:options.images // CLASSES, 0] for label in range(CLASSES)])
    images_NHWC, labels_N = all_NHWC[chosen_N], all_labels_N[chosen_N]
    write_folder(work / "images", images_NHWC, labels_N)
    contestants = {name: train_peers(at_size(images_NHWC, options.size), labels_N, options) if name == "peers"
                   else train_recipe(name, work / "images", work / name, options, extra) for name in options.only}
    classifier = train_classifier(at_size(all_NHWC, options.size), all_labels_N)
    test_NHWC = at_size(cifar10.load("test", TEST_IMAGES)[0], options.size)
    rows, pictures = {}, {}
    for name, contestant in contestants.items():
        figures, restored, samples_KNCHW = evaluate(contestant, test_NHWC, classifier)
        rows[name] = {"seen": contestant.images_seen, **figures}
        pictures[name] = {"reconstructions": restored, "samples": tile_images([row.permute(0, 2, 3, 1).numpy() for row in samples_KNCHW], 2)}
    return report(rows, pictures, options)


def report(rows: dict[str, dict[str, float]], pictures: dict[str, dict[str, np.ndarray]], options: argparse.Namespace) -> int:
    """Print the table and, with --record, write it to RESULTS.md. Returns exit code 1 if a check fails."""
    lines = ["| | images seen by tokenizer and prior | PSNR, dB | SSIM | codebook used | Frechet distance, reconstructions | samples | "
             "of the class asked for | copies |", "|---|---|---|---|---|---|---|---|---|"]
    lines += [f"| {TITLES[name]} | {row['seen'][0]:,}, {row['seen'][1]:,} | {row['psnr']:.2f} | {row['ssim']:.3f} | {row['usage']:.1%} | "
              f"{row['restored']:.2f} | {row['samples']:.2f} | {row['agreement']:.1%} | {row['copies']:.1%} |" for name, row in rows.items()]
    checks = {}
    if "new" in rows and "before" in rows:
        new, before = rows["new"], rows["before"]
        checks = {f"PSNR at least 2 dB above that of 0.1.0: {new['psnr']:.2f}, {before['psnr']:.2f} dB": new["psnr"] >= before["psnr"] + 2,
                  f"more than 95 % of the codebook used: {new['usage']:.1%}": new["usage"] > 0.95,
                  f"lower Frechet distance of reconstructions: {new['restored']:.2f}, {before['restored']:.2f}": new["restored"] < before["restored"],
                  f"lower Frechet distance of samples: {new['samples']:.2f}, {before['samples']:.2f}": new["samples"] < before["samples"],
                  f"less than 2 % copies: {new['copies']:.1%}": new["copies"] < 0.02}
    folder = Path("benchmarks") if options.record else Path(tempfile.gettempdir())
    names = {}
    for name, kinds in pictures.items():
        for kind, picture in kinds.items():
            names[name, kind] = f"image_folder_{options.images}_{options.size}_{name}_{kind}.png"
            save_picture(picture, folder / names[name, kind])
    lines += ["", *(f"- {'kept' if kept else 'NOT kept'}: {text}" for text, kept in checks.items()), "",
              "Pictures: " + "; ".join(f"{TITLES[name]}: [{kind}]({file})" for (name, kind), file in names.items()) + "."]
    record(f"A folder of {options.images:,} images at {options.size} pixels, {options.minutes:g} + {options.minutes:g} minutes", lines,
           ("diffusers", "transformers", "torchmetrics"))
    return int(not all(checks.values()))


if __name__ == "__main__":
    sys.exit(main())
