"""Checks a data set: reads every image once and reports unreadable images, classes, sizes, colour spaces and duplicates.

With data.conditions, also images without a pair or a caption, and paired images without an image.
"""

import hashlib
from collections import Counter
from collections.abc import Callable

from PIL import Image

from stage1_tokenizer.conditions.check_conditions import check_conditions, report_pair_names
from stage1_tokenizer.conditions.condition_checks import check_condition_data
from stage1_tokenizer.data.image_sources import ImageSource
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.data.threaded_map import map_in_threads
from stage1_tokenizer.image_files.colour_spaces import other_colour_space
from stage1_tokenizer.image_files.float_images import FloatImage
from stage1_tokenizer.image_files.images import UnreadableImage
from vqmosaic.errors import printable
from vqmosaic.recipes.image_sizes import ImageSize, height_and_width
from vqmosaic.recipes.recipe_sections import DataConfig
from vqmosaic.wording import counted, is_or_are

_MAX_LISTED_UNREADABLE = 50
_MAX_LISTED_CLASSES = 20
_MAX_LISTED_DUPLICATES = 5
_MAX_LISTED_COLOUR_SPACES = 10


def check_data(data: DataConfig, report: Callable[[str], None] = print) -> list[tuple[str, str]]:
    """(source name, reason) of every unreadable image in both splits, and of every image that lacks a pair or a caption.

    Calls `report` with each line of the result: counts, classes, sizes, pairs and captions, colour spaces and duplicates. Raises InputError if the
    data set cannot be opened.
    """
    check_condition_data(data)
    splits = open_splits(data)
    report(splits.validation_origin)
    for note in splits.notes:
        report(f"{splits.train.split}: {note}")
    unreadable: list[tuple[str, str]] = []
    names_by_digest: dict[bytes, list[tuple[str, str]]] = {}
    names_by_space: dict[str, list[str]] = {}
    incomplete: list[tuple[str, str]] = []
    for split, source in (("train", splits.train), ("validation", splits.validation)):
        unreadable += _check_split(source, report, split, names_by_digest, names_by_space, data.image_size)
        if data.conditions:
            incomplete += check_conditions(data, source, split, report)
    report_pair_names(data, (splits.train, splits.validation), report)
    total = len(splits.train) + len(splits.validation)
    for name, reason in unreadable[:_MAX_LISTED_UNREADABLE]:
        report(f"unreadable: {printable(name)}: {reason}")
    if len(unreadable) > _MAX_LISTED_UNREADABLE:
        report(f"unreadable: and {len(unreadable) - _MAX_LISTED_UNREADABLE} more")
    report(f"{total - len(unreadable)} of {counted(total, 'image')} {is_or_are(total - len(unreadable))} readable")
    _report_colours(names_by_space, report)
    _report_duplicates(names_by_digest, report)
    return unreadable + incomplete


def _report_colours(names_by_space: dict[str, list[str]], report: Callable[[str], None]) -> None:
    """Report how many images declare a colour space other than sRGB. `names_by_space` maps each colour space to the names of its images."""
    if not names_by_space:
        report("colours: no image declares a colour space other than sRGB")
        return
    count = sum(map(len, names_by_space.values()))
    report(f"colours: {counted(count, 'image')} {'declares' if count == 1 else 'declare'} a colour space other than sRGB. Pixel values are read "
           "without conversion, so the colours differ from what image viewers show. To train on the intended colours, convert these files to sRGB")
    for space, names in sorted(names_by_space.items(), key=lambda item: -len(item[1]))[:_MAX_LISTED_COLOUR_SPACES]:
        report(f"colours: {len(names)} in {printable(space)}, such as {printable(names[0])}")
    if len(names_by_space) > _MAX_LISTED_COLOUR_SPACES:
        report(f"colours: and {len(names_by_space) - _MAX_LISTED_COLOUR_SPACES} more colour spaces")


def _report_duplicates(names_by_digest: dict[bytes, list[tuple[str, str]]], report: Callable[[str], None]) -> None:
    """Report how many images are exact copies of another one. `names_by_digest` maps each pixel digest to the (split, name) of its images."""
    groups = [group for group in names_by_digest.values() if len(group) > 1]
    if not groups:
        report("duplicates: none, no two images have the same pixels")
        return
    across = [group for group in groups if len({split for split, _ in group}) > 1]
    leaked = sum(split == "validation" for group in across for split, _ in group)
    count = sum(len(group) - 1 for group in groups)
    report(f"duplicates: {counted(count, 'image')} {'has' if count == 1 else 'have'} exactly the same pixels as another image; "
           f"{counted(leaked, 'validation image')} {is_or_are(leaked)} also in the training split"
           + (", so measurements on them say nothing about new images" if leaked else ""))
    for group in sorted(groups, key=lambda group: len({split for split, _ in group}), reverse=True)[:_MAX_LISTED_DUPLICATES]:
        more = f" and {len(group) - 3} more" if len(group) > 3 else ""
        # Show the last one too: if a group is in both splits, its validation images come last.
        shown = group if len(group) <= 3 else [*group[:2], group[-1]]
        report(f"duplicates: {' = '.join(f'{printable(name)} ({split})' for split, name in shown)}{more}")
    if len(groups) > _MAX_LISTED_DUPLICATES:
        report(f"duplicates: and {len(groups) - _MAX_LISTED_DUPLICATES} more groups")


def _pixel_digest(image: Image.Image | FloatImage) -> bytes:
    """Digest of an image's mode, size and pixels. It does not depend on the file format."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).digest()


def _check_split(source: ImageSource, report: Callable[[str], None], name: str, names_by_digest: dict[bytes, list[tuple[str, str]]],
                 names_by_space: dict[str, list[str]], image_size: ImageSize) -> list[tuple[str, str]]:
    """(source name, reason) of every unreadable image in a split. Adds its images to `names_by_digest` and `names_by_space`."""
    digests: dict[int, bytes] = {}
    space_of: dict[int, str | None] = {}

    def read(index: int) -> tuple[int, int] | str:
        try:
            image = source.read(index, lambda header: space_of.update({index: other_colour_space(header)}))
        except UnreadableImage as error:
            return str(error)
        digests[index] = _pixel_digest(image)
        return image.size

    split = source.split
    results = list(map_in_threads(read, range(len(source)), bar=f"reading {split}"))
    for index in sorted(digests):
        names_by_digest.setdefault(digests[index], []).append((name, source.source_name(index)))
    for index in sorted(digests):
        if space := space_of.get(index):
            names_by_space.setdefault(space, []).append(source.source_name(index))
    sizes = [size for size in results if isinstance(size, tuple)]
    report(f"{split}: {counted(len(source), 'image')}, {_size_range(sizes)}")
    needed_height, needed_width = height_and_width(image_size)
    small = sum(width < needed_width or height < needed_height for width, height in sizes)
    if small:
        report(f"{split}: {counted(small, 'image')} {is_or_are(small)} smaller than data.image_size = {image_size} and will be enlarged, which adds "
               "no detail. A smaller data.image_size trains faster.")
    if source.class_names:
        counts = Counter(source.label(index) for index in range(len(source)))
        listed = [f"{printable(name)} {counts[index]}" for index, name in enumerate(source.class_names[:_MAX_LISTED_CLASSES])]
        more = f" and {len(source.class_names) - _MAX_LISTED_CLASSES} more" if len(source.class_names) > _MAX_LISTED_CLASSES else ""
        unlabelled = f"; without a class: {counts[None]}" if counts[None] else ""
        report(f"{split}: {counted(len(source.class_names), 'class')}: {', '.join(listed)}{more}{unlabelled}")
    else:
        report(f"{split}: no classes")
    return [(source.source_name(index), reason) for index, reason in enumerate(results) if isinstance(reason, str)]


def _size_range(sizes: list[tuple[int, int]]) -> str:
    if not sizes:
        return "none readable"
    smallest, largest = min(sizes, key=lambda size: size[0] * size[1]), max(sizes, key=lambda size: size[0] * size[1])
    if smallest == largest:
        return f"all {smallest[0]} x {smallest[1]} pixels" if len(set(sizes)) == 1 else f"all with {smallest[0] * smallest[1]} pixels"
    return f"from {smallest[0]} x {smallest[1]} to {largest[0]} x {largest[1]} pixels"
