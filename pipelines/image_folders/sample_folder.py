"""The folder that `vqmosaic generate` fills: one PNG per image, grid.png, and samples.json, which records the request. Loads no torch.

An interrupted command continues with the missing images. Images of two requests never mix.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.bundle import part_fingerprints
from pipelines.image_folders.png_files import is_whole_png, png_header
from pipelines.sweep.sweep_record import differing, is_about_the_pipeline, other_pipeline
from vqmosaic import __version__
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import write_json
from vqmosaic.files.full_disks import naming_full_disks
from vqmosaic.files.json_files import read_object
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.runs.run_folder import is_locked
from vqmosaic.wording import counted, is_or_are

FORMAT = "vqmosaic.samples"
FORMAT_VERSION = 1
RECORD_NAME, GRID_NAME = "samples.json", "grid.png"
NAME_BYTES = 220
"""Longest name of an image without number and suffix. File systems allow 255 bytes, and the temporary name takes some of them."""
SHOWN_CLASSES, SHOWN_FILES = 12, 5
"""Largest number of classes in an error, and of damaged files in a warning."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleFolder:
    """An output folder and the request whose images it holds."""

    out: Path
    """The folder."""
    pipeline: Path
    """The pipeline folder that the images come from."""
    class_names: list[str] | None
    """Class names of the pipeline."""
    labels: list[int] | None
    """The requested class indices, or None for a pipeline without classes."""
    num: int
    """Images for each label."""
    seed: int
    """Seed of the request."""
    sampling: SamplingConfig
    """All sampling settings, including the recommended ones."""
    dtype: str
    """Number format of prior and decoder."""

    @cached_property
    def names(self) -> list[str]:
        """The file name of each image, in the order of the request: the class and a number, padded with zeros to the width of the last number."""
        words = ["sample"] if self.labels is None else [file_name(self.class_names[index]) for index in self.labels]
        width, counts, names = len(str(max(Counter(words).values()) * self.num - 1)), Counter(), []
        for word in words:
            names += [f"{word}-{number:0{width}d}.png" for number in range(counts[word], counts[word] + self.num)]
            counts[word] += self.num
        return names

    @cached_property
    def request(self) -> dict[str, Any]:
        """Everything that decides the images, as JSON content. Reads the prior's weights to compute their digest."""
        return {"pipeline": part_fingerprints(self.pipeline / "tokenizer", self.pipeline / "prior"), "classes": self.labels,
                "num": self.num, "seed": self.seed, "sampling": dataclasses.asdict(self.sampling), "dtype": self.dtype}

    def found(self) -> set[str]:
        """The files of this request that already exist, images and grid.

        Raises:
            ValueError: the folder holds images of another request, or files without a record that would be replaced.
        """
        wanted, there = {*self.names, GRID_NAME}, files_in(self.out)
        remedy = f"Give another --out, or remove these images and {RECORD_NAME} to start over."
        if RECORD_NAME not in there:
            refuse_files_in_the_way(self.out, wanted & there, RECORD_NAME)
            return set()
        try:
            content = json.loads((self.out / RECORD_NAME).read_text())
            is_known = (content["format"], content["format_version"]) == (FORMAT, FORMAT_VERSION) and isinstance(content["request"], dict)
        except (OSError, ValueError, KeyError, TypeError):
            is_known = False
        if not is_known:
            raise InputError(f"{self.out / RECORD_NAME} is no record of generated images that this vqmosaic reads. {remedy}")
        if content["request"] != self.request and not any(name.endswith(".png") for name in there):
            return set()  # the other request was stopped before its first image
        if content["request"] != self.request:
            raise InputError(f"--out {self.out} holds the images of another request: {self._differences(content['request'])}. {remedy}")
        return wanted & there

    def _differences(self, recorded: dict[str, Any]) -> str:
        """How a recorded request differs from this one, described with the options of the command."""
        changed = list(differing(recorded, self.request))
        is_other_pipeline = any(is_about_the_pipeline(name) for name, _, _ in changed)
        names = None if is_other_pipeline else self.class_names  # another pipeline may have other classes
        words = [other_pipeline(changed)] if is_other_pipeline else []
        for name, before, now in changed:
            if not is_about_the_pipeline(name):
                option = name.removeprefix("sampling.")
                words.append(f"--{option} was {in_words(option, before, names)}, now {in_words(option, now, names)}")
        return "; ".join(words)

    def whole(self) -> set[str]:
        """The files of this request that exist and are complete PNGs of the expected size. Raises InputError as `found` does."""
        transform = read_object(self.pipeline / "tokenizer" / "config.json", "copy the pipeline again from where it was made")["transform"]
        header = png_header(transform["image_size"], transform["channels"])
        return {name for name in self.found() if is_whole_png(self.out / name, None if name == GRID_NAME else header)}

    def is_finished(self) -> bool:
        """Whether all images and the grid exist and are complete; if so, prints a line that says so. Raises InputError as `found` does."""
        if len(self.found()) < len(self.names) + 1 or len(self.whole()) < len(self.names) + 1:
            return False
        total = len(self.names)
        print(f"nothing to do: {self.out} holds {'the' if total == 1 else 'all'} {counted(total, 'image')} of this request already")
        return True

    def begin(self) -> None:
        """Create the folder and record the request, before the first image is written."""
        make_folder(self.out)
        if not self.found():
            write_json(self.out / RECORD_NAME, {"format": FORMAT, "format_version": FORMAT_VERSION, "vqmosaic": __version__, "request": self.request})


def first_fitting_folder(samples: SampleFolder) -> SampleFolder:
    """The same request with the first folder of out, out-2, out-3 and so on that is free or already holds images of this request.

    A folder that has no record but is locked by another process is not free: that process is about to record its own request there.
    """
    for number in itertools.count(1):
        candidate = samples if number == 1 else dataclasses.replace(samples, out=samples.out.with_name(f"{samples.out.name}-{number}"))
        try:
            candidate.found()
            if (candidate.out / RECORD_NAME).exists() or not is_locked(candidate.out):
                return candidate
        except InputError:
            continue


def files_in(out: Path) -> set[str]:
    """Names of all entries of a folder; empty if there is no such folder."""
    return set(os.listdir(out)) if out.is_dir() else set()


def refuse_files_in_the_way(out: Path, names: set[str], record: str) -> None:
    """Raise InputError if existing files would be replaced and no record says that an earlier call wrote them."""
    if names:
        others = f" and {counted(len(names) - 1, 'other file')}" if len(names) > 1 else ""
        raise InputError(f"--out {out} holds {min(names)}{others} that would be replaced, and no {record} that says where they come from. "
                         "Give another --out, or remove them.")


def make_folder(out: Path) -> None:
    """Create the output folder. Raises InputError if that is not possible."""
    try:
        with naming_full_disks(out.parent):
            out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be made: {error.strerror}.") from None


def file_name(class_name: str) -> str:
    """A class name as part of a file name."""
    return cut_name(re.sub(r"[^\w-]+", "_", class_name)) or "class"


def cut_name(name: str) -> str:
    """The name, cut to NAME_BYTES if it is longer. A digest of the whole name at its end keeps names apart that begin alike."""
    encoded = os.fsencode(name)
    if len(encoded) <= NAME_BYTES:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    return f"{encoded[:NAME_BYTES - 9].decode(errors='ignore')}~{digest}"


def names_of_copies(paths: Sequence[Path]) -> list[str]:
    """A PNG name for the reconstruction of each file: its own name, cut if it is long, with _, _2, _3 and so on if that is taken or is grid."""
    taken, copies, names = {Path(GRID_NAME).stem}, Counter(), []
    for path in paths:
        name = stem = cut_name(path.stem)
        while name in taken:
            copies[stem] += 1
            name = f"{stem}_{copies[stem] if copies[stem] > 1 else ''}"
        taken.add(name)
        names.append(f"{name}.png")
    return names


def report_damaged(out: Path, names: set[str]) -> None:
    """Print which files of an earlier call are damaged or were replaced."""
    if names:
        listed = ", ".join(sorted(names)[:SHOWN_FILES]) + (" ..." if len(names) > SHOWN_FILES else "")
        print(f"warning: {counted(len(names), 'file')} in {out} {is_or_are(len(names))} damaged or replaced and will be "
              f"written again: {listed}", flush=True)


def in_words(option: str, value: Any, class_names: list[str] | None) -> str:
    """The value of an option of `generate` as the user would type it."""
    if value is None:
        return "not given"
    if isinstance(value, float):
        return f"{value:g}"
    if option == "classes" and isinstance(value, list):
        if class_names is not None and value == list(range(len(class_names))):
            return "every class"
        labels = [class_names[index] if class_names is not None and index in range(len(class_names)) else str(index) for index in value]
        return ",".join(labels[:SHOWN_CLASSES]) + (f" ... ({counted(len(labels), 'class')})" if len(labels) > SHOWN_CLASSES else "")
    return " ".join(in_words("", item, None) for item in value) if isinstance(value, list) else str(value)
