"""Counts the training images of a recipe, from which other fields follow (vqmosaic/recipes/fields_from_data.py)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stage1_tokenizer.data.open_data import count_training_images
from stage2_prior.stored_images import count_stored_images
from vqmosaic.recipes.fields_from_data import DataSize


def count_images(recipe: Mapping[str, Any]) -> DataSize | None:
    """The data size of a recipe, given its fields by dotted name. None if unknown.

    Counts stored tokens if the recipe names tokens of another run, or if it names no data set and this run has tokens. Otherwise counts the
    images.
    """
    if recipe["prior_training.tokens"] is not None:
        return count_stored_images(recipe)
    counted = count_training_images(recipe)
    if counted is None and (Path(recipe["run_dir"]) / "tokens" / "train").exists():
        return count_stored_images(recipe)
    return counted
