"""The grids of a tokenizer folder, from its config.json. Does not import torch."""

from pathlib import Path

from stage1_tokenizer.tokenizer_config import read_tokenizer_config
from token_shards.manifest import Grid
from vqmosaic.files.json_files import from_fields, written_by
from vqmosaic.recipes.image_sizes import ImageSize
from vqmosaic.recipes.tokenizer_sections import CONTINUOUS_QUANTIZERS, TokenizerConfig, token_grid

IMAGE_GRID = "image"
"""Name of the only grid of an ImageTokenizer."""


def grids_of_tokenizer(folder: Path) -> list[Grid]:
    """The grids of a tokenizer, according to its config.json. Empty if it has no ids. Raises InputError if the folder is not a tokenizer."""
    content, where = read_tokenizer_config(folder), f"{folder / 'config.json'}"
    version = written_by(content)
    if "grids" in content:
        return [from_fields(Grid, grid, f"{where}: grids[{number}]", version) for number, grid in enumerate(content["grids"])]
    config = from_fields(TokenizerConfig, content["network"], f"{where}: network", version)
    return image_tokenizer_grids(config, content["transform"].get("image_size"), f"{where}: image_size")


def image_tokenizer_grids(config: TokenizerConfig, image_size: ImageSize, field: str = "image_size") -> list[Grid]:
    """The grid of an ImageTokenizer with this configuration. Empty if its quantizer has no ids. Errors about the image size name `field`."""
    if config.quantizer in CONTINUOUS_QUANTIZERS:
        return []
    height, width = token_grid(field, image_size, config)
    return [Grid(name=IMAGE_GRID, codebook_size=config.codebook_size, height=height, width=width, depth=config.depth)]
