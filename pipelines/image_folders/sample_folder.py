"""The output folder of `vqmosaic generate`, with samples.json, and the names of its images and those of `vqmosaic reconstruct`.

Importing this module does not load torch.
"""

import dataclasses
import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.image_folders.output_folder import GRID_NAME, SAMPLES_RECORD, SampledFolder
from pipelines.image_folders.png_files import png_header
from stage1_tokenizer.tiles.tiling import OVERLAP, Tiling
from stage1_tokenizer.tokenizer_config import read_tokenizer_config
from stage1_tokenizer.tokenizer_grids import grids_of_tokenizer
from vqmosaic.errors import InputError, check_range
from vqmosaic.recipes.image_sizes import height_and_width
from vqmosaic.runs.run_folder import is_locked

NAME_BYTES = 220
"""Largest length of a file name without number and suffix. File systems allow 255 bytes, and temporary names add a suffix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleFolder(SampledFolder):
    """The output folder of `vqmosaic generate` and the request for its images."""

    RECORD, FORMAT = SAMPLES_RECORD, "vqmosaic.samples"

    num: int
    """Images per label."""
    prompt: str | None = None
    """The text that is given for all images, or None."""
    size: tuple[int, int] | None = None
    """Height and width of the images in pixels, if they are larger than those of the training."""
    window_overlap: float = OVERLAP
    """For larger images, the share of a window that the next one overlaps."""

    @cached_property
    def names(self) -> list[str]:
        """The file name of each image in the order of the request: class and number."""
        stems = ["sample"] if self.labels is None or self.class_names is None else [file_name(self.class_names[index]) for index in self.labels]
        return numbered_names(stems, self.num)

    @property
    def own_request(self) -> dict[str, Any]:
        larger = {} if self.size is None else {"size": [*self.size], "window_overlap": self.window_overlap}
        return {"num": self.num, **({} if self.prompt is None else {"prompt": self.prompt}), **larger}

    @property
    def image_header(self) -> bytes:
        transform = read_tokenizer_config(self.pipeline / "tokenizer")["transform"]
        return png_header(self.size or transform["image_size"], transform["channels"])


def check_size(pipeline: Path, size: tuple[int, int] | None, window_overlap: float | None) -> dict[str, Any]:
    """The fields of a SampleFolder for --size and --window_overlap; none without --size.

    Raises InputError for a size that a pipeline cannot draw, and for an overlap without a size.
    """
    if size is None:
        if window_overlap is not None:
            raise InputError(f"--window_overlap is {window_overlap:g}, but --size is not given, so there is only one window. Give --size, or leave "
                             "it out.")
        return {}
    overlap = OVERLAP if window_overlap is None else window_overlap
    check_range("--window_overlap", overlap, at_least=0, below=1)
    image_size = read_tokenizer_config(pipeline / "tokenizer")["transform"]["image_size"]
    Tiling.checked(height_and_width(image_size), grids_of_tokenizer(pipeline / "tokenizer"), size, overlap, "--size")
    return {"size": size, "window_overlap": overlap}


def find_output_folder(samples: SampleFolder) -> SampleFolder:
    """The same request with the first folder of out, out-2, out-3 and so on that is free or contains images of this request.

    A folder without a record that another process has locked is not free, because that process is about to record its own request.
    """
    def is_free(candidate: SampleFolder) -> bool:
        try:
            candidate.existing_files()
        except InputError:
            return False
        return (candidate.out / SAMPLES_RECORD).exists() or not is_locked(candidate.out)

    numbered = (dataclasses.replace(samples, out=samples.out.with_name(f"{samples.out.name}-{number}")) for number in itertools.count(2))
    return next(filter(is_free, itertools.chain([samples], numbered)))


def numbered_names(stems: Sequence[str], num: int) -> list[str]:
    """The file names of `num` images for each stem. A repeated stem continues its numbers. All numbers are zero-padded to the same width."""
    width, names = len(str(max(Counter(stems).values()) * num - 1)), []
    counts: Counter[str] = Counter()
    for stem in stems:
        names += [f"{stem}-{number:0{width}d}.png" for number in range(counts[stem], counts[stem] + num)]
        counts[stem] += num
    return names


def file_name(class_name: str) -> str:
    """Convert a class name to the first part of a file name: letters, digits, _ and -; other characters become _."""
    return shorten_name(re.sub(r"[^\w-]+", "_", class_name)) or "class"


def shorten_name(name: str) -> str:
    """Shorten a name to NAME_BYTES if it is longer. A digest of the full name at the end keeps names with the same start distinct."""
    encoded = os.fsencode(name)
    if len(encoded) <= NAME_BYTES:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    return f"{encoded[:NAME_BYTES - 9].decode(errors='ignore')}~{digest}"


def reconstruction_names(paths: Sequence[Path]) -> list[str]:
    """The PNG name for the reconstruction of each file: the file's own name, shortened if it is long.

    A repeated name becomes name_, name_2, name_3 and so on; "grid" counts as taken.
    """
    taken, names = {Path(GRID_NAME).stem}, []
    copies: Counter[str] = Counter()
    for path in paths:
        name = stem = shorten_name(path.stem)
        while name in taken:
            copies[stem] += 1
            name = f"{stem}_{copies[stem] if copies[stem] > 1 else ''}"
        taken.add(name)
        names.append(f"{name}.png")
    return names
