"""The output folder of `vqmosaic upscale` and `vqmosaic translate`, with translations.json: one PNG per given image.

Importing this module does not load torch.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.image_folders.output_folder import GRID_NAME, TRANSLATIONS_RECORD, SampledFolder, digest_of_files
from pipelines.image_folders.sample_folder import shorten_name
from pipelines.stages.stage_checks import check_image
from stage1_tokenizer.data.data_location import image_files
from vqmosaic.errors import InputError

if TYPE_CHECKING:
    from stage2_prior.chain_vocabulary import ChainVocabulary

LOW_RESOLUTION = "low_resolution"
"""The kind of a condition that `upscale` needs. `translate` takes all other images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TranslationFolder(SampledFolder):
    """The output folder of `upscale` and `translate` and the request for its images, one for each given image.

    `labels` is one class index for all images or one for each, or None for no class.
    """

    RECORD, FORMAT = TRANSLATIONS_RECORD, "vqmosaic.translations"

    condition: str
    """Name of the condition to which the given images belong."""
    images: Mapping[str, Path]
    """Name of each result, such as cats/1.png -> the given image."""

    @property
    def names(self) -> list[str]:
        return list(self.images)

    @property
    def own_request(self) -> dict[str, Any]:
        return {"condition": self.condition, "images": len(self.images), "contents": digest_of_files(list(self.images.values()))}

    def describe_difference(self, name: str, before: str, now: str) -> str:
        return f"condition was {before}, now {now}" if name == "condition" else super().describe_difference(name, before, now)


def check_has_condition(content: Mapping[str, Any], vocabulary: "ChainVocabulary", command: str) -> str:
    """The name of the condition for `upscale` or `translate`, from pipeline.json. Raises InputError unless the prior has learned exactly one."""
    records = content.get("conditions", [])
    images = {record["name"]: record["kind"] for record in records if record["kind"] != "caption"}
    names = [name for name, kind in images.items() if (kind == LOW_RESOLUTION) == (command == "upscale")]
    taken = ", ".join(f"{record['name']} ({record['kind']})" for record in records) or "nothing besides the class"
    if not names:
        what = "images at low resolution" if command == "upscale" else "images of another kind, such as edges or paired images"
        raise InputError(f"{command} needs a prior that is given {what}. The prior of this pipeline is given: {taken}. Train one with "
                         "data.conditions.")
    learned = [condition.name for condition in vocabulary.learned_conditions if condition.name in names]
    if not learned:
        raise InputError(f"{command} gives the prior of this pipeline the image {names[0]!r}, but it was trained with drop rate 1 of it, so the "
                         "image would have no effect. Train it with a drop rate, and a label_drop, below 1.")
    if len(learned) > 1:
        raise InputError(f"{command} needs a prior that is given one such image, and this one is given several: {', '.join(learned)}. Use the Python "
                         "interface.")
    return learned[0]


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
