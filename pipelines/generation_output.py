"""What a pipeline returns, and the images that it accepts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from stage1_tokenizer.tokenizer_protocol import Ids

Images = Image.Image | Sequence[Image.Image] | torch.Tensor
"""A PIL image, a list of them, or a floating-point tensor (B, C, H, W) in [-1, 1]."""


@dataclass
class GenerationOutput:
    """Generated images. If the callback stopped the sampling, there are none, but seeds and class_indices are those of the whole request."""

    images: list[Image.Image] | Any = field(default_factory=list)
    """The images in the requested output type. Empty after a stop."""
    token_ids: Ids | None = None
    """int64 (B, h, w), or (B, h, w, depth), on the CPU. A dict by grid name if the tokenizer has several grids. None after a stop."""
    seeds: list[int] = field(default_factory=list)
    """The seed of each image."""
    class_indices: list[int] | None = None
    """The class index of each image; None if the request has no classes."""
    stopped: bool = False
    """True if the callback stopped the sampling."""
    places: range = range(0)
    """The positions of the images in the request, starting at 0. Empty after a stop."""
    given_ids: dict[str, torch.Tensor] = field(default_factory=dict)
    """int64 (B, n): the ids of the conditions by name, on the CPU."""
