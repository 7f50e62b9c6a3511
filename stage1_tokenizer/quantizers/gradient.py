"""Vector quantization with a codebook that learns by gradient (van den Oord et al. 2017, equation 3)."""

from typing import Self

import torch
from torch import nn

from stage1_tokenizer.quantizers.nearest_code import random_codebook
from stage1_tokenizer.quantizers.nearest_code_quantizer import NearestCodeQuantizer
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig


class GradientQuantizer(NearestCodeQuantizer):
    """Nearest code of a codebook (K, D) that is a parameter: codebook_weight pulls codes to latents, commitment_weight latents to codes.

    The optimizer's moments of a revived code stay as they are; they fade within some tens of steps.
    """

    CODES = ("codebook",)

    def __init__(self, codebook_size: int, code_dim: int, *, commitment_weight: float = 0.25, codebook_weight: float = 1.0,
                 ema_decay: float = 0.99, l2_normalize: bool = False, rotation_trick: bool = False, diveq: bool = False,
                 revival_threshold: float = 0.03, seed: int = 0):
        super().__init__(codebook_size, code_dim, commitment_weight=commitment_weight, ema_decay=ema_decay, l2_normalize=l2_normalize,
                         rotation_trick=rotation_trick, diveq=diveq, revival_threshold=revival_threshold, seed=seed)
        self.codebook_weight = codebook_weight
        self.codebook = nn.Parameter(self.normalize(random_codebook(codebook_size, code_dim, seed)))

    @classmethod
    def from_config(cls, config: TokenizerConfig, seed: int) -> Self:
        return cls(config.codebook_size, config.code_dim, commitment_weight=config.commitment_weight, codebook_weight=config.codebook_weight,
                   ema_decay=config.ema_decay, l2_normalize=config.l2_normalize, rotation_trick=config.rotation_trick, diveq=config.diveq,
                   revival_threshold=config.revival_threshold, seed=seed)

    def codes(self) -> torch.Tensor:
        return self.normalize(self.codebook)  # an optimizer step leaves the sphere

    def _set_codes(self, codebook_KD: torch.Tensor) -> None:
        self.codebook.copy_(codebook_KD)

    def _replace(self, reached_K: torch.Tensor, heirs_KD: torch.Tensor) -> None:
        self.codebook.copy_(torch.where(reached_K[:, None], heirs_KD, self.codebook))
