"""What the quantizers that look for the nearest code share: search, gradient, losses, start by k-means."""

from abc import abstractmethod

import torch
import torch.nn.functional as F

from stage1_tokenizer.quantizers.codebook_quantizer import CodebookQuantizer
from stage1_tokenizer.quantizers.gradient_paths import gradient_path
from stage1_tokenizer.quantizers.nearest_code import code_sums, kmeans, nearest_codes
from stage1_tokenizer.quantizers.protocol import QuantizerOutput


class NearestCodeQuantizer(CodebookQuantizer):
    """Base of ema, gradient and simvq: the nearest of K codes (K, D) by Euclidean distance, on the unit sphere with l2_normalize.

    The gradient passes straight through to the latents, turned and scaled as latent to code with rotation_trick, or
    without its part along the error with diveq.
    """

    codebook_weight: float | None = None
    """Weight of the loss that pulls codes to their latents; None where codes do not learn by gradient."""

    def __init__(self, codebook_size: int, code_dim: int, *, commitment_weight: float = 0.25, ema_decay: float = 0.99,
                 l2_normalize: bool = False, rotation_trick: bool = False, diveq: bool = False, revival_threshold: float = 0.03, seed: int = 0):
        super().__init__(codebook_size, code_dim, ema_decay=ema_decay, revival_threshold=revival_threshold, seed=seed)
        self.commitment_weight, self.l2_normalize, self.pass_gradient = commitment_weight, l2_normalize, gradient_path(rotation_trick, diveq)

    @abstractmethod
    def codes(self) -> torch.Tensor:
        """The codes (K, D) as latents are compared with them, with the gradient to what is learnt of them."""

    @abstractmethod
    def _set_codes(self, codebook_KD: torch.Tensor) -> None:
        """Put all codes (K, D) in place."""

    def normalize(self, vectors_xD: torch.Tensor) -> torch.Tensor:
        """The vectors on the unit sphere where l2_normalize is on, else as they are."""
        return F.normalize(vectors_xD, dim=-1) if self.l2_normalize else vectors_xD

    def forward(self, latents_BDhw: torch.Tensor) -> QuantizerOutput:
        with torch.autocast(device_type=latents_BDhw.device.type, enabled=False):
            # in one order with the codes: operations on two orders take several times as long on a CPU
            latents_BhwD = self.normalize(latents_BDhw.float().permute(0, 2, 3, 1).contiguous())
            codes_BhwD, ids_Bhw, loss = self.quantize(latents_BhwD)
            if self.training:
                self.remember(latents_BhwD, ids_Bhw)
            quantized_BhwD = self.pass_gradient(codes_BhwD, latents_BhwD)
        return QuantizerOutput(quantized_BhwD.permute(0, 3, 1, 2), ids_Bhw, loss)

    def quantize(self, latents_xD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes (..., D), ids (...) and loss of float32 latents (..., D), which are normalized already; changes and remembers nothing.

        Each term of the loss is a mean over all values: beta |z - sg(e)|^2 + codebook_weight |sg(z) - e|^2 (van den Oord et al. 2017, eq. 3).
        """
        codebook_KD = self.codes()
        ids_N = nearest_codes(latents_xD.reshape(-1, self.code_dim), codebook_KD)
        codes_xD = F.embedding(ids_N, codebook_KD).view_as(latents_xD)
        loss = self.commitment_weight * F.mse_loss(latents_xD, codes_xD.detach())
        if self.codebook_weight is not None:
            loss = loss + self.codebook_weight * F.mse_loss(codes_xD, latents_xD.detach())
        return codes_xD, ids_N.view(latents_xD.shape[:-1]), loss

    def ids_to_latents(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids_Bhw, self.codes().float()).permute(0, 3, 1, 2)  # (B, D, h, w)

    @torch.no_grad()
    def initialize(self, latents_ND: torch.Tensor) -> None:
        """Codes by k-means on the latents, counts of use by what they get of them."""
        vectors_ND = self.normalize(latents_ND.float())
        codebook_KD = self.normalize(kmeans(vectors_ND, self.codebook_size, self.seed))
        counts_K, _ = code_sums(vectors_ND, nearest_codes(vectors_ND, codebook_KD), self.codebook_size)
        self._set_codes(codebook_KD)
        self.ema_counts.copy_((counts_K / counts_K.mean()).clamp_min(2 * self.revival_threshold))  # no code starts out dead
        self.discard()
