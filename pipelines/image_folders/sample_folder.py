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
from vqmosaic.errors import InputError
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

    @cached_property
    def names(self) -> list[str]:
        """The file name of each image in the order of the request: class and number."""
        stems = ["sample"] if self.labels is None or self.class_names is None else [file_name(self.class_names[index]) for index in self.labels]
        return numbered_names(stems, self.num)

    @property
    def own_request(self) -> dict[str, Any]:
        return {"num": self.num, **({} if self.prompt is None else {"prompt": self.prompt})}


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
