"""Lookup-free quantization (LFQ; MAGVIT-v2, Yu et al. 2023, section 3.1): a code is the sign of each dimension."""

import torch
import torch.nn.functional as F

from stage1_tokenizer.quantizers.implicit_codebook_quantizer import ImplicitCodebookQuantizer
from stage1_tokenizer.quantizers.operations.entropies import entropy_loss_of_bits
from vqmosaic.recipes.quantizer_sizes import lfq_bits


class LFQQuantizer(ImplicitCodebookQuantizer):
    """Codes with `lfq_bits(codebook_size)` entries -1 or 1. The first entry is the most significant bit of the id.

    The loss is commitment_weight * |z - sg(e)|^2 + entropy_weight * (mean entropy of a vector's code - entropy_diversity * entropy of
    the codes of all vectors), with code probabilities softmax(-|z - e|^2 / entropy_temperature). The bits are then independent, so neither an
    N x K matrix nor a codebook is needed. The entropies are computed over the vectors of each rank and micro-batch.

    Raises:
        ValueError: codebook_size is not a power of two.
    """

    KIND = "lfq"
    bit_values_F: torch.Tensor

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("bit_values_F", 2 ** torch.arange(self.codebook_dim - 1, -1, -1), persistent=False)

    def dimension_of_codes(self) -> int:
        return lfq_bits(self.codebook_size)

    def quantize(self, values_BhwF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids_Bhw = ((values_BhwF > 0) * self.bit_values_F).sum(-1)
        loss = self.config.commitment_weight * F.mse_loss(values_BhwF, self.ids_to_codes(ids_Bhw))
        if self.config.entropy_weight:
            # the logit of a bit is the difference of squared distances: |z + 1|^2 - |z - 1|^2 = 4 z
            logits_NF = 4 * values_BhwF.reshape(-1, self.codebook_dim) / self.config.entropy_temperature
            loss = loss + self.config.entropy_weight * entropy_loss_of_bits(logits_NF, self.config.entropy_diversity)
        return ids_Bhw, values_BhwF, loss

    def ids_to_codes(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        return (ids_Bhw[..., None] // self.bit_values_F % 2).float() * 2 - 1
