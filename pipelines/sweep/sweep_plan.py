"""Plans a sweep without loading torch: checks the settings to compare, the images and the record."""

import argparse
import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.bundle import check_sampling_fits, find_pipeline, naming_options, read_bundle, recommended_sampling
from pipelines.pipeline_parts import PipelineParts
from pipelines.stages.stage_checks import check_can_write
from pipelines.sweep.feature_file import FeatureFile, resolve_feature_file
from pipelines.sweep.sweep_record import read_sweep
from stage1_tokenizer.data.data_location import check_data_path
from token_shards.manifest import MANIFEST_NAME
from vqmosaic.errors import InputError, check_range
from vqmosaic.files.given_paths import given_path
from vqmosaic.recipes.field_types import required_type
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.recipes.recipe_sections import DataConfig, SamplingConfig

DEFAULT_IMAGES = 10_000
RECORD_NAME = "sweep.json"
GUIDANCE_GRID = {"guidance_scale": (1.0, 1.25, 1.5, 2.0, 3.0)}
TEMPERATURE_GRID = {"temperature": (0.8, 0.9, 1.0, 1.1)}
"""The default settings to compare: guidance if the prior supports it, else temperature."""


@dataclass(frozen=True, kw_only=True)
class SweepRequest:
    """The checked options of a sweep."""

    folder: Path
    """The pipeline folder."""
    combinations: list[SamplingConfig]
    """The complete sampling settings to compare."""
    features: FeatureFile
    """The feature extractor that is used to compare images."""
    data: DataConfig | None
    """The data set of the run, or None if it is not known. Its validation images are the reference, and its labels give the class proportions."""
    real: Path | None
    """A folder of real images to use as the reference instead."""
    conditions: Path | None = None
    """The token shards with the conditions of validation images, for a prior that is given more than the class. None for others."""
    record: Path
    """The JSON file to which each result is added as soon as it is available."""
    images: int = DEFAULT_IMAGES
    """Number of images to generate for each combination."""
    seed: int = 0
    """Seed of these images, the same for all combinations."""
    batch_size: int = 64
    """Number of images that are sampled together."""
    keep: bool = False
    """Leave the recommended settings of the pipeline unchanged."""
    dry_run: bool = False
    """Check everything and print the plan, but measure nothing."""
    device: str | None = None
    """The device to compute on. None selects the best available device."""
    dtype: str = "float32"
    """Data type of prior and decoder."""


def sweepable_fields() -> dict[str, type]:
    """Field name -> int, float or str, for the sampling settings that are a single value."""
    types = {field.name: required_type(field.type) for field in dataclasses.fields(SamplingConfig)}
    return {name: type_ for name, type_ in types.items() if type_ in (int, float, str)}


def add_sweep_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sweep` to a parser, except device and dtype."""
    parser.add_argument("pipeline", type=given_path, help="a run folder or a pipeline folder")
    parser.add_argument("--features", required=True, type=given_path, metavar="FILE",
                        help="a TorchScript file (it takes uint8 images (B, 3, H, W) and returns features (B, F); its code is executed, so use only "
                             "trusted files), or a weights file for --features_model")
    parser.add_argument("--features_model", metavar="NAME", help="the timm model for the weights in --features (needs 'vqmosaic[features]')")
    parser.add_argument("--images", type=int, default=DEFAULT_IMAGES, help=f"images to generate for each combination; default: {DEFAULT_IMAGES:,}")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images, the same for all combinations")
    parser.add_argument("--batch_size", type=int, default=64, help="images that are sampled together")
    parser.add_argument("--recipe", help="compare with the validation images of this recipe; default: the recipe of the run. Overrides such as "
                                         "--data.path can follow")
    parser.add_argument("--real", type=given_path, metavar="FOLDER", help="compare with all images of a folder instead")
    parser.add_argument("--out", type=given_path, metavar="FILE",
                        help=f"the record, which lets a stopped sweep continue; default: {RECORD_NAME} next to the pipeline folder")
    parser.add_argument("--keep", action="store_true", help="leave the recommended settings of the pipeline unchanged")
    parser.add_argument("--dry_run", action="store_true", help="check everything, including the features on one batch, and print the plan")
    for name in sweepable_fields():
        parser.add_argument(f"--{name}", metavar="VALUES", help="values to compare, separated by commas; default: the recommended value")


def plan_sweep(options: argparse.Namespace, overrides: list[str]) -> SweepRequest:
    """Check the options of `sweep` and the overrides of the recipe, and return the request.

    Raises:
        ValueError: there is no pipeline, no real images are known, a setting is out of range or not supported by this prior, or the feature file or
            the record is invalid.
    """
    folder = find_pipeline(options.pipeline)
    for name, least in (("images", 2), ("seed", 0), ("batch_size", 1)):
        check_range(f"--{name}", getattr(options, name), at_least=least)
    content = read_bundle(folder)
    parts = PipelineParts.in_folder(folder, content)
    vocabulary = parts.vocabulary()
    can_be_guided = vocabulary.why_unguided() is None
    given = {name: parse_values(name, kind, text) for name, kind in sweepable_fields().items() if (text := getattr(options, name)) is not None}
    base = recommended_sampling(folder, content)
    if "guidance_power" in given and base.guidance_schedule != "power-cosine":
        raise InputError(f"--guidance_power has no effect, because sampling.guidance_schedule of this pipeline is {base.guidance_schedule!r}. Only "
                         "power-cosine has a power: set sampling.guidance_schedule in the recipe and bundle again.")
    if "step_schedule" in given and "steps" not in given and base.steps is None:
        raise InputError("--step_schedule has no effect, because each pass draws one token. Give --steps too.")
    with naming_options(sweepable_fields()):
        combinations = combine(base, given or (GUIDANCE_GRID if can_be_guided else TEMPERATURE_GRID))
        for sampling in combinations:
            check_sampling_fits(sampling, vocabulary, parts.priors)
    record = options.out or containing_folder(folder) / RECORD_NAME
    if record.is_dir():
        raise InputError(f"--out is {str(record)!r}, which is a folder; give the path of a JSON file.")
    check_can_write("the folder of --out", record.parent)
    read_sweep(record)  # raises before torch is loaded if the file is not a sweep record
    if not options.keep:
        check_can_write("the pipeline", folder)
    return SweepRequest(
        folder=folder, combinations=combinations, features=resolve_feature_file(options.features, options.features_model),
        data=find_data(folder, options, overrides), real=options.real, record=record,
        conditions=find_conditions(folder, options, overrides) if vocabulary.conditions else None, images=options.images, seed=options.seed,
        batch_size=options.batch_size, keep=options.keep, dry_run=options.dry_run, device=options.device, dtype=options.dtype)


def containing_folder(folder: Path) -> Path:
    """The folder that contains a pipeline folder. It is a run folder if it contains a recipe.yaml."""
    return folder.resolve().parent if folder.name in ("", "..") else folder.parent


def parse_values(name: str, kind: type, text: str) -> tuple[Any, ...]:
    """The distinct values of a list separated by commas, in the given order. Raises InputError if the text is invalid."""
    try:
        return tuple(dict.fromkeys(kind(word.strip()) for word in text.split(",")))
    except ValueError:
        raise InputError(f"--{name} is {text!r}; it must be {'integers' if kind is int else 'numbers'} separated by commas, "
                         f"such as {'0,50,100' if kind is int else '1,1.5,2'}.") from None


def combine(base: SamplingConfig, values: dict[str, tuple[Any, ...]]) -> list[SamplingConfig]:
    """All combinations of the values, with the other settings from `base`. The last name varies fastest."""
    return [dataclasses.replace(base, **dict(zip(values, chosen, strict=True))) for chosen in itertools.product(*values.values())]


def find_conditions(folder: Path, options: argparse.Namespace, overrides: list[str]) -> Path:
    """The validation shards of the given recipe or of the run that contains a pipeline folder. Raises InputError if there are none."""
    run = containing_folder(folder)
    recipe = options.recipe if options.recipe is not None else str(run) if (run / "recipe.yaml").is_file() else None
    tokens = (run / "tokens" if recipe is None else load_recipe(recipe, overrides).tokens_folder) / "validation"
    if not (tokens / MANIFEST_NAME).is_file():
        raise InputError(f"the prior of {folder} is given more than the class, so sweep needs the conditions of validation images, but {tokens} has "
                         "no token shards. Give a run folder with its tokens, or --recipe with the recipe of such a run.")
    return tokens


def find_data(folder: Path, options: argparse.Namespace, overrides: list[str]) -> DataConfig | None:
    """The data set of the given recipe or, by default, of the run that contains a pipeline folder.

    None if --real gives the reference images and the data set is not known or cannot be found. Raises InputError if no reference images are known, or
    their path is invalid.
    """
    run = containing_folder(folder)
    recipe = options.recipe
    if recipe is None and (run / "recipe.yaml").is_file():
        recipe = str(run)
    if options.real is not None:
        check_data_path(DataConfig(source="folder", path=str(options.real)))
    if recipe is None:
        if overrides:
            raise InputError(f"{overrides[0]!r} is not an option of sweep; overrides of the recipe need --recipe.")
        if options.real is None:
            raise InputError(f"{folder} is not in a run folder, so its data set is not known; give --recipe with the recipe of the run, or --real "
                             "with a folder of real images.")
        return None
    data = load_recipe(recipe, overrides).data
    try:
        check_data_path(data)
    except InputError:
        if options.real is None:
            raise
        return None  # it would only give the class proportions
    return data
