"""Reads every image of a recipe once and says which of them a run would have to do without."""

from collections import Counter
from collections.abc import Callable

from stage1_tokenizer.image_sources import ImageSource, open_splits
from stage1_tokenizer.images import UnreadableImage
from stage1_tokenizer.threaded_map import map_in_threads
from vqmosaic.errors import printable
from vqmosaic.recipe_sections import DataConfig

_LISTED = 50
_CLASSES_LISTED = 20


def check_data(data: DataConfig, report: Callable[[str], None] = print) -> list[tuple[str, str]]:
    """(source name, reason) of every unreadable image of both splits; counts, classes and sizes go to `report` line by line.

    Raises InputError where the data cannot be opened at all.
    """
    splits = open_splits(data)
    report(splits.how)
    for note in splits.notes:
        report(f"{splits.train.split}: {note}")
    unreadable = []
    for source in (splits.train, splits.validation):
        found = _check_split(source, report)
        unreadable += found
    total = len(splits.train) + len(splits.validation)
    for name, reason in unreadable[:_LISTED]:
        report(f"unreadable: {printable(name)}: {reason}")
    if len(unreadable) > _LISTED:
        report(f"unreadable: and {len(unreadable) - _LISTED} more")
    report(f"{total - len(unreadable)} of {total} images are readable")
    return unreadable


def _check_split(source: ImageSource, report: Callable[[str], None]) -> list[tuple[str, str]]:
    def read(index: int) -> tuple[int, int] | str:
        try:
            return source.read(index).size
        except UnreadableImage as error:
            return str(error)

    split = source.split
    results = list(map_in_threads(read, range(len(source)), bar=f"reading {split}"))
    sizes = [size for size in results if isinstance(size, tuple)]
    report(f"{split}: {len(source)} images, {_size_range(sizes)}")
    if source.class_names:
        counts = Counter(source.label(index) for index in range(len(source)))
        listed = [f"{printable(name)} {counts[index]}" for index, name in enumerate(source.class_names[:_CLASSES_LISTED])]
        more = f" and {len(source.class_names) - _CLASSES_LISTED} more" if len(source.class_names) > _CLASSES_LISTED else ""
        unlabelled = f"; without a class: {counts[None]}" if counts[None] else ""
        report(f"{split}: {len(source.class_names)} classes: {', '.join(listed)}{more}{unlabelled}")
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
