"""TokenShardReader at scale: cheap opening, memory bounded by the window, and exact partitioning over ranks and workers."""

import copy
import hashlib
import json
import shutil
import tracemalloc

import numpy as np
import pytest
import torch

from stage2_prior.token_batches import TokenBatches, rank_slice
from stage2_prior.vocabulary import Vocabulary
from tests.test_token_shards import CLASSES, edit_manifest, ids_of, make_header
from token_shards import Grid, TokenShardReader, TokenShardWriter, default_key
from token_shards import reader as reader_module
from token_shards.sidecar import ShardSidecar
from vqmosaic.errors import InputError

SAMPLES, PER_SHARD, WINDOW = 240, 10, 3
GRID = Grid("image", 512, 2, 3)
HEADER = make_header(grids=[GRID], images_per_shard=PER_SHARD, num_sources=SAMPLES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens") / "train"
    writer = TokenShardWriter(folder, HEADER)
    for number in range(writer.num_shards):
        with writer.shard(number) as shard:
            for index in HEADER.source_indices(number):
                shard.add(index=index, key=default_key(index), source=f"{index}.png", label=index % 3, ids=ids_of(index, HEADER))
    writer.finish()
    return folder


@pytest.fixture
def parsed(monkeypatch) -> list[str]:
    """Names of the parsed sidecars, with one entry per parse."""
    names, parse = [], ShardSidecar.from_bytes

    def parse_and_record(content, path):
        names.append(path.name)
        return parse(content, path)

    monkeypatch.setattr(ShardSidecar, "from_bytes", parse_and_record)
    return names


# --- cost of opening and reading ----------------------------------------------------------------------------------------------


def test_sidecars_are_parsed_when_the_window_needs_them(folder, parsed):
    reader = TokenShardReader(folder, seed=1, window_shards=WINDOW)
    assert parsed == ["shard-000000.json"]
    parsed.clear()
    reader.read(range(12))
    assert 1 <= len(parsed) <= WINDOW
    for start in range(12, SAMPLES, 12):
        reader.read(range(start, start + 12))
    assert len(parsed) == len(set(parsed)) == SAMPLES // PER_SHARD, "each sidecar is parsed once per epoch"
    assert len(reader._indexes) <= 2 * WINDOW + 1 and len(reader._maps) <= 2 * WINDOW + 1


def test_sidecars_are_parsed_once_if_the_window_exceeds_the_open_maps(folder, parsed, monkeypatch):
    monkeypatch.setattr(reader_module, "MAX_OPEN_MAPS", 2)
    reader = TokenShardReader(folder, seed=1, window_shards=24)
    parsed.clear()
    for start in range(0, SAMPLES, 12):
        reader.read(range(start, start + 12))
        assert len(reader._maps) <= 2
    assert len(parsed) == len(set(parsed)) == SAMPLES // PER_SHARD


def test_reading_cost_does_not_depend_on_the_position(folder, parsed):
    reader = TokenShardReader(folder, seed=1, window_shards=WINDOW)
    parsed.clear()
    epoch = 10**9
    batch = reader.read(range(epoch * SAMPLES + 100, epoch * SAMPLES + 108))
    assert (batch.epochs_B == epoch).all() and len(parsed) <= 2 * WINDOW
    for sample, view, ids_T, label in zip(batch.samples_B, batch.views_B, batch.ids_BT, batch.labels_B, strict=True):
        np.testing.assert_array_equal(ids_T, ids_of(int(sample), HEADER)["image"][view])
        assert label == sample % 3


def test_labels_of_all_samples_in_stored_order(folder):
    reader = TokenShardReader(folder)
    assert reader.labels_N.tolist() == [index % 3 for index in range(SAMPLES)] and reader.labels_N.dtype == np.int64
    assert copy.deepcopy(reader).labels_N.tolist() == reader.labels_N.tolist()


@pytest.mark.parametrize(("change", "message"), [
    (lambda sidecar: sidecar["offsets"].update(image=[offset + 1 for offset in sidecar["offsets"]["image"]]), "offsets of grid 'image' do not fit"),
    (lambda sidecar: sidecar["offsets"].update(image=[10**9] * PER_SHARD), "offsets of grid 'image' do not fit"),
    (lambda sidecar: sidecar.update(offsets={}), "offsets of grid 'image' do not fit"),
    (lambda sidecar: sidecar.update(header_fingerprint="f" * 64), "its header fingerprint is f+"),
    (lambda sidecar: sidecar.update(count=PER_SHARD - 1), "each list must have one entry for each of its 9 samples"),
])
def test_invalid_sidecars_with_a_matching_digest_are_rejected(folder, tmp_path, change, message):
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    path = damaged / "shard-000007.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_manifest(damaged, lambda manifest: manifest["shards"][7].update(sidecar_sha256=digest))
    reader = TokenShardReader(damaged)
    reader.sequential(0, 7 * PER_SHARD)
    with pytest.raises(InputError, match=rf"shard-000007.json.*{message}"):
        reader.sequential(7 * PER_SHARD, 8 * PER_SHARD)


def test_sidecar_deleted_after_opening_is_reported(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "own")
    reader = TokenShardReader(copied)
    (copied / "shard-000007.json").unlink()
    with pytest.raises(InputError, match=r"shard-000007\.json is missing"):
        reader.sequential(70, 80)


# --- ranks and workers -------------------------------------------------------------------------------------------------------


class RankBatches(torch.utils.data.Dataset):
    """The batches of one rank as a map-style dataset for DataLoader workers."""

    def __init__(self, batches: TokenBatches, steps: int, batch_size: int, rank: int, world_size: int):
        self.batches, self.steps = batches, steps
        self.arguments = {"batch_size": batch_size, "rank": rank, "world_size": world_size}

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.batches.batch(step, **self.arguments)


def make_batches(folder) -> TokenBatches:
    vocabulary = Vocabulary(grids=[GRID], class_names=CLASSES, token_fingerprint=HEADER.token_fingerprint)
    return TokenBatches(TokenShardReader(folder, seed=4, window_shards=WINDOW), vocabulary, seed=4, label_drop=0.2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [7, 32])
def test_ranks_partition_each_epoch_into_slices_of_nearly_equal_size(folder, world_size, batch_size):
    steps = -(-2 * SAMPLES // batch_size)  # two epochs; the first may end inside a step
    readers = [TokenShardReader(folder, seed=4, window_shards=WINDOW) for _ in range(world_size)]
    seen, sizes = [], set()
    for step in range(steps):
        for rank, reader in enumerate(readers):
            batch = reader.read(range(*rank_slice(step * batch_size, (step + 1) * batch_size, rank, world_size)))
            sizes.add(len(batch.samples_B))
            seen += zip(batch.epochs_B.tolist(), batch.samples_B.tolist(), strict=True)
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1, "every rank has samples in every step"
    assert sorted(seen[:2 * SAMPLES]) == [(epoch, sample) for epoch in (0, 1) for sample in range(SAMPLES)]


@pytest.mark.parametrize("rank", [0, 1])
def test_loader_workers_return_the_same_batches_as_one_process(folder, rank):
    steps, batches = 9, make_batches(folder)
    dataset = RankBatches(batches, steps, 30, rank, 2)
    batches.batch(0, 30)  # maps shards before the workers are forked
    loaded = list(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2))
    fresh = make_batches(folder)
    assert len(loaded) == steps
    for step, (ids_BT, classes_B, *_) in enumerate(loaded):
        expected_ids_BT, expected_classes_B, *_ = fresh.batch(step, 30, rank, 2)
        assert torch.equal(ids_BT, expected_ids_BT) and torch.equal(classes_B, expected_classes_B)


def test_label_drop_memory_does_not_depend_on_the_data_set_size(folder, monkeypatch):
    batches, size = make_batches(folder), 10**12
    monkeypatch.setattr(TokenShardReader, "__len__", lambda reader: size)
    epochs_B, samples_B = np.repeat([3, 10**12], 4000), np.tile(size - 1 - np.arange(4000), 2)
    tracemalloc.start()
    dropped_B = batches.dropped(epochs_B, samples_B)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20 and dropped_B.shape == (8000,) and dropped_B.dtype == bool
    early, late = dropped_B.reshape(2, 4000)
    assert [early.mean(), late.mean()] == pytest.approx([0.2, 0.2], abs=0.03)
    assert (early & late).mean() == pytest.approx(0.04, abs=0.015)
    backwards = slice(None, None, -3)
    assert (batches.dropped(epochs_B[backwards], samples_B[backwards]) == dropped_B[backwards]).all(), "independent of the rest of the batch"


def test_resuming_at_any_step_gives_the_same_batches(folder):
    batches = make_batches(folder)
    expected = [batches.batch(step, 28) for step in range(30)]
    for step in (0, 8, 9, 17, 29):  # epochs of 240 samples end inside steps 8 and 17
        ids_BT, classes_B, *_ = make_batches(folder).batch(step, 28)
        assert torch.equal(ids_BT, expected[step][0]) and torch.equal(classes_B, expected[step][1])
