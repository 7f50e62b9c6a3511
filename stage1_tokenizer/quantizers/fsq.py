"""Finite scalar quantization (FSQ, Mentzer et al. 2023): bounds each dimension and rounds it to a few levels."""

from itertools import accumulate
from operator import mul

import torch

from stage1_tokenizer.quantizers.implicit_codebook_quantizer import ImplicitCodebookQuantizer
from vqmosaic.recipes.quantizer_sizes import fsq_levels

BOUND_EPS = 1e-3  # widens the range, so that rounding reaches the outermost levels before tanh saturates


class FSQQuantizer(ImplicitCodebookQuantizer):
    """A grid of `fsq_levels(codebook_size)` levels scaled to [-1, 1]. In an id, the first dimension varies fastest. No loss, no dead codes.

    Raises:
        ValueError: codebook_size is not a product of levels from 3 to 8.
    """

    KIND = "fsq"
    levels_F: torch.Tensor
    basis_F: torch.Tensor
    half_width_F: torch.Tensor

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        levels = fsq_levels(self.codebook_size)
        levels_F = torch.tensor(levels)
        self.register_buffer("levels_F", levels_F, persistent=False)
        self.register_buffer("basis_F", torch.tensor([1, *accumulate(levels[:-1], mul)]), persistent=False)
        self.register_buffer("half_width_F", levels_F // 2, persistent=False)

    def dimension_of_codes(self) -> int:
        return len(fsq_levels(self.codebook_size))

    def quantize(self, values_BhwF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Mentzer et al., section 3.1 and appendix A.1: an even number of levels has no middle level, so tanh is shifted by half a level
        half_range_F = (self.levels_F - 1) * (1 + BOUND_EPS) / 2
        offset_F = torch.where(self.levels_F % 2 == 0, 0.5, 0.0)
        bounded_BhwF = torch.tanh(values_BhwF + torch.atanh(offset_F / half_range_F)) * half_range_F - offset_F
        level_BhwF = (bounded_BhwF.detach().round() + self.half_width_F).nan_to_num(0.0).long()
        level_BhwF = torch.minimum(level_BhwF.clamp_min(0), self.levels_F - 1)
        return (level_BhwF * self.basis_F).sum(-1), bounded_BhwF / self.half_width_F, values_BhwF.new_zeros(())

    def ids_to_codes(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        level_BhwF = ids_Bhw[..., None] // self.basis_F % self.levels_F
        return (level_BhwF - self.half_width_F) / self.half_width_F
