"""VQ-VAE with a codebook trained by gradient descent (van den Oord et al. 2017, equation 3)."""

import torch
from torch import nn

from stage1_tokenizer.quantizers.nearest_code_quantizer import NearestCodeQuantizer
from stage1_tokenizer.quantizers.operations.nearest_code import random_codebook


class GradientQuantizer(NearestCodeQuantizer):
    """Nearest code of a codebook parameter (K, D). codebook_weight pulls codes to latents, commitment_weight pulls latents to codes.

    Reviving a code does not reset its optimizer moments. They decay within tens of steps.
    """

    KIND = "gradient"
    CODES = ("codebook",)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.codebook = nn.Parameter(self.normalize(random_codebook(self.codebook_size, self.code_dim, self.seed)))

    def codes(self) -> torch.Tensor:
        return self.normalize(self.codebook)  # optimizer steps move codes off the sphere

    def _set_codes(self, codebook_KD: torch.Tensor) -> None:
        self.codebook.copy_(codebook_KD)

    def _replace(self, revived_K: torch.Tensor, replacements_KD: torch.Tensor) -> None:
        self.codebook.copy_(torch.where(revived_K[:, None], replacements_KD, self.codebook))
