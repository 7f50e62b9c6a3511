"""Finite scalar quantization: each dimension is bounded and rounded to a few levels (Mentzer et al. 2023)."""

from itertools import accumulate
from operator import mul
from typing import Self

import torch

from stage1_tokenizer.quantizers.implicit_codebook_quantizer import ImplicitCodebookQuantizer
from vqmosaic.recipes.quantizer_sizes import levels_of
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig

BOUND_MARGIN = 1e-3  # the outermost levels are reached before tanh saturates


class FSQQuantizer(ImplicitCodebookQuantizer):
    """The grid of `levels_of(codebook_size)` levels, scaled to [-1, 1]; an id's first dimension counts fastest. No loss, no codes to die.

    Raises:
        ValueError: codebook_size is no product of levels from 3 to 8.
    """

    def __init__(self, codebook_size: int, code_dim: int, *, seed: int = 0):
        levels = levels_of(codebook_size)
        super().__init__(codebook_size, code_dim, len(levels), seed)
        levels_F = torch.tensor(levels)
        self.register_buffer("levels_F", levels_F, persistent=False)
        self.register_buffer("steps_F", torch.tensor([1, *accumulate(levels[:-1], mul)]), persistent=False)
        self.register_buffer("half_F", levels_F // 2, persistent=False)

    @classmethod
    def from_config(cls, config: TokenizerConfig, seed: int) -> Self:
        return cls(config.codebook_size, config.code_dim, seed=seed)

    def quantize(self, values_BhwF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # section 3.1 and appendix A.1 there: an even number of levels has no level in the middle, so that tanh is shifted by half a one
        reach_F = (self.levels_F - 1) * (1 + BOUND_MARGIN) / 2
        offset_F = torch.where(self.levels_F % 2 == 0, 0.5, 0.0)
        bounded_BhwF = torch.tanh(values_BhwF + torch.atanh(offset_F / reach_F)) * reach_F - offset_F
        level_BhwF = (bounded_BhwF.detach().round() + self.half_F).nan_to_num(0.0).long()
        level_BhwF = torch.minimum(level_BhwF.clamp_min(0), self.levels_F - 1)
        return (level_BhwF * self.steps_F).sum(-1), bounded_BhwF / self.half_F, values_BhwF.new_zeros(())

    def ids_to_codes(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        level_BhwF = ids_Bhw[..., None] // self.steps_F % self.levels_F
        return (level_BhwF - self.half_F) / self.half_F
