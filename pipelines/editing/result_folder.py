"""The output folders of `vqmosaic edit`, with edits.json, and of `vqmosaic score`, with scores.json. Importing this module does not load torch."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.editing.edit_inputs import DRAWN_BY
from pipelines.image_folders.output_folder import EDITS_RECORD, SCORES_RECORD, OutputFolder, SampledFolder, digest_of_files
from pipelines.image_folders.png_files import png_header
from pipelines.image_folders.sample_folder import file_name, numbered_names, shorten_name
from stage1_tokenizer.tokenizer_config import read_tokenizer_config

TABLE_NAME = "scores.csv"
"""The table that `score` writes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditFolder(SampledFolder):
    """The output folder of `vqmosaic edit` and the request for its results."""

    RECORD, FORMAT = EDITS_RECORD, "vqmosaic.edits"

    image: Path
    """The image file."""
    drawn_by: str
    """The option that says what to draw again: mask, box, keep or strength."""
    value: Any
    """Its value: the mask file, the four sides of the box, top, left or a share to keep, or a strength."""
    condition_images: Mapping[str, Path]
    """Name of a condition -> its image file."""
    num: int
    """Results per class."""
    num_tries: int
    """How often each result is drawn."""
    prompt: str | None
    """The text for all results, or None."""

    @functools.cached_property
    def names(self) -> list[str]:
        """The file name of each result in the order of the request: image, class and number."""
        stem, classes = self.image.stem, self.class_names
        stems = [stem] if self.labels is None or classes is None else [f"{stem}_{file_name(classes[label])}" for label in self.labels]
        return numbered_names([shorten_name(each) for each in stems], self.num)

    @property
    def own_request(self) -> dict[str, Any]:
        mask = [self.value] if self.drawn_by == "mask" else []
        value = dict.fromkeys(DRAWN_BY) | {self.drawn_by: str(self.value.name) if mask else self.value}
        return {"contents": digest_of_files([self.image, *mask, *self.condition_images.values()]), **value, "prompt": self.prompt,
                "condition_image": list(self.condition_images) or None, "num": self.num, "num_tries": self.num_tries}

    @property
    def image_header(self) -> bytes:
        transform = read_tokenizer_config(self.pipeline / "tokenizer")["transform"]
        return png_header(transform["image_size"], transform["channels"], keep_alpha=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreFolder(OutputFolder):
    """The output folder of `vqmosaic score` and the request for its table and pictures.

    `labels` is one class index for all images or one for each, or None for no class.
    """

    RECORD, FORMAT, SUMMARY = SCORES_RECORD, "vqmosaic.scores", TABLE_NAME

    images: Mapping[str, Path]
    """Name of each picture, such as cats/1.png -> the given image."""
    prompt: str | None
    """The text that is given for all images, or None."""
    condition_images: Mapping[str, Sequence[Path]]
    """Name of a condition -> its image files: one for all images or one for each."""

    @property
    def names(self) -> list[str]:
        return list(self.images)

    @functools.cached_property
    def request(self) -> dict[str, Any]:
        files = [*self.images.values(), *(path for paths in self.condition_images.values() for path in paths)]
        return {"pipeline": self.fingerprints, "contents": digest_of_files(files), "images": len(self.images), "classes": self.labels,
                "prompt": self.prompt, "condition_image": list(self.condition_images) or None, "dtype": self.dtype}

    @property
    def image_header(self) -> None:
        """Pictures have a size that depends on the number of grids. It is not checked."""
        return None
