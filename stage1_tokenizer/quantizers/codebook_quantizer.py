"""What quantizers with an explicit codebook share: statistics that wait for commit(), counts of use, revival of dead codes."""

import itertools
import math
from abc import abstractmethod

import torch
import torch.distributed as dist

from stage1_tokenizer.quantizers.protocol import Quantizer
from vqmosaic.seeding import derive_seed

REVIVAL_CANDIDATES = 1024
GOLDEN_SECTION = (math.sqrt(5) - 1) / 2


class CodebookQuantizer(Quantizer):
    """Base of the quantizers whose codes can die: it counts how often each is chosen and moves those hardly in use onto latents."""

    TRAINING_ONLY = ("ema_counts", "commits")

    def __init__(self, codebook_size: int, code_dim: int, *, ema_decay: float, revival_threshold: float, seed: int):
        super().__init__()
        self.codebook_size, self.code_dim = codebook_size, code_dim
        self.ema_decay, self.revival_threshold, self.seed = ema_decay, revival_threshold, seed
        self.register_buffer("ema_counts", torch.ones(codebook_size))
        self.register_buffer("commits", torch.zeros((), dtype=torch.int64))
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    @abstractmethod
    def _replace(self, reached_K: torch.Tensor, heirs_KD: torch.Tensor) -> None:
        """Put the codes where reached_K (K,) is true onto the latents heirs_KD (K, D)."""

    def remember(self, latents_xD: torch.Tensor, ids_x: torch.Tensor) -> None:
        """Keep latents (..., D) and their ids (...) until commit() or discard()."""
        self._pending.append((latents_xD.detach().reshape(-1, self.code_dim), ids_x.reshape(-1)))

    def discard(self) -> None:
        self._pending.clear()

    @torch.no_grad()
    def restart_averages(self) -> None:
        """Let the counts of use start anew, as an export does not hold them."""
        self.ema_counts.fill_(1.0)

    @torch.no_grad()
    def commit(self) -> None:
        """Apply what was gathered and revive dead codes.

        Counts, sums and revival candidates of all ranks travel in one all-reduce, so the codebooks stay equal.
        """
        if self._pending:
            self.apply_statistics(all_reduced(self.take_statistics()))

    def take_statistics(self) -> list[torch.Tensor]:
        """This rank's share of the pending counts (K,) and revival candidates (R, D), to be summed over ranks; nothing is pending then."""
        vectors_ND, ids_N = self._take_pending()
        return [torch.bincount(ids_N, minlength=self.codebook_size).float(), self._candidates(vectors_ND)]

    def apply_statistics(self, statistics: list[torch.Tensor]) -> None:
        """Apply what take_statistics gave, summed over ranks."""
        counts_K, candidates_RD = statistics
        self.ema_counts.lerp_(counts_K, 1 - self.ema_decay)
        self._revive(candidates_RD)
        self.commits += 1

    def _take_pending(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All pending latents (N, D) and ids (N,)."""
        pending, self._pending = self._pending, []
        if len(pending) == 1:  # as it is, without a copy
            return pending[0]
        return torch.cat([vectors for vectors, _ in pending]), torch.cat([ids for _, ids in pending])

    def _candidates(self, vectors_ND: torch.Tensor) -> torch.Tensor:
        """R vectors (R, D) of the global batch chosen by f(seed, commit); a rank fills in its own, zeros elsewhere.

        They lie a golden section of the batch apart (an additive recurrence; Weyl 1916): any number of them spreads evenly over it, and a draw takes
        three times as long.
        """
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        total = len(vectors_ND) * world
        count = min(self.codebook_size, total, REVIVAL_CANDIDATES)
        stride = next(step for step in itertools.count(round(total * GOLDEN_SECTION)) if math.gcd(step, total) == 1)  # meets each vector once
        start = derive_seed(self.seed, "revival", int(self.commits)) % total
        chosen_R = torch.arange(start, start + count * stride, stride, device=vectors_ND.device).remainder_(total)
        if world == 1:
            return vectors_ND.index_select(0, chosen_R)
        local_R = chosen_R - rank * len(vectors_ND)
        is_here_R1 = ((local_R >= 0) & (local_R < len(vectors_ND)))[:, None]
        return torch.where(is_here_R1, vectors_ND[local_R.clamp(0, len(vectors_ND) - 1)], 0.0)

    def _revive(self, candidates_RD: torch.Tensor) -> None:
        """Give each dead code a latent of this batch, with the count of a code in average use so that it lives on."""
        mean = self.ema_counts.mean()
        dead_K = self.ema_counts < self.revival_threshold * mean
        if dead_K.device.type == "cpu" and not dead_K.any():  # elsewhere the question would cost a wait for the device
            return
        turn_K = dead_K.cumsum(0) - 1  # the n-th dead code takes the n-th candidate; those left over wait for the next step
        reached_K = dead_K & (turn_K < len(candidates_RD))
        self.ema_counts.copy_(torch.where(reached_K, mean, self.ema_counts))
        self._replace(reached_K, candidates_RD[turn_K.clamp(0, len(candidates_RD) - 1)])


def all_reduced(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors (float32) summed over all ranks in one all-reduce; as they are where there is one process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensors
    packed = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(packed)
    return [piece.view_as(tensor) for piece, tensor in zip(packed.split([tensor.numel() for tensor in tensors]), tensors, strict=True)]
