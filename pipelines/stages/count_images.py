"""Finds the amount of training data of a recipe, from which other fields follow (vqmosaic/recipes/fields_from_data.py)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stage1_tokenizer.data.open_data import count_training_images
from stage2_prior.stored_images import count_stored_images
from vqmosaic.recipes.fields_from_data import DataSize


def count_images(recipe: Mapping[str, Any]) -> DataSize | None:
    """The number of training images of a recipe and, for stored tokens, of views. None if unknown. `recipe` maps dotted field names to values.

    Counts the images of the stored tokens if the recipe names tokens of another run, or if it names no data set and this run has tokens.
    Otherwise counts the images of the data set.
    """
    if recipe["prior_training.tokens"] is not None:
        return count_stored_images(recipe)
    data_size = count_training_images(recipe)
    if data_size is None and (Path(recipe["run_dir"]) / "tokens" / "train").exists():
        return count_stored_images(recipe)
    return data_size
