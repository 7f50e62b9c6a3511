"""The grids of conditions in token shards: images encoded by their own tokenizers, and captions as ids of a text tokenizer.

All grids of an image are made from the same view of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pipelines.stages.stage_inputs import check_condition_tokenizer, condition_tokenizer_folder
from stage1_tokenizer.conditions.condition_data import ConditionData, open_condition_data
from stage1_tokenizer.conditions.image_pairs import OtherProportions
from stage1_tokenizer.conditions.text_tokenizer import TextTokenizer, load_text_tokenizer, text_grid, text_ids
from stage1_tokenizer.data.image_sources import ImageSource
from stage1_tokenizer.image_files.images import UnreadableImage
from stage1_tokenizer.image_files.views import View
from stage1_tokenizer.tokenizer_protocol import Tokenizer, load_tokenizer
from token_shards.manifest import Grid
from vqmosaic.recipes.recipe import Recipe


@dataclass(frozen=True)
class ConditionTokenizers:
    """The tokenizers of all conditions of a recipe, by name."""

    images: Mapping[str, Tokenizer]
    texts: Mapping[str, TextTokenizer]

    @classmethod
    def load(cls, recipe: Recipe, device: torch.device) -> "ConditionTokenizers":
        """The tokenizers of a recipe. Raises InputError for one that is missing or does not fit its condition."""
        images: dict[str, Tokenizer] = {}
        texts: dict[str, TextTokenizer] = {}
        for condition in recipe.data.given_conditions:
            if condition.is_caption:
                texts[condition.name] = load_text_tokenizer(condition.text_tokenizer)
            else:
                check_condition_tokenizer(recipe, condition)
                images[condition.name] = load_tokenizer(condition_tokenizer_folder(recipe, condition), device)
        return cls(images, texts)


@dataclass(frozen=True)
class ConditionGrid:
    """The grid of one condition for the images of one split."""

    data: ConditionData
    grid: Grid
    tokenizer: Tokenizer | None
    """The tokenizer of an image condition."""
    text_tokenizer: TextTokenizer | None
    """The tokenizer of captions."""

    @property
    def name(self) -> str:
        """Name of the condition and its grid."""
        return self.data.config.name

    def as_recorded(self, identity: Mapping[str, Any]) -> "ConditionGrid":
        """The same grid, with the pairs left out of the identity whose contents are not part of the recorded one."""
        return replace(self, data=self.data.as_recorded(identity))

    def pixels(self, index: int, image_size: tuple[int, int], view_VHWC: np.ndarray, views: Sequence[View]) -> np.ndarray:
        """The images (V, h, w, c) of the condition, given the size (width, height) of an image and its views.

        Raises UnreadableImage if the paired image cannot be read, or has other proportions.
        """
        assert self.tokenizer is not None
        if self.data.pairs is None:
            return np.stack([self.tokenizer.transform.derive(view_HWC) for view_HWC in view_VHWC])
        try:
            return self.tokenizer.transform.resize_views(self.data.pairs.read(index, image_size), views)
        except OtherProportions as error:
            raise UnreadableImage(f"its pair for {self.name!r} cannot be used: {error}") from error
        except UnreadableImage as error:
            raise UnreadableImage(f"its pair for {self.name!r} is unreadable: {error}") from error

    def text_ids_of(self, indices: Sequence[int], views: int) -> np.ndarray:
        """The ids (N, V, T) of the captions of images, the same in each view. Only padding for an image without a caption."""
        assert self.text_tokenizer is not None and self.data.captions is not None
        texts = [self.data.captions.texts[index] or "" for index in indices]
        ids_NT = np.stack([text_ids(self.text_tokenizer, text, self.grid.width) for text in texts])
        return np.repeat(ids_NT[:, None], views, axis=1)


def condition_grids(recipe: Recipe, tokenizers: ConditionTokenizers, source: ImageSource, split: str) -> list[ConditionGrid]:
    """The grids of the conditions for the images of one split (train or validation), in the order of the recipe."""
    grids = []
    for data in open_condition_data(recipe.data, source, split):
        name = data.config.name
        tokenizer, text_tokenizer = tokenizers.images.get(name), tokenizers.texts.get(name)
        if text_tokenizer is not None:
            grid = text_grid(name, text_tokenizer, data.config.length)
        else:
            assert tokenizer is not None
            grid = replace(tokenizer.grids[0], name=name, token_fingerprint=tokenizer.token_fingerprint)
        grids.append(ConditionGrid(data, grid, tokenizer, text_tokenizer))
    return grids
