"""Lookup-free quantization: a code is the signs of a few dimensions (Yu et al. 2023, MAGVIT-v2, section 3.1)."""

from typing import Self

import torch
import torch.nn.functional as F

from stage1_tokenizer.quantizers.entropies import entropy_of_bits
from stage1_tokenizer.quantizers.implicit_codebook_quantizer import ImplicitCodebookQuantizer
from vqmosaic.recipes.quantizer_sizes import bits_of
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig


class LFQQuantizer(ImplicitCodebookQuantizer):
    """Codes of `bits_of(codebook_size)` entries -1 and 1; the id has the first one as its most significant bit.

    The loss is commitment_weight * |z - sg(e)|^2 + entropy_weight * (mean entropy of a vector's code - entropy_diversity * entropy of
    the codes of all vectors), where a code's probability falls with its squared distance over entropy_temperature. These bits are
    independent, so that no N x K matrix and no codebook is built. Each rank and micro-batch takes the entropy over its own vectors.

    Raises:
        ValueError: codebook_size is no power of two.
    """

    def __init__(self, codebook_size: int, code_dim: int, *, commitment_weight: float = 0.25, entropy_weight: float = 0.1,
                 entropy_diversity: float = 1.0, entropy_temperature: float = 0.1, seed: int = 0):
        bits = bits_of(codebook_size)
        super().__init__(codebook_size, code_dim, bits, seed)
        self.commitment_weight, self.entropy_weight = commitment_weight, entropy_weight
        self.entropy_diversity, self.entropy_temperature = entropy_diversity, entropy_temperature
        self.register_buffer("steps_F", 2 ** torch.arange(bits - 1, -1, -1), persistent=False)

    @classmethod
    def from_config(cls, config: TokenizerConfig, seed: int) -> Self:
        return cls(config.codebook_size, config.code_dim, commitment_weight=config.commitment_weight, entropy_weight=config.entropy_weight,
                   entropy_diversity=config.entropy_diversity, entropy_temperature=config.entropy_temperature, seed=seed)

    def quantize(self, values_BhwF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids_Bhw = ((values_BhwF > 0) * self.steps_F).sum(-1)
        loss = self.commitment_weight * F.mse_loss(values_BhwF, self.ids_to_codes(ids_Bhw))
        if self.entropy_weight:
            # |z + 1|^2 - |z - 1|^2 = 4 z is how much nearer 1 is than -1
            logits_NF = 4 * values_BhwF.reshape(-1, self.own_dim) / self.entropy_temperature
            loss = loss + self.entropy_weight * entropy_of_bits(logits_NF, self.entropy_diversity)
        return ids_Bhw, values_BhwF, loss

    def ids_to_codes(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        return (ids_Bhw[..., None] // self.steps_F % 2).float() * 2 - 1
