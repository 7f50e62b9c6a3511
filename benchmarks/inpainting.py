"""Measures inpainting on CIFAR-10 with recipe cifar10_any_order, beside raster order and OpenCV's Telea.

    python -m benchmarks.inpainting --run runs/parallel          # 2,000 images; continues with what is in the folder
    python -m benchmarks.inpainting --images 10 --minutes 0.05   # checks that it works

The centre square of test images is masked and filled in three ways: with `pipe.inpaint`, whose tokens see all kept ones; with the same prior in
raster order, where each token sees only those before it; and with cv2.inpaint (Telea 2004). The prior is given the class of the image.

The folder can be that of benchmarks.parallel_sampling or benchmarks.conditions, whose tokenizer, prior and classifier are used, or trained if they
are missing. Test images are used neither for training nor for choices. A tenth of the training images is held out from training the tokenizer and the
prior. On some of them, the number of passes and the scale of linear guidance with the lowest Frechet distance are chosen, for each order. Frechet
distances are those of filled images to other real images, in the features of a small classifier that is trained on the training images. Filled
images, and the distances for all settings, are kept in the folder, so a second call continues where the first one stopped.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import cv2
import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks import cifar10
from benchmarks.classifier import CLASSIFIER_SECONDS
from benchmarks.conditions import COLUMNS, PICTURE_SCALE, make_classifier, save_tensors
from benchmarks.measuring import RESULTS, record, use_two_cpu_threads
from benchmarks.parallel_sampling import ANY_ORDER, BATCH, MINUTES, SEED, Judge, make_recipe, make_tokens, settings_of, train
from benchmarks.two_levels import reconstruct
from pipelines.editing.masked_images import MaskedImages, token_side
from pipelines.generate import ImageGenerationPipeline
from stage1_tokenizer.image_files.images import to_uint8
from stage1_tokenizer.pictures import save_picture, tile_images
from stage1_tokenizer.tokenizer_protocol import Tokenizer, load_tokenizer
from stage2_prior.prior import TokenPrior
from vqmosaic.files.durable_files import write_json
from vqmosaic.files.json_files import read_object
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.recipes.recipe_sections import SamplingConfig

SIDE, SQUARE = 32, 16
"""Sides of the images and of the masked squares, in pixels."""
SCALES = (1.0, 1.5, 2.5, 4.0, 5.0, 6.0)
"""The scales of linear guidance that are compared on the held-out images."""
IMAGES, HELD_OUT_IMAGES, WARM_UP_IMAGES = 2_000, 500, 16
TELEA_RADIUS, GREY = 3, 128
PASSES: dict[str, tuple[int | None, ...]] = {"any order": (8, 16), "raster": (None,)}
"""For each way to fill with the prior, the numbers of passes that are compared on the held-out images. The squares have 16 tokens. None draws one
token after another, in raster order."""


class Images(NamedTuple):
    """Images that are filled, and others that the results are compared with."""

    images_NHWC: torch.Tensor
    classes: list[int]
    judge: Judge
    """Computes distances to the other images."""


class Filled(NamedTuple):
    """Images (N, H, W, C), uint8, whose masked pixels are filled."""

    images_NHWC: torch.Tensor
    seconds: float
    """The time for all images."""


def centre_mask() -> torch.Tensor:
    """The mask (H, W): True in the centre square."""
    mask_HW, start = torch.zeros(SIDE, SIDE, dtype=torch.bool), (SIDE - SQUARE) // 2
    mask_HW[start:start + SQUARE, start:start + SQUARE] = True
    return mask_HW


def check_kept(name: str, filled_NHWC: torch.Tensor, images_NHWC: torch.Tensor) -> None:
    """Raise an error unless all pixels outside of the mask are those of the images, bit for bit."""
    differs_N = (filled_NHWC != images_NHWC)[:, ~centre_mask()].flatten(1).any(dim=1)
    if differs_N.any():
        raise AssertionError(f"{name} changed kept pixels of {int(differs_N.sum())} of {len(images_NHWC)} images.")


# --- filling -----------------------------------------------------------------------------------------------------------------


def fill_with_prior(tokenizer: Tokenizer, prior: TokenPrior, settings: SamplingConfig, images: Images) -> Filled:
    """Fill the masked pixels with `pipe.inpaint`, given the classes. In raster order, a token does not see the kept ones after it."""
    pipe = ImageGenerationPipeline(tokenizer, prior, settings)
    # A prior for any order is then sampled as if it had been trained in raster order: with RasterPasses, which feed it the tokens before each place.
    in_raster_order = patch("stage2_prior.generation.sampling.check_order", return_value=False)
    with in_raster_order if settings.order == "raster" else contextlib.nullcontext():
        started = time.perf_counter()
        out = pipe.inpaint(cifar10.to_float(images.images_NHWC), centre_mask(), images.classes, seed=SEED, output_type="np", batch_size=BATCH)
        seconds = time.perf_counter() - started
    return Filled(torch.from_numpy(out.images), seconds)


def fill_with_telea(images: Images) -> Filled:
    """Fill the masked pixels with cv2.inpaint, from the edge of the mask inwards."""
    mask_HW, started = centre_mask().numpy().astype(np.uint8), time.perf_counter()
    filled = [cv2.inpaint(image_HWC, mask_HW, TELEA_RADIUS, cv2.INPAINT_TELEA) for image_HWC in images.images_NHWC.numpy()]
    seconds = time.perf_counter() - started
    return Filled(torch.from_numpy(np.stack(filled)), seconds)


def fill_with_reconstructions(tokenizer: Tokenizer, images: Images) -> torch.Tensor:
    """Fill the masked pixels with reconstructions of the images, whose edge is adapted as in `pipe.inpaint`."""
    masks_NHW = centre_mask().expand(len(images.images_NHWC), -1, -1)
    masked = MaskedImages(cifar10.to_float(images.images_NHWC), masks_NHW, token_side(tokenizer.grids, tokenizer.transform.sides))
    restored_NCHW = cifar10.to_float(reconstruct(tokenizer, images.images_NHWC))
    return torch.from_numpy(to_uint8(masked.paste(restored_NCHW, range(len(restored_NCHW)))))


def fill_with_best_settings(folder: Path, key: str, tokenizer: Tokenizer, prior: TokenPrior, passes: Sequence[int | None], held_out: Images,
                            test: Images) -> tuple[Filled, int | None, float]:
    """Choose the passes and the guidance scale on the held-out images, and fill the test images. Both are kept in files. Returns the choices, too."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{key}-held-out-{len(held_out.classes)}.json"
    distances = read_object(file, "delete it") if file.is_file() else {}
    names = {(steps, scale): f"{steps or 'all'} passes, scale {scale:g}" for steps in passes for scale in SCALES}
    for (steps, scale), name in names.items():
        if name not in distances:
            filled = fill_with_prior(tokenizer, prior, settings_of(steps, "linear", scale), held_out)
            distances[name] = held_out.judge.distance_of(filled.images_NHWC)
            write_json(file, distances)
    print(f"{key}: Frechet distance on held-out images: {distances}", flush=True)
    steps, scale = min(names, key=lambda choice: distances[names[choice]])
    file = folder / f"{key}-test-{len(test.classes)}-{steps or 'all'}-passes-scale-{scale:g}.safetensors"
    if not file.is_file():
        settings = settings_of(steps, "linear", scale)
        warm_up = Images(test.images_NHWC[:WARM_UP_IMAGES], test.classes[:WARM_UP_IMAGES], test.judge)
        fill_with_prior(tokenizer, prior, settings, warm_up)
        filled = fill_with_prior(tokenizer, prior, settings, test)
        save_tensors(file, {"images": filled.images_NHWC, "seconds": torch.tensor(filled.seconds)})
    content = load_file(file)
    return Filled(content["images"], float(content["seconds"])), steps, scale


# --- results -----------------------------------------------------------------------------------------------------------------


def measure(run_dir: Path, count: int, minutes: float) -> int:
    """Fill the images in all ways, print the table, and save the picture. Returns exit code 1 if a target is missed."""
    tokenizer = load_tokenizer(make_tokens(run_dir, minutes=minutes) / "tokenizer")
    prior, metrics = train(ANY_ORDER, run_dir, minutes)
    train_NHWC, train_labels_N = cifar10.load("train")
    test_NHWC, test_labels_N = cifar10.load("test")
    classifier = make_classifier(run_dir, min(CLASSIFIER_SECONDS, 60 * minutes), train_NHWC, train_labels_N)
    held_out_N = cifar10.held_out_rows(make_recipe(ANY_ORDER, run_dir))

    def split(images_NHWC: torch.Tensor, labels_N: torch.Tensor, number: int) -> Images:
        """The first images, to be compared with all others."""
        return Images(images_NHWC[:number], labels_N[:number].tolist(), Judge(tokenizer, classifier, images_NHWC[number:]))

    held_out = split(train_NHWC[held_out_N], train_labels_N[held_out_N], min(HELD_OUT_IMAGES, count))
    test = split(test_NHWC, test_labels_N, count)

    filled, steps, scales = {}, {}, {}
    for name, passes in PASSES.items():
        key, folder = f"{name.replace(' ', '_')}-{minutes:g}-minutes", run_dir / "inpainting_benchmark"
        filled[name], steps[name], scales[name] = fill_with_best_settings(folder, key, tokenizer, prior, passes, held_out, test)
    filled["Telea"] = fill_with_telea(test)
    restored_NHWC = fill_with_reconstructions(tokenizer, test)
    for name, images_NHWC in {**{name: each.images_NHWC for name, each in filled.items()}, "reconstructions": restored_NHWC}.items():
        check_kept(name, images_NHWC, test.images_NHWC)

    distances = {name: test.judge.distance_of(each.images_NHWC) for name, each in filled.items()}
    rows = {"any order": f"prior, order {load_recipe(ANY_ORDER).sampling.order}, {steps['any order']} passes, sees all kept tokens",
            "raster": "the same prior in raster order, one token per pass, sees only tokens before each",
            "Telea": f"Telea, OpenCV {cv2.__version__}, radius {TELEA_RADIUS}"}
    others, compared = len(test_NHWC) - count, len(held_out_N) - len(held_out.classes)
    lines = [f"The prior of recipe {ANY_ORDER} trained for {minutes:g} minutes ({metrics['step']:,} steps). Squares of {SQUARE}x{SQUARE} pixels in "
             f"the centre of {count:,} test images were filled, each once. The prior was given the class of the image. Outside of the squares, the "
             "pixels of all results are those of the images, bit for bit. No test image was used for training or for choices. The scale of linear "
             f"guidance was chosen from {', '.join(f'{scale:g}' for scale in SCALES)} for each order, and the number of passes from "
             f"{' and '.join(map(str, PASSES['any order']))}: those with the lowest Frechet distance of "
             f"{len(held_out.classes):,} filled images to {compared:,} others, all held out from the training of tokenizer and prior.", "",
             f"| {count:,} test images, squares filled by | guidance scale | Frechet distance to the other {others:,} test images | "
             "classified as the right class | seconds for 100 images |", "|---|---|---|---|---|"]
    for name, text in rows.items():
        scale = f"{scales[name]:g}" if name in scales else ""
        lines.append(f"| {text} | {scale} | {distances[name]:.3f} | {test.judge.agreement(filled[name].images_NHWC, test.classes):.1%} | "
                     f"{100 * filled[name].seconds / count:.2f} |")
    for text, images_NHWC in {"reconstructions by the tokenizer": restored_NHWC, "nothing: the real images": test.images_NHWC}.items():
        lines.append(f"| {text} | | {test.judge.distance_of(images_NHWC):.3f} | {test.judge.agreement(images_NHWC, test.classes):.1%} | |")
    checks = {f"Frechet distance lower than {text}: {distances['any order']:.3f} and {distances[name]:.3f}": distances["any order"] < distances[name]
              for name, text in {"raster": "in raster order", "Telea": "with Telea"}.items()}
    lines += ["", *(f"- {'kept' if kept else 'NOT kept'}: {text}" for text, kept in checks.items())]

    masked_NHWC = test.images_NHWC.masked_fill(centre_mask()[..., None], GREY)
    shown = [test.images_NHWC, masked_NHWC, *(filled[name].images_NHWC for name in rows)]
    folder = RESULTS.parent if "--record" in sys.argv else Path(tempfile.gettempdir())
    save_picture(tile_images([images_NHWC[:COLUMNS].numpy() for images_NHWC in shown], PICTURE_SCALE), folder / "inpainting.png")
    lines += ["", "Pictures: [inpainting.png](inpainting.png). From top to bottom: test images; the masked squares in grey; filled by the prior, "
                  "which sees all kept tokens; by the same prior in raster order; by Telea."]
    record("Inpainting on CIFAR-10", lines, ("transformers", "torchmetrics"))
    return int(not all(checks.values()))


def main() -> int:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, help="a folder for tokenizer, tokens, prior and filled images; default: a temporary one")
    parser.add_argument("--images", type=int, default=IMAGES, help="number of test images that are filled, 2 to 8000; default: 2000")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="minutes of training of the prior, and of a tokenizer that is missing")
    parser.add_argument("--record", action="store_true", help="write the result to RESULTS.md")
    options = parser.parse_args()
    if not 2 <= options.images <= 8000:
        parser.error(f"--images is {options.images}; allowed: 2 to 8000. The others of the 10,000 test images are compared with these.")
    use_two_cpu_threads()
    return measure(options.run or Path(tempfile.mkdtemp()), options.images, options.minutes)


if __name__ == "__main__":
    sys.exit(main())
