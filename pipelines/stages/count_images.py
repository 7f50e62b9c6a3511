"""How much a recipe has to train on, for the fields that follow from it (vqmosaic/recipes/fields_from_data.py)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stage1_tokenizer.data.open_data import count_training_images
from stage2_prior.stored_images import count_stored_images
from vqmosaic.recipes.fields_from_data import DataSize


def count_images(recipe: Mapping[str, Any]) -> DataSize | None:
    """The size of a recipe's data, given its fields by dotted name: of its tokens if they were made elsewhere or no data set is named."""
    if recipe["prior_training.tokens"] is not None:
        return count_stored_images(recipe)
    counted = count_training_images(recipe)
    if counted is None and (Path(recipe["run_dir"]) / "tokens" / "train").exists():
        return count_stored_images(recipe)
    return counted
