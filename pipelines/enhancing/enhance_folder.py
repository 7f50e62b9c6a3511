"""The output folder of `vqmosaic enhance`, with enhanced.json: one PNG per given image. Importing this module does not load torch."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.image_folders.output_folder import ENHANCED_RECORD, SampledFolder, digest_of_files
from pipelines.image_folders.png_files import png_header
from stage1_tokenizer.tokenizer_config import read_tokenizer_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnhanceFolder(SampledFolder):
    """The output folder of `vqmosaic enhance` and the request for its images, one for each given image.

    `labels` is one class index for all images or one for each, or None for no class.
    """

    RECORD, FORMAT = ENHANCED_RECORD, "vqmosaic.enhanced"

    images: Mapping[str, Path]
    """Name of each result, such as cats/1.png -> the given image."""
    noise: float
    """The level of noise, on the 8-bit scale (0 to 255)."""
    strength: float
    """The share of the tokens that are drawn again."""
    average: int
    """The number of images whose mean is a result."""
    num_tries: int
    """How often each result is drawn."""

    @property
    def names(self) -> list[str]:
        return list(self.images)

    @property
    def own_request(self) -> dict[str, Any]:
        return {"images": len(self.images), "contents": digest_of_files(list(self.images.values())), "noise": self.noise, "strength": self.strength,
                "average": self.average, "num_tries": self.num_tries}

    @property
    def image_header(self) -> bytes:
        transform = read_tokenizer_config(self.pipeline / "tokenizer")["transform"]
        return png_header(transform["image_size"], transform["channels"], keep_alpha=True)
