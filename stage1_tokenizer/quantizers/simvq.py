"""SimVQ: a frozen codebook behind a learnt linear map (Zhu et al. 2024, "Addressing representation collapse ... with one linear layer")."""

from typing import Self

import torch
import torch.nn.functional as F
from torch import nn

from stage1_tokenizer.quantizers.nearest_code import full_precision, random_codebook
from stage1_tokenizer.quantizers.nearest_code_quantizer import NearestCodeQuantizer
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig

SMALLEST_SINGULAR_VALUE = 1e-3  # of the largest; directions that the map hardly reaches are left out when it is inverted


class SimVQQuantizer(NearestCodeQuantizer):
    """Nearest code of W c_1 ... W c_K: the codes c (K, D) are never learnt, the map W (D, D) is, so that all codes move together.

    W starts as the identity. The codes are random until initialize() puts the k-means of real latents in their place. A code that is
    dead all the same (rare: that is the point of SimVQ) is revived by moving its frozen row to where W leads onto a latent, by the
    pseudo-inverse of W; the others do not move.
    """

    # All codes are linear in W: decay would shrink them, and an average of W would move the codes that were revived by its pseudo-inverse.
    CODES = ("projection",)

    def __init__(self, codebook_size: int, code_dim: int, *, commitment_weight: float = 0.25, codebook_weight: float = 1.0,
                 ema_decay: float = 0.99, l2_normalize: bool = False, rotation_trick: bool = False, diveq: bool = False,
                 revival_threshold: float = 0.03, seed: int = 0):
        super().__init__(codebook_size, code_dim, commitment_weight=commitment_weight, ema_decay=ema_decay, l2_normalize=l2_normalize,
                         rotation_trick=rotation_trick, diveq=diveq, revival_threshold=revival_threshold, seed=seed)
        self.codebook_weight = codebook_weight
        self.register_buffer("frozen_codebook", random_codebook(codebook_size, code_dim, seed))
        self.projection = nn.Parameter(torch.eye(code_dim))

    @classmethod
    def from_config(cls, config: TokenizerConfig, seed: int) -> Self:
        return cls(config.codebook_size, config.code_dim, commitment_weight=config.commitment_weight, codebook_weight=config.codebook_weight,
                   ema_decay=config.ema_decay, l2_normalize=config.l2_normalize, rotation_trick=config.rotation_trick, diveq=config.diveq,
                   revival_threshold=config.revival_threshold, seed=seed)

    def codes(self) -> torch.Tensor:
        with full_precision(self.projection.device):
            return self.normalize(F.linear(self.frozen_codebook, self.projection))

    def _set_codes(self, codebook_KD: torch.Tensor) -> None:
        self.frozen_codebook.copy_(codebook_KD)
        self.projection.copy_(torch.eye(self.code_dim))

    def _replace(self, reached_K: torch.Tensor, heirs_KD: torch.Tensor) -> None:
        if not reached_K.any():
            return
        with full_precision(self.projection.device):
            origins_KD = heirs_KD @ torch.linalg.pinv(self.projection, rtol=SMALLEST_SINGULAR_VALUE).T
        self.frozen_codebook.copy_(torch.where(reached_K[:, None], origins_KD, self.frozen_codebook))
