"""What a sweep will do, checked without torch: which settings are compared, on which images, into which record."""

import argparse
import dataclasses
import itertools
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.bundle import check_sampling_fits, find_pipeline, naming_options, read_bundle, recommended_sampling
from pipelines.stages.stage_checks import check_can_write
from pipelines.stages.stage_inputs import read_vocabulary
from pipelines.sweep.feature_file import FeatureFile, resolve_feature_file
from pipelines.sweep.sweep_record import read_sweep
from stage1_tokenizer.data.data_location import check_data_path
from vqmosaic.errors import InputError, check_range
from vqmosaic.files.given_paths import given_path
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.recipes.recipe_sections import DataConfig, SamplingConfig

DEFAULT_IMAGES = 10_000
RECORD_NAME = "sweep.json"
GUIDED_GRID = {"guidance_scale": (1.0, 1.25, 1.5, 2.0, 3.0)}
PLAIN_GRID = {"temperature": (0.8, 0.9, 1.0, 1.1)}
"""What is compared when no setting is named: guidance where the prior can be guided, else temperature."""


@dataclass(frozen=True, kw_only=True)
class SweepRequest:
    """One sweep, with everything about it that can be known without loading torch."""

    folder: Path
    """The pipeline folder."""
    combinations: list[SamplingConfig]
    """The settings to compare, each whole."""
    features: FeatureFile
    """What the images are compared by."""
    data: DataConfig | None
    """The data set of the run, whose validation images are the reference and whose classes tell the proportions; None where it is not known."""
    real: Path | None
    """A folder of real images that is the reference instead."""
    record: Path
    """The JSON file that gets each result as it comes."""
    images: int = DEFAULT_IMAGES
    """Images that are generated for each combination."""
    seed: int = 0
    """Seed of these images, the same for all combinations."""
    batch_size: int = 64
    """Images that are sampled together."""
    keep: bool = False
    """Leave the pipeline's recommended settings as they are."""
    dry_run: bool = False
    """Check everything, then say what would be done."""
    device: str | None = None
    """Where to compute; None for the best there is."""
    dtype: str = "float32"
    """Number format of prior and decoder."""


def sweepable_fields() -> dict[str, type]:
    """Name -> int or float of the sampling settings that are one number."""
    found: dict[str, type] = {}
    for field in dataclasses.fields(SamplingConfig):
        members = typing.get_args(field.type) if typing.get_origin(field.type) in (types.UnionType, typing.Union) else (field.type,)
        if set(members) - {type(None)} and set(members) <= {int, float, type(None)}:
            found[field.name] = float if float in members else int
    return found


def add_sweep_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sweep` to a parser, except device and dtype."""
    parser.add_argument("pipeline", type=given_path, help="a run folder or a pipeline folder")
    parser.add_argument("--features", required=True, type=given_path, metavar="FILE",
                        help="a TorchScript file (it gets uint8 images, (B, 3, H, W), and gives features (B, F); its code runs, so trust it), "
                             "or weights for --features_model")
    parser.add_argument("--features_model", metavar="NAME", help="the timm model whose weights --features is (needs 'vqmosaic[features]')")
    parser.add_argument("--images", type=int, default=DEFAULT_IMAGES, help=f"generated for each combination; default: {DEFAULT_IMAGES:,}")
    parser.add_argument("--seed", type=int, default=0, help="of the images, the same for all combinations")
    parser.add_argument("--batch_size", type=int, default=64, help="images that are sampled together")
    parser.add_argument("--recipe", help="compare with the validation images of this recipe; default: that of the run. Overrides such as "
                                         "--data.path may follow")
    parser.add_argument("--real", type=given_path, metavar="FOLDER", help="compare with all images of a folder instead")
    parser.add_argument("--out", type=given_path, metavar="FILE",
                        help=f"the record, from which a stopped sweep goes on; default: {RECORD_NAME} beside the pipeline folder")
    parser.add_argument("--keep", action="store_true", help="measure, but leave the recommended settings of the pipeline as they are")
    parser.add_argument("--dry_run", action="store_true", help="check everything, try the features on one batch, and say what would be done")
    for name in sweepable_fields():
        parser.add_argument(f"--{name}", metavar="VALUES", help="values to compare, with commas between; default: as the bundle recommends")


def plan_sweep(options: argparse.Namespace, overrides: list[str]) -> SweepRequest:
    """The checked request for the options of `sweep`, and overrides of the recipe.

    Raises:
        ValueError: there is no pipeline, no real images are known, a setting is out of range or not possible with this prior, the feature
            file or the record cannot be.
    """
    folder = find_pipeline(options.pipeline)
    for name, least in (("images", 2), ("seed", 0), ("batch_size", 1)):
        check_range(f"--{name}", getattr(options, name), at_least=least)
    vocabulary = read_vocabulary(folder / "prior")
    can_be_guided = vocabulary["class_names"] is not None and vocabulary["label_drop"] > 0
    given = {name: parse_values(name, kind, text) for name, kind in sweepable_fields().items() if (text := getattr(options, name)) is not None}
    base = recommended_sampling(folder, read_bundle(folder))
    if "guidance_power" in given and base.guidance_schedule != "power-cosine":
        raise InputError(f"--guidance_power means nothing under this pipeline's sampling.guidance_schedule, {base.guidance_schedule!r}: every value "
                         "would give the same images. Only power-cosine has a power: set sampling.guidance_schedule in the recipe and bundle again.")
    with naming_options(sweepable_fields()):
        combinations = combine(base, given or (GUIDED_GRID if can_be_guided else PLAIN_GRID))
        for sampling in combinations:
            check_sampling_fits(sampling, vocabulary, folder / "prior")
    record = options.out or surroundings(folder) / RECORD_NAME
    if record.is_dir():
        raise InputError(f"--out is {str(record)!r}, which is a folder; give the path of a JSON file.")
    check_can_write("the folder of --out", record.parent)
    read_sweep(record)  # refuses what is something else before torch is loaded
    if not options.keep:
        check_can_write("the pipeline", folder)
    return SweepRequest(
        folder=folder, combinations=combinations, features=resolve_feature_file(options.features, options.features_model),
        data=data_of(folder, options, overrides), real=options.real, record=record, images=options.images, seed=options.seed,
        batch_size=options.batch_size, keep=options.keep, dry_run=options.dry_run, device=options.device, dtype=options.dtype)


def surroundings(folder: Path) -> Path:
    """The folder that a pipeline folder lies in, which is its run folder where that has a recipe.yaml."""
    return folder.resolve().parent if folder.name in ("", "..") else folder.parent


def parse_values(name: str, kind: type, text: str) -> tuple[Any, ...]:
    """The numbers in a text with commas between, each once, in their order. Raises InputError for anything else."""
    try:
        return tuple(dict.fromkeys(kind(word) for word in text.split(",")))
    except ValueError:
        raise InputError(f"--{name} is {text!r}; it must be {'whole numbers' if kind is int else 'numbers'} with commas between, "
                         f"such as {'0,50,100' if kind is int else '1,1.5,2'}.") from None


def combine(base: SamplingConfig, values: dict[str, tuple[Any, ...]]) -> list[SamplingConfig]:
    """Every combination of the values, what they do not name being that of `base`; the last name varies fastest."""
    return [dataclasses.replace(base, **dict(zip(values, chosen, strict=True))) for chosen in itertools.product(*values.values())]


def data_of(folder: Path, options: argparse.Namespace, overrides: list[str]) -> DataConfig | None:
    """The data set of the recipe given, or of the run that a pipeline folder lies in; checked by name where it is the reference.

    Raises InputError where no real images are known.
    """
    run = surroundings(folder)
    recipe = options.recipe
    if recipe is None and (run / "recipe.yaml").is_file():
        recipe = str(run)
    if options.real is not None:
        check_data_path(DataConfig(source="folder", path=str(options.real)))
    if recipe is None:
        if overrides:
            raise InputError(f"{overrides[0]!r} was not expected; recipe overrides need --recipe.")
        if options.real is None:
            raise InputError(f"{folder} does not lie in a run folder, so its data set is not known; give --recipe with the run's recipe, or --real "
                             "with a folder of real images.")
        return None
    data = load_recipe(recipe, overrides).data
    try:
        check_data_path(data)
    except InputError:
        if options.real is None:
            raise
        return None  # only the proportions of the classes would have come from it
    return data
