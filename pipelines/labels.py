"""Class labels of requests: names and indices, and comma-separated texts of them. Does not load torch."""

import operator
from collections.abc import Sequence

from vqmosaic.errors import InputError, did_you_mean, listed_names
from vqmosaic.wording import counted


def evenly_spaced_classes(classes: int, samples: int) -> list[int]:
    """At most `samples` class indices, evenly spaced between 0 and classes - 1."""
    count = min(classes, samples)
    return [index * classes // count for index in range(count)]


def balanced_labels(names: Sequence[str], classes: Sequence[int], num_images: int) -> list[int]:
    """The class index of each image of a balanced data set: the classes in turn, so the first ones have one more if it is not divisible.

    `names` are those of all classes. Raises InputError for fewer images than classes, and for a class that is listed twice.
    """
    if len(set(classes)) < len(classes):
        twice = next(index for number, index in enumerate(classes) if index in classes[:number])
        raise InputError(f"the class {names[twice]!r} is listed twice; list each class once.")
    if num_images < len(classes):
        raise InputError(f"{counted(num_images, 'image')} cannot be balanced over {counted(len(classes), 'class')}; "
                         f"give at least {len(classes)}, or fewer classes.")
    return [classes[number % len(classes)] for number in range(num_images)]


def class_indices(names: list[str] | None, labels: Sequence[str | int]) -> list[int]:
    """The index of each label, which is a class name or an integer of any type.

    Raises InputError for unknown classes, and if the pipeline has no classes (`names` is None).
    """
    if names is None:
        raise InputError(f"the classes {list(labels)} are given, but this pipeline was trained without classes. Leave them out.")
    indices = []
    for label in labels:
        if isinstance(label, str):
            if label not in names:
                raise InputError(f"no class {label!r}; there are {len(names)}: {listed_names(names, 50)}."
                                 f"{did_you_mean(label, names)}")
            indices.append(names.index(label))
            continue
        try:
            index = operator.index(label)
        except TypeError:
            raise InputError(f"class_labels has {label!r}; allowed: class names as strings, class indices as integers.") from None
        if not 0 <= index < len(names):
            raise InputError(f"class index {index} does not exist; allowed: 0 to {len(names) - 1}.")
        indices.append(index)
    return indices


def labels_from_text(names: list[str] | None, text: str) -> list[str | int]:
    """The labels in a comma-separated text: class names as strings, class indices as integers.

    Class names take precedence, longer ones first, because names may contain commas. If all class names are numbers, a number is always a name:
    with classes 1 to 12, 0 is an error and not the first class.
    """
    parts, known, labels, start = text.split(","), set(names or []), [], 0
    has_indices = not known or not all(name.isdecimal() for name in known)
    while start < len(parts):
        spans = (",".join(parts[start:stop]).strip() for stop in range(len(parts), start, -1))
        label = next((span for span in spans if span in known), parts[start].strip())
        labels.append(int(label) if has_indices and label not in known and label.isdecimal() else label)
        start += 1 + label.count(",")  # only a class name can contain commas
    return labels


def classes_from_text(names: list[str] | None, text: str | None) -> list[int] | None:
    """The class indices in a comma-separated text. Without a text: all classes, or None if there are none. Raises as `class_indices` does."""
    if text is not None:
        return class_indices(names, labels_from_text(names, text))
    return None if names is None else list(range(len(names)))
