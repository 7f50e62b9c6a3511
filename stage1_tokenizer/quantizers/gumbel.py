"""Gumbel-softmax quantization: codes are drawn by logits, relaxed for the gradient (Jang et al. 2016; as in DALL-E and taming-transformers)."""

import math
from typing import Self

import torch
import torch.nn.functional as F
from torch import nn

from stage1_tokenizer.quantizers.gradient_paths import check_all_codes_fit, through_probabilities
from stage1_tokenizer.quantizers.nearest_code import full_precision, kmeans, lowest_scores, nearest_codes, random_codebook
from stage1_tokenizer.quantizers.protocol import Quantizer, QuantizerOutput
from stage1_tokenizer.quantizers.seeded_layers import seeded_linear
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig

LOWEST_TEMPERATURE = 1 / 16  # of the first one (Ramesh et al. 2021, appendix A.2)
UNIFORM_PULL = 0.005
SMALLEST_SPREAD = 1e-3  # of the latents' variance; spares initialize() endless logits where k-means hits every vector


class GumbelQuantizer(Quantizer):
    """A code drawn from softmax(W z + b) in training, the most likely one in evaluation; W (K, D), codebook (K, D) are learnt.

    Training takes hard samples of Gumbel-softmax with noise of torch's global generator; their gradient goes through the relaxed
    samples at a temperature that falls from gumbel_temperature to a sixteenth of it as a half cosine. The loss is 0.005 *
    entropy_weight * KL(probabilities || uniform), mean over vectors, so that the default weight is that of taming-transformers (5e-4).
    In training this needs N x K probabilities by nature, and forward refuses more than 2 GiB of them; evaluation works in pieces.
    """

    CODES = ("codebook",)

    def __init__(self, codebook_size: int, code_dim: int, *, gumbel_temperature: float = 1.0, entropy_weight: float = 0.1, seed: int = 0):
        super().__init__()
        self.codebook_size, self.code_dim, self.seed = codebook_size, code_dim, seed
        self.gumbel_temperature = self.temperature = gumbel_temperature
        self.entropy_weight = entropy_weight
        self.to_logits = seeded_linear(code_dim, codebook_size, seed, "to_logits")
        self.codebook = nn.Parameter(random_codebook(codebook_size, code_dim, seed))

    @classmethod
    def from_config(cls, config: TokenizerConfig, seed: int) -> Self:
        return cls(config.codebook_size, config.code_dim, gumbel_temperature=config.gumbel_temperature, entropy_weight=config.entropy_weight,
                   seed=seed)

    def set_progress(self, share: float) -> None:
        """Lower the temperature: the full one at share 0, a sixteenth at share 1."""
        falling = (1 + math.cos(math.pi * min(1.0, max(0.0, share)))) / 2
        self.temperature = self.gumbel_temperature * (LOWEST_TEMPERATURE + (1 - LOWEST_TEMPERATURE) * falling)

    def forward(self, latents_BDhw: torch.Tensor) -> QuantizerOutput:
        with full_precision(latents_BDhw.device):
            latents_BhwD = latents_BDhw.float().permute(0, 2, 3, 1)
            vectors_ND = latents_BhwD.reshape(-1, self.code_dim)
            if self.training:
                ids_N, quantized_ND, loss = self._sample(vectors_ND)
            else:
                ids_N = lowest_scores(vectors_ND, self.to_logits.weight, -self.to_logits.bias)
                quantized_ND, loss = F.embedding(ids_N, self.codebook), vectors_ND.new_zeros(())
        return QuantizerOutput(quantized_ND.view(latents_BhwD.shape).permute(0, 3, 1, 2), ids_N.view(latents_BhwD.shape[:3]), loss)

    def _sample(self, vectors_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Drawn ids (N,), their codes (N, D) with the gradient of the relaxed samples, and the loss."""
        check_all_codes_fit("gumbel", len(vectors_ND), self.codebook_size)
        logits_NK = self.to_logits(vectors_ND)
        noisy_NK = logits_NK + gumbel_noise(logits_NK)
        ids_N = noisy_NK.argmax(-1)
        quantized_ND = through_probabilities(ids_N, (noisy_NK / self.temperature).softmax(-1), self.codebook)
        log_probabilities_NK = logits_NK.log_softmax(-1)
        divergence = math.log(self.codebook_size) + (log_probabilities_NK.exp() * log_probabilities_NK).sum(-1).mean()
        return ids_N, quantized_ND, UNIFORM_PULL * self.entropy_weight * divergence

    def ids_to_latents(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids_Bhw, self.codebook.float()).permute(0, 3, 1, 2)  # (B, D, h, w)

    @torch.no_grad()
    def initialize(self, latents_ND: torch.Tensor) -> None:
        """Codes by k-means on the latents, logits so that probabilities are those of Gaussians of the clusters' spread around the codes."""
        vectors_ND = latents_ND.float()
        codebook_KD = kmeans(vectors_ND, self.codebook_size, self.seed)
        spread = (vectors_ND - codebook_KD[nearest_codes(vectors_ND, codebook_KD)]).square().mean()
        spread = spread.clamp_min(SMALLEST_SPREAD * vectors_ND.var(unbiased=False)).clamp_min(1e-12)
        self.codebook.copy_(codebook_KD)
        self.to_logits.weight.copy_(codebook_KD / spread)  # -|z - c|^2 / 2 spread, without the term that all codes share
        self.to_logits.bias.copy_(-codebook_KD.square().sum(-1) / (2 * spread))


def gumbel_noise(like: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise from torch's global generator of the tensor's device, shaped like it."""
    return -torch.empty_like(like).exponential_().log()
