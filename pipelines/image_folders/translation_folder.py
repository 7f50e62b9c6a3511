"""The output folder of `vqmosaic upscale` and `vqmosaic translate`: one PNG per image, grid.png, and translations.json, which records the request.

After an interruption, the same command writes the missing images. A folder never holds images of two requests.
Importing this module does not load torch.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.bundle import read_bundle
from pipelines.image_folders.png_files import is_whole_png, png_header
from pipelines.image_folders.sample_folder import (
    GRID_NAME,
    TRANSLATIONS_RECORD,
    check_no_other_images,
    check_no_unrecorded_files,
    digest_of_files,
    format_option,
    make_folder,
    shorten_name,
)
from pipelines.pipeline_parts import PipelineParts
from pipelines.stages.stage_checks import check_image
from pipelines.sweep.sweep_record import describe_pipeline_change, is_pipeline_field, iterate_differences
from stage1_tokenizer.data.data_location import image_files
from stage1_tokenizer.tokenizer_config import read_tokenizer_config
from vqmosaic import __version__
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import write_json
from vqmosaic.files.json_files import read_object
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.wording import counted

FORMAT = "vqmosaic.translations"
FORMAT_VERSION = 1
LOW_RESOLUTION = "low_resolution"
"""The kind of a condition that `upscale` needs. `translate` takes all other images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TranslationFolder:
    """An output folder and the request for its images, one for each given image."""

    out: Path
    """The output folder."""
    pipeline: Path
    """The pipeline folder that makes the images."""
    condition: str
    """Name of the condition to which the given images belong."""
    images: Mapping[str, Path]
    """Name of each result, such as cats/1.png -> the given image."""
    labels: list[int] | None
    """One class index for all images or one for each, or None for no class."""
    seed: int
    """Seed of the request. Image i depends on it and on i."""
    sampling: SamplingConfig
    """All sampling settings, including the recommended ones."""
    dtype: str
    """Number format of prior and decoder."""

    @cached_property
    def names(self) -> list[str]:
        """The names of the results, in order."""
        return list(self.images)

    @cached_property
    def request(self) -> dict[str, Any]:
        """Everything that determines the results, as JSON content. Reads the weights of the priors to compute their digests."""
        return {"pipeline": PipelineParts.in_folder(self.pipeline, read_bundle(self.pipeline)).fingerprints(), "condition": self.condition,
                "images": len(self.images), "contents": digest_of_files(list(self.images.values())), "classes": self.labels, "seed": self.seed,
                "sampling": self.sampling.to_dict(), "dtype": self.dtype}

    def existing_files(self) -> set[str]:
        """Names of the results and the grid that exist, complete or not.

        Raises:
            InputError: the folder contains results of another request, or it has no record, but it or a sub-folder contains images.
        """
        existing = {name for name in (*self.names, GRID_NAME) if (self.out / name).exists()}
        if not (self.out / TRANSLATIONS_RECORD).exists():
            check_no_unrecorded_files(self.out, existing, TRANSLATIONS_RECORD)
            check_no_other_images(self.out)
            return set()
        content = read_object(self.out / TRANSLATIONS_RECORD, "give another --out")
        if (content.get("format"), content.get("format_version")) != (FORMAT, FORMAT_VERSION) or not isinstance(content.get("request"), Mapping):
            raise InputError(f"{self.out / TRANSLATIONS_RECORD} is not a record that this vqmosaic can read. Give another --out.")
        if content["request"] != self.request:
            raise InputError(f"--out {self.out} contains the images of another request: {describe_differences(content['request'], self.request)}. "
                             f"Give another --out, or delete these images and {TRANSLATIONS_RECORD}.")
        return existing

    def complete_files(self) -> set[str]:
        """Names of the results and the grid that are complete PNGs of the expected size. Raises as `existing_files` does."""
        transform = read_tokenizer_config(self.pipeline / "tokenizer")["transform"]
        header = png_header(transform["image_size"], transform["channels"])
        return {name for name in self.existing_files() if is_whole_png(self.out / name, None if name == GRID_NAME else header)}

    def is_finished(self) -> bool:
        """Whether all results and the grid exist and are complete. If so, prints that there is nothing to do. Raises as `existing_files` does."""
        if len(self.complete_files()) < len(self.names) + 1:
            return False
        print(f"nothing to do: {self.out} already contains {'the' if len(self.names) == 1 else 'all'} {counted(len(self.names), 'image')} of this "
              "request")
        return True

    def begin(self) -> None:
        """Create the folder and record the request. Called before the first image is written."""
        make_folder(self.out)
        if not (self.out / TRANSLATIONS_RECORD).exists():
            write_json(self.out / TRANSLATIONS_RECORD,
                       {"format": FORMAT, "format_version": FORMAT_VERSION, "vqmosaic": __version__, "request": self.request})


def describe_differences(recorded: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    """What differs between a recorded request for given images and the current one."""
    changed = list(iterate_differences(dict(recorded), dict(request)))
    is_other_pipeline = any(is_pipeline_field(name) for name, _, _ in changed)
    words = [describe_pipeline_change(changed)] if is_other_pipeline else []
    for name, before, now in changed:
        if name == "contents":
            words.append("the given images are other files, or have changed")
        elif not is_pipeline_field(name):
            option = name.removeprefix("sampling.")
            words.append(f"{option} was {format_option(option, before, None)}, now {format_option(option, now, None)}")
    return "; ".join(words)


def check_has_condition(content: Mapping[str, Any], command: str) -> str:
    """The name of the condition for `upscale` or `translate`, from pipeline.json. Raises InputError unless there is exactly one."""
    records = content.get("conditions", [])
    images = {record["name"]: record["kind"] for record in records if record["kind"] != "caption"}
    names = [name for name, kind in images.items() if (kind == LOW_RESOLUTION) == (command == "upscale")]
    taken = ", ".join(f"{record['name']} ({record['kind']})" for record in records) or "nothing besides the class"
    if not names:
        what = "images at low resolution" if command == "upscale" else "images of another kind, such as edges or paired images"
        raise InputError(f"{command} needs a prior that is given {what}. The prior of this pipeline is given: {taken}. Train one with "
                         "data.conditions.")
    if len(names) > 1:
        raise InputError(f"{command} needs a prior that is given one such image, and this one is given several: {', '.join(names)}. Use the Python "
                         "interface.")
    return names[0]


def find_images(paths: Sequence[Path]) -> dict[str, Path]:
    """Name of the result -> image file, for files and all images in folders. Names keep sub-folders; a repeated name gets a number.

    Raises InputError for files that are no images and for folders without images.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if path.is_dir():
            names = sorted(image_files(path))
            if not names:
                raise InputError(f"{path} is a folder without images. Give image files, or folders of them.")
        else:
            check_image(path)
            names = [path.name]
        for name in names:
            stem = str(Path(name).with_name(shorten_name(Path(name).stem)))
            free, number = f"{stem}.png", 1
            while free in found or free == GRID_NAME:
                number += 1
                free = f"{stem}_{number}.png"
            found[free] = path / name if path.is_dir() else path
    return found
