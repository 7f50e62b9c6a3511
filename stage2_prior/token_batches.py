"""Batches of tokens and classes for the prior: this rank's slice of each step, a function of the step alone."""

from collections.abc import Iterator

import numpy as np
import torch

from stage2_prior.vocabulary import NO_CLASS, Vocabulary
from token_shards.reader import TokenBatch, TokenShardReader, stored_views
from vqmosaic.errors import InputError, check_range
from vqmosaic.seeding import derive_seed

LEVELS = 2**53
"""Equally far numbers in [0, 1), as many as float64 tells apart: a hash is made one of them."""


def rank_slice(start: int, stop: int, rank: int, world_size: int) -> tuple[int, int]:
    """The contiguous part [start, stop) of a rank; the parts of all ranks differ by at most one in size and make up the whole."""
    size = stop - start
    return start + size * rank // world_size, start + size * (rank + 1) // world_size


class TokenBatches:
    """Training batches over a reader's endless stream. Label drop is f(seed, epoch, sample): no rank, world size or resume changes it."""

    def __init__(self, reader: TokenShardReader, vocabulary: Vocabulary, seed: int, label_drop: float):
        check_range("prior_training.label_drop", label_drop, at_least=0, at_most=1)
        check_same_tokens(reader, vocabulary)
        self.reader, self.seed, self.label_drop = reader, seed, label_drop

    def batch(self, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (B, T) and class indices (B), int64, -1 for the null class: the rank's slice of the positions [step * B, (step + 1) * B)."""
        start, stop = rank_slice(step * batch_size, (step + 1) * batch_size, rank, world_size)
        tokens = self.reader.read(np.arange(start, stop, dtype=np.int64))
        classes_B = np.where(self.dropped(tokens.epochs_B, tokens.samples_B), NO_CLASS, tokens.labels_B)
        return torch.from_numpy(tokens.ids_BT), torch.from_numpy(classes_B)

    def dropped(self, epochs_B: np.ndarray, samples_B: np.ndarray) -> np.ndarray:
        """True (B,) where the class of a sample is replaced by the null class in that epoch.

        Computed for these samples alone: with more data neither a step nor a resume costs more.
        """
        dropped_B = np.zeros(len(samples_B), dtype=bool)
        for epoch in np.unique(epochs_B).tolist():  # a batch of a small data set may span a few epochs
            chosen = epochs_B == epoch
            samples = samples_B[chosen]
            # the reader's hash of a sample, under a seed of this epoch's own: the choice among so many views is a uniform number
            hashed = stored_views(derive_seed("label drop", self.seed, epoch), np.zeros_like(samples), samples, LEVELS)
            dropped_B[chosen] = hashed < self.label_drop * LEVELS
        return dropped_B


def validation_batches(reader: TokenShardReader, batch_size: int, rank: int = 0, world_size: int = 1,
                       limit: int | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids (B, T) and class indices (B) of the first `limit` samples in stored order, none dropped, each on exactly one rank.

    Every rank gets the same number of batches, at most batch_size samples over all ranks, even ones as far as can be: with at least
    as many samples as ranks no rank's batch is empty. Sum what you measure, and count the samples; their numbers differ by one.
    """
    check_range("batch_size", batch_size, at_least=world_size)
    total = len(reader) if limit is None else min(limit, len(reader))
    batches = -(-total // batch_size)
    for number in range(batches):
        start, stop = rank_slice(0, total, number, batches)
        yield _to_torch(reader.sequential(*rank_slice(start, stop, rank, world_size)))


def _to_torch(tokens: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(tokens.ids_BT), torch.from_numpy(tokens.labels_B)


def check_same_tokens(reader: TokenShardReader, vocabulary: Vocabulary) -> None:
    """Raise InputError unless the shards hold what the vocabulary speaks of: same tokenizer, same grids, same classes."""
    manifest = reader.manifest
    for what, own, expected in (("token fingerprint", manifest.token_fingerprint, vocabulary.token_fingerprint),
                                ("grids", list(manifest.grids), list(vocabulary.grids)),
                                ("class_names", manifest.class_names, vocabulary.class_names)):
        if own != expected:
            raise InputError(f"The {what} of the tokens in {reader.folder} is {own}; that of the prior's vocabulary is {expected}.")
