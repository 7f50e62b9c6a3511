"""How many images the tokens of a recipe hold, read from their manifest. Loads no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from token_shards.manifest import TokenShardManifest
from vqmosaic.recipes.fields_from_data import DataSize


def count_stored_images(recipe: Mapping[str, Any]) -> DataSize:
    """Training images in the tokens of a recipe, and their views, given the recipe's fields by dotted name."""
    given = recipe["prior_training.tokens"]
    manifest = TokenShardManifest.load(Path(recipe["run_dir"]) / "tokens" / "train" if given is None else Path(given) / "train")
    return DataSize(manifest.num_samples, len(manifest.views))
