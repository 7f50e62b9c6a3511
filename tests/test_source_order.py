"""Storage order of images: a recorded permutation, so that training batches and validation contain all classes."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from pipelines.command_line import dispatch
from stage2_prior.token_batches import (
    describe_validation,
    expected_classes,
    validation_batches,
    validation_samples,
    warn_of_sorted_shards,
)
from tests.run_files import edit_json
from tests.test_token_shards import (
    NUM_SOURCES,
    UNREADABLE,
    expected_sources,
    make_header,
    members_of,
    source_of,
    tar_bytes,
    write_folder,
    write_shard,
)
from token_shards import (
    Grid,
    ShardSetHeader,
    TokenShardManifest,
    TokenShardReader,
    TokenShardWriter,
    audit_folder,
    default_key,
)
from token_shards.manifest import ORDER_SEED
from token_shards.order import permuted_sources
from vqmosaic.errors import InputError

PERMUTED = make_header(order_seed=ORDER_SEED)


def write_classes(folder: Path, labels: list[int], per_shard: int, order_seed: int | None = ORDER_SEED, split: str = "train") -> Path:
    """Write shards of a data set with these labels in data set order. The tokens of source i are i and its label."""
    header = ShardSetHeader(
        split=split, token_fingerprint="f" * 64, grids=[Grid("image", 60_000, 1, 2)], views=[{"name": "original"}],
        class_names=[f"class {label}" for label in range(max(labels) + 1)], dataset={}, encoding={}, images_per_shard=per_shard,
        num_sources=len(labels), order_seed=order_seed)
    writer = TokenShardWriter(folder, header)
    for number in range(writer.num_shards):
        with writer.shard(number) as shard:
            for index in header.source_indices(number):
                ids_VT = np.array([[index, labels[index]]])
                shard.add(index=index, key=default_key(index), source=str(index), label=labels[index], ids={"image": ids_VT})
    writer.finish()
    return folder


def sorted_labels(classes: int, images: int) -> list[int]:
    return np.repeat(np.arange(classes), images).tolist()


# --- the permutation -------------------------------------------------------------------------------------------------------------------


def test_permutation_is_the_same_in_every_version():
    """Repairing and completing existing shards depends on it."""
    assert permuted_sources(12, 0).tolist() == [2, 9, 3, 11, 8, 5, 4, 0, 1, 7, 6, 10]
    assert permuted_sources(12, 7).tolist() == [11, 2, 8, 5, 3, 10, 1, 6, 7, 4, 9, 0]
    digest = hashlib.sha256(permuted_sources(100_000, 0).astype("<i8").tobytes()).hexdigest()
    assert digest == "69d54b7262d503dac83e01090dd2a4f20ee4d5ed0cb52dbf9b01c120eff2fb52"
    assert sorted(permuted_sources(1001, 3).tolist()) == list(range(1001))


def test_unpermuted_sets_keep_the_fingerprints_and_bytes_of_version_0_1_0(tmp_path):
    manifest = write_folder(tmp_path, make_header())
    assert manifest.order_seed is None and "order_seed" not in (tmp_path / "manifest.json").read_text()
    assert manifest.header.fingerprint == "d33f54e4e6d67662277dd1c4d7aa76ddd2025fcae5c441730834e175262ca1f8"
    assert manifest.fingerprint == "21258acb24ffcda6d009ae1b52e71f7b9088e67c0a9cb494c87800645ba66711"
    digest = hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest()
    assert digest == "021eed4679d03ded42cf527969c6bd738c68e43049245b2c82bce988622c8ab1"
    assert TokenShardManifest.load(tmp_path) == manifest and audit_folder(tmp_path, expected_sources()).passed


def test_permuted_set_contains_each_source_once(tmp_path):
    manifest = write_folder(tmp_path / "one", PERMUTED)
    assert manifest.fingerprint != write_folder(tmp_path / "other", dataclasses.replace(PERMUTED, order_seed=1)).fingerprint
    assert TokenShardManifest.load(tmp_path / "one") == manifest and manifest.order_seed == ORDER_SEED
    writers = [TokenShardWriter(tmp_path / "two", PERMUTED) for _ in range(2)]
    for rank in (1, 0):
        for number in range(rank, writers[rank].num_shards, 2):
            write_shard(writers[rank], number)
    writers[0].finish()
    assert tar_bytes(tmp_path / "two") == tar_bytes(tmp_path / "one")
    indices = TokenShardReader(tmp_path / "one").indices_N
    assert sorted(indices.tolist()) == sorted(set(range(NUM_SOURCES)) - UNREADABLE) and (np.diff(indices) < 0).any()
    for number in range(PERMUTED.num_shards):
        indices_of_shard = PERMUTED.source_indices(number)
        assert indices_of_shard == sorted(indices_of_shard) and not set(indices_of_shard) <= set(make_header().source_indices(number))
    assert [record["index"] for record in manifest.skipped] == sorted(UNREADABLE)
    report = audit_folder(tmp_path / "one", expected_sources())
    assert report.passed and (report.samples, report.skipped) == (NUM_SOURCES - len(UNREADABLE), len(UNREADABLE)), report.problems


def test_audit_finds_a_wrong_order_seed(tmp_path):
    write_folder(tmp_path, PERMUTED)
    path = tmp_path / "manifest.json"
    for order_seed in (None, 1):
        edit_json(path, order_seed=order_seed)
        assert any("belongs to another shard" in problem for problem in audit_folder(tmp_path).problems)
        with pytest.raises(InputError, match="header fingerprint"):
            TokenShardReader(tmp_path)
    edit_json(path, order_seed="x")
    with pytest.raises(InputError, match=r"manifest\.json.*order_seed|manifest\.json is invalid"):
        TokenShardManifest.load(tmp_path)


def test_keys_and_sources_follow_the_data_set_index(tmp_path):
    write_folder(tmp_path, PERMUTED)
    for name, content in members_of(tmp_path / "shard-000001.tar"):
        if name.endswith(".json"):
            metadata = json.loads(content)
            assert name == f"{default_key(metadata['index'])}.json" and metadata["source"] == source_of(metadata["index"])


# --- training batches ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sixty(tmp_path_factory) -> Path:
    """60 classes of 100 images in 120 shards, permuted."""
    return write_classes(tmp_path_factory.mktemp("sixty") / "train", sorted_labels(60, 100), 50)


@pytest.fixture(scope="module")
def thousand(tmp_path_factory) -> Path:
    """1,000 classes of 20 images in 200 shards, permuted."""
    return write_classes(tmp_path_factory.mktemp("thousand") / "train", sorted_labels(1000, 20), 100)


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    """60 classes of 100 images, imported from JSON lines sorted by class."""
    folder = tmp_path_factory.mktemp("imported")
    (folder / "tokens.jsonl").write_text("".join(json.dumps({"class_id": label, "tokens": [index % 32] * 4}) + "\n"
                                                 for index, label in enumerate(sorted_labels(60, 100))))
    assert dispatch(["import-tokens", str(folder / "tokens.jsonl"), "--codebook_size", "32", "--images_per_shard", "50",
                     "--out", str(folder / "tokens")]) == 0
    return folder / "tokens/train"


@pytest.mark.parametrize("batch_size", [64, 256])
@pytest.mark.parametrize("tokens", ["sixty", "thousand", "imported"])
def test_training_batches_contain_as_many_classes_as_independent_draws(tokens, batch_size, request):
    """With a window of 4 out of more than 100 shards."""
    reader = TokenShardReader(request.getfixturevalue(tokens), seed=3, window_shards=4)
    assert len(reader.manifest.shards) > 100
    labels = np.stack([reader.read(range(step * batch_size, (step + 1) * batch_size)).labels_B for step in range(100)])
    classes = np.mean([len(set(row)) for row in labels.tolist()])
    assert classes >= 0.95 * expected_classes(reader.labels_N, batch_size)
    assert len(np.unique(labels)) >= 0.95 * expected_classes(reader.labels_N, labels.size), "over the first 100 steps"
    assert warn_of_sorted_shards(reader, batch_size) is None


def test_expected_classes():
    assert expected_classes(np.array([0, 0, 1]), 1) == pytest.approx(1)
    assert expected_classes(np.array([0, 0, 1]), 2) == pytest.approx((1 - 1 / 9) + (1 - 4 / 9))
    assert expected_classes(np.repeat(np.arange(60), 7), 64) == pytest.approx(60 * (1 - (59 / 60) ** 64))


def test_shards_sorted_by_class_give_a_warning(tmp_path):
    labels = sorted_labels(60, 20)
    by_class = write_classes(tmp_path / "by class", labels, 10, order_seed=None)
    warning = warn_of_sorted_shards(TokenShardReader(by_class, window_shards=4), 64)
    assert warning.startswith("warning: a batch of 64 holds ") and "independent draws would give 40" in warning
    assert "prior_training.window_shards to 120" in warning and "--redo tokens" in warning
    assert int(warning.split()[6]) < 15
    assert warn_of_sorted_shards(TokenShardReader(by_class, window_shards=120), 64) is None, "all shards are shuffled together"
    mixed = write_classes(tmp_path / "mixed", np.random.default_rng(0).permutation(labels).tolist(), 10, order_seed=None)
    assert warn_of_sorted_shards(TokenShardReader(mixed, window_shards=4), 64) is None, "the data set is already in random order"


# --- validation ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order_seed", [None, ORDER_SEED])
def test_validation_samples_all_classes_in_proportion(order_seed, tmp_path):
    labels = [label for label in range(10) for _ in range(30 if label else 90)]  # class 0 is three times as large
    reader = TokenShardReader(write_classes(tmp_path, labels, 50, order_seed, "validation"))
    for limit in (10, 100, 359):
        counts = np.bincount(reader.labels_N[validation_samples(reader, limit)], minlength=10)
        shares = np.bincount(labels) * limit / len(labels)
        assert counts.sum() == limit and (abs(counts - shares) < 1.01).all(), (limit, counts)
    assert describe_validation(reader, 100) == "100 of 360 to validate on, 10 of 10 classes"
    assert describe_validation(reader, 3).startswith("3 of 360 to validate on, 3 of 10")
    assert set(validation_samples(reader, 50)) < set(validation_samples(reader, 100)) < set(validation_samples(reader, 1000)), "subsets are nested"
    assert validation_samples(reader, None).tolist() == list(range(360))


def test_validation_images_do_not_depend_on_the_storage_order(tmp_path):
    labels = sorted_labels(10, 30)
    chosen = []
    for name, order_seed in (("old", None), ("new", ORDER_SEED), ("other", 5)):
        reader = TokenShardReader(write_classes(tmp_path / name, labels, 20, order_seed, "validation"))
        chosen.append(set(reader.indices_N[validation_samples(reader, 70)].tolist()))
    assert chosen[0] == chosen[1] == chosen[2]
    assert len(chosen[0] & set(range(0, 300, 2))) not in (0, 70), "not every n-th image"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_images_do_not_depend_on_the_number_of_ranks(world_size, tmp_path):
    reader = TokenShardReader(write_classes(tmp_path, sorted_labels(10, 30), 20, None, "validation"))
    per_rank = [list(validation_batches(reader, 16, rank, world_size, limit=100)) for rank in range(world_size)]
    assert len({len(batches) for batches in per_rank}) == 1
    seen = sorted(int(index) for batches in per_rank for ids_BT, _, _ in batches for index in ids_BT[:, 0])
    assert seen == sorted(reader.indices_N[validation_samples(reader, 100)].tolist())
    for batches in zip(*per_rank, strict=True):
        sizes = [len(labels_B) for _, labels_B, _ in batches]
        assert sum(sizes) <= 16 and max(sizes) - min(sizes) <= 1
        assert all((ids_BT[:, 1] == labels_B).all() for ids_BT, labels_B, _ in batches)


def test_unlabelled_validation_images_are_chosen_by_hash(tmp_path):
    header = dataclasses.replace(make_header(class_names=None), split="validation")
    writer = TokenShardWriter(tmp_path, header)
    for number in range(writer.num_shards):
        with writer.shard(number) as shard:
            for index in header.source_indices(number):
                ids = {grid.name: np.zeros((2, grid.num_tokens), int) for grid in header.grids}
                shard.add(index=index, key=default_key(index), source=str(index), ids=ids)
    writer.finish()
    reader = TokenShardReader(tmp_path)
    few, more = validation_samples(reader, 10), validation_samples(reader, 20)
    assert len(few) == 10 and set(few) < set(more) and max(few) >= 20
    assert describe_validation(reader, 10) == "10 of 47 to validate on"
