"""Vector quantization with a codebook that follows its vectors by moving averages (van den Oord et al. 2017, appendix A.1)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from stage1_tokenizer.quantizers.nearest_code import code_sums, kmeans, nearest_codes
from stage1_tokenizer.quantizers.protocol import Quantizer, QuantizerOutput
from vqmosaic.seeding import derive_seed, generator

REVIVAL_CANDIDATES = 1024
SMOOTHING = 1e-5


class EMAQuantizer(Quantizer):
    """Nearest code of a codebook (K, D); the gradient passes straight through to the latents."""

    def __init__(self, codebook_size: int, code_dim: int, *, commitment_weight: float = 0.25, ema_decay: float = 0.99,
                 l2_normalize: bool = False, revival_threshold: float = 0.03, seed: int = 0):
        super().__init__()
        self.codebook_size, self.code_dim = codebook_size, code_dim
        self.commitment_weight, self.ema_decay = commitment_weight, ema_decay
        self.l2_normalize, self.revival_threshold, self.seed = l2_normalize, revival_threshold, seed
        rng = torch.Generator().manual_seed(derive_seed(seed, "codebook"))
        codebook_KD = self.normalize(torch.randn(codebook_size, code_dim, generator=rng) * code_dim**-0.5)
        self.register_buffer("codebook", codebook_KD)
        self.register_buffer("ema_counts", torch.ones(codebook_size))
        self.register_buffer("ema_sums", codebook_KD.clone())
        self.register_buffer("commits", torch.zeros((), dtype=torch.int64))
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    def normalize(self, vectors_xD: torch.Tensor) -> torch.Tensor:
        """The vectors on the unit sphere where l2_normalize is on, else as they are."""
        return F.normalize(vectors_xD, dim=-1) if self.l2_normalize else vectors_xD

    def forward(self, latents_BDhw: torch.Tensor) -> QuantizerOutput:
        with torch.autocast(device_type=latents_BDhw.device.type, enabled=False):
            latents_BhwD = self.normalize(latents_BDhw.float().permute(0, 2, 3, 1))
            vectors_ND = latents_BhwD.reshape(-1, self.code_dim)
            ids_N = nearest_codes(vectors_ND, self.codebook)
            if self.training:
                self._pending.append((vectors_ND.detach(), ids_N))
            codes_BhwD = F.embedding(ids_N, self.codebook).view_as(latents_BhwD)
            loss = self.commitment_weight * F.mse_loss(latents_BhwD, codes_BhwD)
            quantized_BhwD = codes_BhwD + (latents_BhwD - latents_BhwD.detach())  # straight-through: the codes to the last bit
        return QuantizerOutput(quantized_BhwD.permute(0, 3, 1, 2), ids_N.view(latents_BhwD.shape[:3]), loss)

    def ids_to_latents(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids_Bhw, self.codebook.float()).permute(0, 3, 1, 2)  # (B, D, h, w)

    @torch.no_grad()
    def initialize(self, latents_ND: torch.Tensor) -> None:
        vectors_ND = self.normalize(latents_ND.float())
        codebook_KD = self.normalize(kmeans(vectors_ND, self.codebook_size, self.seed))
        counts_K, _ = code_sums(vectors_ND, nearest_codes(vectors_ND, codebook_KD), self.codebook_size)
        share_K = (counts_K / counts_K.mean()).clamp_min(2 * self.revival_threshold)  # no code starts out dead
        self.codebook.copy_(codebook_KD)
        self.ema_counts.copy_(share_K)
        self.ema_sums.copy_(codebook_KD * share_K[:, None])
        self.discard()

    @torch.no_grad()
    def restart_averages(self) -> None:
        """Let the moving averages start from the codebook as it is, which is all that an export holds."""
        self.ema_counts.fill_(1.0)
        self.ema_sums.copy_(self.codebook)

    @torch.no_grad()
    def commit(self) -> None:
        """Move the codebook towards the gathered vectors and revive dead codes.

        Counts, sums and revival candidates of all ranks travel in one all-reduce, so the codebooks stay equal.
        """
        if not self._pending:
            return
        vectors_ND = torch.cat([vectors for vectors, _ in self._pending])
        ids_N = torch.cat([ids for _, ids in self._pending])
        self.discard()
        counts_K, sums_KD = code_sums(vectors_ND, ids_N, self.codebook_size)
        candidates_RD = self._candidates(vectors_ND)
        if dist.is_initialized() and dist.get_world_size() > 1:
            packed = torch.cat([counts_K, sums_KD.flatten(), candidates_RD.flatten()])
            dist.all_reduce(packed)
            counts_K, sums, candidates = packed.split([counts_K.numel(), sums_KD.numel(), candidates_RD.numel()])
            sums_KD, candidates_RD = sums.view_as(sums_KD), candidates.view_as(candidates_RD)
        self.ema_counts.lerp_(counts_K, 1 - self.ema_decay)
        self.ema_sums.lerp_(sums_KD, 1 - self.ema_decay)
        self._revive(candidates_RD)
        total = self.ema_counts.sum()
        smoothed_K = (self.ema_counts + SMOOTHING) / (total + self.codebook_size * SMOOTHING) * total
        self.codebook.copy_(self.normalize(self.ema_sums / smoothed_K[:, None]))
        self.commits += 1

    def discard(self) -> None:
        self._pending.clear()

    def _candidates(self, vectors_ND: torch.Tensor) -> torch.Tensor:
        """R vectors (R, D) of the global batch chosen by f(seed, commit); a rank fills in its own, zeros elsewhere."""
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        total = len(vectors_ND) * world
        count = min(self.codebook_size, total, REVIVAL_CANDIDATES)
        chosen_R = generator(self.seed, "revival", int(self.commits)).choice(total, count, replace=False)
        local_R = torch.from_numpy(chosen_R - rank * len(vectors_ND)).to(vectors_ND.device)
        is_here_R1 = ((local_R >= 0) & (local_R < len(vectors_ND)))[:, None]
        return torch.where(is_here_R1, vectors_ND[local_R.clamp(0, len(vectors_ND) - 1)], 0.0)

    def _revive(self, candidates_RD: torch.Tensor) -> None:
        """Give each dead code a latent of this batch, with sums and counts of a code in average use so that it lives on."""
        mean = self.ema_counts.mean()
        dead_K = self.ema_counts < self.revival_threshold * mean
        turn_K = dead_K.cumsum(0) - 1  # the n-th dead code takes the n-th candidate; those left over wait for the next step
        reached_K = dead_K & (turn_K < len(candidates_RD))
        heirs_KD = candidates_RD[turn_K.clamp(0, len(candidates_RD) - 1)]
        self.ema_counts.copy_(torch.where(reached_K, mean, self.ema_counts))
        self.ema_sums.copy_(torch.where(reached_K[:, None], heirs_KD * mean, self.ema_sums))
