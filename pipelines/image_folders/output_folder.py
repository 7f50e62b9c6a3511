"""The output folder of a command that writes images: one PNG per image, grid.png or a table, and a record of the request.

After an interruption, the same command writes the missing images. A folder never holds images of two requests.
Importing this module does not load torch.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pipelines.bundle import read_bundle
from pipelines.image_folders.png_files import is_whole_png, png_header
from pipelines.pipeline_parts import PipelineParts
from pipelines.sweep.sweep_record import describe_pipeline_change, is_pipeline_field, iterate_differences
from stage1_tokenizer.data.data_location import is_image
from stage1_tokenizer.tokenizer_config import read_tokenizer_config
from vqmosaic import __version__
from vqmosaic.errors import InputError, listed_names, printable
from vqmosaic.files.durable_files import write_json
from vqmosaic.files.full_disks import explain_full_disk
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.runs.interruption import Interrupted
from vqmosaic.wording import counted, is_or_are

FORMAT_VERSION = 1
GRID_NAME = "grid.png"
SAMPLES_RECORD, RECONSTRUCTIONS_RECORD, TRANSLATIONS_RECORD = "samples.json", "reconstructions.json", "translations.json"
EDITS_RECORD, SCORES_RECORD, ENHANCED_RECORD, AUGMENTATION_RECORD = "edits.json", "scores.json", "enhanced.json", "augmentation.json"
RECORDS = frozenset({SAMPLES_RECORD, RECONSTRUCTIONS_RECORD, TRANSLATIONS_RECORD, EDITS_RECORD, SCORES_RECORD, ENHANCED_RECORD, AUGMENTATION_RECORD})
"""The records of all commands that write images. A folder with one of them holds results."""
RESULT_SUFFIXES = (".png", ".tar")
"""Suffixes of the files that hold the images of a request."""
MAX_LISTED_CLASSES, MAX_LISTED_FILES = 12, 5
"""Largest number of classes listed in an error, and of damaged files listed in a warning."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputFolder(ABC):
    """An output folder and the request for its images. Subclasses define the names of the images and the request."""

    RECORD: ClassVar[str]
    """File name of the record."""
    FORMAT: ClassVar[str]
    """The format that the record states."""
    SUMMARY: ClassVar[str] = GRID_NAME
    """File name of what is written beside the images, about all of them."""

    out: Path
    """The output folder."""
    pipeline: Path
    """The pipeline folder that makes the images."""
    class_names: list[str] | None
    """Class names of the pipeline, or None without classes."""
    labels: list[int] | None
    """The requested class indices, or None for no class."""
    dtype: str
    """Number format of prior and decoder."""

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """The file name of each image relative to the folder, in the order of the request."""

    @property
    @abstractmethod
    def request(self) -> dict[str, Any]:
        """Everything that determines the images, as JSON content."""

    @functools.cached_property
    def fingerprints(self) -> dict[str, Any]:
        """The fingerprints of the pipeline. Reads the weights of the priors to compute their digests."""
        return PipelineParts.in_folder(self.pipeline, read_bundle(self.pipeline)).fingerprints()

    @property
    def image_header(self) -> bytes | None:
        """The PNG header of each image, or None if it is not checked."""
        transform = read_tokenizer_config(self.pipeline / "tokenizer")["transform"]
        return png_header(transform["image_size"], transform["channels"])

    def existing_files(self) -> set[str]:
        """Check that the folder can be used for this request, and return the files of this request that exist: images and summary.

        The files may be incomplete; see `complete_files`.

        Raises:
            InputError: the folder contains images of another request; its record cannot be read; or there is no record, but the folder or a
                sub-folder contains images.
        """
        existing = {name for name in (*self.names, self.SUMMARY) if (self.out / name).exists()}
        remedy = f"Give another --out, or delete these images and {self.RECORD}."
        if not (self.out / self.RECORD).exists():
            check_no_unrecorded_files(self.out, existing, self.RECORD)
            check_no_other_images(self.out)
            return set()
        try:
            content = json.loads((self.out / self.RECORD).read_text())
            is_known = (content["format"], content["format_version"]) == (self.FORMAT, FORMAT_VERSION) and isinstance(content["request"], dict)
        except (OSError, ValueError, KeyError, TypeError):
            is_known = False
        if not is_known:
            raise InputError(f"{self.out / self.RECORD} is not a record of generated images that this vqmosaic can read. {remedy}")
        recorded = content["request"]
        if isinstance(recorded.get("sampling"), dict):  # settings that did not exist when it was recorded get their defaults
            recorded = recorded | {"sampling": SamplingConfig().to_dict() | recorded["sampling"]}
        if recorded != self.request and not any(True for suffix in RESULT_SUFFIXES for _ in self.out.rglob(f"*{suffix}")):
            return set()  # the other request was stopped before its first image
        if recorded != self.request:
            raise InputError(f"--out {self.out} contains the images of another request: {self._differences(recorded)}. {remedy}")
        return existing

    def _differences(self, recorded: dict[str, Any]) -> str:
        """The differences between a recorded request and this one, in terms of the command's options."""
        changed = list(iterate_differences(recorded, self.request))
        is_other_pipeline = any(is_pipeline_field(name) for name, _, _ in changed)
        names = None if is_other_pipeline else self.class_names  # another pipeline may have other classes
        words = [describe_pipeline_change(changed)] if is_other_pipeline else []
        words += [self.describe_difference(name, format_option(name, before, names), format_option(name, now, names))
                  for name, before, now in changed if not is_pipeline_field(name)]
        return "; ".join(dict.fromkeys(words))

    def describe_difference(self, name: str, before: str, now: str) -> str:
        """A clause about an entry of the request that was `before` and is `now`."""
        if name in ("images", "contents"):
            return "the given images are other files, or have changed"
        return f"--{name.removeprefix('sampling.')} was {before}, now {now}"

    def complete_files(self) -> set[str]:
        """Names of the files of this request that are complete: a table, and PNGs of the expected size. Raises as `existing_files` does."""
        header = self.image_header
        return {name for name in self.existing_files()
                if not name.endswith(".png") or is_whole_png(self.out / name, None if name == self.SUMMARY else header)}

    def usable_files(self) -> set[str]:
        """The `complete_files`. Prints a warning that files of an earlier call are damaged or were replaced."""
        complete = self.complete_files()
        report_damaged(self.out, self.existing_files() - complete)
        return complete

    @contextlib.contextmanager
    def explain_interruption(self) -> Iterator[None]:
        """Turn Ctrl-C into Interrupted, with the number of written images, while no StopFlag handles it, such as when libraries are loaded."""
        try:
            yield
        except KeyboardInterrupt:
            done = sum((self.out / name).exists() for name in self.names)
            raise Interrupted(signal.SIGINT, self.describe_progress(done)) from None

    def describe_progress(self, done: int) -> str:
        """A clause about the number of images that are written."""
        return f"{done:,} of {counted(len(self.names), 'image')} {is_or_are(done)} written to {self.out}"

    def is_finished(self) -> bool:
        """Whether all images and the summary exist and are complete. If so, prints that there is nothing to do.

        Counts the files first, which is fast, and reads them only if none is missing. Raises as `existing_files` does.
        """
        total = len(self.names)
        if len(self.existing_files()) < total + 1 or len(self.complete_files()) < total + 1:
            return False
        print(f"nothing to do: {self.out} already contains {'the' if total == 1 else 'all'} {counted(total, 'image')} of this request")
        return True

    def begin(self) -> None:
        """Create the folder and record the request. Called before the first image is written."""
        make_folder(self.out)
        if not self.existing_files():
            write_json(self.out / self.RECORD,
                       {"format": self.FORMAT, "format_version": FORMAT_VERSION, "vqmosaic": __version__, "request": self.request})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledFolder(OutputFolder):
    """The output folder of a command that samples images. Subclasses define the names of the images and the rest of the request."""

    seed: int
    """Seed of the request. Image i depends on it and on i."""
    sampling: SamplingConfig
    """All sampling settings, including the recommended ones."""

    @property
    @abstractmethod
    def own_request(self) -> dict[str, Any]:
        """What determines the images besides the fields of every request, as JSON content."""

    @functools.cached_property
    def request(self) -> dict[str, Any]:
        return {"pipeline": self.fingerprints, "classes": self.labels, **self.own_request, "seed": self.seed, "sampling": self.sampling.to_dict(),
                "dtype": self.dtype}


def files_in(out: Path) -> set[str]:
    """Names of all entries of a folder. Empty if the folder does not exist."""
    return set(os.listdir(out)) if out.is_dir() else set()


def check_no_unrecorded_files(out: Path, names: set[str], record: str) -> None:
    """Raise InputError if there are any `names`: existing files that would be replaced and that no record lists.

    `record` is the file name of the record, for the message.
    """
    if names:
        others = f" and {counted(len(names) - 1, 'other file')}" if len(names) > 1 else ""
        raise InputError(f"--out {out} contains {printable(min(names))}{others} that would be replaced and that no {record} lists. "
                         "Give another --out, or delete them.")


def check_no_other_images(out: Path) -> None:
    """Raise InputError if a folder without a record, or one of its sub-folders, contains images: it may be a data set.

    Sub-folders with a record contain results of an earlier command, so they are ignored.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        entries = sorted(os.scandir(out), key=lambda entry: entry.name)
        found = [entry.name for entry in entries if is_image(entry.name)]
        for entry in entries:
            if not found and not entry.name.startswith(".") and entry.is_dir() and not files_in(Path(entry)) & RECORDS:
                found = [f"{entry.name}/{name}" for name in sorted(files_in(Path(entry))) if is_image(name)]
        if found:
            raise InputError(f"--out {out} contains images of another origin, such as {printable(found[0])}. The new images would be mixed with "
                             "them, as in a data set. Give a folder that is new or empty.")


def digest_of_files(paths: Sequence[Path]) -> str:
    """Hex sha256 over the paths, sizes and modification times of files. Detects changes without reading the files."""
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        digest.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def make_folder(out: Path) -> None:
    """Create the output folder. Raises InputError if this fails."""
    try:
        with explain_full_disk(out.parent):
            out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create --out {out}: {error.strerror}.") from None


def report_damaged(out: Path, names: set[str]) -> None:
    """Warn that files of an earlier call are damaged or were replaced."""
    if names:
        print(f"warning: {counted(len(names), 'file')} in {out} {is_or_are(len(names))} damaged or replaced and will be "
              f"written again: {listed_names(sorted(names), MAX_LISTED_FILES)}", flush=True)


def format_option(option: str, value: Any, class_names: list[str] | None) -> str:
    """Format the value of an option of `generate` for a message, about as the user would type it. Long lists of classes are cut.

    `class_names` are the names for the indices in option `classes`; None if they are not known.
    """
    if value is None:
        return "not given"
    if isinstance(value, float):
        return f"{value:g}"
    if option == "classes" and isinstance(value, list):
        if class_names is not None and value == list(range(len(class_names))):
            return "all classes"
        labels = [class_names[index] if class_names is not None and index in range(len(class_names)) else str(index) for index in value]
        more = f" ... ({counted(len(labels), 'class')})" if len(labels) > MAX_LISTED_CLASSES else ""
        return printable(",".join(labels[:MAX_LISTED_CLASSES])) + more
    return " ".join(format_option("", item, None) for item in value) if isinstance(value, list) else printable(str(value))
