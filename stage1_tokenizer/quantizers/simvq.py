"""SimVQ (Zhu et al. 2024): a frozen codebook transformed by one learned linear layer."""

import torch
import torch.nn.functional as F
from torch import nn

from stage1_tokenizer.quantizers.nearest_code_quantizer import NearestCodeQuantizer
from stage1_tokenizer.quantizers.operations.nearest_code import full_precision, random_codebook

PINV_RTOL = 1e-3  # the pseudo-inverse drops singular values below this fraction of the largest


class SimVQQuantizer(NearestCodeQuantizer):
    """Nearest code of W c_1 ... W c_K. The rows c (K, D) are frozen and W (D, D) is learned, so all codes move together.

    W starts as the identity. The rows are random until initialize() replaces them by k-means centres of latents. Codes rarely die: that is the
    point of SimVQ. A dead code is revived by setting its frozen row to the pseudo-inverse of W applied to a latent. Other codes do not move.
    """

    KIND = "simvq"
    # W counts as codes, because all codes are linear in it: weight decay of W would shrink them, and averaging W over the steps would move codes that
    # were revived by its pseudo-inverse.
    CODES = ("projection",)
    frozen_codebook: torch.Tensor

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("frozen_codebook", random_codebook(self.codebook_size, self.code_dim, self.seed))
        self.projection = nn.Parameter(torch.eye(self.code_dim))

    def codes(self) -> torch.Tensor:
        with full_precision(self.projection.device):
            return self.normalize(F.linear(self.frozen_codebook, self.projection))

    def _set_codes(self, codebook_KD: torch.Tensor) -> None:
        self.frozen_codebook.copy_(codebook_KD)
        self.projection.copy_(torch.eye(self.code_dim))

    def _replace(self, revived_K: torch.Tensor, replacements_KD: torch.Tensor) -> None:
        if not revived_K.any():
            return
        with full_precision(self.projection.device):
            frozen_codes_KD = replacements_KD @ torch.linalg.pinv(self.projection, rtol=PINV_RTOL).T
        self.frozen_codebook.copy_(torch.where(revived_K[:, None], frozen_codes_KD, self.frozen_codebook))
