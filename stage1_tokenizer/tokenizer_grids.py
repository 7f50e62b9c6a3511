"""The grids of a tokenizer folder, from its config.json. Does not import torch."""

from pathlib import Path

from stage1_tokenizer.tokenizer_config import read_tokenizer_config
from token_shards.manifest import Grid
from vqmosaic.files.json_files import from_fields, written_by
from vqmosaic.recipes.image_sizes import ImageSize
from vqmosaic.recipes.tokenizer_sections import IMAGE_GRID, TokenizerConfig, token_grids

__all__ = ["IMAGE_GRID", "grids_of_config", "grids_of_tokenizer"]


def grids_of_tokenizer(folder: Path) -> list[Grid]:
    """The grids of a tokenizer, according to its config.json. Empty if it has no ids. Raises InputError if the folder is not a tokenizer."""
    content, where = read_tokenizer_config(folder), f"{folder / 'config.json'}"
    version = written_by(content)
    if "grids" in content:
        return [from_fields(Grid, grid, f"{where}: grids[{number}]", version) for number, grid in enumerate(content["grids"])]
    config = from_fields(TokenizerConfig, content["network"], f"{where}: network", version)
    return grids_of_config(config, content["transform"].get("image_size"), f"{where}: image_size")


def grids_of_config(config: TokenizerConfig, image_size: ImageSize, field: str = "image_size") -> list[Grid]:
    """The grids of a tokenizer with this configuration. Empty if a quantizer has no ids. Errors about the image size name `field`."""
    sides, levels = token_grids(field, image_size, config), config.levels
    if not all(level.has_ids for level in levels.values()):
        return []
    return [Grid(name=name, codebook_size=level.codebook_size, height=sides[name][0], width=sides[name][1], depth=level.depth)
            for name, level in levels.items()]
