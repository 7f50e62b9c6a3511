"""What a data set holds for the conditions of a recipe: the paired images and captions of each split."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stage1_tokenizer.conditions.captions import Captions, describe_cut_captions
from stage1_tokenizer.conditions.image_pairs import ImagePairs, OtherProportions
from stage1_tokenizer.conditions.text_tokenizer import load_text_tokenizer
from stage1_tokenizer.data.image_sources import ImageSource, allowed_unreadable, refuse_if_too_many_unreadable
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.data.threaded_map import map_in_threads
from stage1_tokenizer.image_files.stored_values import UnreadableImage
from vqmosaic.errors import InputError, listed_names, printable
from vqmosaic.recipes.conditions import ConditionConfig
from vqmosaic.recipes.recipe_sections import DataConfig
from vqmosaic.wording import counted

CHECKED_PAIRS = 200
"""Largest number of pairs of a split that are read before a run starts, to compare their proportions with those of their images."""

CHANCE = 1e-6
"""Largest probability with which pairs are refused because of chance, although no more have other proportions than are allowed."""


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

    def as_recorded(self, identity: Mapping[str, Any]) -> "ConditionData":
        """The same data, with the pairs left out of the identity whose contents are not part of the recorded one."""
        return self if self.pairs is None else dataclasses.replace(self, pairs=self.pairs.with_unread(identity.get("unread", ())))


def open_condition_data(data: DataConfig, source: ImageSource, split: str) -> list[ConditionData]:
    """The data of each condition of the recipe for the images of one split, train or validation."""
    opened = []
    for config in data.given_conditions:
        if config.kind == "paired_folder":
            opened.append(ConditionData(config, pairs=ImagePairs(source, config.derivation(), data)))
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
    """Raise UnreadableImage, with the reason, if an image has no pair or caption, or if its pair cannot be used."""
    check_complete(conditions, index)
    for condition in conditions:
        if condition.pairs is not None:
            condition.pairs.check(index)


def check_coverage(data: DataConfig) -> list[str]:
    """Warnings about captions that are cut and pairs of other proportions.

    Opens the data set, finds the pairs, and reads the captions and some pairs. Raises InputError if so many images lack a pair or a caption, or have
    a pair of other proportions, that preprocessing would stop, or if there are no captions.
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
            if condition.pairs is not None:
                other = check_proportions(condition.pairs, condition.config.name, source, split, data)
                warnings += [other] if other else []
            if condition.captions is not None:
                cut = describe_cut_captions(condition.captions, source, condition.config, load_text_tokenizer(condition.config.text_tokenizer))
                warnings += [f"{split}: {cut}"] if cut else []
    return warnings


def check_proportions(pairs: ImagePairs, name: str, source: ImageSource, split: str, data: DataConfig) -> str | None:
    """A warning if pairs have other proportions than their images, or None. Raises InputError if there are more than data.max_unreadable allows.

    Reads up to CHECKED_PAIRS pairs, evenly spaced. Of a larger number of pairs, preprocessing may find too many later. It also finds unreadable ones.
    """
    indices = pairs.indices[::-(-len(pairs.indices) // CHECKED_PAIRS) or 1]
    found: dict[str, str] = {}

    def check(index: int) -> None:
        try:
            pairs.check(index)
        except OtherProportions as error:
            found[source.source_name(index)] = str(error)
        except UnreadableImage:
            return

    for _ in map_in_threads(check, indices):
        pass
    if not found:
        return None
    example = min(found)
    message = (f"{len(found)} of the {counted(len(indices), 'pair')} of the {split} split that were checked have other proportions than their image: "
               f"{listed_names(sorted(found))}. The pair of {printable(example)}: {found[example]}.")
    if len(found) > allowed_unreadable(len(source), data) or is_larger_fraction(len(found), len(indices), data.max_unreadable):
        raise InputError(f"data.conditions ({name}): {message} Both get the same crop and flip, so they must show the same part. Crop or resize the "
                         "images, or remove these pairs. `vqmosaic check-data` checks all pairs.")
    return f"data.conditions ({name}): {message} Such images are not used. `vqmosaic check-data` checks all pairs"


def is_larger_fraction(found: int, checked: int, allowed: float) -> bool:
    """Whether so many of the `checked` pairs of a larger set show that its fraction is larger than `allowed`, and are not there by chance."""
    from scipy.stats import binom  # takes a second to import

    return bool(binom.sf(found - 1, checked, allowed) < CHANCE)


def identities(conditions: Sequence[ConditionData]) -> dict[str, dict[str, Any]]:
    """Name -> identity of the pairs or captions, of the conditions that have any."""
    return {condition.config.name: identity for condition in conditions if (identity := condition.identity) is not None}
