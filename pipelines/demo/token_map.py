"""Shows a grid of tokens as HTML."""

from collections.abc import Sequence

import torch

GOLDEN_ANGLE = 137.508  # degrees between the hues of successive ids, which keeps them distinguishable


def format_shape(shape: Sequence[int]) -> str:
    """Format a shape, such as "4 x 4"."""
    return " x ".join(map(str, shape))


def token_map(ids_hw: torch.Tensor) -> str:
    """HTML of a token grid. Equal ids have equal colours. Grids up to 8 x 8 show the ids; larger ones show them as tooltips."""
    cells, columns = "", ids_hw.shape[1]
    for code in ids_hw.flatten().tolist():
        colour = f"hsl({code * GOLDEN_ANGLE % 360:.0f} 60% 78%)"
        cells += f'<span style="background: {colour}" title="{code}">{code if columns <= 8 else ""}</span>'
    style = f"grid-template-columns: repeat({columns}, minmax(0, 1fr)); font-size: {min(0.8, 5 / columns):.2f}rem"
    return f'<div class="tokens" style="{style}">{cells}</div>'
