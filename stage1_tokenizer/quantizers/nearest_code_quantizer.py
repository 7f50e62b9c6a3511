"""Base class of the nearest-code quantizers: search, gradient estimator, losses, initialization by k-means."""

from abc import abstractmethod

import torch
import torch.nn.functional as F

from stage1_tokenizer.quantizers.codebook_quantizer import CodebookQuantizer
from stage1_tokenizer.quantizers.operations.gradient_paths import choose_gradient_path
from stage1_tokenizer.quantizers.operations.nearest_code import code_sums, kmeans, nearest_codes
from stage1_tokenizer.quantizers.protocol import QuantizerOutput


class NearestCodeQuantizer(CodebookQuantizer):
    """Base class of ema, gradient and simvq: the nearest of K codes (K, D) by Euclidean distance.

    l2_normalize puts latents and codes on the unit sphere, as in ViT-VQGAN (Yu et al. 2021).

    By default, the gradient passes unchanged to the latents. With rotation_trick, it passes through the rotation and scaling that map the latent
    to the code. With diveq, it passes without its component along the error.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pass_gradient = choose_gradient_path(self.config.rotation_trick, self.config.diveq)

    @abstractmethod
    def codes(self) -> torch.Tensor:
        """The codes (K, D) that latents are compared with. Differentiable with respect to learned parameters."""

    @abstractmethod
    def _set_codes(self, codebook_KD: torch.Tensor) -> None:
        """Overwrite all codes (K, D)."""

    def normalize(self, vectors_xD: torch.Tensor) -> torch.Tensor:
        """Scale vectors to unit length if l2_normalize is on."""
        return F.normalize(vectors_xD, dim=-1) if self.config.l2_normalize else vectors_xD

    def forward(self, latents_BDhw: torch.Tensor) -> QuantizerOutput:
        with torch.autocast(device_type=latents_BDhw.device.type, enabled=False):
            # the same memory layout as the codes: on a CPU, operations on mixed layouts are several times slower
            latents_BhwD = self.normalize(latents_BDhw.float().permute(0, 2, 3, 1).contiguous())
            codes_BhwD, ids_Bhw, loss = self.quantize(latents_BhwD)
            if self.training:
                self.remember(latents_BhwD, ids_Bhw)
            quantized_BhwD = self.pass_gradient(codes_BhwD, latents_BhwD)
        return QuantizerOutput(quantized_BhwD.permute(0, 3, 1, 2), ids_Bhw, loss)

    def quantize(self, latents_xD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes (..., D), ids (...) and loss for float32 latents (..., D) that are already normalized. Has no side effects.

        The loss is commitment_weight |z - sg(e)|^2 + codebook_weight |sg(z) - e|^2 (van den Oord et al. 2017, eq. 3), each a mean over all values.
        """
        codebook_KD = self.codes()
        ids_N = nearest_codes(latents_xD.reshape(-1, self.code_dim), codebook_KD)
        codes_xD = F.embedding(ids_N, codebook_KD).view_as(latents_xD)
        loss = self.config.commitment_weight * F.mse_loss(latents_xD, codes_xD.detach())
        if self.CODES:  # the codes learn by gradient
            loss = loss + self.config.codebook_weight * F.mse_loss(codes_xD, latents_xD.detach())
        return codes_xD, ids_N.view(latents_xD.shape[:-1]), loss

    def vectors_and_codes(self, latents_BDhw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.normalize(latents_BDhw.float().permute(0, 2, 3, 1)), self.codes().float()

    def ids_to_latents(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids_Bhw, self.codes().float()).permute(0, 3, 1, 2)  # (B, D, h, w)

    @torch.no_grad()
    def initialize(self, latents_ND: torch.Tensor) -> None:
        """Initialize the codes by k-means on the latents, and the usage counts by the cluster sizes."""
        vectors_ND = self.normalize(latents_ND.float())
        codebook_KD = self.normalize(kmeans(vectors_ND, self.codebook_size, self.seed))
        counts_K, _ = code_sums(vectors_ND, nearest_codes(vectors_ND, codebook_KD), self.codebook_size)
        self._set_codes(codebook_KD)
        self.start_counts(counts_K)
