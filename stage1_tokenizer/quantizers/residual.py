"""Residual vector quantization: each level quantizes what the ones before left over (Zeghidour et al. 2021, algorithm 1)."""

from typing import Self

import torch
from torch import nn

from stage1_tokenizer.quantizers.codebook_quantizer import all_reduced
from stage1_tokenizer.quantizers.ema import EMAQuantizer
from stage1_tokenizer.quantizers.gradient import GradientQuantizer
from stage1_tokenizer.quantizers.gradient_paths import gradient_path
from stage1_tokenizer.quantizers.nearest_code import kmeans, nearest_codes
from stage1_tokenizer.quantizers.nearest_code_quantizer import NearestCodeQuantizer
from stage1_tokenizer.quantizers.protocol import Quantizer, QuantizerOutput
from stage1_tokenizer.quantizers.simvq import SimVQQuantizer
from vqmosaic.errors import check_name
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig
from vqmosaic.seeding import derive_seed

LEVEL_KINDS: dict[str, type[NearestCodeQuantizer]] = {"ema": EMAQuantizer, "gradient": GradientQuantizer, "simvq": SimVQQuantizer}


class ResidualQuantizer(Quantizer):
    """Sum of `residual_depth` nearest codes: ids (B, h, w, depth), (B, h, w) at depth 1. Levels have a codebook each, or all the same one.

    The gradient passes once from the sum to the latents, and not to codes: passed through at each level, as some do, it arrives `depth` times.
    The loss is the mean over the levels', so that weights mean the same at any depth. With l2_normalize the latents are put on the unit sphere
    once; the levels' codes are not, since what is left over gets shorter from level to level.
    """

    def __init__(self, codebook_size: int, code_dim: int, *, residual_depth: int = 4, residual_kind: str = "ema", residual_shared: bool = False,
                 commitment_weight: float = 0.25, codebook_weight: float = 1.0, ema_decay: float = 0.99, l2_normalize: bool = False,
                 rotation_trick: bool = False, diveq: bool = False, revival_threshold: float = 0.03, seed: int = 0):
        super().__init__()
        check_name("tokenizer.residual_kind", residual_kind, LEVEL_KINDS)
        self.codebook_size, self.code_dim, self.depth = codebook_size, code_dim, residual_depth
        self.shared, self.l2_normalize, self.seed = residual_shared, l2_normalize, seed
        self.pass_gradient = gradient_path(rotation_trick, diveq)
        fields = {"commitment_weight": commitment_weight, "ema_decay": ema_decay, "revival_threshold": revival_threshold}
        if residual_kind != "ema":
            fields["codebook_weight"] = codebook_weight
        self.levels = nn.ModuleList(LEVEL_KINDS[residual_kind](codebook_size, code_dim, **fields, seed=derive_seed(seed, "level", level))
                                    for level in range(1 if residual_shared else residual_depth))

    @classmethod
    def from_config(cls, config: TokenizerConfig, seed: int) -> Self:
        return cls(config.codebook_size, config.code_dim, residual_depth=config.residual_depth, residual_kind=config.residual_kind,
                   residual_shared=config.residual_shared, commitment_weight=config.commitment_weight, codebook_weight=config.codebook_weight,
                   ema_decay=config.ema_decay, l2_normalize=config.l2_normalize, rotation_trick=config.rotation_trick, diveq=config.diveq,
                   revival_threshold=config.revival_threshold, seed=seed)

    def level(self, index: int) -> NearestCodeQuantizer:
        """The quantizer of a level."""
        return self.levels[0 if self.shared else index]

    def normalize(self, vectors_xD: torch.Tensor) -> torch.Tensor:
        """The vectors on the unit sphere where l2_normalize is on, else as they are."""
        return nn.functional.normalize(vectors_xD, dim=-1) if self.l2_normalize else vectors_xD

    def forward(self, latents_BDhw: torch.Tensor) -> QuantizerOutput:
        with torch.autocast(device_type=latents_BDhw.device.type, enabled=False):
            latents_BhwD = self.normalize(latents_BDhw.float().permute(0, 2, 3, 1))
            residues, ids, losses = [latents_BhwD], [], []
            sum_BhwD = torch.zeros_like(latents_BhwD)
            for index in range(self.depth):
                codes_BhwD, ids_Bhw, loss = self.level(index).quantize(residues[-1])
                sum_BhwD = sum_BhwD + codes_BhwD.detach()
                residues.append(latents_BhwD - sum_BhwD)
                ids.append(ids_Bhw)
                losses.append(loss)
            ids_Bhwd = torch.stack(ids, dim=-1)
            if self.training:
                self._remember(residues, ids_Bhwd)
            quantized_BhwD = self.pass_gradient(sum_BhwD, latents_BhwD)
        return QuantizerOutput(quantized_BhwD.permute(0, 3, 1, 2), ids_Bhwd if self.depth > 1 else ids[0], torch.stack(losses).mean())

    def _remember(self, residues: list[torch.Tensor], ids_Bhwd: torch.Tensor) -> None:
        if self.shared:  # position by position, so that micro-batches and ranks line up to the order of the whole batch
            self.levels[0].remember(torch.stack(residues[:-1], dim=-2), ids_Bhwd)
            return
        for index, level in enumerate(self.levels):
            level.remember(residues[index], ids_Bhwd[..., index])

    def ids_to_latents(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        ids_Bhwd = ids_Bhw if self.depth > 1 else ids_Bhw[..., None]
        sum_BDhw = torch.zeros((), device=ids_Bhw.device)
        for index in range(self.depth):  # one after the other as in forward: another order would round differently
            sum_BDhw = sum_BDhw + self.level(index).ids_to_latents(ids_Bhwd[..., index])
        return sum_BDhw

    @torch.no_grad()
    def initialize(self, latents_ND: torch.Tensor) -> None:
        """Level by level k-means on what the levels before leave over; a shared codebook by k-means on all of that together."""
        residues_ND, seen = self.normalize(latents_ND.float()), []
        for index in range(self.depth):
            if self.shared:
                codebook_KD = kmeans(residues_ND, self.codebook_size, derive_seed(self.seed, "level", index))
            else:
                self.levels[index].initialize(residues_ND)
                codebook_KD = self.levels[index].codes()
            seen.append(residues_ND)
            residues_ND = residues_ND - codebook_KD[nearest_codes(residues_ND, codebook_KD)]
        if self.shared:
            self.levels[0].initialize(torch.cat(seen))

    def commit(self) -> None:
        """Commit every level, after one all-reduce for all of them."""
        if not self.levels[0]._pending:
            return
        with torch.no_grad():
            statistics = [level.take_statistics() for level in self.levels]
            reduced = iter(all_reduced([tensor for of_level in statistics for tensor in of_level]))
            for level, of_level in zip(self.levels, statistics, strict=True):
                level.apply_statistics([next(reduced) for _ in of_level])

    def discard(self) -> None:
        for level in self.levels:
            level.discard()

    def restart_averages(self) -> None:
        for level in self.levels:
            level.restart_averages()
