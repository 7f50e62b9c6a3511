"""No quantization: the Gaussian bottleneck of a variational autoencoder (Kingma and Welling 2013; as in Rombach et al. 2022), a baseline."""

from typing import ClassVar, NoReturn, Self

import torch

from stage1_tokenizer.quantizers.nearest_code import full_precision
from stage1_tokenizer.quantizers.protocol import Quantizer, QuantizerOutput
from stage1_tokenizer.quantizers.seeded_layers import seeded_linear
from vqmosaic.errors import InputError
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig

LOG_VARIANCE_RANGE = (-30.0, 20.0)


class KLBottleneck(Quantizer):
    """Mean and log-variance (D each) by a learnt 1x1 projection; a sample in training, by torch's global generator, the mean in evaluation.

    The loss is kl_weight * KL(N(mean, variance) || N(0, 1)) as a mean over all latent values, so that the weight means the same on any grid.
    There are no ids; codebook_size is not used.
    """

    has_ids: ClassVar[bool] = False

    def __init__(self, codebook_size: int, code_dim: int, *, kl_weight: float = 1e-6, seed: int = 0):
        super().__init__()
        self.codebook_size, self.code_dim, self.kl_weight = codebook_size, code_dim, kl_weight
        self.projection = seeded_linear(code_dim, 2 * code_dim, seed, "projection")

    @classmethod
    def from_config(cls, config: TokenizerConfig, seed: int) -> Self:
        return cls(config.codebook_size, config.code_dim, kl_weight=config.kl_weight, seed=seed)

    def forward(self, latents_BDhw: torch.Tensor) -> QuantizerOutput:
        with full_precision(latents_BDhw.device):
            mean_BhwD, log_variance_BhwD = self.projection(latents_BDhw.float().permute(0, 2, 3, 1)).chunk(2, dim=-1)
            log_variance_BhwD = log_variance_BhwD.clamp(*LOG_VARIANCE_RANGE)
            loss = self.kl_weight * 0.5 * (mean_BhwD.square() + log_variance_BhwD.exp() - 1 - log_variance_BhwD).mean()
            drawn_BhwD = mean_BhwD
            if self.training:
                drawn_BhwD = mean_BhwD + (log_variance_BhwD / 2).exp() * torch.randn_like(mean_BhwD)
        return QuantizerOutput(drawn_BhwD.permute(0, 3, 1, 2), None, loss)

    def ids_to_latents(self, ids_Bhw: torch.Tensor) -> NoReturn:
        """Raise InputError: the latents are continuous."""
        raise InputError("tokenizer.quantizer is kl, whose latents are continuous: there are no ids, and none can be turned into latents. "
                         "Train a tokenizer with another tokenizer.quantizer, such as ema, for tokens.")
