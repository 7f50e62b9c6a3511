"""What a data set holds for the conditions of a recipe: the paired images and captions of each split."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from stage1_tokenizer.conditions.captions import Captions, describe_cut_captions
from stage1_tokenizer.conditions.image_pairs import ImagePairs
from stage1_tokenizer.conditions.text_tokenizer import load_text_tokenizer
from stage1_tokenizer.data.image_sources import ImageSource, refuse_if_too_many_unreadable
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.stored_values import UnreadableImage
from vqmosaic.recipes.conditions import ConditionConfig
from vqmosaic.recipes.recipe_sections import DataConfig


@dataclass(frozen=True)
class ConditionData:
    """The data of one condition in one split. Both are None for images that are computed from the images themselves."""

    config: ConditionConfig
    pairs: ImagePairs | None = None
    captions: Captions | None = None

    def missing(self, index: int) -> str | None:
        """The reason why an image has no pair or caption, or None."""
        data = self.pairs or self.captions
        return None if data is None else data.missing(index)

    @property
    def identity(self) -> dict[str, Any] | None:
        """Identifies the pairs or captions; None if there are none."""
        data = self.pairs or self.captions
        return None if data is None else data.identity


def open_condition_data(data: DataConfig, source: ImageSource, split: str) -> list[ConditionData]:
    """The data of each condition of the recipe for the images of one split, train or validation."""
    opened = []
    for config in data.given_conditions:
        if config.kind == "paired_folder":
            assert config.path is not None  # the recipe checks it
            opened.append(ConditionData(config, pairs=ImagePairs(source, config.path, config.channels, data)))
        elif config.is_caption:
            opened.append(ConditionData(config, captions=Captions(source, config, split)))
        else:
            opened.append(ConditionData(config))
    return opened


def check_complete(conditions: Iterable[ConditionData], index: int) -> None:
    """Raise UnreadableImage, with the reason, if an image has no pair or no caption."""
    for condition in conditions:
        if reason := condition.missing(index):
            raise UnreadableImage(f"{reason} (condition {condition.config.name!r})")


def check_readable(conditions: Sequence[ConditionData], index: int) -> None:
    """Raise UnreadableImage, with the reason, if an image has no pair or caption, or if its pair cannot be read."""
    check_complete(conditions, index)
    for condition in conditions:
        if condition.pairs is not None:
            condition.pairs.read(index)


def check_coverage(data: DataConfig) -> list[str]:
    """Warnings about captions that are cut. Opens the data set, finds the pairs and reads the captions, but no image.

    Raises InputError if so many images lack a pair or a caption that preprocessing would stop, or if there are no captions.
    """
    splits, warnings = open_splits(data), []
    for split, source in (("train", splits.train), ("validation", splits.validation)):
        conditions = open_condition_data(data, source, split)
        missing: dict[str, str] = {}
        for index in range(len(source)):
            if reason := next((reason for condition in conditions if (reason := condition.missing(index)) is not None), None):
                missing[source.source_name(index)] = reason
        refuse_if_too_many_unreadable(missing, len(source), data)
        for condition in conditions:
            if condition.captions is not None:
                cut = describe_cut_captions(condition.captions, source, condition.config, load_text_tokenizer(condition.config.text_tokenizer))
                warnings += [f"{split}: {cut}"] if cut else []
    return warnings


def identities(conditions: Sequence[ConditionData]) -> dict[str, dict[str, Any]]:
    """Name -> identity of the pairs or captions, of the conditions that have any."""
    return {condition.config.name: identity for condition in conditions if (identity := condition.identity) is not None}
