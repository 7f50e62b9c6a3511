"""Gaussian VAE bottleneck without quantization, as a baseline (Kingma and Welling 2013; as in Rombach et al. 2022)."""

from typing import ClassVar, NoReturn

import torch

from stage1_tokenizer.quantizers.operations.nearest_code import full_precision
from stage1_tokenizer.quantizers.operations.seeded_layers import seeded_linear
from stage1_tokenizer.quantizers.protocol import Quantizer, QuantizerOutput
from vqmosaic.errors import InputError

LOG_VARIANCE_RANGE = (-30.0, 20.0)


class KLBottleneck(Quantizer):
    """Predicts mean and log-variance (D each) with a learned 1x1 projection. Samples with torch's global generator in training, else the mean.

    The loss is kl_weight * KL(N(mean, variance) || N(0, 1)), averaged over all latent values, so kl_weight does not depend on the grid size.
    There are no ids. codebook_size is not used.
    """

    KIND = "kl"
    has_ids: ClassVar[bool] = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.projection = seeded_linear(self.code_dim, 2 * self.code_dim, self.seed, "projection")

    def forward(self, latents_BDhw: torch.Tensor) -> QuantizerOutput:
        with full_precision(latents_BDhw.device):
            mean_BhwD, log_variance_BhwD = self.projection(latents_BDhw.float().permute(0, 2, 3, 1)).chunk(2, dim=-1)
            log_variance_BhwD = log_variance_BhwD.clamp(*LOG_VARIANCE_RANGE)
            loss = self.config.kl_weight * 0.5 * (mean_BhwD.square() + log_variance_BhwD.exp() - 1 - log_variance_BhwD).mean()
            sample_BhwD = mean_BhwD
            if self.training:
                sample_BhwD = mean_BhwD + (log_variance_BhwD / 2).exp() * torch.randn_like(mean_BhwD)
        return QuantizerOutput(sample_BhwD.permute(0, 3, 1, 2), None, loss)

    def ids_to_latents(self, ids_Bhw: torch.Tensor) -> NoReturn:
        """Raise InputError: the latents are continuous."""
        raise InputError("tokenizer.quantizer is kl, whose latents are continuous, so there are no ids to decode. "
                         "For tokens, train a tokenizer with another tokenizer.quantizer, such as ema.")
