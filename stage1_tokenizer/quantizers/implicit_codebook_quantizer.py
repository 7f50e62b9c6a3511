"""What fsq and lfq share: codes that follow from their ids by arithmetic, and projections where code_dim is another dimension."""

from abc import abstractmethod

import torch
from torch import nn

from stage1_tokenizer.quantizers.gradient_paths import straight_through
from stage1_tokenizer.quantizers.nearest_code import full_precision
from stage1_tokenizer.quantizers.protocol import Quantizer, QuantizerOutput
from stage1_tokenizer.quantizers.seeded_layers import seeded_linear


class ImplicitCodebookQuantizer(Quantizer):
    """Base of the quantizers without a codebook. Codes have F dimensions of their own, which follow from codebook_size.

    Where code_dim is not F, a learnt linear layer leads from D to F and another one back (as in vector-quantize-pytorch).
    Nothing is gathered: commit() and discard() have nothing to do.
    """

    def __init__(self, codebook_size: int, code_dim: int, own_dim: int, seed: int):
        super().__init__()
        self.codebook_size, self.code_dim, self.own_dim = codebook_size, code_dim, own_dim
        is_same = code_dim == own_dim
        self.project_in = nn.Identity() if is_same else seeded_linear(code_dim, own_dim, seed, "project_in")
        self.project_out = nn.Identity() if is_same else seeded_linear(own_dim, code_dim, seed, "project_out")

    @abstractmethod
    def quantize(self, values_BhwF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids (B, h, w), a smooth stand-in (B, h, w, F) for the codes that carries their gradient, and the loss."""

    @abstractmethod
    def ids_to_codes(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        """Codes (B, h, w, F) float32 of ids (B, h, w)."""

    def forward(self, latents_BDhw: torch.Tensor) -> QuantizerOutput:
        with full_precision(latents_BDhw.device):
            values_BhwF = self.project_in(latents_BDhw.float().permute(0, 2, 3, 1))
            ids_Bhw, smooth_BhwF, loss = self.quantize(values_BhwF)
            quantized_BhwD = self.project_out(straight_through(self.ids_to_codes(ids_Bhw), smooth_BhwF))
        return QuantizerOutput(quantized_BhwD.permute(0, 3, 1, 2), ids_Bhw, loss)

    def ids_to_latents(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        with full_precision(ids_Bhw.device):
            return self.project_out(self.ids_to_codes(ids_Bhw)).permute(0, 3, 1, 2)  # (B, D, h, w)
