"""Measures what priors make of a low resolution, of edges and of captions: recipes cifar10_superres, cifar10_edges and cifar10_captions.

    python -m benchmarks.conditions superres --run runs/parallel    # about 25 minutes; continues with what is in the folder
    python -m benchmarks.conditions edges --run runs/parallel
    python -m benchmarks.conditions captions --run runs/parallel
    python -m benchmarks.conditions superres --minutes 0.05 --condition_minutes 0.05 --samples 40 --held_out_samples 40   # checks that it works

The folder can be that of benchmarks.parallel_sampling, whose tokenizer of images and class-conditional prior (recipe cifar10) are used, or trained if
they are missing. Each prior trains for the same time, without dropout. A tenth of the training images is held out. On them, the scale of linear
guidance with the lowest Frechet distance is chosen: of the condition alone, or of class and condition together. Captions of held-out images have the
templates of training for this. The priors are then given the conditions of the 10,000 test images, and captions with held-out templates. Frechet
distances are those to the test images, in the features of a small classifier that this script trains. Classifier, guidance scales and samples are
kept in the folder, so a second call continues where the first one stopped.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from benchmarks import cifar10
from benchmarks.classifier import CLASSIFIER_SECONDS, Classifier, train_classifier
from benchmarks.condition_measures import EDGE_THRESHOLD, EDGE_TOLERANCE, derive, edge_f_score, psnr, upsample_bicubic
from benchmarks.measuring import RESULTS, record, use_two_cpu_threads
from benchmarks.parallel_sampling import BATCH, HELD_OUT_SAMPLES, MINUTES, RASTER, SAMPLES, SEED, Judge, make_recipe, make_tokens, train
from benchmarks.two_levels import reconstruct
from pipelines.stages.preprocess import preprocess
from pipelines.stages.stage_inputs import condition_tokenizer_folder
from stage1_tokenizer.conditions.text_tokenizer import load_text_tokenizer, text_ids
from stage1_tokenizer.image_files.images import to_uint8
from stage1_tokenizer.pictures import save_picture, tile_images
from stage1_tokenizer.tokenizer_protocol import Tokenizer, load_tokenizer
from stage1_tokenizer.train import train as train_tokenizer
from stage2_prior.prior import TokenPrior
from vqmosaic.files.durable_files import publish, temporary_sibling, write_json
from vqmosaic.files.json_files import read_object
from vqmosaic.recipes.conditions import CLASS_PLACEHOLDER, ConditionConfig
from vqmosaic.recipes.recipe import Recipe, condition_recipes
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.seeding import image_seeds

RECIPES = {"superres": "cifar10_superres", "edges": "cifar10_edges", "captions": "cifar10_captions"}
SCALES = {"low": (1.0, 1.5, 2.0, 3.0, 5.0), "edges": (1.0, 2.0, 3.0, 5.0, 8.0), "text": (3.0, 4.0, 5.0, 6.0, 8.0), "class": (3.0, 4.0, 5.0, 6.0, 8.0)}
"""For each given segment, the scales of linear guidance that are compared on the held-out images, without top-p. All others have the scale 1."""
SCALES_FOR_ALL = {"low": (1.5, 2.0, 3.0), "edges": (2.0, 3.0, 5.0, 8.0), "text": (), "class": ()}
"""The scales that are compared for all segments together, where there are several."""
CONDITION_MINUTES = 2.0
MIN_PSNR, MAX_AGREEMENT_LOSS = 25.0, 0.05
COLUMNS, PICTURE_SCALE = 16, 3


class Setup(NamedTuple):
    """What all priors are measured with. Images are uint8 (N, H, W, C)."""

    run_dir: Path
    tokenizer: Tokenizer
    chooser: Judge
    judge: Judge
    held_out_NHWC: torch.Tensor
    held_out_classes: list[int]
    test_NHWC: torch.Tensor
    test_classes: list[int]
    real_distance: float
    """The Frechet distance of training images."""


class Contender(NamedTuple):
    """A trained prior."""

    key: str
    """Start of the names of its files."""
    segment: str
    """The given segment whose guidance is chosen."""
    prior: TokenPrior
    metrics: dict[str, float]

    @property
    def nll(self) -> str:
        """Its NLL on held-out images and its number of steps, as text."""
        return f"{self.metrics['nll']:.4f} ({self.metrics['step']:,} steps)"


class Guidance(NamedTuple):
    """Linear guidance."""

    segment: str | None
    """The guided segment. All others have the scale 1. None if all have the same scale."""
    scale: float

    def __str__(self) -> str:
        return f"{self.scale:g}" if self.segment else f"{self.scale:g} for all"

    @property
    def settings(self) -> SamplingConfig:
        """The settings for sampling."""
        if self.segment:
            return SamplingConfig(guidance_schedule="linear", guidance={self.segment: self.scale})
        return SamplingConfig(guidance_schedule="linear", guidance_scale=self.scale)


class Sampled(NamedTuple):
    """The samples of a prior for the test images."""

    images_NHWC: torch.Tensor
    guidance: Guidance
    """The chosen guidance."""
    distance: float
    """The Frechet distance to the test images."""


def prepare(run_dir: Path, minutes: float, samples: int, held_out_samples: int) -> Setup:
    """Load the images and the tokenizer, which is trained if it is missing, and train the classifier."""
    tokenizer = load_tokenizer(make_tokens(run_dir, minutes=minutes) / "tokenizer")
    train_NHWC, train_labels_N = cifar10.load("train")
    test_NHWC, test_labels_N = cifar10.load("test")
    held_out_N = cifar10.held_out_rows(make_recipe(RASTER, run_dir))
    classifier = make_classifier(run_dir, min(CLASSIFIER_SECONDS, 60 * minutes), train_NHWC, train_labels_N)
    judge = Judge(tokenizer, classifier, test_NHWC)
    return Setup(run_dir, tokenizer, Judge(tokenizer, classifier, train_NHWC[held_out_N]), judge, train_NHWC[held_out_N[:held_out_samples]],
                 train_labels_N[held_out_N[:held_out_samples]].tolist(), test_NHWC[:samples], test_labels_N[:samples].tolist(),
                 judge.distance_of(train_NHWC[:samples]))


def make_classifier(run_dir: Path, seconds: float, images_NHWC: torch.Tensor, labels_N: torch.Tensor) -> Classifier:
    """The classifier of the run folder, which is trained if it is missing."""
    file = run_dir / f"classifier-{seconds:g}-seconds.safetensors"
    if not file.is_file():
        save_tensors(file, train_classifier(images_NHWC, labels_N, seconds).state_dict())
    classifier = Classifier()
    classifier.load_state_dict(load_file(file))
    return classifier.eval()


def save_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a file of tensors, complete or not at all."""
    partial = temporary_sibling(file)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    publish(partial, file)


# --- training ----------------------------------------------------------------------------------------------------------------


def train_conditioned(name: str, run_dir: Path, minutes: float, condition_minutes: float) -> tuple[Contender, Recipe]:
    """Train the tokenizer of the condition and the prior of a recipe, and write the tokens between. Returns the prior, and the recipe."""
    condition, = load_recipe(name).data.given_conditions
    changes: dict[str, Any] = {"training": {"max_steps": None, "max_minutes": condition_minutes, "validate_every": 500}}
    if condition.is_caption:
        changes, folder = {}, run_dir / name
    else:
        folder = run_dir / f"{name}_condition_{condition_minutes:g}_minutes"
    recipe = make_recipe(name, folder, f"--data.conditions={json.dumps([condition.to_record() | changes])}",
                         f"--tokens.tokenizer={run_dir / 'tokenizer'}")
    for each in condition_recipes(recipe).values():
        train_tokenizer(each)
    preprocess(recipe)
    prior, metrics = train(name, folder, minutes)
    return Contender(f"{folder.name}-{minutes:g}-minutes", condition.name, prior, metrics), recipe


def train_baseline(run_dir: Path, minutes: float) -> Contender:
    """Train the class-conditional prior."""
    return Contender(f"{RASTER}-{minutes:g}-minutes", "class", *train(RASTER, run_dir, minutes))


# --- sampling ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_images(contender: Contender, tokenizer: Tokenizer, guidance: Guidance, classes: Sequence[int],
                  given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """An image (N, H, W, C) for each class and each row of the ids of the conditions. Priors that have not learned classes ignore them."""
    seeds, images = image_seeds(SEED, len(classes)), []
    for start in range(0, len(classes), BATCH):
        part = slice(start, start + BATCH)
        ids_BT = contender.prior.sample(classes[part], guidance.settings, seeds[part],
                                        given={name: ids_BG[part] for name, ids_BG in given.items()})
        images.append(torch.from_numpy(to_uint8(tokenizer.decode(tokenizer.split_tokens(ids_BT)))))
    return torch.cat(images)


def sample_with_best_guidance(setup: Setup, contender: Contender, held_out_given: Mapping[str, torch.Tensor],
                              test_given: Mapping[str, torch.Tensor]) -> Sampled:
    """Choose the guidance on the held-out images, and sample an image for each test image. Both are kept in files."""
    folder = setup.run_dir / "conditions_benchmark"
    folder.mkdir(exist_ok=True)
    file = folder / f"{contender.key}-held-out-{len(setup.held_out_classes)}.json"
    distances = read_object(file, "delete it") if file.is_file() else {}
    compared = [*(Guidance(contender.segment, scale) for scale in SCALES[contender.segment]),
                *(Guidance(None, scale) for scale in SCALES_FOR_ALL[contender.segment])]
    for guidance in compared:
        if str(guidance) not in distances:
            images_NHWC = sample_images(contender, setup.tokenizer, guidance, setup.held_out_classes, held_out_given)
            distances[str(guidance)] = setup.chooser.distance_of(images_NHWC)
            write_json(file, distances)
    best = min(compared, key=lambda guidance: distances[str(guidance)])
    print(f"{contender.key}: Frechet distance to the held-out images by guidance scale: {distances}", flush=True)
    file = folder / f"{contender.key}-test-{len(setup.test_classes)}-scale-{best}.safetensors".replace(" ", "-")
    if not file.is_file():
        save_tensors(file, {"images": sample_images(contender, setup.tokenizer, best, setup.test_classes, test_given)})
    images_NHWC = load_file(file)["images"]
    return Sampled(images_NHWC, best, setup.judge.distance_of(images_NHWC))


@torch.no_grad()
def encode(tokenizer: Tokenizer, images_NHWC: torch.Tensor) -> torch.Tensor:
    """The ids (N, n) of images."""
    return torch.cat([tokenizer.join_tokens(tokenizer.encode(cifar10.to_float(part))) for part in images_NHWC.split(BATCH)])


def captions_of(classes: Sequence[int], class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """A caption for each class, from the templates in turn."""
    return [templates[number % len(templates)].replace(CLASS_PLACEHOLDER, class_names[index]) for number, index in enumerate(classes)]


def encode_captions(condition: ConditionConfig, captions: Sequence[str]) -> torch.Tensor:
    """The ids (N, n) of captions."""
    text_tokenizer = load_text_tokenizer(condition.text_tokenizer)
    return torch.from_numpy(np.stack([text_ids(text_tokenizer, caption, condition.length) for caption in captions]))


# --- results -----------------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What a task prints and shows."""

    title: str
    lines: list[str]
    """Sentences and the table."""
    checks: dict[str, bool]
    """What must hold -> whether it does."""
    rows: dict[str, torch.Tensor]
    """The rows of the picture, images (N, H, W, C), by their names."""


def measure_superres(setup: Setup, minutes: float, condition_minutes: float) -> Result:
    """Compare images from 8x8 images with bicubic upsampling."""
    contender, recipe = train_conditioned(RECIPES["superres"], setup.run_dir, minutes, condition_minutes)
    low = load_tokenizer(condition_tokenizer_folder(recipe, recipe.data.given_conditions[0]))
    held_out_low_NHWC, test_low_NHWC = derive(low.transform, setup.held_out_NHWC), derive(low.transform, setup.test_NHWC)
    sampled = sample_with_best_guidance(setup, contender, {"low": encode(low, held_out_low_NHWC)}, {"low": encode(low, test_low_NHWC)})
    bicubic_NHWC = upsample_bicubic(test_low_NHWC, setup.test_NHWC.shape[1])
    bicubic_distance = setup.judge.distance_of(bicubic_NHWC)
    restored_NHWC = reconstruct(setup.tokenizer, setup.test_NHWC)
    found, bicubic, limit = (psnr(derive(low.transform, images_NHWC), test_low_NHWC) for images_NHWC in
                             (sampled.images_NHWC, bicubic_NHWC, restored_NHWC))
    side = test_low_NHWC.shape[1]
    lines = [f"The tokenizer of the {side}x{side} images trained for {condition_minutes:g} minutes. It reconstructs those of the test images with "
             f"{psnr(reconstruct(low, test_low_NHWC), test_low_NHWC):.2f} dB. The prior trained for {minutes:g} minutes. NLL on held-out images, in "
             f"nats per token: {contender.nll}. Guidance scale of the {side}x{side} image, chosen on held-out images: {sampled.guidance}.", "",
             f"| {len(setup.test_NHWC):,} test images from {side}x{side} pixels | Frechet distance to the test images | "
             f"PSNR of the result at {side}x{side}, dB |", "|---|---|---|",
             f"| prior, given the class | {sampled.distance:.3f} | {found:.2f} |",
             f"| bicubic upsampling | {bicubic_distance:.3f} | {bicubic:.2f} |",
             f"| reconstructions of the test images by the tokenizer | {setup.judge.distance_of(restored_NHWC):.3f} | {limit:.2f} |",
             f"| real training images | {setup.real_distance:.3f} | |"]
    checks = {f"Frechet distance lower than that of bicubic upsampling: {sampled.distance:.3f} and {bicubic_distance:.3f}":
              sampled.distance < bicubic_distance,
              f"PSNR at {side}x{side} at least {MIN_PSNR:g} dB: {found:.2f}": found >= MIN_PSNR}
    enlarged_NHWC = upsample_nearest(test_low_NHWC, setup.test_NHWC.shape[1])
    rows = {f"{side}x{side} images": enlarged_NHWC, "results": sampled.images_NHWC, "test images": setup.test_NHWC,
            "bicubic upsampling": bicubic_NHWC}
    return Result("Super-resolution on CIFAR-10", lines, checks, rows)


def upsample_nearest(images_NHWC: torch.Tensor, side: int) -> torch.Tensor:
    """Images enlarged to squares without smoothing."""
    return F.interpolate(images_NHWC.movedim(-1, 1), size=(side, side), mode="nearest").movedim(1, -1)


def measure_edges(setup: Setup, minutes: float, condition_minutes: float) -> Result:
    """Compare the edges of images that are made from edges with those edges."""
    contender, recipe = train_conditioned(RECIPES["edges"], setup.run_dir, minutes, condition_minutes)
    baseline = train_baseline(setup.run_dir, minutes)
    edges = load_tokenizer(condition_tokenizer_folder(recipe, recipe.data.given_conditions[0]))
    held_out_edges_NHWC, test_edges_NHWC = derive(edges.transform, setup.held_out_NHWC), derive(edges.transform, setup.test_NHWC)
    sampled = sample_with_best_guidance(setup, contender, {"edges": encode(edges, held_out_edges_NHWC)}, {"edges": encode(edges, test_edges_NHWC)})
    unaware = sample_with_best_guidance(setup, baseline, {}, {})
    restored_NHWC = reconstruct(setup.tokenizer, setup.test_NHWC)
    scores = [edge_f_score(derive(edges.transform, images_NHWC), test_edges_NHWC) for images_NHWC in
              (sampled.images_NHWC, unaware.images_NHWC, restored_NHWC)]
    seen = edge_f_score(reconstruct(edges, test_edges_NHWC), test_edges_NHWC)
    lines = [f"The tokenizer of the edges trained for {condition_minutes:g} minutes. The F-score of its reconstructions is {seen:.3f}. Each prior "
             f"trained for {minutes:g} minutes. NLL on held-out images, in nats per token: given edges and class {contender.nll}; given the class "
             f"{baseline.nll}. Edges are pixels of the image of edges from {EDGE_THRESHOLD} of 255 on. In the F-score, edges match if they are at "
             f"most {EDGE_TOLERANCE} pixel apart.", "",
             f"| {len(setup.test_NHWC):,} images | guidance scale, chosen on held-out images | F-score of the edges | "
             "Frechet distance to the test images |", "|---|---|---|---|",
             f"| prior, given edges and class of the test images | {sampled.guidance} | {scores[0]:.3f} | {sampled.distance:.3f} |",
             f"| prior, given the class of the test images | {unaware.guidance} | {scores[1]:.3f} | {unaware.distance:.3f} |",
             f"| reconstructions of the test images by the tokenizer | | {scores[2]:.3f} | {setup.judge.distance_of(restored_NHWC):.3f} |",
             f"| real training images | | | {setup.real_distance:.3f} |"]
    checks = {f"F-score higher than without the edges: {scores[0]:.3f} and {scores[1]:.3f}": scores[0] > scores[1]}
    rows = {"edges": test_edges_NHWC.expand(-1, -1, -1, 3), "results": sampled.images_NHWC, "test images": setup.test_NHWC,
            "samples without the edges": unaware.images_NHWC}
    return Result("Images from edges on CIFAR-10", lines, checks, rows)


def measure_captions(setup: Setup, minutes: float, condition_minutes: float) -> Result:
    """Compare samples from captions that training has not seen with those of the class-conditional prior."""
    contender, recipe = train_conditioned(RECIPES["captions"], setup.run_dir, minutes, condition_minutes)
    baseline = train_baseline(setup.run_dir, minutes)
    text, names = recipe.data.given_conditions[0], contender.prior.vocabulary.class_names
    assert names is not None  # the data set has classes
    templates = text.held_out_templates
    captions = captions_of(setup.test_classes, names, templates)
    held_out_ids_NG = encode_captions(text, captions_of(setup.held_out_classes, names, text.templates))
    sampled = sample_with_best_guidance(setup, contender, {"text": held_out_ids_NG}, {"text": encode_captions(text, captions)})
    unaware = sample_with_best_guidance(setup, baseline, {}, {})
    restored_NHWC = reconstruct(setup.tokenizer, setup.test_NHWC)
    found, expected, restored, real = (setup.judge.agreement(images_NHWC, setup.test_classes) for images_NHWC in
                                       (sampled.images_NHWC, unaware.images_NHWC, restored_NHWC, setup.test_NHWC))
    by_template = [setup.judge.agreement(sampled.images_NHWC[number::len(templates)], setup.test_classes[number::len(templates)])
                   for number in range(len(templates))]
    lines = [f"Each prior trained for {minutes:g} minutes. NLL on held-out images, in nats per token: given captions {contender.nll}; given the "
             f"class {baseline.nll}. Requested class by held-out template: "
             f"{'; '.join(f'{template} {share:.1%}' for template, share in zip(templates, by_template, strict=True))}.", "",
             f"| {len(captions):,} images | guidance scale, chosen on held-out images | requested class | Frechet distance to the test images |",
             "|---|---|---|---|",
             f"| prior, given captions with held-out templates | {sampled.guidance} | {found:.1%} | {sampled.distance:.3f} |",
             f"| prior, given the class | {unaware.guidance} | {expected:.1%} | {unaware.distance:.3f} |",
             f"| reconstructions of the test images by the tokenizer | | {restored:.1%} | {setup.judge.distance_of(restored_NHWC):.3f} |",
             f"| test images | | {real:.1%} | |", f"| real training images | | | {setup.real_distance:.3f} |"]
    checks = {f"requested class at most {100 * MAX_AGREEMENT_LOSS:g} points below the class-conditional prior: {100 * (found - expected):+.1f}":
              found >= expected - MAX_AGREEMENT_LOSS}
    shown = f"results for {', '.join(repr(caption) for caption in captions[:COLUMNS])}"
    rows = {shown: sampled.images_NHWC, "samples of the class-conditional prior": unaware.images_NHWC, "test images": setup.test_NHWC}
    return Result("Images from captions on CIFAR-10", lines, checks, rows)


def report(what: str, result: Result, is_recorded: bool) -> int:
    """Print the result and save the picture. Returns exit code 1 if a target is missed."""
    folder, name = RESULTS.parent if is_recorded else Path(tempfile.gettempdir()), f"conditions_{what}.png"
    save_picture(tile_images([images_NHWC[:COLUMNS].numpy() for images_NHWC in result.rows.values()], PICTURE_SCALE), folder / name)
    lines = [*result.lines, "", *(f"- {'kept' if kept else 'NOT kept'}: {text}" for text, kept in result.checks.items()), "",
             f"Pictures: [{name}]({name}). From top to bottom: {'; '.join(result.rows)}. One column for each test image."]
    record(result.title, lines, ("transformers", "torchmetrics"))
    return int(not all(result.checks.values()))


def main() -> int:
    """Run one of the measurements."""
    measures: dict[str, Any] = {"superres": measure_superres, "edges": measure_edges, "captions": measure_captions}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=tuple(measures))
    parser.add_argument("--run", type=Path, help="a folder for tokenizers, tokens, priors and samples; default: a temporary one")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="minutes of training per prior, and of a tokenizer of images that is missing")
    parser.add_argument("--condition_minutes", type=float, default=CONDITION_MINUTES, help="minutes of training of the condition's tokenizer")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="number of test images")
    parser.add_argument("--held_out_samples", type=int, default=HELD_OUT_SAMPLES, help="number of samples for each guidance scale")
    parser.add_argument("--record", action="store_true", help="write the result to RESULTS.md")
    options = parser.parse_args()
    use_two_cpu_threads()
    setup = prepare(options.run or Path(tempfile.mkdtemp()), options.minutes, options.samples, options.held_out_samples)
    return report(options.what, measures[options.what](setup, options.minutes, options.condition_minutes), options.record)


if __name__ == "__main__":
    sys.exit(main())
