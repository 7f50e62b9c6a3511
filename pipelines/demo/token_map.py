"""Shows grids of tokens as HTML."""

from collections.abc import Sequence

import torch

from stage1_tokenizer.tokenizer_protocol import Ids, ids_shape
from token_shards.manifest import Grid

GOLDEN_ANGLE = 137.508  # degrees between the hues of successive ids, which keeps them distinguishable


def format_shape(shape: Sequence[int]) -> str:
    """Format a shape, such as "4 x 4"."""
    return " x ".join(map(str, shape))


def format_grids(grids: Sequence[Grid]) -> str:
    """Format the shapes of grids, such as "4 x 4" or "2 x 2 + 4 x 4"."""
    return " + ".join(format_shape(ids_shape(grid)) for grid in grids)


def split_levels(ids: Ids, grid: Grid) -> tuple[torch.Tensor, ...]:
    """The levels (h, w) of one grid of the first image, the coarsest first."""
    first = (ids[grid.name] if isinstance(ids, dict) else ids)[0]
    return (first,) if grid.depth == 1 else first.unbind(-1)


def format_used_codes(ids: Ids, grids: Sequence[Grid]) -> str:
    """The number of codes that each level of the first image uses, such as "7 of 32 codes"."""
    return ", ".join(f"{' + '.join(str(len(ids_hw.unique())) for ids_hw in split_levels(ids, grid))} of {grid.codebook_size} codes" for grid in grids)


def token_maps(ids: Ids, grids: Sequence[Grid]) -> str:
    """HTML of all levels of the first image. With several grids, the tooltips contain the name of the grid."""
    return "".join(token_map(ids_hw, grid.name if len(grids) > 1 else "") for grid in grids for ids_hw in split_levels(ids, grid))


def token_map(ids_hw: torch.Tensor, name: str = "") -> str:
    """HTML of a token grid. Equal ids have equal colours. Grids up to 8 x 8 show the ids; larger ones show them as tooltips, after the name."""
    cells, columns = "", ids_hw.shape[1]
    for code in ids_hw.flatten().tolist():
        colour = f"hsl({code * GOLDEN_ANGLE % 360:.0f} 60% 78%)"
        cells += f'<span style="background: {colour}" title="{f"{name} {code}".strip()}">{code if columns <= 8 else ""}</span>'
    style = f"grid-template-columns: repeat({columns}, minmax(0, 1fr)); font-size: {min(0.8, 5 / columns):.2f}rem"
    return f'<div class="tokens" style="{style}">{cells}</div>'
