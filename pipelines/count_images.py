"""Counts the training images of a recipe, for the rules that choose fields from this number (vqmosaic/fields_from_data.py)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stage1_tokenizer.image_sources import count_training_images
from token_shards.manifest import TokenShardManifest


def count_images(recipe: Mapping[str, Any]) -> int | None:
    """The number of training images of a recipe, given its fields by dotted name. None if it is not known.

    Counts the images of the data set. If the recipe names no data set or names tokens made elsewhere, counts the images of the tokens.
    """
    own, given = Path(recipe["run_dir"]) / "tokens" / "train", recipe["prior_training.tokens"]
    count = None if given is not None else count_training_images(recipe)
    if count is None and (given is not None or own.exists()):
        count = TokenShardManifest.load(own if given is None else Path(given) / "train").num_samples
    return count
