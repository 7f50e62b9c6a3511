"""The output folders of `vqmosaic augment`, with augmentation.json: images in class folders, or WebDataset shards. Does not load torch.

    <class>/00000.png      FolderDataset
    shard-000000.tar       ShardDataset: <key>.cls (the class index), <key>.json and <key>.png
    images.csv             one row for each image: file, class, label, seed, candidates, accepted, score
    augmentation.json      the request and, when all images are written, the counts of each class

Until all images are written, the rows of a FolderDataset are in .images.jsonl.
"""

import csv
import dataclasses
import functools
import io
import json
import math
import os
import tarfile
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pipelines.augment.classifier_file import ClassifierFile
from pipelines.image_folders.output_folder import AUGMENTATION_RECORD, SampledFolder
from pipelines.image_folders.png_files import is_whole_png_content, png_header
from pipelines.image_folders.sample_folder import NAME_BYTES, file_name
from pipelines.labels import balanced_labels
from stage1_tokenizer.data.data_location import NO_DATA_FOLDERS
from stage1_tokenizer.tokenizer_config import read_tokenizer_config
from token_shards.manifest import shard_name
from token_shards.writer import default_key
from vqmosaic.errors import InputError, printable
from vqmosaic.files.durable_files import flush_to_disk, write_bytes, write_json
from vqmosaic.files.full_disks import explain_full_disk
from vqmosaic.files.permissions import explain_permission_errors
from vqmosaic.wording import counted

TABLE_NAME, JOURNAL_NAME = "images.csv", ".images.jsonl"
NUMBERS = ("label", "seed", "candidates", "accepted")
COLUMNS = ("file", "class", *NUMBERS, "score")
"""Columns of the table. `label` is the class index of the pipeline, `score` is empty if candidates were not ranked."""
MIN_DIGITS = 5
"""Digits of the number of an image in its class folder, more for larger data sets."""
RESERVED_CHARACTERS = frozenset('/\\:*?"<>|')
"""Characters that some file systems do not allow in names."""

Row = dict[str, Any]
"""What the table has about an image, by column."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetFolder(SampledFolder):
    """The output folder of `vqmosaic augment` and the request for its images. Subclasses define the files."""

    RECORD, FORMAT, SUMMARY = AUGMENTATION_RECORD, "vqmosaic.augmentation", TABLE_NAME
    KIND: ClassVar[str]
    """Value of the option --format."""

    class_names: list[str]
    labels: list[int]
    num: int
    """Images of all classes together."""
    oversample: int
    """Candidates for each image, of which the best is kept."""
    rank_by: str
    """How candidates are ranked."""
    classifier: ClassifierFile | None
    """The classifier that rejects candidates, or None."""
    max_attempts: int
    """How often the candidates of an image are drawn at most. Not a part of the request, because it changes no image."""

    @functools.cached_property
    def image_labels(self) -> list[int]:
        """The class index of each image."""
        return balanced_labels(self.class_names, self.labels, self.num)

    @property
    def own_request(self) -> dict[str, Any]:
        classifier = None if self.classifier is None else {"kind": self.classifier.kind, "name": self.classifier.path.name,
                                                           "sha256": self.classifier.sha256}
        return {"num": self.num, "format": self.KIND, "oversample": self.oversample, "rank_by": self.rank_by if self.oversample > 1 else None,
                "classifier": classifier}

    @property
    def image_header(self) -> bytes:
        transform = read_tokenizer_config(self.pipeline / "tokenizer")["transform"]
        return png_header(transform["image_size"], transform["channels"], keep_alpha=True)

    def describe_difference(self, name: str, before: str, now: str) -> str:
        if name.startswith("classifier."):
            return "--classifier is another one, or has changed"
        if name == "classifier":
            return "--classifier was not given before" if before == "not given" else "--classifier was given before, now not given"
        return super().describe_difference(name, before, now)

    def is_finished(self) -> bool:
        if len(self.existing_files()) <= len(self.names) or len(self.complete_files()) <= len(self.names) or "result" not in self.record():
            return False
        print(f"nothing to do: {self.out} already contains the {counted(self.num, 'image')} of this request")
        return True

    def begin(self) -> None:
        if not self.existing_files():
            (self.out / JOURNAL_NAME).unlink(missing_ok=True)  # of another request, which was stopped before its first image
        super().begin()

    def record(self) -> dict[str, Any]:
        """The content of the record. Call it only after `existing_files`, which checks it."""
        return json.loads((self.out / self.RECORD).read_text()) if (self.out / self.RECORD).is_file() else {}

    @abstractmethod
    def rows(self, complete: set[str]) -> dict[int, Row]:
        """Position -> row of each image that is written. `complete` are the names of complete files."""

    @abstractmethod
    def write(self, rows: Mapping[int, Row], images: Mapping[int, bytes]) -> int:
        """Write the images at some positions, which are PNG files as bytes, and their rows. Returns how many images are newly on disk."""

    def finish(self, rows: Mapping[int, Row]) -> None:
        """Write the counts of each class to the record, and the table. `rows` has the rows of all images."""
        counts = {self.class_names[label]: Counter[str]() for label in self.labels}
        for row in rows.values():
            counts[row["class"]].update(images=1, candidates=row["candidates"], accepted=row["accepted"])
        classes = {name: {**each, "acceptance_rate": round(each["accepted"] / each["candidates"], 4)} for name, each in counts.items()}
        write_json(self.out / self.RECORD, self.record() | {"class_names": self.class_names, "result": {"images": len(rows), "classes": classes}})
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[position] for position in range(self.num))
        write_bytes(self.out / TABLE_NAME, text.getvalue().encode(errors="surrogateescape"))
        (self.out / JOURNAL_NAME).unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderDataset(DatasetFolder):
    """A folder of PNG files, with a sub-folder for each class."""

    KIND = "folder"

    @functools.cached_property
    def names(self) -> list[str]:
        """The file name of each image: the folder of its class, and its number there."""
        folders = class_folders([self.class_names[label] for label in self.labels])
        digits = max(MIN_DIGITS, len(str(math.ceil(self.num / len(folders)) - 1)))
        return [f"{folders[number % len(folders)]}/{number // len(folders):0{digits}d}.png" for number in range(self.num)]

    def rows(self, complete: set[str]) -> dict[int, Row]:
        positions = {name: position for position, name in enumerate(self.names) if name in complete}
        found = {positions[row["file"]]: row for row in recorded_rows(self.out) if row["file"] in positions}
        return {position: row | {"class": self.class_names[row["label"]]} for position, row in found.items()
                if row["label"] == self.image_labels[position]}

    @explain_permission_errors()
    def write(self, rows: Mapping[int, Row], images: Mapping[int, bytes]) -> int:
        journal = self.out / JOURNAL_NAME
        lines = "".join(json.dumps(row) + "\n" for row in rows.values())
        with explain_full_disk(self.out, len(lines)), open(journal, "a") as file:  # before the images, so that each image has its row
            file.write("\n" + lines)  # ends a line that was cut
        flush_to_disk(journal)
        for position, content in images.items():
            write_bytes(self.out / self.names[position], content)
        return len(images)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardDataset(DatasetFolder):
    """WebDataset shards."""

    KIND = "webdataset"

    images_per_shard: int
    """Images in each shard. The last one may have fewer."""
    waiting: dict[int, tuple[Row, bytes]] = dataclasses.field(default_factory=dict)
    """Position -> row and image of those whose shard is not complete."""

    @functools.cached_property
    def names(self) -> list[str]:
        """The file name of each shard."""
        return [shard_name(number) for number in range(math.ceil(self.num / self.images_per_shard))]

    @property
    def own_request(self) -> dict[str, Any]:
        return super().own_request | {"images_per_shard": self.images_per_shard}

    def existing_files(self) -> set[str]:
        existing = super().existing_files()
        if not (self.out / self.RECORD).exists() and (others := sorted(self.out.glob("*.tar"))):
            raise InputError(f"--out {self.out} contains other shards, such as {printable(others[0].name)}, with which the new ones would be mixed. "
                             "Give a folder that is new or empty.")
        return existing

    def positions(self, shard: int) -> range:
        """The positions of the images in a shard."""
        return range(shard * self.images_per_shard, min((shard + 1) * self.images_per_shard, self.num))

    def complete_files(self) -> set[str]:
        complete, header = self.existing_files(), self.image_header
        broken = {name for shard, name in enumerate(self.names)
                  if name in complete and shard_rows(self.out / name, self.positions(shard), header) is None}
        return complete - broken

    def rows(self, complete: set[str]) -> dict[int, Row]:
        found: dict[int, Row] = {}
        for shard, name in enumerate(self.names):
            if name in complete:
                found |= shard_rows(self.out / name, self.positions(shard), self.image_header) or {}
        return found

    def write(self, rows: Mapping[int, Row], images: Mapping[int, bytes]) -> int:
        self.waiting.update({position: (rows[position], images[position]) for position in images})
        written = 0
        for shard in dict.fromkeys(position // self.images_per_shard for position in images):
            positions = self.positions(shard)
            if all(position in self.waiting for position in positions):
                write_shard(self.out / self.names[shard], {position: self.waiting.pop(position) for position in positions})
                written += len(positions)
        return written


# --- files -------------------------------------------------------------------------------------------------------------------


def class_folders(class_names: Sequence[str]) -> list[str]:
    """The folder of each class: its name, if file systems and image folders allow it. Otherwise, other characters become _.

    No two folders are equal, also on file systems that do not distinguish case.
    """
    folders: dict[str, str] = {}
    for name in sorted(class_names, key=lambda name: not is_folder_name(name)):  # allowed names come first, so they do not change
        stem = folder = name if is_folder_name(name) else file_name(name)
        number = 1
        while folder.casefold() in {other.casefold() for other in folders.values()} or folder in NO_DATA_FOLDERS:
            number += 1
            folder = f"{stem}_{number}"
        folders[name] = folder
    return [folders[name] for name in class_names]


def is_folder_name(name: str) -> bool:
    """Whether a class name can be the name of a folder on all usual file systems, and is not hidden or ignored in folders of images."""
    return bool(name and name.isprintable() and not set(name) & RESERVED_CHARACTERS and name not in NO_DATA_FOLDERS
                and name == name.strip(" ").rstrip(".") and not name.startswith(".") and len(os.fsencode(name)) <= NAME_BYTES)


def recorded_rows(out: Path) -> Iterator[Row]:
    """The rows of a table, and then those of a journal, whose last line may be incomplete."""
    if (out / TABLE_NAME).is_file():
        with open(out / TABLE_NAME, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            for row in csv.DictReader(file):
                if (checked := checked_row(row)) is not None:
                    yield checked
    if (out / JOURNAL_NAME).is_file():
        for line in (out / JOURNAL_NAME).read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if (checked := checked_row(row)) is not None:
                yield checked


def checked_row(row: Any) -> Row | None:
    """A row with its numbers as int and float. None if it is not a complete row."""
    try:
        numbers = {column: int(row[column]) for column in NUMBERS}
        return {"file": row["file"], "class": row["class"], **numbers, "score": None if row["score"] in (None, "") else float(row["score"])}
    except (KeyError, TypeError, ValueError):
        return None


@explain_permission_errors()
def shard_rows(path: Path, positions: range, header: bytes) -> dict[int, Row] | None:
    """Position -> row of each image in a shard. None if it is damaged or has other images."""
    try:
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]  # only files
        rows = {position: checked_row(json.loads(members[f"{default_key(position)}.json"])) for position in positions}
        is_whole = all(is_whole_png_content(members[f"{default_key(position)}.png"], header) for position in positions)
        labels = {position: int(members[f"{default_key(position)}.cls"]) for position in positions}
    except (tarfile.TarError, EOFError, KeyError, ValueError, AttributeError):
        return None
    whole = {position: row for position, row in rows.items() if row is not None and row["label"] == labels[position]}
    return whole if is_whole and len(whole) == len(positions) and len(members) == 3 * len(positions) else None


def write_shard(path: Path, images: Mapping[int, tuple[Row, bytes]]) -> None:
    """Write a shard atomically. Its bytes depend only on the images and rows."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for position, (row, png) in images.items():
            for suffix, data in (("cls", str(row["label"]).encode()), ("json", json.dumps(row).encode()), ("png", png)):
                member = tarfile.TarInfo(f"{default_key(position)}.{suffix}")  # mtime, uid and gid are 0
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    write_bytes(path, content.getvalue())
