"""Reads every image of a recipe once and says which of them a run would have to do without."""

import hashlib
from collections import Counter
from collections.abc import Callable

from PIL import Image

from stage1_tokenizer.data.image_sources import ImageSource
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.data.threaded_map import map_in_threads
from stage1_tokenizer.image_files.colour_spaces import other_colour_space
from stage1_tokenizer.image_files.images import UnreadableImage
from vqmosaic.errors import printable
from vqmosaic.recipes.recipe_sections import DataConfig
from vqmosaic.wording import counted, is_or_are

_LISTED = 50
_CLASSES_LISTED = 20
_DUPLICATES_LISTED = 5
_SPACES_LISTED = 10


def check_data(data: DataConfig, report: Callable[[str], None] = print) -> list[tuple[str, str]]:
    """(source name, reason) of every unreadable image of both splits.

    Counts, classes, sizes, colour spaces and duplicates go to `report` line by line. Raises InputError where the data cannot be opened at all.
    """
    splits = open_splits(data)
    report(splits.how)
    for note in splits.notes:
        report(f"{splits.train.split}: {note}")
    unreadable, names_of, spaces = [], {}, {}
    for split, source in (("train", splits.train), ("validation", splits.validation)):
        unreadable += _check_split(source, report, split, names_of, spaces, data.image_size)
    total = len(splits.train) + len(splits.validation)
    for name, reason in unreadable[:_LISTED]:
        report(f"unreadable: {printable(name)}: {reason}")
    if len(unreadable) > _LISTED:
        report(f"unreadable: and {len(unreadable) - _LISTED} more")
    report(f"{total - len(unreadable)} of {counted(total, 'image')} {is_or_are(total - len(unreadable))} readable")
    _report_colours(spaces, report)
    _report_duplicates(names_of, report)
    return unreadable


def _report_colours(spaces: dict[str, list[str]], report: Callable[[str], None]) -> None:
    """Report how many images state another colour space than sRGB. `spaces` maps each colour space to the names of its images."""
    if not spaces:
        report("colours: no image states another colour space than sRGB")
        return
    count = sum(map(len, spaces.values()))
    report(f"colours: {counted(count, 'image')} {'states' if count == 1 else 'state'} another colour space than sRGB. Pixel values are read without "
           "conversion, so the colours differ from those that image viewers show. To train on the intended colours, convert these files to sRGB")
    for space, names in sorted(spaces.items(), key=lambda item: -len(item[1]))[:_SPACES_LISTED]:
        report(f"colours: {len(names)} in {printable(space)}, such as {printable(names[0])}")
    if len(spaces) > _SPACES_LISTED:
        report(f"colours: and {len(spaces) - _SPACES_LISTED} more colour spaces")


def _report_duplicates(names_of: dict[bytes, list[tuple[str, str]]], report: Callable[[str], None]) -> None:
    """Say how many images have exactly the pixels of another one. `names_of` gives the (split, name) of all images with the same digest."""
    groups = [group for group in names_of.values() if len(group) > 1]
    if not groups:
        report("duplicates: none, no two images have the same pixels")
        return
    across = [group for group in groups if len({split for split, _ in group}) > 1]
    leaked = sum(split == "validation" for group in across for split, _ in group)
    count = sum(len(group) - 1 for group in groups)
    report(f"duplicates: {counted(count, 'image')} {'has' if count == 1 else 'have'} exactly the pixels of another one; {leaked} of the images to "
           f"validate on {is_or_are(leaked)} among those to train on"
           + (", so what is measured on them says nothing about new images" if leaked else ""))
    for group in sorted(groups, key=lambda group: len({split for split, _ in group}), reverse=True)[:_DUPLICATES_LISTED]:
        more = f" and {len(group) - 3} more" if len(group) > 3 else ""
        # the last one too: where a group lies in both splits, the images to validate on come last
        shown = group if len(group) <= 3 else [*group[:2], group[-1]]
        report(f"duplicates: {' = '.join(f'{printable(name)} ({split})' for split, name in shown)}{more}")
    if len(groups) > _DUPLICATES_LISTED:
        report(f"duplicates: and {len(groups) - _DUPLICATES_LISTED} more groups")


def _digest(image: Image.Image) -> bytes:
    """Of what a run sees of an image: its size and its pixels, whatever file format they come from."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).digest()


def _check_split(source: ImageSource, report: Callable[[str], None], name: str,
                 names_of: dict[bytes, list[tuple[str, str]]], spaces: dict[str, list[str]], image_size: int) -> list[tuple[str, str]]:
    digests: dict[int, bytes] = {}
    space_of: dict[int, str | None] = {}

    def read(index: int) -> tuple[int, int] | str:
        try:
            image = source.read(index, lambda header: space_of.update({index: other_colour_space(header)}))
        except UnreadableImage as error:
            return str(error)
        digests[index] = _digest(image)
        return image.size

    split = source.split
    results = list(map_in_threads(read, range(len(source)), bar=f"reading {split}"))
    for index in sorted(digests):
        names_of.setdefault(digests[index], []).append((name, source.source_name(index)))
    for index in sorted(digests):
        if space_of.get(index):
            spaces.setdefault(space_of[index], []).append(source.source_name(index))
    sizes = [size for size in results if isinstance(size, tuple)]
    report(f"{split}: {counted(len(source), 'image')}, {_size_range(sizes)}")
    small = sum(min(size) < image_size for size in sizes)
    if small:
        report(f"{split}: {counted(small, 'image')} {is_or_are(small)} smaller than data.image_size = {image_size} and will be enlarged, which adds "
               "no detail. A smaller data.image_size trains faster.")
    if source.class_names:
        counts = Counter(source.label(index) for index in range(len(source)))
        listed = [f"{printable(name)} {counts[index]}" for index, name in enumerate(source.class_names[:_CLASSES_LISTED])]
        more = f" and {len(source.class_names) - _CLASSES_LISTED} more" if len(source.class_names) > _CLASSES_LISTED else ""
        unlabelled = f"; without a class: {counts[None]}" if counts[None] else ""
        report(f"{split}: {counted(len(source.class_names), 'class')}: {', '.join(listed)}{more}{unlabelled}")
    else:
        report(f"{split}: no classes")
    return [(source.source_name(index), reason) for index, reason in enumerate(results) if isinstance(reason, str)]


def _size_range(sizes: list[tuple[int, int]]) -> str:
    if not sizes:
        return "none of them readable"
    smallest, largest = min(sizes, key=lambda size: size[0] * size[1]), max(sizes, key=lambda size: size[0] * size[1])
    if smallest == largest:
        return f"all of {smallest[0]} x {smallest[1]} pixels" if len(set(sizes)) == 1 else f"all of {smallest[0] * smallest[1]} pixels"
    return f"from {smallest[0]} x {smallest[1]} to {largest[0]} x {largest[1]} pixels"
