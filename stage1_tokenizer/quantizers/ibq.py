"""Index back-propagation quantization: the gradient goes to all codes (Shi et al. 2024, "Scalable image tokenization with IBQ")."""

from typing import Self

import torch
import torch.nn.functional as F
from torch import nn

from stage1_tokenizer.quantizers.codebook_quantizer import CodebookQuantizer
from stage1_tokenizer.quantizers.entropies import entropy_of_logits
from stage1_tokenizer.quantizers.gradient_paths import check_all_codes_fit, through_probabilities
from stage1_tokenizer.quantizers.nearest_code import full_precision, kmeans, lowest_scores, random_codebook
from stage1_tokenizer.quantizers.protocol import QuantizerOutput
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig


class IBQQuantizer(CodebookQuantizer):
    """The code of a learnt codebook (K, D) with the largest inner product z.e; its gradient goes through softmax(z.e) to latent and codes.

    In training this needs N x K probabilities by nature, and forward refuses more than 2 GiB of them; evaluation works in pieces.
    The loss has the paper's two sides (section 3.2): codebook_weight * |q - sg(z)|^2, where q carries the index gradient, and
    commitment_weight * |z - sg(e)|^2; in training also entropy_weight * (mean entropy of a vector's code - entropy_diversity * entropy of
    the codes of all vectors), with z.e over entropy_temperature as logits, over each rank's and micro-batch's own vectors.
    By inner products a long code wins over a nearer one: initialize() gives all codes one length, and a revived code gets the
    direction of a latent and the length of the longest code, so that it wins there.
    """

    CODES = ("codebook",)

    def __init__(self, codebook_size: int, code_dim: int, *, commitment_weight: float = 0.25, codebook_weight: float = 1.0,
                 ema_decay: float = 0.99, revival_threshold: float = 0.03, entropy_weight: float = 0.1, entropy_diversity: float = 1.0,
                 entropy_temperature: float = 0.1, seed: int = 0):
        super().__init__(codebook_size, code_dim, ema_decay=ema_decay, revival_threshold=revival_threshold, seed=seed)
        self.commitment_weight, self.codebook_weight = commitment_weight, codebook_weight
        self.entropy_weight, self.entropy_diversity, self.entropy_temperature = entropy_weight, entropy_diversity, entropy_temperature
        self.codebook = nn.Parameter(random_codebook(codebook_size, code_dim, seed))

    @classmethod
    def from_config(cls, config: TokenizerConfig, seed: int) -> Self:
        return cls(config.codebook_size, config.code_dim, commitment_weight=config.commitment_weight, codebook_weight=config.codebook_weight,
                   ema_decay=config.ema_decay, revival_threshold=config.revival_threshold, entropy_weight=config.entropy_weight,
                   entropy_diversity=config.entropy_diversity, entropy_temperature=config.entropy_temperature, seed=seed)

    def forward(self, latents_BDhw: torch.Tensor) -> QuantizerOutput:
        with full_precision(latents_BDhw.device):
            latents_BhwD = latents_BDhw.float().permute(0, 2, 3, 1)
            vectors_ND = latents_BhwD.reshape(-1, self.code_dim)
            ids_N = self.best_codes(vectors_ND)
            quantized_ND = codes_ND = F.embedding(ids_N, self.codebook)
            loss = self.commitment_weight * F.mse_loss(vectors_ND, codes_ND.detach())
            if self.training:
                check_all_codes_fit("ibq", len(vectors_ND), self.codebook_size)
                self.remember(vectors_ND, ids_N)
                logits_NK = vectors_ND @ self.codebook.T
                quantized_ND = through_probabilities(ids_N, logits_NK.softmax(-1), self.codebook)
                loss = loss + self.codebook_weight * F.mse_loss(quantized_ND, vectors_ND.detach())
                if self.entropy_weight:
                    loss = loss + self.entropy_weight * entropy_of_logits(logits_NK / self.entropy_temperature, self.entropy_diversity)
        return QuantizerOutput(quantized_ND.view(latents_BhwD.shape).permute(0, 3, 1, 2), ids_N.view(latents_BhwD.shape[:3]), loss)

    def best_codes(self, vectors_ND: torch.Tensor) -> torch.Tensor:
        """Ids (N,) of the codes with the largest inner product, in pieces."""
        return lowest_scores(vectors_ND, self.codebook, self.codebook.new_zeros(self.codebook_size))

    def ids_to_latents(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids_Bhw, self.codebook.float()).permute(0, 3, 1, 2)  # (B, D, h, w)

    @torch.no_grad()
    def initialize(self, latents_ND: torch.Tensor) -> None:
        """Codes by k-means on the latents' directions, all of the latents' root mean square length."""
        vectors_ND = latents_ND.float()
        length = vectors_ND.square().sum(-1).mean().sqrt()
        self.codebook.copy_(length * F.normalize(kmeans(F.normalize(vectors_ND, dim=-1), self.codebook_size, self.seed), dim=-1))
        counts_K = torch.bincount(self.best_codes(vectors_ND), minlength=self.codebook_size).float()
        self.ema_counts.copy_((counts_K / counts_K.mean()).clamp_min(2 * self.revival_threshold))  # no code starts out dead
        self.discard()

    def _replace(self, reached_K: torch.Tensor, heirs_KD: torch.Tensor) -> None:
        heirs_KD = F.normalize(heirs_KD, dim=-1) * self.codebook.norm(dim=-1).max()
        self.codebook.copy_(torch.where(reached_K[:, None], heirs_KD, self.codebook))
