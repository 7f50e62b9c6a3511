"""Batches of tokens and classes for the prior. A batch does not depend on earlier batches, so training can resume at any step."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from stage2_prior.segments import Segment
from stage2_prior.token_columns import TokenColumns
from stage2_prior.vocabulary import NO_CLASS, Vocabulary
from token_shards.manifest import Grid
from token_shards.reader import TokenShardReader, stored_views
from vqmosaic.errors import check_range
from vqmosaic.recipes.recipe_sections import PriorTrainingConfig
from vqmosaic.seeding import derive_seed, hashes
from vqmosaic.wording import counted

VALIDATION_RULE = 1
"""Version of the rule in `validation_samples`. Version 0.1.0 of vqmosaic used another rule: the first images."""
MEASURED_BATCHES = 20
"""Number of training batches whose classes are counted before training starts."""
MIN_CLASS_FRACTION = 0.9
"""A warning is shown if a batch has less than this fraction of the classes that independent draws would give. Permuted shards reach 0.95 and more."""
UNIFORM_LEVELS = 2**53
"""Number of equally spaced values in [0, 1) for random numbers. float64 represents all of them exactly."""


def rank_slice(start: int, stop: int, rank: int, world_size: int) -> tuple[int, int]:
    """The contiguous part of the range [start, stop) for a rank. The parts of all ranks cover the range, and their sizes differ by at most one."""
    size = stop - start
    return start + size * rank // world_size, start + size * (rank + 1) // world_size


class TrainingBatch(NamedTuple):
    """One training batch of the prior. All tensors are int64."""

    ids_BT: torch.Tensor
    """The ids to predict."""
    classes_B: torch.Tensor
    """Class indices; -1 is the null class."""
    inputs_BT: torch.Tensor
    """The input ids of the model: `ids_BT`, with a fraction of them replaced by random codes (prior_training.token_noise)."""
    given_BG: torch.Tensor
    """The ids of the conditions; -1 is the null id. No columns if the class is the only given segment."""
    orders_BT: torch.Tensor
    """The positions of each image in the order in which they are predicted."""


class TokenBatches:
    """Training batches from a reader's endless stream.

    Label drop, the drop rates of segments and token noise depend only on (seed, epoch, sample), not on rank, world size or resuming.
    """

    def __init__(self, reader: TokenShardReader, vocabulary: Vocabulary, seed: int, label_drop: float, token_noise: float = 0.0):
        check_range("prior_training.label_drop", label_drop, at_least=0, at_most=1)
        check_range("prior_training.token_noise", token_noise, at_least=0, below=1)
        self.columns = TokenColumns(reader, vocabulary)
        self.vocabulary = vocabulary
        self.reader, self.seed, self.label_drop, self.token_noise = reader, seed, label_drop, token_noise
        # The codebook size of each token's grid.
        self.codebook_sizes_T = np.concatenate([np.full(grid.num_tokens, grid.codebook_size, dtype=np.uint64) for grid in vocabulary.grids])

    def batch(self, step: int, batch_size: int, rank: int = 0, world_size: int = 1, random_share: float = 0.0) -> TrainingBatch:
        """The rank's slice of the stream's positions [step * batch_size, (step + 1) * batch_size), a share of it in random order."""
        start, stop = rank_slice(step * batch_size, (step + 1) * batch_size, rank, world_size)
        tokens = self.reader.read(np.arange(start, stop, dtype=np.int64))
        ids_BT, given_BG = self.columns.split(tokens.ids_BT)
        dropped_B = self.dropped(tokens.epochs_B, tokens.samples_B)
        class_segment, *conditions = self.vocabulary.given_segments
        class_dropped_B = dropped_B | self.dropped_segment(class_segment, tokens.epochs_B, tokens.samples_B)
        classes_B = np.where(class_dropped_B, NO_CLASS, tokens.labels_B)
        for segment in conditions:
            segment_dropped_B = dropped_B | self.dropped_segment(segment, tokens.epochs_B, tokens.samples_B)
            given_BG[segment_dropped_B, segment.places.start - 1:segment.places.stop - 1] = -1
        inputs_BT = self.add_noise(ids_BT, tokens.epochs_B, tokens.samples_B)
        orders_BT = self.orders(tokens.epochs_B, tokens.samples_B, random_share)
        return TrainingBatch(*map(torch.from_numpy, (ids_BT, classes_B, inputs_BT, given_BG, orders_BT)))

    def orders(self, epochs_B: np.ndarray, samples_B: np.ndarray, random_share: float) -> np.ndarray:
        """The order of positions (B, T) of each image: a random one with probability `random_share`, otherwise raster."""
        orders_BT = np.tile(np.arange(len(self.codebook_sizes_T)), (len(samples_B), 1))
        for epoch in np.unique(epochs_B).tolist() if random_share else ():
            is_random_B = (epochs_B == epoch) & (hashes(samples_B, "is random order", self.seed, epoch) / 2.0**64 < random_share)
            orders_BT[is_random_B] = random_orders(samples_B[is_random_B], self.vocabulary.grids, self.seed, epoch)
        return orders_BT

    def add_noise(self, ids_BT: np.ndarray, epochs_B: np.ndarray, samples_B: np.ndarray) -> np.ndarray:
        """The ids (B, T), each replaced with probability `token_noise` by a random code of its grid."""
        if self.token_noise == 0:
            return ids_BT
        tokens_per_sample = len(self.codebook_sizes_T)
        token_indices_BT = samples_B[:, None] * tokens_per_sample + np.arange(tokens_per_sample)
        noisy_BT = ids_BT.copy()
        for epoch in np.unique(epochs_B).tolist():
            in_epoch_B = epochs_B == epoch
            uniforms = hashes(token_indices_BT[in_epoch_B], "token noise", self.seed, epoch) / 2.0**64
            random_ids = hashes(token_indices_BT[in_epoch_B], "random tokens", self.seed, epoch) % self.codebook_sizes_T
            noisy_BT[in_epoch_B] = np.where(uniforms < self.token_noise, random_ids.astype(np.int64), ids_BT[in_epoch_B])
        return noisy_BT

    def dropped(self, epochs_B: np.ndarray, samples_B: np.ndarray) -> np.ndarray:
        """Mask (B,): True if all given segments of a sample, such as its class, are dropped in that epoch (label_drop)."""
        return self._chosen("label drop", self.label_drop, epochs_B, samples_B)

    def dropped_segment(self, segment: Segment, epochs_B: np.ndarray, samples_B: np.ndarray) -> np.ndarray:
        """Mask (B,): True if a given segment of a sample is dropped in that epoch independently of the others."""
        return self._chosen(f"drop of segment {segment.name}", segment.drop_rate, epochs_B, samples_B)

    def _chosen(self, choice: str, fraction: float, epochs_B: np.ndarray, samples_B: np.ndarray) -> np.ndarray:
        """Mask (B,), True for this fraction of the samples. Each choice is independent of other choices and of other epochs.

        Computed only for these samples, so the cost of a step or a resume does not depend on the size of the data set.
        """
        chosen_B = np.zeros(len(samples_B), dtype=bool)
        if fraction == 0:
            return chosen_B
        for epoch in np.unique(epochs_B).tolist():  # a batch of a small data set may span a few epochs
            in_epoch_B = epochs_B == epoch
            samples = samples_B[in_epoch_B]
            # stored_views serves as a hash here: with UNIFORM_LEVELS views, the view number of a sample is a uniform random number.
            uniforms = stored_views(derive_seed(choice, self.seed, epoch), np.zeros_like(samples), samples, UNIFORM_LEVELS)
            chosen_B[in_epoch_B] = uniforms < fraction * UNIFORM_LEVELS
        return chosen_B


def random_share(training: PriorTrainingConfig, progress: float) -> float:
    """The share of images in random order after a fraction `progress` of the training."""
    if training.order != "annealed":
        return float(training.order == "random")
    start, stop = training.order_annealing
    annealed = min(1.0, max(0.0, (progress - start) / (stop - start))) if stop > start else float(progress >= start)
    return 1 + annealed * (training.final_random_share - 1)


def random_orders(samples_B: np.ndarray, grids: Sequence[Grid], *seeds: int | str) -> np.ndarray:
    """A random order of the positions (B, T) for each sample, one grid after another, as in sampling. It depends only on the sample and the seeds."""
    stops = np.cumsum([grid.num_tokens for grid in grids])
    keys_BT = hashes(samples_B[:, None] * stops[-1] + np.arange(stops[-1]), "random orders", *seeds)
    parts = [keys_Bn.argsort(axis=1) for keys_Bn in np.split(keys_BT, stops[:-1], axis=1)]
    return np.concatenate([part + stop - part.shape[1] for part, stop in zip(parts, stops.tolist(), strict=True)], axis=1)


def expected_classes(labels_N: np.ndarray, draws: int) -> float:
    """The expected number of different classes in `draws` independent draws from these labels. Samples without a class count as one more class."""
    _, counts = np.unique(labels_N, return_counts=True)
    return float((1 - (1 - counts / len(labels_N)) ** draws).sum())


def classes_in_batches(reader: TokenShardReader, batch_size: int, batches: int = MEASURED_BATCHES) -> float:
    """Mean number of different classes in a training batch, over `batches` batches spread evenly over the first epoch. Reads only labels."""
    first_positions = np.linspace(0, max(0, len(reader) - batch_size), batches).astype(np.int64)
    labels_N = reader.labels_N
    first_sample_S = np.cumsum(reader.order.counts_S) - reader.order.counts_S  # index of the first sample in each shard
    class_counts = []
    for first in first_positions.tolist():
        shards_B, rows_B = reader.order.sample_at(np.arange(first, first + batch_size))
        class_counts.append(len(np.unique(labels_N[first_sample_S[shards_B] + rows_B])))
    return float(np.mean(class_counts))


def warn_of_sorted_shards(reader: TokenShardReader, batch_size: int) -> str | None:
    """A warning if the shards are stored by class and too few are shuffled together to mix the classes; otherwise None."""
    manifest = reader.manifest
    if manifest.order_seed is not None or manifest.class_names is None or len(manifest.shards) <= reader.window_shards:
        return None  # permuted, no classes, or all shards are shuffled together
    found, expected = classes_in_batches(reader, batch_size), expected_classes(reader.labels_N, batch_size)
    if found >= MIN_CLASS_FRACTION * expected:
        return None
    return (f"warning: a batch of {batch_size} holds {found:.0f} of {len(manifest.class_names):,} classes on average; independent draws would give "
            f"{expected:.0f}. The tokens in {reader.folder} are stored by class, and prior_training.window_shards shuffles "
            f"{reader.window_shards} of {len(manifest.shards)} shards at a time. Write them again in a permuted order (`vqmosaic preprocess` with "
            f"--redo tokens, or `vqmosaic import-tokens` into a new folder), or set prior_training.window_shards to {len(manifest.shards)}, which "
            "takes more memory.")


def validation_samples(reader: TokenShardReader, limit: int | None = None) -> np.ndarray:
    """Ascending indices (N,) of at most `limit` samples for validation. They are the same at every validation, with all classes in proportion.

    Each class contributes the fraction limit / len(reader) of its samples, rounded up or down, chosen by a hash of their index in the data set.
    So the order in which samples are stored does not matter, and a larger limit adds images to those of a smaller one.
    """
    total = len(reader)
    if limit is None or limit >= total:
        return np.arange(total)
    labels_N, hashed_N = reader.labels_N, hashes(reader.indices_N, "validation samples")
    by_class_N = np.lexsort((hashed_N, labels_N))  # by class, then by hash
    classes, starts, counts = np.unique(labels_N[by_class_N], return_index=True, return_counts=True)
    # Spread the n samples of each class evenly over [0, 1): sample k is at (k + u) / n, where u in [0, 1) is random for each class. Then the samples
    # with the lowest positions have all classes in proportion.
    offsets = hashes(classes, "validation classes") / 2.0**64
    number_in_class_N = np.arange(total) - np.repeat(starts, counts)
    positions_N = (number_in_class_N + np.repeat(offsets, counts)) / np.repeat(counts, counts)
    return np.sort(by_class_N[np.argsort(positions_N, kind="stable")[:limit]])


def describe_validation(reader: TokenShardReader, limit: int) -> str:
    """The numbers of validation images and of their classes, as text for the plan."""
    samples, class_names = validation_samples(reader, limit), reader.manifest.class_names
    text = f"{len(samples):,} of {len(reader):,} to validate on"
    if class_names is None:
        return text
    labels = reader.labels_N[samples]
    return f"{text}, {len(np.unique(labels[labels >= 0])):,} of {counted(len(class_names), 'class')}"


def validation_batches(reader: TokenShardReader, batch_size: int, rank: int = 0, world_size: int = 1,
                       limit: int | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield the rank's batches of the `validation_samples`: ids (B, T), class indices (B,), samples (B,). Each sample is on exactly one rank.

    No classes are replaced by the null class. Every rank gets the same number of batches. A batch has at most batch_size samples over all ranks.
    Samples are spread evenly: if there are at least as many as ranks, no batch is empty. Batch sizes can differ by one, so add up sums and counts
    instead of averaging means.
    """
    check_range("batch_size", batch_size, at_least=world_size)
    samples = validation_samples(reader, limit)
    batches = -(-len(samples) // batch_size)
    for number in range(batches):
        batch_start, batch_stop = rank_slice(0, len(samples), number, batches)
        start, stop = rank_slice(batch_start, batch_stop, rank, world_size)
        tokens = reader.samples(samples[start:stop])
        yield torch.from_numpy(tokens.ids_BT), torch.from_numpy(tokens.labels_B), torch.from_numpy(tokens.samples_B)
