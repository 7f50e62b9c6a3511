"""Index backpropagation quantization (IBQ, Shi et al. 2024): the gradient reaches all codes."""

import torch
import torch.nn.functional as F
from torch import nn

from stage1_tokenizer.quantizers.codebook_quantizer import CodebookQuantizer
from stage1_tokenizer.quantizers.operations.entropies import entropy_loss_of_logits
from stage1_tokenizer.quantizers.operations.gradient_paths import check_all_codes_fit, straight_through_softmax
from stage1_tokenizer.quantizers.operations.nearest_code import full_precision, kmeans, lowest_score_ids, random_codebook
from stage1_tokenizer.quantizers.protocol import QuantizerOutput


class IBQQuantizer(CodebookQuantizer):
    """Chooses the code e of a learned codebook (K, D) with the largest inner product z.e. The gradient reaches latent and codes through softmax(z.e).

    The loss follows section 3.2 of the paper: codebook_weight * |q - sg(z)|^2 + commitment_weight * |z - sg(e)|^2. q has the values of e, and
    passes its gradient through the softmax. Training adds entropy_weight * (mean entropy of each vector's code probabilities - entropy_diversity *
    entropy of the mean probabilities), with logits z.e / entropy_temperature, computed over the vectors of each rank and micro-batch.
    Training needs N x K probabilities, and forward refuses more than 2 GiB of them. Evaluation works in chunks.

    With inner products, a long code can win over a closer one. So initialize() gives all codes the same length, and a revived code gets the
    direction of a latent and the length of the longest code, which lets it win for that latent.
    """

    KIND = "ibq"
    CODES = ("codebook",)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.codebook = nn.Parameter(random_codebook(self.codebook_size, self.code_dim, self.seed))

    def forward(self, latents_BDhw: torch.Tensor) -> QuantizerOutput:
        config = self.config
        with full_precision(latents_BDhw.device):
            latents_BhwD = latents_BDhw.float().permute(0, 2, 3, 1)
            vectors_ND = latents_BhwD.reshape(-1, self.code_dim)
            ids_N = self.best_ids(vectors_ND)
            quantized_ND = codes_ND = F.embedding(ids_N, self.codebook)
            loss = config.commitment_weight * F.mse_loss(vectors_ND, codes_ND.detach())
            if self.training:
                check_all_codes_fit("ibq", len(vectors_ND), self.codebook_size)
                self.remember(vectors_ND, ids_N)
                logits_NK = vectors_ND @ self.codebook.T
                quantized_ND = straight_through_softmax(ids_N, logits_NK.softmax(-1), self.codebook)
                loss = loss + config.codebook_weight * F.mse_loss(quantized_ND, vectors_ND.detach())
                if config.entropy_weight:
                    loss = loss + config.entropy_weight * entropy_loss_of_logits(logits_NK / config.entropy_temperature, config.entropy_diversity)
        return QuantizerOutput(quantized_ND.view(latents_BhwD.shape).permute(0, 3, 1, 2), ids_N.view(latents_BhwD.shape[:3]), loss)

    def best_ids(self, vectors_ND: torch.Tensor) -> torch.Tensor:
        """Ids (N,) of the codes with the largest inner product. Works in chunks."""
        return lowest_score_ids(vectors_ND, self.codebook, self.codebook.new_zeros(self.codebook_size))

    def ids_to_latents(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids_Bhw, self.codebook.float()).permute(0, 3, 1, 2)  # (B, D, h, w)

    @torch.no_grad()
    def initialize(self, latents_ND: torch.Tensor) -> None:
        """Initialize codes by k-means on the directions of the latents, scaled to the latents' root mean square length."""
        vectors_ND = latents_ND.float()
        length = vectors_ND.square().sum(-1).mean().sqrt()
        self.codebook.copy_(length * F.normalize(kmeans(F.normalize(vectors_ND, dim=-1), self.codebook_size, self.seed), dim=-1))
        self.start_counts(torch.bincount(self.best_ids(vectors_ND), minlength=self.codebook_size).float())

    def _replace(self, revived_K: torch.Tensor, replacements_KD: torch.Tensor) -> None:
        replacements_KD = F.normalize(replacements_KD, dim=-1) * self.codebook.norm(dim=-1).max()
        self.codebook.copy_(torch.where(revived_K[:, None], replacements_KD, self.codebook))
