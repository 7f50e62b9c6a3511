"""Residual vector quantization (Zeghidour et al. 2021, algorithm 1): each level quantizes the residual of the previous levels."""

import dataclasses

import torch
from torch import nn

from stage1_tokenizer.quantizers.codebook_quantizer import sum_over_ranks
from stage1_tokenizer.quantizers.ema import EMAQuantizer
from stage1_tokenizer.quantizers.gradient import GradientQuantizer
from stage1_tokenizer.quantizers.nearest_code_quantizer import NearestCodeQuantizer
from stage1_tokenizer.quantizers.operations.gradient_paths import choose_gradient_path
from stage1_tokenizer.quantizers.operations.nearest_code import kmeans, nearest_codes
from stage1_tokenizer.quantizers.protocol import Quantizer, QuantizerOutput
from stage1_tokenizer.quantizers.simvq import SimVQQuantizer
from vqmosaic.seeding import derive_seed

LEVEL_KINDS: dict[str, type[NearestCodeQuantizer]] = {
    "ema": EMAQuantizer,
    "gradient": GradientQuantizer,
    "simvq": SimVQQuantizer,
}
"""In the order of NEAREST_CODE_KINDS."""


class ResidualQuantizer(Quantizer):
    """Sum of `residual_depth` nearest codes. ids are (B, h, w, depth), or (B, h, w) at depth 1.

    Each level has its own codebook. With residual_shared, all levels share one (as in RQ-VAE, Lee et al. 2022).
    The gradient passes once from the sum to the latents, and not to the codes. Some implementations pass it at each level, so that it arrives
    `depth` times. The loss is the mean over levels, so loss weights do not depend on the depth. l2_normalize puts only the latents on the unit
    sphere, not the codes of the levels, because residuals get shorter from level to level.
    """

    KIND = "residual"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.depth, self.shared = self.config.residual_depth, self.config.residual_shared
        self.pass_gradient = choose_gradient_path(self.config.rotation_trick, self.config.diveq)
        level_config = dataclasses.replace(self.config, quantizer=self.config.residual_kind, l2_normalize=False, rotation_trick=False, diveq=False)
        self.levels = nn.ModuleList(LEVEL_KINDS[self.config.residual_kind](level_config, seed=derive_seed(self.seed, "level", level))
                                    for level in range(1 if self.shared else self.depth))

    def level(self, index: int) -> NearestCodeQuantizer:
        """The quantizer of a level. All levels share one with residual_shared."""
        return self.levels[0 if self.shared else index]

    def normalize(self, vectors_xD: torch.Tensor) -> torch.Tensor:
        """Scale vectors to unit length if l2_normalize is on."""
        return nn.functional.normalize(vectors_xD, dim=-1) if self.config.l2_normalize else vectors_xD

    def forward(self, latents_BDhw: torch.Tensor) -> QuantizerOutput:
        with torch.autocast(device_type=latents_BDhw.device.type, enabled=False):
            latents_BhwD = self.normalize(latents_BDhw.float().permute(0, 2, 3, 1))
            residuals, ids, losses = [latents_BhwD], [], []
            sum_BhwD = torch.zeros_like(latents_BhwD)
            for index in range(self.depth):
                codes_BhwD, ids_Bhw, loss = self.level(index).quantize(residuals[-1])
                sum_BhwD = sum_BhwD + codes_BhwD.detach()
                residuals.append(latents_BhwD - sum_BhwD)
                ids.append(ids_Bhw)
                losses.append(loss)
            ids_Bhwd = torch.stack(ids, dim=-1)
            if self.training:
                self._remember(residuals, ids_Bhwd)
            quantized_BhwD = self.pass_gradient(sum_BhwD, latents_BhwD)
        return QuantizerOutput(quantized_BhwD.permute(0, 3, 1, 2), ids_Bhwd if self.depth > 1 else ids[0], torch.stack(losses).mean())

    def _remember(self, residuals: list[torch.Tensor], ids_Bhwd: torch.Tensor) -> None:
        if self.shared:  # levels innermost, so that micro-batches and ranks concatenate to the order of the whole batch
            self.levels[0].remember(torch.stack(residuals[:-1], dim=-2), ids_Bhwd)
            return
        for index, level in enumerate(self.levels):
            level.remember(residuals[index], ids_Bhwd[..., index])

    def ids_to_latents(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        ids_Bhwd = ids_Bhw if self.depth > 1 else ids_Bhw[..., None]
        sum_BDhw = torch.zeros((), device=ids_Bhw.device)
        for index in range(self.depth):  # same order as in forward: another order would round differently
            sum_BDhw = sum_BDhw + self.level(index).ids_to_latents(ids_Bhwd[..., index])
        return sum_BDhw

    @torch.no_grad()
    def initialize(self, latents_ND: torch.Tensor) -> None:
        """Initialize each level by k-means on the residuals of the previous levels, or a shared codebook by k-means on all residuals."""
        residuals_ND, level_inputs = self.normalize(latents_ND.float()), []
        for index in range(self.depth):
            if self.shared:
                codebook_KD = kmeans(residuals_ND, self.codebook_size, derive_seed(self.seed, "level", index))
            else:
                self.levels[index].initialize(residuals_ND)
                codebook_KD = self.levels[index].codes()
            level_inputs.append(residuals_ND)
            residuals_ND = residuals_ND - codebook_KD[nearest_codes(residuals_ND, codebook_KD)]
        if self.shared:
            self.levels[0].initialize(torch.cat(level_inputs))

    def commit(self) -> None:
        """Commit all levels with one all-reduce."""
        if not self.levels[0]._pending:
            return
        with torch.no_grad():
            statistics = [level.take_statistics() for level in self.levels]
            reduced = iter(sum_over_ranks([tensor for level_statistics in statistics for tensor in level_statistics]))
            for level, level_statistics in zip(self.levels, statistics, strict=True):
                level.apply_statistics([next(reduced) for _ in level_statistics])

    def discard(self) -> None:
        for level in self.levels:
            level.discard()

    def restart_averages(self) -> None:
        for level in self.levels:
            level.restart_averages()
