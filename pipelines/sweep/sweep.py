"""`vqmosaic sweep`: measures sampling settings by the Frechet distance to real images, and recommends the best settings in the bundle.

    vqmosaic sweep runs/cifar10 --features inception.pt                                  # guidance, if the prior supports it
    vqmosaic sweep runs/cifar10 --features inception.pt --guidance_scale 1,1.5,2 --top_p 0.9,0.95,1
    vqmosaic sweep runs/cifar10 --features resnet50.safetensors --features_model resnet50 --images 5000 --keep

Every combination generates images with the same seeds and the same classes, in the class proportions of the real images. They are compared with the
validation images of the run (after the deterministic transform) in the feature space of a network that the user provides.
"""

import platform
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from pipelines.bundle import read_bundle, recommend, usable_device
from pipelines.decoded_images import decode_in_batches
from pipelines.generate import ImageGenerationPipeline
from pipelines.pipeline_parts import PipelineParts
from pipelines.stages.stored_conditions import stored_images
from pipelines.sweep.feature_extractors import FeatureExtractor, FeatureNetwork, load_feature_extractor
from pipelines.sweep.random_subset import RandomSubset
from pipelines.sweep.sweep_plan import SweepRequest, containing_folder
from pipelines.sweep.sweep_record import SweepRecord, format_settings, ranking_table, read_sweep, setting_names, varying_settings
from stage1_tokenizer.data.data_location import image_files
from stage1_tokenizer.data.folder_source import FolderSource, class_name
from stage1_tokenizer.data.image_batches import ValidationImages
from stage1_tokenizer.data.image_sources import ImageSource, comparable_identity, refuse_if_too_many_unreadable
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.images import ImageTransform, to_uint8
from stage1_tokenizer.tokenizer_config import read_tokenizer_config
from stage2_prior.generation.sampling import SamplingStopped
from token_shards import TokenShardReader
from vqmosaic import __version__
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import DataConfig, SamplingConfig
from vqmosaic.runs.interruption import Interrupted, StopFlag
from vqmosaic.runs.out_of_memory import FittingBatches
from vqmosaic.runs.run_folder import RunFolder, locked
from vqmosaic.seeding import derive_seed, image_seeds
from vqmosaic.training.budget import format_duration
from vqmosaic.training.tracking import progress_bar
from vqmosaic.wording import counted, is_or_are

BIAS_WARNING_IMAGES = 10_000
"""With fewer images, the Frechet distance has a clear upward bias, which depends on the number of images."""
KERNEL_IMAGES, KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 10_000, 20, 1000
"""The kernel distance uses the features of at most KERNEL_IMAGES images, chosen at random. It is the mean over KERNEL_SUBSETS random subsets
of KERNEL_SUBSET_SIZE images each."""
LIBRARIES = ("torch", "transformers", "torchmetrics", "numpy", "pillow")


class Generated(NamedTuple):
    """What is given for the N generated images of each combination."""

    classes: list[int] | None
    """The class index of each image, or None for a prior without classes."""
    given: dict[str, torch.Tensor]
    """Ids (N, n) of the conditions, by name."""


class FeaturesAsGiven(nn.Identity):
    """The network for torchmetrics, which receives features instead of images."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


class Distances:
    """Frechet and kernel distance between generated and real images. The real features are kept for all combinations.

    torchmetrics accumulates in float64. The network runs once for both distances, which receive its features instead of images.
    """

    def __init__(self, extractor: FeatureExtractor):
        self.extractor = extractor
        features = FeaturesAsGiven(extractor.num_features)
        self.frechet = FrechetInceptionDistance(feature=features, reset_real_features=False)
        with warnings.catch_warnings():  # torchmetrics warns that it keeps all features, but there are at most KERNEL_IMAGES
            warnings.simplefilter("ignore", UserWarning)
            self.kernel = KernelInceptionDistance(feature=features, subsets=KERNEL_SUBSETS)
        self.subsets = {True: RandomSubset(KERNEL_IMAGES, "real"), False: RandomSubset(KERNEL_IMAGES, "generated")}

    def update(self, images_BCHW: torch.Tensor, real: bool) -> None:
        """Add images in [-1, 1]. Raises InputError if their features are not finite."""
        pixels_BCHW = torch.from_numpy(to_uint8(images_BCHW)).permute(0, 3, 1, 2)
        features_BF = self.extractor(pixels_BCHW)
        if not features_BF.isfinite().all():
            raise InputError(f"--features {self.extractor.file.path} returns features that are not finite for "
                             f"{'real' if real else 'generated'} images.")
        self.frechet.update(features_BF, real=real)
        self.subsets[real].update(features_BF)  # a random subset, because images come class by class

    def result(self, seed: int) -> dict[str, float]:
        """Return the distances and remove the generated images."""
        features = {real: subset.rows() for real, subset in self.subsets.items()}
        for real, features_NF in features.items():
            self.kernel.update(features_NF, real=real)
        self.kernel.subset_size = min(KERNEL_SUBSET_SIZE, *map(len, features.values()))
        with torch.random.fork_rng(devices=[]):  # torchmetrics draws the subsets from the global generator
            torch.manual_seed(derive_seed("kernel distance", seed))
            mean, deviation = self.kernel.compute()
        result = {"frechet_distance": float(self.frechet.compute()), "kernel_distance": float(mean), "kernel_deviation": float(deviation)}
        self.frechet.reset()
        self.kernel.reset()
        self.subsets[False] = RandomSubset(KERNEL_IMAGES, "generated")
        return result


def run_sweep(request: SweepRequest, build: Callable[[str], FeatureNetwork] | None = None) -> int:
    """Measure every combination, recommend the best settings and return exit code 0.

    Args:
        build: see load_feature_extractor.

    Raises:
        ValueError: the feature extractor returns no valid features, or the record was made with another setup.
        Interrupted: a signal stopped the sweep. The combinations measured so far are in the record.
    """
    device = usable_device(request.device, "--device")
    transform = ImageTransform.from_dict(read_tokenizer_config(request.folder / "tokenizer")["transform"])
    extractor = load_feature_extractor(request.features, transform.image_size, device, build)
    pipe = ImageGenerationPipeline.from_pretrained(request.folder, device, getattr(torch, request.dtype))
    source, labelled, description = open_reference(request, transform, pipe.class_names)
    real = ValidationImages(source, transform, cache_megabytes=0)
    counts, classes_text, stored, given = None, "with the conditions of validation images", None, dict[str, torch.Tensor]()
    if request.conditions is None:
        counts, classes_text = class_counts(pipe.vocabulary.learned_class_names, labelled, request.images)
        classes = None if counts is None else [index for index, count in enumerate(counts) for _ in range(count)]
    else:
        reader = TokenShardReader(request.conditions)
        stored = stored_images(reader, pipe.chain.vocabularies, request.images)
        classes, given = stored.learned_by(pipe.vocabulary)
    recorded_real = (read_sweep(request.record) or {"setup": {}})["setup"].get("real", {})
    setup = {"pipeline": PipelineParts.in_folder(request.folder, read_bundle(request.folder)).fingerprints(),
             "features": {**request.features.to_dict(), "count": extractor.num_features},
             "real": {**comparable_identity(source, recorded_real), "transform": transform.to_dict()},
             "images": request.images, "seed": request.seed, "images_of_class": counts, "dtype": request.dtype,
             **({} if stored is None else {"conditions": reader.manifest.fingerprint}),
             "kernel": {"images": KERNEL_IMAGES, "subsets": KERNEL_SUBSETS, "subset_size": KERNEL_SUBSET_SIZE,
                        # older records used the first images; they are refused if this makes a difference
                        **({"images_chosen": "at random"} if max(request.images, len(real)) > KERNEL_IMAGES else {})}}
    lock = request.record.with_name(f".lock-{request.record.name}")
    with nullcontext() if request.dry_run else locked(request.record, "--out", lock):  # two sweeps would overwrite each other's results
        record = SweepRecord.open(request.record, setup)
        missing = [sampling for sampling in request.combinations if record.result_of(sampling) is None]
        total = len(request.combinations)
        combinations = counted(total, "combination")
        print(f"features: {extractor.num_features} of {request.features.path.name} ({request.features.kind}), on {device}\n"
              f"real: {counted(len(real), 'image')}, {description}\n"
              f"generated: {counted(request.images, 'image')} for {'each of ' if total > 1 else ''}{combinations}, {classes_text}\n"
              f"record: {request.record}, {total - len(missing)} of {total} measured already")
        warn_about_bias(request.images, len(real))
        if request.dry_run:
            print("--dry_run: nothing was measured or written")
            return 0
        if missing:
            measure_combinations(request, pipe, Distances(extractor), real, Generated(classes, given), record, missing)
        else:
            print(f"nothing to do: {combinations} {is_or_are(total)} in the record already, so nothing was measured")
        report_and_recommend(request, record)
    return 0


def measure_combinations(request: SweepRequest, pipe: ImageGenerationPipeline, distances: Distances, real: ValidationImages,
                         generated: Generated, record: SweepRecord, missing: list[SamplingConfig]) -> None:
    """Measure the combinations that are missing from the record, and add each to the record as soon as it is done."""
    names = varying_settings(request.combinations)
    with StopFlag() as stop:
        for images_BCHW, _ in until_stopped(real.batches(request.batch_size), stop, record):
            distances.update(images_BCHW, real=True)
        refuse_if_too_many_unreadable(real.unreadable, len(real), request.data or DataConfig())
        record.content["reference"] = {"images": distances.subsets[True].count, "unreadable": sorted(real.unreadable)}
        for remaining, sampling in zip(reversed(range(len(missing))), missing, strict=True):
            started = time.monotonic()
            settings = format_settings(sampling, names)
            with progress_bar(request.images, 0, settings, "image") as bar:
                for images_BCHW in until_stopped(generate_batches(pipe, sampling, generated, request, stop), stop, record):
                    distances.update(images_BCHW, real=False)
                    bar.update(len(images_BCHW))
            result, seconds = distances.result(request.seed), time.monotonic() - started
            record.add(sampling, **result, images=request.images, seconds=round(seconds, 1), device=str(pipe.device),
                       versions=library_versions(request.features.kind))
            estimate = f"; {remaining} remaining: about {format_duration(remaining * seconds)}" if remaining else ""
            print(f"{settings}: Frechet {result['frechet_distance']:.6g}, kernel {result['kernel_distance']:.6g} ({seconds:.1f} s{estimate})",
                  flush=True)


def generate_batches(pipe: ImageGenerationPipeline, sampling: SamplingConfig, generated: Generated, request: SweepRequest,
                     stop: StopFlag) -> Iterator[torch.Tensor]:
    """Yield the images of one combination in batches (B, C, H, W). Image i depends on the seed, i, its class and conditions. Ends on a signal."""
    seeds, decoding = image_seeds(request.seed, request.images), FittingBatches(pipe.device)
    for start in range(0, request.images, request.batch_size):
        batch = slice(start, start + request.batch_size)
        try:
            ids = pipe.sample_ids(None if generated.classes is None else generated.classes[batch], sampling, seeds[batch],
                                  callback=lambda done, total: not stop.signal,
                                  given={name: ids_Nn[batch] for name, ids_Nn in generated.given.items()})
        except SamplingStopped:
            return
        yield from decode_in_batches(pipe.tokenizer, ids, fitting=decoding)


def until_stopped(batches: Iterator[Any], stop: StopFlag, record: SweepRecord) -> Iterator[Any]:
    """Yield the batches. Raises Interrupted after a signal."""
    for batch in batches:
        yield batch
        if stop.signal:
            break
    if stop.signal:
        done = len(record.content["results"])
        raise Interrupted(stop.signal, f"{counted(done, 'combination')} {is_or_are(done)} in {record.path}")


def report_and_recommend(request: SweepRequest, record: SweepRecord) -> None:
    """Print the ranking and, without --keep, write the best settings into the pipeline as its recommendation."""
    ranked = record.ranked()
    others = len(ranked) - len(request.combinations)
    earlier = f", with {counted(others, 'combination')} of earlier sweeps" if others else ""
    print(f"\nranked ({request.record}{earlier}):\n{ranking_table(record)}")
    by_kernel = min(ranked, key=lambda result: result["kernel_distance"])
    if by_kernel is not ranked[0]:
        names = varying_settings([record.settings_of(result) for result in ranked])
        print(f"the kernel distance ranks another combination first: {format_settings(record.settings_of(by_kernel), names)}")
    best = record.settings_of(ranked[0])
    settings = format_settings(best, setting_names([best]))
    if request.keep:
        print(f"best: {settings}\n--keep: the recommended settings in {request.folder / 'pipeline.json'} were not changed")
        return
    run = containing_folder(request.folder)
    with RunFolder(run).lock() if (run / "recipe.yaml").is_file() else nullcontext():
        recommend(request.folder, best, record.content)
    print(f"now recommended in {request.folder / 'pipeline.json'}: {settings}")


def warn_about_bias(images: int, real: int) -> None:
    """Print a warning if there are too few images for an unbiased Frechet distance."""
    if min(images, real) < BIAS_WARNING_IMAGES:
        print(f"warning: {images:,} generated and {real:,} real images are compared. With fewer than {BIAS_WARNING_IMAGES:,} of either, the Frechet "
              "distance has an upward bias that depends on the number of images. Use it only to rank the settings of this sweep. The kernel "
              "distance has no such bias.")


def open_reference(request: SweepRequest, transform: ImageTransform, class_names: list[str] | None) -> tuple[ImageSource, ImageSource | None, str]:
    """(real images, labelled images that give the class proportions or None, description of the real images)."""
    def has_prior_classes(source: ImageSource | None) -> bool:
        return source is not None and class_names is not None and source.class_names == class_names

    validation: ImageSource | None = None
    if request.real is None:
        assert request.data is not None  # plan_sweep requires one of the two
        source = validation = open_splits(request.data).in_class_order_of(class_names).validation
        description = f"the validation split of {request.data.path or request.data.source}"
    else:
        source, description = open_all_images(request.real, transform, class_names), f"all of {request.real}"
        if class_names is not None and not has_prior_classes(source) and request.data is not None:
            validation = open_splits(request.data).in_class_order_of(class_names).validation
    if len(source) < 2:
        raise InputError(f"there {is_or_are(len(source))} {counted(len(source), 'real image')} to compare with ({description}); a distance needs at "
                         "least 2.")
    return source, next(filter(has_prior_classes, (source, validation)), None), description


def open_all_images(folder: Path, transform: ImageTransform, class_names: list[str] | None) -> FolderSource:
    """All images of a folder as one split. They are labelled if every image is in a sub-folder with the name of a class."""
    names = sorted(image_files(folder.expanduser()))
    folders = [class_name(name.partition("/")[0]) if "/" in name else None for name in names]
    labels: list[int | None] | None = None
    if class_names is not None and set(folders) <= set(class_names):
        labels = [class_names.index(name) for name in folders if name is not None]
    return FolderSource("all", names, labels, class_names if labels is not None else None,
                        DataConfig(source="folder", path=str(folder), channels=transform.channels,
                                   value_range=None if transform.value_range is None else [*transform.value_range]))


def class_counts(class_names: list[str] | None, labelled: ImageSource | None, images: int) -> tuple[list[int] | None, str]:
    """(number of generated images of each class or, for a prior without classes, None; description of it).

    The proportions are those of the labels, rounded by the largest-remainder method. Equal remainders are ordered by class index. If there are fewer
    images than classes, they are ordered by a hash, because the real images come from all classes and not only from the first ones.
    """
    if class_names is None:
        return None, "without classes"
    found = Counter(labelled.label(index) for index in range(len(labelled))) if labelled is not None else Counter()
    weights = [found[index] for index in range(len(class_names))]
    classes = counted(len(class_names), "class")
    description = f"{classes} in the proportions of the {counted(sum(weights), 'labelled real image')}"
    if not sum(weights):
        weights, description = [1] * len(class_names), f"{classes} in equal proportions, because the real images have no labels of these classes"
    counts = [weight * images // sum(weights) for weight in weights]
    rank = (lambda index: derive_seed("images of class", index)) if images < len(weights) else (lambda index: index)
    by_remainder = sorted(range(len(weights)), key=lambda index: (-(weights[index] * images % sum(weights)), rank(index)))
    for index in by_remainder[:images - sum(counts)]:
        counts[index] += 1
    return counts, description


def library_versions(features_kind: str) -> dict[str, str]:
    """Versions of vqmosaic, Python and the libraries that affect the results."""
    names = (*LIBRARIES, *(["timm"] if features_kind == "timm" else []))
    return {"vqmosaic": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}
