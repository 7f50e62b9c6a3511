"""Gumbel-softmax quantization (Jang et al. 2016), as in DALL-E (Ramesh et al. 2021) and taming-transformers."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from stage1_tokenizer.quantizers.operations.gradient_paths import check_all_codes_fit, straight_through_softmax
from stage1_tokenizer.quantizers.operations.nearest_code import full_precision, kmeans, lowest_score_ids, nearest_codes, random_codebook
from stage1_tokenizer.quantizers.operations.seeded_layers import seeded_linear
from stage1_tokenizer.quantizers.protocol import Quantizer, QuantizerOutput

FINAL_TEMPERATURE_RATIO = 1 / 16  # final / initial temperature (Ramesh et al. 2021, appendix A.2)
KL_SCALE = 0.005
MIN_VARIANCE_RATIO = 1e-3  # relative to the latents' variance; keeps initial logits finite if k-means fits every vector exactly


class GumbelQuantizer(Quantizer):
    """Samples a code from softmax(W z + b) in training, and takes the most likely code in evaluation. Learns W (K, D), b (K,), codebook (K, D).

    Training draws hard Gumbel-softmax samples with torch's global generator. Their gradient is that of the soft samples, at a temperature
    that falls from gumbel_temperature to a sixteenth of it along a half cosine. The loss is 0.005 * entropy_weight *
    KL(probabilities || uniform), averaged over vectors. The default weight equals that of taming-transformers (5e-4).
    Training needs N x K probabilities, and forward refuses more than 2 GiB of them. Evaluation works in chunks.
    """

    KIND = "gumbel"
    CODES = ("codebook",)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.temperature = self.config.gumbel_temperature
        self.to_logits = seeded_linear(self.code_dim, self.codebook_size, self.seed, "to_logits")
        self.codebook = nn.Parameter(random_codebook(self.codebook_size, self.code_dim, self.seed))

    def set_progress(self, share: float) -> None:
        """Set the temperature: gumbel_temperature at share 0, a sixteenth of it at share 1."""
        cosine = (1 + math.cos(math.pi * min(1.0, max(0.0, share)))) / 2
        self.temperature = self.config.gumbel_temperature * (FINAL_TEMPERATURE_RATIO + (1 - FINAL_TEMPERATURE_RATIO) * cosine)

    def forward(self, latents_BDhw: torch.Tensor) -> QuantizerOutput:
        with full_precision(latents_BDhw.device):
            latents_BhwD = latents_BDhw.float().permute(0, 2, 3, 1)
            vectors_ND = latents_BhwD.reshape(-1, self.code_dim)
            if self.training:
                ids_N, quantized_ND, loss = self._sample(vectors_ND)
            else:
                ids_N = lowest_score_ids(vectors_ND, self.to_logits.weight, -self.to_logits.bias)
                quantized_ND, loss = F.embedding(ids_N, self.codebook), vectors_ND.new_zeros(())
        return QuantizerOutput(quantized_ND.view(latents_BhwD.shape).permute(0, 3, 1, 2), ids_N.view(latents_BhwD.shape[:3]), loss)

    def _sample(self, vectors_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sampled ids (N,), their codes (N, D) with the gradient of the soft samples, and the loss."""
        check_all_codes_fit("gumbel", len(vectors_ND), self.codebook_size)
        logits_NK = self.to_logits(vectors_ND)
        noisy_NK = logits_NK + gumbel_noise(logits_NK)
        ids_N = noisy_NK.argmax(-1)
        quantized_ND = straight_through_softmax(ids_N, (noisy_NK / self.temperature).softmax(-1), self.codebook)
        log_probabilities_NK = logits_NK.log_softmax(-1)
        divergence = math.log(self.codebook_size) + (log_probabilities_NK.exp() * log_probabilities_NK).sum(-1).mean()
        return ids_N, quantized_ND, KL_SCALE * self.config.entropy_weight * divergence

    def ids_to_latents(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids_Bhw, self.codebook.float()).permute(0, 3, 1, 2)  # (B, D, h, w)

    @torch.no_grad()
    def initialize(self, latents_ND: torch.Tensor) -> None:
        """Initialize codes by k-means, and W and b so that softmax(W z + b) is the posterior of a mixture of Gaussians.

        The Gaussians are around the codes and have the mean within-cluster variance.
        """
        vectors_ND = latents_ND.float()
        codebook_KD = kmeans(vectors_ND, self.codebook_size, self.seed)
        variance = (vectors_ND - codebook_KD[nearest_codes(vectors_ND, codebook_KD)]).square().mean()
        variance = variance.clamp_min(MIN_VARIANCE_RATIO * vectors_ND.var(unbiased=False)).clamp_min(1e-12)
        self.codebook.copy_(codebook_KD)
        self.to_logits.weight.copy_(codebook_KD / variance)  # -|z - c|^2 / (2 variance), without |z|^2, which is the same for all codes
        self.to_logits.bias.copy_(-codebook_KD.square().sum(-1) / (2 * variance))


def gumbel_noise(like: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise of the same shape, from torch's global generator of the tensor's device."""
    return -torch.empty_like(like).exponential_().log()
