"""The interface of all image sources (images with names and labels), and the two splits of a data set.

The kinds of sources are in digits_source.py, folder_source.py and huggingface_source.py. open_data.py opens the data set of a recipe.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from PIL import Image

from stage1_tokenizer.image_files.float_images import FloatImage
from vqmosaic.errors import InputError, printable
from vqmosaic.files.fingerprints import fingerprint
from vqmosaic.held_out import choose_held_out
from vqmosaic.recipes.recipe_sections import DataConfig
from vqmosaic.wording import counted

UNREAD_IMAGES = "unread images"
"""The key in a stage record for images whose contents are not part of the data set's fingerprint."""


class ImageSource(Protocol):
    """One split: images by index. Sources are cheap to open, can be pickled for worker processes, and can be read from several threads."""

    split: str
    """The name of the split in the data set."""
    class_names: list[str] | None
    """Names of the classes, or None for images without labels; the same list in every split."""

    @property
    def identity(self) -> dict[str, Any]:
        """Identifies the images wherever they are stored, as JSON: kind, version, split, count, and sha256 of names, labels, sizes and contents.

        Only some bytes of long contents are digested (content_digest.py): changes to other bytes go unnoticed unless the size changes. `unread`
        lists the images that are missing or lack read permission, if there are any. Their contents are not part of the identity.
        """

    @property
    def former_identity(self) -> dict[str, Any]:
        """The identity in the format of vqmosaic 0.1.0, to compare with its records."""

    def with_class_order(self, order: Sequence[int]) -> Self:
        """The same images with their classes in another order: class i of the result is class order[i] of this source."""

    def with_unread(self, unread: Iterable[int]) -> Self:
        """The same images with an identity without the contents of the `unread` images, even if they can be read now."""

    def __len__(self) -> int: ...

    def source_name(self, index: int) -> str:
        """The image's name, unique in the split: its path relative to data.path, or its row number."""

    def label(self, index: int) -> int | None:
        """The index of the image's class in class_names; None for an image without a class."""

    def texts(self, column: str | None) -> Sequence[str | None]:
        """The text of each image in a column, or in a .txt file beside it for None. None for images without one.

        Raises InputError if the data set has no texts of this kind.
        """

    def read(self, index: int, before_decoding: Callable[[Image.Image], object] | None = None) -> Image.Image | FloatImage:
        """The upright image with data.channels and data.value_range. Raises UnreadableImage with the reason. See read_image."""


Source = TypeVar("Source", bound=ImageSource)


@dataclass(frozen=True)
class ImageSplits:
    """The two splits of a data set."""

    train: ImageSource
    validation: ImageSource
    validation_origin: str
    """A message that says where the validation images come from."""
    notes: tuple[str, ...] = ()
    """Messages about ignored files and about layouts with another possible meaning."""
    text_order: tuple[int, ...] | None = None
    """The indices of the classes in the order of version 0.1.0, which sorted numbers as text; None if the order is the same."""

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, or None for images without labels."""
        return self.train.class_names

    @property
    def fingerprint(self) -> str:
        """The digest of both identities, which a stage records."""
        return fingerprint({"train": self.train.identity, "validation": self.validation.identity})

    def comparable_fingerprint(self, recorded: str | None) -> str:
        """The fingerprint in the format of vqmosaic 0.1.0 if it equals `recorded`, else `fingerprint`."""
        if recorded in (None, self.fingerprint):
            return self.fingerprint
        former = fingerprint({"train": self.train.former_identity, "validation": self.validation.former_identity})
        return former if recorded == former else self.fingerprint

    @property
    def unread_input(self) -> dict[str, str]:
        """The entry about missing or forbidden images that a stage records with the fingerprint; empty if there are none."""
        unread = {name: source.identity.get("unread", []) for name, source in (("train", self.train), ("validation", self.validation))}
        return {UNREAD_IMAGES: json.dumps(unread)} if any(unread.values()) else {}

    def as_recorded(self, inputs: Mapping[str, str]) -> "ImageSplits":
        """These images as a stage recorded them in `inputs`: with the same class order, and with the same unread images.

        Returns these splits unchanged if the record is about other images.
        """
        recorded = inputs.get("data set")
        if recorded is None:
            return self
        unread = json.loads(inputs.get(UNREAD_IMAGES, "{}"))
        with_unread = dataclasses.replace(self, train=self.train.with_unread(unread.get("train", ())),
                                          validation=self.validation.with_unread(unread.get("validation", ())))
        for candidate, as_opened in ((with_unread, self), (with_unread.sorted_as_text(), self.sorted_as_text())):
            if candidate.fingerprint == recorded:  # recorded in the current format
                return candidate
            if candidate.comparable_fingerprint(recorded) == recorded:  # recorded by version 0.1.0, which did not record unread images
                return as_opened
        return self

    def in_class_order_of(self, class_names: list[str] | None) -> "ImageSplits":
        """These images with their classes sorted as text if that gives the recorded `class_names`; otherwise unchanged."""
        as_text = self.sorted_as_text()
        return as_text if class_names == as_text.class_names else self

    def sorted_as_text(self) -> "ImageSplits":
        """These images with their classes in the order of version 0.1.0."""
        if self.text_order is None:
            return self
        return dataclasses.replace(self, train=self.train.with_class_order(self.text_order),
                                   validation=self.validation.with_class_order(self.text_order), text_order=None)


def comparable_identity(source: ImageSource, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The identity to compare with a recorded one: in the format of vqmosaic 0.1.0 if that version recorded it, else in the current format.

    It leaves out the contents of the same unread images as the recorded identity.
    """
    if not recorded:
        return source.identity
    return source.with_unread(recorded.get("unread", ())).identity if "version" in recorded else source.former_identity


def changed_copy(source: Source, **attributes: Any) -> Source:
    """A copy of a source with changed attributes, and without its cached identities, which depend on the original attributes.

    The source must define `identity` and `former_identity` as cached_property, which stores the values in vars(source).
    """
    changed = copy.copy(source)
    for name in ("identity", "former_identity"):
        vars(changed).pop(name, None)
    vars(changed).update(attributes)
    return changed


def update_digest(digest: Any, entries: Iterable[list], contents: Sequence[tuple[int | None, bytes | None]], unread: Iterable[int]) -> None:
    """Update a hash with the entry of each image and its `contents`: (size, content digest). Images in `unread` add only their entry."""
    unread = frozenset(unread)
    for index, (entry, (size, content_digest)) in enumerate(zip(entries, contents, strict=True)):
        size_and_digest = [None, None] if index in unread else [size, content_digest and content_digest.hex()]
        digest.update(json.dumps([*entry, *size_and_digest]).encode())


def hold_out_validation(names: Sequence[int | str], labels: Sequence[Hashable] | None, data: DataConfig) -> tuple[np.ndarray, np.ndarray, str]:
    """The indices of the training images, the indices of the validation images, both ascending, and a message that describes the split.

    A hash of each image's name decides (choose_held_out), so adding images does not move others between the splits.
    """
    if len(names) < 2:
        raise InputError(f"data.path {data.path!r} holds {counted(len(names), 'image')}; at least 2 are needed, one for training and one for "
                         "validation.")
    held_out = choose_held_out(names, data.validation_fraction, labels)
    kind = "path" if isinstance(names[0], str) else "row number"
    origin = (f"validation: {int(held_out.sum())} of {counted(len(names), 'image')}, held out from the training split by a hash of the {kind} "
              f"(data.validation_fraction = {data.validation_fraction:g})")
    return np.flatnonzero(~held_out), np.flatnonzero(held_out), origin


def allowed_unreadable(total: int, data: DataConfig) -> float:
    """Number of the `total` images that may be unreadable.

    A single unreadable image never stops a run, however few images there are, unless data.max_unreadable is 0.
    """
    return max(data.max_unreadable * total, 1 if data.max_unreadable else 0)


def refuse_if_too_many_unreadable(unreadable: Mapping[str, str], total: int, data: DataConfig) -> None:
    """Raise InputError if a larger fraction of the `total` images is unreadable than data.max_unreadable. `unreadable` maps names to reasons."""
    if len(unreadable) <= allowed_unreadable(total, data):
        return
    examples = "; ".join(f"{printable(name)} ({reason})" for name, reason in list(unreadable.items())[:3])
    raise InputError(f"{len(unreadable)} of {total} images are unreadable, more than data.max_unreadable = {data.max_unreadable:g} allows. "
                     f"For example: {examples}. `vqmosaic check-data` lists all of them. Remove them, or raise data.max_unreadable.")
