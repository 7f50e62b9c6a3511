"""Base class of quantizers with an explicit codebook. Counts how often codes are used, and revives dead ones."""

import itertools
import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from stage1_tokenizer.quantizers.protocol import Quantizer
from vqmosaic.seeding import derive_seed

REVIVAL_CANDIDATES = 1024
"""Largest number of codes that one commit() revives."""
GOLDEN_SECTION = (math.sqrt(5) - 1) / 2


class CodebookQuantizer(Quantizer):
    """Base class of quantizers whose codes can die, that is, become rarely used. Counts how often each code is used, and revives dead codes by moving
    them onto latents.

    This is the random restart of Jukebox (Dhariwal et al. 2020), with a threshold on an exponential moving average of the counts. Subclasses call
    remember() in each forward pass of training.
    """

    TRAINING_ONLY: ClassVar[tuple[str, ...]] = ("ema_counts", "commits")
    ema_counts: torch.Tensor
    commits: torch.Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("ema_counts", torch.ones(self.codebook_size))
        self.register_buffer("commits", torch.zeros((), dtype=torch.int64))
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    @abstractmethod
    def _replace(self, revived_K: torch.Tensor, replacements_KD: torch.Tensor) -> None:
        """Replace the codes where revived_K (K,) is true by the latents replacements_KD (K, D)."""

    def remember(self, latents_xD: torch.Tensor, ids_x: torch.Tensor) -> None:
        """Store latents (..., D) and their ids (...) until commit() or discard()."""
        self._pending.append((latents_xD.detach().reshape(-1, self.code_dim), ids_x.reshape(-1)))

    def discard(self) -> None:
        """Drop the latents and ids stored since the last commit."""
        self._pending.clear()

    def start_counts(self, counts_K: torch.Tensor) -> None:
        """Start the usage counts at `counts_K`, divided by their mean and large enough that no code starts dead. Drops stored latents and ids."""
        self.ema_counts.copy_((counts_K / counts_K.mean()).clamp_min(2 * self.config.revival_threshold))
        self.discard()

    @torch.no_grad()
    def restart_averages(self) -> None:
        """Reset the usage counts. Called after loading an export, which does not contain them."""
        self.ema_counts.fill_(1.0)

    @torch.no_grad()
    def commit(self) -> None:
        """Apply the pending statistics and revive dead codes.

        One all-reduce sums the statistics over all ranks, so the codebooks stay equal.
        """
        if self._pending:
            self.apply_statistics(sum_over_ranks(self.take_statistics()))

    def take_statistics(self) -> list[torch.Tensor]:
        """Compute this rank's statistics from the pending latents and ids, and clear these. Subclasses may return further statistics.

        Returns the usage counts (K,) and revival candidates (R, D). apply_statistics takes their sums over the ranks.
        """
        vectors_ND, ids_N = self._take_pending()
        return [torch.bincount(ids_N, minlength=self.codebook_size).float(), self._revival_candidates(vectors_ND)]

    def apply_statistics(self, statistics: list[torch.Tensor]) -> None:
        """Update the usage counts and revive dead codes, from the results of take_statistics summed over the ranks."""
        counts_K, candidates_RD = statistics
        self.ema_counts.lerp_(counts_K, 1 - self.config.ema_decay)
        self._revive(candidates_RD)
        self.commits += 1

    def _take_pending(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pop all pending latents (N, D) and ids (N,)."""
        pending, self._pending = self._pending, []
        if len(pending) == 1:  # avoid the copy
            return pending[0]
        return torch.cat([vectors for vectors, _ in pending]), torch.cat([ids for _, ids in pending])

    def _revival_candidates(self, vectors_ND: torch.Tensor) -> torch.Tensor:
        """Choose R vectors (R, D) of the global batch, which is `vectors_ND` of all ranks. The seed and the number of commits determine the choice.

        Each rank fills in its own vectors and leaves the other rows zero, so the sum over ranks has all chosen vectors.

        The distance between successive indices is about 0.618 of the batch, modulo the batch (additive recurrence; Weyl 1916), so any number of
        them spreads evenly over the batch. A random draw takes three times as long.
        """
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        total = len(vectors_ND) * world
        count = min(self.codebook_size, total, REVIVAL_CANDIDATES)
        stride = next(step for step in itertools.count(round(total * GOLDEN_SECTION)) if math.gcd(step, total) == 1)  # coprime, so no index repeats
        start = derive_seed(self.seed, "revival", int(self.commits)) % total
        chosen_R = torch.arange(start, start + count * stride, stride, device=vectors_ND.device).remainder_(total)
        if world == 1:
            return vectors_ND.index_select(0, chosen_R)
        local_R = chosen_R - rank * len(vectors_ND)
        is_here_R1 = ((local_R >= 0) & (local_R < len(vectors_ND)))[:, None]
        return torch.where(is_here_R1, vectors_ND[local_R.clamp(0, len(vectors_ND) - 1)], 0.0)

    def _revive(self, candidates_RD: torch.Tensor) -> None:
        """Move each dead code onto a latent of this batch, and set its count to the average so that it does not die again at once."""
        mean = self.ema_counts.mean()
        dead_K = self.ema_counts < self.config.revival_threshold * mean
        if dead_K.device.type == "cpu" and not dead_K.any():  # on a GPU, the check would force a synchronization
            return
        candidate_index_K = dead_K.cumsum(0) - 1  # the n-th dead code gets the n-th candidate; codes without a candidate wait for the next commit
        revived_K = dead_K & (candidate_index_K < len(candidates_RD))
        self.ema_counts.copy_(torch.where(revived_K, mean, self.ema_counts))
        self._replace(revived_K, candidates_RD[candidate_index_K.clamp(0, len(candidates_RD) - 1)])


def sum_over_ranks(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Sum float32 tensors over all ranks in one all-reduce. Returns them unchanged with one process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensors
    packed = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(packed)
    return [part.view_as(tensor) for part, tensor in zip(packed.split([tensor.numel() for tensor in tensors]), tensors, strict=True)]
