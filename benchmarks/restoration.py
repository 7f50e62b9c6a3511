"""Measures `pipe.enhance` on damaged CIFAR-10 images, beside the tokenizer alone, a median filter and bicubic resampling.

    python -m benchmarks.restoration --run runs/parallel          # 2,000 images; continues with what is in the folder
    python -m benchmarks.restoration --images 10 --minutes 0.05   # checks that it works

Test images get Gaussian noise (standard deviation 10, 25 and 50 of 255), are saved as JPEG of quality 10, or lose 30 % of their pixels. Each way to
restore them is measured by PSNR and SSIM with the originals, and by the Frechet distance to other real images in the features of a small classifier.

The folder can be that of benchmarks.parallel_sampling, benchmarks.inpainting or benchmarks.conditions, whose tokenizer, prior and classifier are
used, or trained if they are missing. The prior is not given the class of the image. Test images are used neither for training nor for choices. A
tenth of the training images is held out from training the tokenizer and the prior. On some of them, the settings of `enhance` are chosen for each
kind of damage. Results are kept in the folder, so a second call continues where the first one stopped.
"""

import argparse
import io
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.ndimage import median_filter
from torchmetrics.functional.image import structural_similarity_index_measure

from benchmarks import cifar10
from benchmarks.classifier import CLASSIFIER_SECONDS
from benchmarks.conditions import PICTURE_SCALE, make_classifier, save_tensors
from benchmarks.measuring import RESULTS, record, use_two_cpu_threads
from benchmarks.parallel_sampling import ANY_ORDER, BATCH, MINUTES, RASTER, SEED, Judge, make_recipe, make_tokens, train
from benchmarks.two_levels import reconstruct
from pipelines.editing.masked_images import MaskedImages, token_side
from pipelines.generate import ImageGenerationPipeline
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.images import to_uint8
from stage1_tokenizer.pictures import save_picture, tile_images
from stage1_tokenizer.tokenizer_protocol import Tokenizer, load_tokenizer
from stage2_prior.prior import TokenPrior
from vqmosaic.files.durable_files import write_json
from vqmosaic.files.json_files import read_object
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.seeding import generator

IMAGES, HELD_OUT_IMAGES = 2_000, 200
JPEG_QUALITY, MISSING = 10, 0.3
COLUMNS = 8
"""Images in each row of the picture, which has 26 rows."""
DAMAGES = ("noise 10", "noise 25", "noise 50", "JPEG 10", "30 % missing")
NOISES = {"noise 10": (6, 10, 15), "noise 25": (15, 25, 35), "noise 50": (30, 50, 70), "JPEG 10": (6, 12, 25), "30 % missing": (6, 12, 25)}
"""For each kind of damage, the values of `noise` that are compared on the held-out images."""
TOKENIZER = "the tokenizer alone"
AVERAGE = 4
MEAN = f"enhance, mean of {AVERAGE}"
WAYS: dict[str, dict[str, Any]] = {"enhance": {}, "enhance, temperature 0": {"temperature": 0.0}, MEAN: {"average": AVERAGE}}
"""For each way to call `pipe.enhance`, its arguments besides the noise."""


class Damaged(NamedTuple):
    """Images (N, H, W, C), uint8, and what is known about the damage."""

    images_NHWC: torch.Tensor
    masks_NHW: torch.Tensor | None
    """True where a pixel is missing."""


class Measures(NamedTuple):
    """How close restored images are to the originals, and to other real images."""

    psnr: float
    ssim: float
    distance: float


def damage(kind: str, images_NHWC: torch.Tensor) -> Damaged:
    """The images with this kind of damage. That of an image depends only on its position. Missing pixels are grey."""
    damaged, masks = [], []
    for number, image_HWC in enumerate(images_NHWC.numpy()):
        rng = generator("restoration benchmark", kind, number)
        if kind.startswith("noise"):
            noisy_HWC = image_HWC + rng.standard_normal(image_HWC.shape) * float(kind.removeprefix("noise "))
            damaged.append(noisy_HWC.round().clip(0, 255).astype(np.uint8))
        elif kind.startswith("JPEG"):
            file = io.BytesIO()
            Image.fromarray(image_HWC).save(file, "JPEG", quality=JPEG_QUALITY)
            damaged.append(np.asarray(Image.open(file)))
        else:
            masks.append(rng.random(image_HWC.shape[:2]) < MISSING)
            damaged.append(np.where(masks[-1][..., None], 128, image_HWC).astype(np.uint8))
    return Damaged(torch.from_numpy(np.stack(damaged)), torch.from_numpy(np.stack(masks)) if masks else None)


# --- ways to restore ---------------------------------------------------------------------------------------------------------


def restore_simply(tokenizer: Tokenizer, damaged: Damaged) -> dict[str, torch.Tensor]:
    """The images (N, H, W, C), uint8, after each way to restore them that needs no prior. Pixels that are not missing are kept, if others are."""
    given_NHWC, restored_NHWC = damaged.images_NHWC, reconstruct(tokenizer, damaged.images_NHWC)
    if damaged.masks_NHW is not None:
        masked = MaskedImages(cifar10.to_float(given_NHWC), damaged.masks_NHW, token_side(tokenizer.grids, tokenizer.transform.sides))
        given_NHWC = torch.from_numpy(to_uint8(masked.filled()))
        restored_NCHW = cifar10.to_float(reconstruct(tokenizer, given_NHWC))
        restored_NHWC = torch.from_numpy(to_uint8(masked.paste(restored_NCHW, range(len(restored_NCHW)))))  # as in pipe.enhance

    def keep(filtered: np.ndarray) -> torch.Tensor:
        filtered_NHWC = torch.from_numpy(filtered)
        return filtered_NHWC if damaged.masks_NHW is None else torch.where(damaged.masks_NHW[..., None], filtered_NHWC, given_NHWC)

    half = [Image.fromarray(image_HWC).resize((16, 16), Image.Resampling.BICUBIC).resize((32, 32), Image.Resampling.BICUBIC)
            for image_HWC in given_NHWC.numpy()]
    return {"nothing" if damaged.masks_NHW is None else "the nearest pixel": given_NHWC,
            "median filter, 3x3": keep(median_filter(given_NHWC.numpy(), size=(1, 3, 3, 1))),
            "bicubic, to 16x16 and back": keep(np.stack([np.asarray(image) for image in half])),
            TOKENIZER: restored_NHWC}


def enhance(pipe: ImageGenerationPipeline, damaged: Damaged, noise: float, **arguments: Any) -> torch.Tensor:
    """The images (N, H, W, C), uint8, after `pipe.enhance`."""
    out = pipe.enhance(cifar10.to_float(damaged.images_NHWC), noise, mask=None if damaged.masks_NHW is None else list(damaged.masks_NHW),
                       seed=SEED, output_type="np", batch_size=BATCH, **arguments)
    return torch.from_numpy(out.images)


def measure(judge: Judge, restored_NHWC: torch.Tensor, images_NHWC: torch.Tensor) -> Measures:
    """The measures of restored images."""
    squared_N = (restored_NHWC.double() - images_NHWC.double()).square().flatten(1).mean(dim=1)
    psnr = float((10 * torch.log10(255**2 / squared_N.clamp_min(1e-6))).mean())
    ssim = structural_similarity_index_measure(*(each.permute(0, 3, 1, 2).float() for each in (restored_NHWC, images_NHWC)), data_range=255.0)
    assert isinstance(ssim, torch.Tensor)
    return Measures(psnr, float(ssim), judge.distance_of(restored_NHWC))


def choose_noise(pipe: ImageGenerationPipeline, file: Path, kind: str, images_NHWC: torch.Tensor, judge: Judge) -> dict[str, int]:
    """For each of WAYS, the noise with the highest PSNR on held-out images. All measures are kept in the file."""
    found = read_object(file, "delete it") if file.is_file() else {}
    damaged, best = damage(kind, images_NHWC), {}
    for way, arguments in WAYS.items():
        for noise in NOISES[kind]:
            if f"{way}: {noise}" not in found:
                found[f"{way}: {noise}"] = list(measure(judge, enhance(pipe, damaged, noise, **arguments), images_NHWC))
                write_json(file, found)
        best[way] = max(NOISES[kind], key=lambda noise: found[f"{way}: {noise}"][0])
    print(f"{kind}: PSNR, SSIM and Frechet distance on held-out images by noise: {found}", flush=True)
    return best


# --- results -----------------------------------------------------------------------------------------------------------------


def measure_all(run_dir: Path, count: int, minutes: float, prior_name: str) -> int:
    """Restore the images in all ways, print the tables, and save the picture. Returns exit code 0: there is no target."""
    tokenizer = load_tokenizer(make_tokens(run_dir, minutes=minutes) / "tokenizer")
    prior, metrics = train(prior_name, run_dir, minutes)
    base = load_recipe(prior_name).sampling
    pipe = ImageGenerationPipeline(tokenizer, prior, SamplingConfig(order=base.order, steps=base.steps, step_schedule=base.step_schedule))
    fresh = TokenPrior.from_config(load_recipe(prior_name).prior, prior.vocabulary, SEED, any_order=prior.any_order).eval()
    without_prior = ImageGenerationPipeline(tokenizer, fresh, pipe.sampling)  # new weights: all codes are about equally likely
    train_NHWC, train_labels_N = cifar10.load("train")
    test_NHWC, _ = cifar10.load("test")
    classifier = make_classifier(run_dir, min(CLASSIFIER_SECONDS, 60 * minutes), train_NHWC, train_labels_N)
    validation = open_splits(make_recipe(prior_name, run_dir).data).validation
    held_out_NHWC = train_NHWC[[int(validation.source_name(index)) for index in range(len(validation))]]  # the name of a source is its row
    held_out = min(HELD_OUT_IMAGES, count)
    chooser, judge = Judge(tokenizer, classifier, held_out_NHWC[held_out:]), Judge(tokenizer, classifier, test_NHWC[count:])
    images_NHWC, folder = test_NHWC[:count], run_dir / "restoration_benchmark"
    folder.mkdir(exist_ok=True)

    lines = [f"The prior of recipe {prior_name} trained for {minutes:g} minutes ({metrics['step']:,} steps). {count:,} test images. No test image "
             f"was used for training or for choices, and the prior was not given classes. `noise` was chosen for each damage by PSNR on {held_out:,} "
             "images that were held out from the training of tokenizer and prior. Rows with an untrained prior show what the prior adds. The "
             f"distances are those to the other {len(test_NHWC) - count:,} test images. Pixels that are not missing are kept, in all ways alike.", "",
             "| damage | restored by | PSNR, dB | SSIM | Frechet distance |", "|---|---|---|---|---|"]
    rows, verdicts = [images_NHWC[:COLUMNS]], []
    for kind in DAMAGES:
        damaged = damage(kind, images_NHWC)
        key = f"{prior_name}-{minutes:g}-minutes-{kind.replace(' ', '_').replace('%', 'percent')}"
        ways: dict[str, torch.Tensor] = restore_simply(tokenizer, damaged)
        noises = choose_noise(pipe, folder / f"{key}-held-out-{held_out}.json", kind, held_out_NHWC[:held_out], chooser)
        calls = [(f"{MEAN}, untrained prior", without_prior, MEAN), *((way, pipe, way) for way in WAYS)]
        for name, each, way in calls:
            file = folder / f"{key}-test-{count}-{name.replace(', ', '-').replace(' ', '_')}-{noises[way]}.safetensors"
            if not file.is_file():
                save_tensors(file, {"images": enhance(each, damaged, noises[way], **WAYS[way])})
            ways[f"{name}, noise {noises[way]}"] = load_file(file)["images"]
        measures = {name: measure(judge, restored_NHWC, images_NHWC) for name, restored_NHWC in ways.items()}
        lines += [f"| {kind} | {name} | {each.psnr:.2f} | {each.ssim:.3f} | {each.distance:.2f} |" for name, each in measures.items()]
        verdicts.append(f"- {kind}: {describe_best(measures)}")
        names = list(ways)
        rows += [damaged.images_NHWC[:COLUMNS], *(ways[name][:COLUMNS] for name in (names[1], TOKENIZER, names[-len(WAYS)], names[-1]))]
    clean = measure(judge, reconstruct(tokenizer, images_NHWC), images_NHWC)
    lines += [f"| none | {TOKENIZER} | {clean.psnr:.2f} | {clean.ssim:.3f} | {clean.distance:.2f} |", "", *verdicts, "",
              "Picture: [restoration.png](restoration.png). First row: test images. Then, for each damage: damaged images; after the median filter; "
              f"after the tokenizer alone; one result of `enhance`; the mean of {AVERAGE}."]
    pictures = RESULTS.parent if "--record" in sys.argv else Path(tempfile.gettempdir())
    save_picture(tile_images([row_NHWC.numpy() for row_NHWC in rows], PICTURE_SCALE), pictures / "restoration.png")
    record("Restoring images of CIFAR-10", lines, ("transformers", "torchmetrics", "scipy"))
    return 0


def describe_best(measures: Mapping[str, Measures]) -> str:
    """Which way is the best by each measure."""
    best = {"PSNR": max(measures, key=lambda name: measures[name].psnr), "SSIM": max(measures, key=lambda name: measures[name].ssim),
            "Frechet distance": min(measures, key=lambda name: measures[name].distance)}
    return "; ".join(f"best {name}: {way}" for name, way in best.items())


def main() -> int:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, help="a folder for tokenizer, tokens, prior and restored images; default: a temporary one")
    parser.add_argument("--images", type=int, default=IMAGES, help="number of test images that are restored, 2 to 8000; default: 2000")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="minutes of training of the prior, and of a tokenizer that is missing")
    parser.add_argument("--prior", choices=(ANY_ORDER, RASTER), default=ANY_ORDER, help=f"the recipe of the prior; default: {ANY_ORDER}")
    parser.add_argument("--record", action="store_true", help="write the result to RESULTS.md")
    options = parser.parse_args()
    if not 2 <= options.images <= 8000:
        parser.error(f"--images is {options.images}; allowed: 2 to 8000. The others of the 10,000 test images are compared with these.")
    use_two_cpu_threads()
    return measure_all(options.run or Path(tempfile.mkdtemp()), options.images, options.minutes, options.prior)


if __name__ == "__main__":
    sys.exit(main())
