"""Captions of the images of a data set: from a text column, from .txt files beside the images, or from class names."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from stage1_tokenizer.conditions.text_tokenizer import TextTokenizer
from stage1_tokenizer.data.image_sources import ImageSource
from vqmosaic.errors import InputError, printable
from vqmosaic.recipes.conditions import CLASS_PLACEHOLDER, ConditionConfig
from vqmosaic.seeding import derive_seed
from vqmosaic.wording import counted, is_or_are


class Captions:
    """The captions of the images of one split, by index. None for images without one."""

    def __init__(self, source: ImageSource, condition: ConditionConfig, split: str):
        """Read all captions of the split `split`: train or validation.

        Raises InputError if the data set has no texts of this kind, or if no image has a caption.
        """
        self._origin = f"in the column {condition.column!r}" if condition.column is not None else "in a .txt file beside it"
        if condition.templates:
            self._origin = "because it has no class"
            held_out = condition.held_out_templates if split == "validation" else []
            self.texts = texts_from_classes(source, condition.name, held_out or condition.templates)
        else:
            self.texts = [text and (text.strip() or None) for text in source.texts(condition.column)]
        if not any(self.texts):
            raise InputError(f"data.conditions ({condition.name}): no image of the {split} split has a caption {self._origin}. "
                             f"An image is {printable(source.source_name(0))}.")

    def missing(self, index: int) -> str | None:
        """The reason why the image has no caption, or None if it has one."""
        return None if self.texts[index] else f"it has no caption {self._origin}"

    @property
    def identity(self) -> dict[str, Any]:
        """Identifies the captions, as JSON."""
        digest = hashlib.sha256(json.dumps(self.texts).encode())
        return {"kind": "captions", "count": sum(text is not None for text in self.texts), "sha256": digest.hexdigest()}


def describe_cut_captions(captions: Captions, source: ImageSource, condition: ConditionConfig, tokenizer: TextTokenizer) -> str | None:
    """How many captions are longer than the condition's `length`, with an example and the field to change. None if there are none."""
    lengths = {text: len(tokenizer.encode(text)) for text in set(captions.texts) if text}
    cut = [(index, text) for index, text in enumerate(captions.texts) if text and lengths[text] > condition.length]
    if not cut:
        return None
    index, text = cut[0]
    return (f"{counted(len(cut), 'caption')} {is_or_are(len(cut))} longer than {condition.length} {tokenizer.unit}, and the rest is cut. For "
            f"example, that of {printable(source.source_name(index))} has {lengths[text]}: '{shortened(text)}'. To keep more, raise `length` of "
            f"the condition {condition.name!r} in data.conditions (the longest caption has {max(lengths.values())} {tokenizer.unit})")


def shortened(text: str, limit: int = 100) -> str:
    """A text on one line, for a message. Of a long one, the first `limit` characters."""
    return printable(text[:limit]) + ("..." if len(text) > limit else "")


def texts_from_classes(source: ImageSource, name: str, templates: Sequence[str]) -> list[str | None]:
    """A caption of each image that has a class. A hash of the names of the condition and the image chooses the template."""
    names = source.class_names
    if names is None:
        raise InputError(f"data.conditions ({name}) has templates, but the images have no classes. Set column, or add .txt files beside the images "
                         "and leave out templates.")
    texts: list[str | None] = []
    for index in range(len(source)):
        label = source.label(index)
        template = templates[derive_seed("caption", name, source.source_name(index)) % len(templates)]
        texts.append(None if label is None else template.replace(CLASS_PLACEHOLDER, names[label]).strip())
    return texts
