"""Vector quantization with a codebook that follows its vectors by moving averages (van den Oord et al. 2017, appendix A.1)."""

from typing import Self

import torch

from stage1_tokenizer.quantizers.nearest_code import code_sums, random_codebook
from stage1_tokenizer.quantizers.nearest_code_quantizer import NearestCodeQuantizer
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig

SMOOTHING = 1e-5


class EMAQuantizer(NearestCodeQuantizer):
    """Nearest code of a codebook (K, D), each code the moving average of the latents that chose it."""

    TRAINING_ONLY = ("ema_counts", "ema_sums", "commits")

    def __init__(self, codebook_size: int, code_dim: int, *, commitment_weight: float = 0.25, ema_decay: float = 0.99,
                 l2_normalize: bool = False, rotation_trick: bool = False, diveq: bool = False, revival_threshold: float = 0.03, seed: int = 0):
        super().__init__(codebook_size, code_dim, commitment_weight=commitment_weight, ema_decay=ema_decay, l2_normalize=l2_normalize,
                         rotation_trick=rotation_trick, diveq=diveq, revival_threshold=revival_threshold, seed=seed)
        codebook_KD = self.normalize(random_codebook(codebook_size, code_dim, seed))
        self.register_buffer("codebook", codebook_KD)
        self.register_buffer("ema_sums", codebook_KD.clone())

    @classmethod
    def from_config(cls, config: TokenizerConfig, seed: int) -> Self:
        return cls(config.codebook_size, config.code_dim, commitment_weight=config.commitment_weight, ema_decay=config.ema_decay,
                   l2_normalize=config.l2_normalize, rotation_trick=config.rotation_trick, diveq=config.diveq,
                   revival_threshold=config.revival_threshold, seed=seed)

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
        """Let the moving averages start from the codebook as it is, which is all that an export holds."""
        super().restart_averages()
        self.ema_sums.copy_(self.codebook)

    def take_statistics(self) -> list[torch.Tensor]:
        vectors_ND, ids_N = self._take_pending()
        return [*code_sums(vectors_ND, ids_N, self.codebook_size), self._candidates(vectors_ND)]

    def apply_statistics(self, statistics: list[torch.Tensor]) -> None:
        """Move the codebook towards the gathered vectors and revive dead codes."""
        counts_K, sums_KD, candidates_RD = statistics
        self.ema_sums.lerp_(sums_KD, 1 - self.ema_decay)
        super().apply_statistics([counts_K, candidates_RD])
        total = self.ema_counts.sum()
        smoothed_K = (self.ema_counts + SMOOTHING) / (total + self.codebook_size * SMOOTHING) * total
        self.codebook.copy_(self.normalize(self.ema_sums / smoothed_K[:, None]))

    def _replace(self, reached_K: torch.Tensor, heirs_KD: torch.Tensor) -> None:
        """The sums are set with the counts: left as they were, they would pull the code back to where it died."""
        self.ema_sums.copy_(torch.where(reached_K[:, None], heirs_KD * self.ema_counts[:, None], self.ema_sums))
