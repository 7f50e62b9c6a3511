"""Measures what a classifier with few real images gains from synthetic ones, on CIFAR-10 with 5, 20 and 100 real images per class.

    python -m benchmarks.augmentation --run runs/parallel      # continues with what is in the folder
    python -m benchmarks.augmentation --minutes 0.05 --own_minutes 0.1 --images 40 --own_images 20 --steps 4 --subsets 2     # checks that it works

The folder can be that of benchmarks.parallel_sampling or benchmarks.conditions, whose tokenizer and class-conditional prior (recipe cifar10) are
used, or trained if they are missing. This generator has seen all training images with their labels, the classifier only few of them. A second
generator (recipe image_folder) trains on no other images than those of the classifier, for the largest of the three numbers.

A tenth of the training images is held out from both. The classifier trains for a fixed number of steps on batches with a share of synthetic images,
all flipped and shifted. For each number of real images and each kind of synthetic images, the share with the highest accuracy on the held-out images
is chosen, with the first random subset. Accuracies are those on the 10,000 test images, over several random subsets. Synthetic images and accuracies
are kept in the folder, so a second call continues where the first one stopped.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks import cifar10
from benchmarks.conditions import save_tensors
from benchmarks.few_labels import BATCH_SIZE, LabelledImages, accuracy, mean_and_deviation, random_subset, train_on_few
from benchmarks.measuring import RESULTS, record, use_two_cpu_threads
from benchmarks.parallel_sampling import MINUTES, RASTER, SEED, make_recipe, make_tokens, train
from pipelines.generate import ImageGenerationPipeline
from pipelines.stages.chain import run_chain
from pipelines.stages.count_images import count_images
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.pictures import save_picture, tile_images
from stage1_tokenizer.tokenizer_protocol import load_tokenizer
from vqmosaic.files.durable_files import write_json
from vqmosaic.files.json_files import read_object
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.recipes.recipe_sections import SamplingConfig

SHARES = (0.5, 0.9)
"""Shares of synthetic images in a batch that are compared on the held-out images."""
PER_CLASS, SUBSETS, IMAGES, STEPS = (5, 20, 100), 3, 5_000, 500
OWN_MINUTES, OWN_IMAGES = 4.0, 2_000
BATCH, OVERSAMPLE, SHOWN = 250, 4, 16


class Kind(NamedTuple):
    """A kind of synthetic images."""

    title: str
    sampling: SamplingConfig
    oversample: int = 1


KINDS = {
    "plain": Kind("no guidance", SamplingConfig()),
    "guided": Kind("guidance of the recipe", load_recipe(RASTER).sampling),
    "chosen": Kind(f"no guidance, best of {OVERSAMPLE} by the posterior", SamplingConfig(), OVERSAMPLE),
}
"""What the generator that has seen all training images draws."""


class Experiment:
    """Trains classifiers and keeps their accuracies in a file."""

    def __init__(self, folder: Path, steps: int, images: LabelledImages, held_out: LabelledImages, test: LabelledImages):
        """`images` are the training images without the held-out ones."""
        folder.mkdir(exist_ok=True)
        self.folder, self.steps, self.images, self.held_out, self.test = folder, steps, images, held_out, test
        self.file = folder / f"accuracies-{steps}-steps.json"
        self.found = read_object(self.file, "delete it") if self.file.is_file() else {}

    def accuracies(self, per_class: int, subset: int, name: str | None, synthetic: LabelledImages | None, share: float) -> tuple[float, float]:
        """The accuracies on the held-out and the test images, with a subset of the real images and a kind of synthetic ones."""
        key = f"{per_class} per class, subset {subset}, " + ("real only" if name is None else f"{name}, share {share:g}")
        if key not in self.found:
            model = train_on_few(random_subset(self.images, per_class, subset), synthetic, share, self.steps, seed=subset)
            self.found[key] = [accuracy(model, self.held_out), accuracy(model, self.test)]
            write_json(self.file, self.found)
            print(f"{key}: held-out {self.found[key][0]:.1%}, test {self.found[key][1]:.1%}", flush=True)
        held_out, test = self.found[key]
        return held_out, test

    def over_subsets(self, per_class: int, names: Sequence[str | None], pools: Sequence[LabelledImages | None]) -> tuple[list[float], float]:
        """The test accuracy with each subset, and the share that is chosen on the held-out images with the first one.

        `names` and `pools` have the synthetic images for each subset.
        """
        shares = (0.0,) if names[0] is None else SHARES
        share = max(shares, key=lambda share: self.accuracies(per_class, 0, names[0], pools[0], share)[0])
        found = [self.accuracies(per_class, subset, name, pool, share)[1] for subset, (name, pool) in enumerate(zip(names, pools, strict=True))]
        return found, share


# --- synthetic images --------------------------------------------------------------------------------------------------------


def make_images(file: Path, pipe: ImageGenerationPipeline, kind: Kind, count: int) -> LabelledImages:
    """Images that a pipeline draws, which are kept in a file."""
    if not file.is_file():
        pipe.sampling = kind.sampling
        batches = list(pipe.labelled_batches(count, seed=SEED, oversample=kind.oversample, output_type="np", batch_size=BATCH))
        save_tensors(file, {"images": torch.cat([torch.from_numpy(batch.images) for batch in batches]),
                            "labels": torch.tensor([label for batch in batches for label in batch.class_indices or []])})
        print(f"drew {count:,} images: {file.stem}", flush=True)
    content = load_file(file)
    return LabelledImages(content["images"], content["labels"])


def train_own_generator(folder: Path, real: LabelledImages, class_names: Sequence[str], minutes: float) -> ImageGenerationPipeline:
    """Train recipe image_folder on these images only, as a user would: the tokenizer and the prior together for some minutes."""
    photos = folder / "photos"
    for number, (pixels_HWC, label) in enumerate(zip(real.images_NHWC, real.labels_N.tolist(), strict=True)):
        path = photos / class_names[label] / f"{number:05d}.png"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels_HWC.numpy()).save(path)
    recipe = load_recipe("image_folder", [f"--run_dir={folder / 'run'}", f"--data.path={photos}", "--data.image_size=32", f"--minutes={minutes}"],
                         count_images=count_images)
    if run_chain(recipe):
        raise SystemExit(f"the training in {folder} failed")
    return ImageGenerationPipeline.from_pretrained(folder / "run")


# --- results -----------------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> int:
    """Draw the synthetic images, train all classifiers, and print the table. Returns exit code 0."""
    run_dir = options.run or Path(tempfile.mkdtemp())
    tokenizer = load_tokenizer(make_tokens(run_dir, minutes=options.minutes) / "tokenizer")
    prior, metrics = train(RASTER, run_dir, options.minutes)
    pipe = ImageGenerationPipeline(tokenizer, prior)
    everything, test = LabelledImages(*cifar10.load("train")), LabelledImages(*cifar10.load("test"))
    validation = open_splits(make_recipe(RASTER, run_dir).data).validation
    is_held_out_N = torch.zeros(len(everything.labels_N), dtype=torch.bool)
    is_held_out_N[[int(validation.source_name(index)) for index in range(len(validation))]] = True  # the name of a source is its row
    experiment = Experiment(run_dir / "augmentation_benchmark", options.steps, everything.take((~is_held_out_N).nonzero().flatten()),
                            everything.take(is_held_out_N.nonzero().flatten()), test)

    pools = {name: make_images(experiment.folder / f"{name}-{options.minutes:g}-minutes-{options.images}.safetensors", pipe, kind, options.images)
             for name, kind in KINDS.items()}
    names, subsets = list(KINDS), range(options.subsets)
    rows: dict[str, dict[int, str]] = {title: {} for title in ("real images only", *(KINDS[name].title for name in names))}
    for count in options.per_class:
        found, _ = experiment.over_subsets(count, [None] * len(subsets), [None] * len(subsets))
        rows["real images only"][count] = mean_and_deviation(found)
        for name in names:
            key = f"{name}, {options.minutes:g} minutes, {options.images} images"
            found, share = experiment.over_subsets(count, [key] * len(subsets), [pools[name]] * len(subsets))
            rows[KINDS[name].title][count] = f"{mean_and_deviation(found)} (share {share:g})"

    count = max(options.per_class)
    own_pools = {"no guidance": SamplingConfig(), "guidance of the recipe": load_recipe("image_folder").sampling}
    own: dict[str, list[LabelledImages | None]] = {title: [] for title in own_pools}
    folder = experiment.folder / f"own-{count}-per-class-{options.own_minutes:g}-minutes"
    for subset in subsets if options.own_minutes else ():
        generator = train_own_generator(folder / f"subset-{subset}", random_subset(experiment.images, count, subset), pipe.class_names or [],
                                        options.own_minutes)
        for title, sampling in own_pools.items():
            file = folder / f"subset-{subset}-{title.replace(' ', '-')}-{options.own_images}.safetensors"
            own[title].append(make_images(file, generator, Kind(title, sampling), options.own_images))
    own_rows = {}
    for title, subset_pools in own.items() if options.own_minutes else ():
        key = f"own {title}, {options.own_minutes:g} minutes, {options.own_images} images"
        found, share = experiment.over_subsets(count, [key] * len(subsets), subset_pools)
        own_rows[title] = f"{mean_and_deviation(found)} (share {share:g})"

    header = " | ".join(f"{count} real images per class" for count in options.per_class)
    lines = [f"Accuracy on the {len(test.labels_N):,} test images in percent: mean ± standard deviation over {options.subsets} random subsets of "
             f"the real images. Classifiers trained for {options.steps} steps of {BATCH_SIZE} flipped and shifted images. The share of synthetic "
             f"images in each batch was chosen from {' and '.join(f'{share:g}' for share in SHARES)} on {int(is_held_out_N.sum()):,} held-out "
             "training images.", "",
             f"| {options.images:,} synthetic images of recipe {RASTER}, {options.minutes:g} minutes ({metrics['step']:,} steps), which has seen all "
             f"{int((~is_held_out_N).sum()):,} training images and labels | {header} |", "|---|" + "---|" * len(options.per_class)]
    lines += [f"| {'' if title == 'real images only' else 'with synthetic images: '}{title} | {' | '.join(cells.values())} |"
              for title, cells in rows.items()]
    if own_rows:
        lines += ["", f"| {options.own_images:,} synthetic images of recipe image_folder, {options.own_minutes:g} minutes for both stages, which has "
                  f"seen only the real images of the classifier | {count} real images per class |", "|---|---|"]
        found, _ = experiment.over_subsets(count, [None] * len(subsets), [None] * len(subsets))
        lines += [f"| real images only | {mean_and_deviation(found)} |"]
        lines += [f"| with synthetic images: {title} | {cell} |" for title, cell in own_rows.items()]
    shown = [pools[name].images_NHWC[:SHOWN].numpy() for name in names]
    shown += [subset_pools[0].images_NHWC[:SHOWN].numpy() for subset_pools in own.values() if subset_pools and subset_pools[0] is not None]
    save_picture(tile_images(shown, 3), (RESULTS.parent if "--record" in sys.argv else Path(tempfile.gettempdir())) / "augmentation.png")
    lines += ["", "Pictures: [augmentation.png](augmentation.png), the synthetic images in the order of the tables, classes in turn."]
    record("Synthetic images for a classifier with few real ones, CIFAR-10", lines, ("transformers",))
    return 0


def main() -> int:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, help="a folder for tokenizer, tokens, prior, images and accuracies; default: a temporary one")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="minutes of training of the prior, and of a tokenizer that is missing")
    parser.add_argument("--per_class", type=int, nargs="+", default=list(PER_CLASS), help="numbers of real images per class")
    parser.add_argument("--subsets", type=int, default=SUBSETS, help="random subsets of the real images")
    parser.add_argument("--images", type=int, default=IMAGES, help="synthetic images of each kind")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of each classifier")
    parser.add_argument("--own_minutes", type=float, default=OWN_MINUTES, help="minutes for each generator that sees only the real images; 0: none")
    parser.add_argument("--own_images", type=int, default=OWN_IMAGES, help="synthetic images of each of these generators")
    parser.add_argument("--record", action="store_true", help="write the result to RESULTS.md")
    use_two_cpu_threads()
    return measure(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
