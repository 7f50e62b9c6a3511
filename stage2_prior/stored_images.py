"""Counts the images in the tokens of a recipe, from their manifest. Does not import torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from token_shards.manifest import TokenShardManifest
from vqmosaic.recipes.fields_from_data import DataSize


def count_stored_images(recipe: Mapping[str, Any]) -> DataSize:
    """Number of training images, and of views of each, in the tokens of a recipe. `recipe` maps dotted field names to values."""
    tokens = recipe["prior_training.tokens"]
    manifest = TokenShardManifest.load(Path(recipe["run_dir"]) / "tokens" / "train" if tokens is None else Path(tokens) / "train")
    return DataSize(manifest.num_samples, len(manifest.views))
