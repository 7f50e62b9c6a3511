"""VQ-VAE with a codebook updated by exponential moving averages (van den Oord et al. 2017, appendix A.1)."""

import torch

from stage1_tokenizer.quantizers.nearest_code_quantizer import NearestCodeQuantizer
from stage1_tokenizer.quantizers.operations.nearest_code import code_sums, random_codebook

LAPLACE_EPS = 1e-5


class EMAQuantizer(NearestCodeQuantizer):
    """Nearest code of a codebook (K, D). Each code is the moving average of the latents assigned to it."""

    KIND = "ema"
    TRAINING_ONLY = ("ema_counts", "ema_sums", "commits")
    codebook: torch.Tensor
    ema_sums: torch.Tensor

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        codebook_KD = self.normalize(random_codebook(self.codebook_size, self.code_dim, self.seed))
        self.register_buffer("codebook", codebook_KD)
        self.register_buffer("ema_sums", codebook_KD.clone())

    def codes(self) -> torch.Tensor:
        return self.codebook

    def _set_codes(self, codebook_KD: torch.Tensor) -> None:
        self.codebook.copy_(codebook_KD)

    @torch.no_grad()
    def initialize(self, latents_ND: torch.Tensor) -> None:
        super().initialize(latents_ND)
        self.ema_sums.copy_(self.codebook * self.ema_counts[:, None])

    @torch.no_grad()
    def restart_averages(self) -> None:
        """Reset the moving averages to the current codebook, because an export contains only the codebook."""
        super().restart_averages()
        self.ema_sums.copy_(self.codebook)

    def take_statistics(self) -> list[torch.Tensor]:
        vectors_ND, ids_N = self._take_pending()
        return [*code_sums(vectors_ND, ids_N, self.codebook_size), self._revival_candidates(vectors_ND)]

    def apply_statistics(self, statistics: list[torch.Tensor]) -> None:
        """Update the moving averages and the codebook, and revive dead codes."""
        counts_K, sums_KD, candidates_RD = statistics
        self.ema_sums.lerp_(sums_KD, 1 - self.config.ema_decay)
        super().apply_statistics([counts_K, candidates_RD])
        total = self.ema_counts.sum()
        # Laplace smoothing of the counts, as in VectorQuantizerEMA of DeepMind's Sonnet
        smoothed_K = (self.ema_counts + LAPLACE_EPS) / (total + self.codebook_size * LAPLACE_EPS) * total
        self.codebook.copy_(self.normalize(self.ema_sums / smoothed_K[:, None]))

    def _replace(self, revived_K: torch.Tensor, replacements_KD: torch.Tensor) -> None:
        """Replace the sums of revived codes. `apply_statistics` then computes the codes from the sums and counts."""
        self.ema_sums.copy_(torch.where(revived_K[:, None], replacements_KD * self.ema_counts[:, None], self.ema_sums))
