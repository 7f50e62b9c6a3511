"""Base class of FSQ and LFQ: codes computed from ids by arithmetic, with projections if code_dim differs from the codebook dimension."""

from abc import abstractmethod

import torch
from torch import nn

from stage1_tokenizer.quantizers.operations.gradient_paths import straight_through
from stage1_tokenizer.quantizers.operations.nearest_code import full_precision
from stage1_tokenizer.quantizers.operations.seeded_layers import seeded_linear
from stage1_tokenizer.quantizers.protocol import Quantizer, QuantizerOutput


class ImplicitCodebookQuantizer(Quantizer):
    """Base class of quantizers without a stored codebook. codebook_size determines the dimension F of the codes (codebook_dim).

    If code_dim D is not F, learned linear layers project from D to F and back (as in vector-quantize-pytorch).
    There are no statistics, so commit() and discard() do nothing.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.codebook_dim = self.dimension_of_codes()
        is_identity = self.code_dim == self.codebook_dim
        self.project_in = nn.Identity() if is_identity else seeded_linear(self.code_dim, self.codebook_dim, self.seed, "project_in")
        self.project_out = nn.Identity() if is_identity else seeded_linear(self.codebook_dim, self.code_dim, self.seed, "project_out")

    @abstractmethod
    def dimension_of_codes(self) -> int:
        """The dimension F of the codes."""

    @abstractmethod
    def quantize(self, values_BhwF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids (B, h, w), values (B, h, w, F) that receive the straight-through gradient of the codes, and the loss."""

    @abstractmethod
    def ids_to_codes(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        """Float32 codes (B, h, w, F) of ids (B, h, w)."""

    def forward(self, latents_BDhw: torch.Tensor) -> QuantizerOutput:
        with full_precision(latents_BDhw.device):
            values_BhwF = self.project_in(latents_BDhw.float().permute(0, 2, 3, 1))
            ids_Bhw, continuous_BhwF, loss = self.quantize(values_BhwF)
            quantized_BhwD = self.project_out(straight_through(self.ids_to_codes(ids_Bhw), continuous_BhwF))
        return QuantizerOutput(quantized_BhwD.permute(0, 3, 1, 2), ids_Bhw, loss)

    def vectors_and_codes(self, latents_BDhw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with full_precision(latents_BDhw.device):
            _, vectors_BhwF, _ = self.quantize(self.project_in(latents_BDhw.float().permute(0, 2, 3, 1)))
        return vectors_BhwF, self.ids_to_codes(torch.arange(self.codebook_size, device=latents_BDhw.device))

    def ids_to_latents(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        with full_precision(ids_Bhw.device):
            return self.project_out(self.ids_to_codes(ids_Bhw)).permute(0, 3, 1, 2)  # (B, D, h, w)
