"""Token shards: reproducible bytes, atomic writes, random access and audits of damaged folders."""

import copy
import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.run_files import edit_json, flip_byte
from tests.tiny import ROOT
from token_shards import (
    EpochOrder,
    Grid,
    ShardSetHeader,
    TokenShardManifest,
    TokenShardReader,
    TokenShardWriter,
    audit_folder,
    audit_tokens,
    default_key,
)
from token_shards.reader import stored_views
from vqmosaic.errors import InputError

NUM_SOURCES, PER_SHARD, CLASSES = 47, 10, ["ant", "bee", "cat"]
UNREADABLE = {3, *range(20, 30)}  # one source of shard 0 and all sources of shard 2
GRIDS = [Grid("image", 512, 2, 3), Grid("detail", 70_000, 2, 2, depth=2)]


def make_header(**changes):
    fields = {"split": "train", "token_fingerprint": "a" * 64, "grids": GRIDS, "views": [{"name": "original"}, {"name": "flip"}],
              "class_names": CLASSES, "dataset": {"name": "made up"}, "encoding": {"threads": 2}, "images_per_shard": PER_SHARD,
              "num_sources": NUM_SOURCES}
    return ShardSetHeader(**(fields | changes))


def source_of(index):
    return f"photos/{CLASSES[index % 3]}/{index}.png"


def ids_of(index, header):
    """Random ids that differ between sources, views and grids. The first token has the largest id."""
    rng = np.random.default_rng(index)
    ids = {grid.name: rng.integers(0, grid.codebook_size, (len(header.views), grid.num_tokens)) for grid in header.grids}
    for grid in header.grids:
        ids[grid.name][:, 0] = grid.codebook_size - 1
    return ids


def write_shard(writer, shard_index, stop_before=None):
    with writer.shard(shard_index) as shard:
        for index in writer.header.source_indices(shard_index):
            if index == stop_before:
                raise RuntimeError("interrupted")
            if index in UNREADABLE:
                shard.skip(index=index, source=source_of(index), reason="truncated file")
            else:
                shard.add(index=index, key=default_key(index), source=source_of(index), label=index % 3, ids=ids_of(index, writer.header))


def write_folder(folder, header=None):
    writer = TokenShardWriter(folder, header or make_header())
    for shard_index in range(writer.num_shards):
        write_shard(writer, shard_index)
    return writer.finish()


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens") / "train"
    write_folder(folder)
    return folder


@pytest.fixture
def damaged(clean, tmp_path):
    """A copy of the shards that a test may damage."""
    return Path(shutil.copytree(clean, tmp_path / "damaged"))


def tar_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- writing ---------------------------------------------------------------------------------------------------------------------------

def test_round_trip_with_two_grids(clean):
    reader, header = TokenShardReader(clean), make_header()
    stored = [index for index in range(NUM_SOURCES) if index not in UNREADABLE]
    assert len(reader) == len(stored) == reader.manifest.num_samples
    assert reader.num_tokens == 6 + 8
    for view in (0, 1):
        batch = reader.sequential(0, len(reader), view)
        expected = [np.concatenate([ids_of(index, header)[grid.name][view] for grid in GRIDS]) for index in stored]
        np.testing.assert_array_equal(batch.ids_BT, expected)
        assert batch.ids_BT.dtype == np.int64
        assert batch.ids_BT[:, 6].tolist() == [69_999] * len(stored)  # too large for uint16: stored as int32
        assert batch.labels_B.tolist() == [index % 3 for index in stored]


def test_grids_of_several_tokenizers(tmp_path):
    plain = make_header()
    own = make_header(grids=[dataclasses.replace(GRIDS[0], token_fingerprint="a" * 64), GRIDS[1]])
    assert own == plain and own.fingerprint == plain.fingerprint, "naming the tokenizer of the manifest makes no difference"
    assert all("token_fingerprint" not in grid for grid in plain.to_dict()["grids"])
    header = make_header(grids=[GRIDS[0], dataclasses.replace(GRIDS[1], token_fingerprint="b" * 64)], num_sources=5)
    assert header.token_fingerprints == {"image": "a" * 64, "detail": "b" * 64} and header.fingerprint != make_header(num_sources=5).fingerprint
    writer = TokenShardWriter(tmp_path / "train", header)
    with writer.shard(0) as shard:
        for index in header.source_indices(0):
            shard.add(index=index, key=default_key(index), source=source_of(index), label=index % 3, ids=ids_of(index, header))
    written = writer.finish()
    assert TokenShardManifest.load(tmp_path / "train") == written and written.token_fingerprints == header.token_fingerprints
    assert TokenShardReader(tmp_path / "train").num_tokens == 14 and audit_folder(tmp_path / "train").passed
    edit_manifest(tmp_path / "train", lambda manifest: manifest["grids"][1].update(token_fingerprint=3))
    with pytest.raises(InputError, match="token_fingerprint of grid 'detail' is 3; it must be a string, or None"):
        TokenShardManifest.load(tmp_path / "train")


def test_storage_dtypes(clean):
    assert Grid("g", 65_536, 1, 1).dtype == np.uint16
    assert Grid("g", 65_537, 1, 1).dtype == np.int32
    with tarfile.open(clean / "shard-000000.tar") as tar:
        names = tar.getnames()
        first = [np.load(io.BytesIO(tar.extractfile(name).read()), allow_pickle=False) for name in names[:2]]
    assert names[:3] == ["000000000.image.npy", "000000000.detail.npy", "000000000.json"]
    assert [(array.dtype, array.shape) for array in first] == [(np.uint16, (2, 6)), (np.int32, (2, 8))]


@pytest.mark.parametrize(("key", "views", "tokens"), [("0", 1, 1), ("a" * 64, 3, 85), ("x-1", 10, 4096)])
def test_members_are_byte_identical_to_tarfile_and_numpy(tmp_path, key, views, tokens):
    """The writer assembles the tar and npy headers itself, for speed."""
    grids = [Grid("image", 512, 1, tokens), Grid("wide", 70_000, tokens, 1)]
    header = make_header(grids=grids, num_sources=1, views=[{"name": str(view)} for view in range(views)])
    ids = {"image": np.arange(views * tokens).reshape(views, tokens) % 512, "wide": np.arange(views * tokens).reshape(tokens, views).T}
    with TokenShardWriter(tmp_path, header).shard(0) as shard:
        shard.add(index=0, key=key, source="a\N{SNOWMAN}.png", label=1, ids=ids)
    metadata = json.dumps({"index": 0, "label": 1, "source": "a\N{SNOWMAN}.png", "views": views}).encode()
    with tarfile.open(tmp_path / "expected.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, values in (("image.npy", ids["image"].astype("<u2")), ("wide.npy", np.ascontiguousarray(ids["wide"], "<i4")), ("json", metadata)):
            stream = io.BytesIO(values if isinstance(values, bytes) else b"")
            if not isinstance(values, bytes):
                np.save(stream, values, allow_pickle=False)
            info = tarfile.TarInfo(f"{key}.{name}")
            info.size = len(stream.getvalue())
            tar.addfile(info, io.BytesIO(stream.getvalue()))
    assert (tmp_path / "shard-000000.tar").read_bytes() == (tmp_path / "expected.tar").read_bytes()


def test_manifest_lists_stored_and_skipped_samples(clean):
    manifest = TokenShardManifest.load(clean)
    assert manifest.header == make_header()
    assert [shard.count for shard in manifest.shards] == [9, 10, 0, 10, 7]
    assert [record["index"] for record in manifest.skipped] == sorted(UNREADABLE)
    assert manifest.skipped[0] == {"index": 3, "source": source_of(3), "reason": "truncated file"}
    lines = "".join(f"{i}\t{default_key(i)}\t{source_of(i)}\t{i % 3}\n" for i in range(NUM_SOURCES) if i not in UNREADABLE)
    assert manifest.sources_sha256 == hashlib.sha256(lines.encode()).hexdigest()


def test_bytes_do_not_depend_on_number_or_order_of_writers(clean, tmp_path):
    first, second = (TokenShardWriter(tmp_path, make_header()) for _ in range(2))
    for shard_index in (4, 0, 2):
        write_shard(second, shard_index)
    for shard_index in (3, 1):
        write_shard(first, shard_index)
    manifest = first.finish()
    assert tar_bytes(tmp_path) == tar_bytes(clean)
    assert manifest.fingerprint == TokenShardManifest.load(clean).fingerprint


KILLED_WRITER = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_token_shards import *
writer = TokenShardWriter({folder!r}, make_header())
write_shard(writer, 0)
with writer.shard(1) as shard:
    for index in range(10, 15):
        shard.add(index=index, key=default_key(index), source="x", label=0, ids=ids_of(index, writer.header))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_writer_leaves_only_complete_shards(clean, tmp_path):
    script = KILLED_WRITER.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert [path.name for path in sorted(tmp_path.glob("shard-*"))] == ["shard-000000.json", "shard-000000.tar"]
    with pytest.raises(InputError, match=r"not complete.*1 shard is finished"):
        TokenShardReader(tmp_path)

    before = (tmp_path / "shard-000000.tar").stat()
    writer = TokenShardWriter(tmp_path, make_header())
    assert [writer.is_complete(index) for index in range(5)] == [True, False, False, False, False]
    with pytest.raises(InputError, match=r"4 of 5 shards .* are not finished. The first: .*shard-000001"):
        writer.finish()
    for shard_index in range(5):
        if not writer.is_complete(shard_index):
            write_shard(writer, shard_index)
    writer.finish()
    after = (tmp_path / "shard-000000.tar").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert tar_bytes(tmp_path) == tar_bytes(clean)  # and no partial files


def test_failed_shard_is_not_published(tmp_path):
    writer = TokenShardWriter(tmp_path, make_header())
    with pytest.raises(RuntimeError, match="interrupted"):
        write_shard(writer, 0, stop_before=5)
    assert list(tmp_path.iterdir()) == []


def test_shards_with_other_settings_or_changed_bytes_are_incomplete(damaged):
    writer = TokenShardWriter(damaged, make_header())
    assert all(writer.is_complete(index) for index in range(5))
    flip_byte(damaged / "shard-000001.tar")
    assert not writer.is_complete(1)
    write_shard(writer, 1)
    assert writer.is_complete(1)
    assert not (damaged / "manifest.json").exists()  # a rewritten shard invalidates the manifest until finish()
    other = TokenShardWriter(damaged, make_header(token_fingerprint="b" * 64))
    assert not any(other.is_complete(index) for index in range(5))


def test_finish_removes_shards_of_a_former_larger_set(damaged):
    (damaged / ".partial-shard-000007.tar").write_bytes(b"half")
    manifest = write_folder(damaged, make_header(num_sources=20))
    assert [shard.name for shard in manifest.shards] == ["shard-000000.tar", "shard-000001.tar"]
    assert len(list(damaged.iterdir())) == 5
    assert audit_folder(damaged).passed


@pytest.mark.parametrize(("change", "message"), [
    ({"index": 10}, "source index 10 belongs to another shard"),
    ({"index": 1}, "exactly once"),
    ({"key": "a.b"}, "key is 'a.b'; allowed"),
    ({"key": "__a__"}, "starting with a letter or digit"),
    ({"key": "000000001"}, "unique"),
    ({"label": 3}, "allowed: 0 to 2"),
    ({"ids": {"image": np.zeros((2, 6), int)}}, "expected .'detail', 'image'."),
    ({"image": np.zeros((1, 6), int)}, r"expected \(2, 6\)"),
    ({"image": np.zeros((2, 6))}, "expected integers"),
    ({"image": np.full((2, 6), 512)}, "allowed: 0 to 511"),
    ({"image": np.full((2, 6), -1)}, "allowed: 0 to 511"),
])
def test_invalid_samples_are_rejected(tmp_path, change, message):
    writer = TokenShardWriter(tmp_path, make_header())
    valid = {"index": 2, "key": "000000002", "source": "x", "label": 0, "ids": ids_of(2, writer.header)}
    if "image" in change:
        change = {"ids": valid["ids"] | change}
    with pytest.raises(ValueError, match=message), writer.shard(0) as shard:
        shard.add(**(valid | {"index": 1, "key": "000000001"}))
        shard.add(**(valid | change))
    assert list(tmp_path.iterdir()) == []


def test_every_source_must_be_added_or_skipped(tmp_path):
    writer = TokenShardWriter(tmp_path, make_header())
    message = "9 of 10 source indices were neither added nor skipped; the first is 1"
    with pytest.raises(ValueError, match=message), writer.shard(0) as shard:
        shard.skip(index=0, source="x", reason="broken")
    unlabelled = TokenShardWriter(tmp_path, make_header(class_names=None))
    with pytest.raises(ValueError, match="label of source index 0 is 1; allowed: None"), unlabelled.shard(0) as shard:
        shard.add(index=0, key="0", source="x", label=1, ids=ids_of(0, writer.header))


def test_unlabelled_sources_and_unusual_names(tmp_path):
    header = make_header(class_names=None, num_sources=2)
    writer = TokenShardWriter(tmp_path, header)
    names = ["tab\tand\nnewline \N{SNOWMAN}.png", os.fsdecode(b"latin-\xff.png")]
    with writer.shard(0) as shard:
        shard.add(index=0, key="0", source=names[0], label=None, ids=ids_of(0, header))
        shard.skip(index=1, source=names[1], reason="not an image")
    assert writer.finish().skipped[0]["source"] == names[1]
    assert TokenShardReader(tmp_path).read([0, 1]).labels_B.tolist() == [-1, -1]
    assert audit_folder(tmp_path, [(name, None) for name in names]).problems == []


def test_webdataset_reads_the_shards(clean):
    webdataset = pytest.importorskip("webdataset")
    urls = sorted(str(path) for path in clean.glob("shard-*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["json"]["index"] for sample in samples] == [index for index in range(NUM_SOURCES) if index not in UNREADABLE]
    for sample in samples:
        index = sample["json"]["index"]
        assert sample["__key__"] == default_key(index)
        assert sample["json"] == {"index": index, "label": index % 3, "source": source_of(index), "views": 2}
        for grid in GRIDS:
            np.testing.assert_array_equal(sample[f"{grid.name}.npy"], ids_of(index, make_header())[grid.name])


# --- order -----------------------------------------------------------------------------------------------------------------------------

COUNTS = [7, 0, 5, 9, 1, 8, 3]


@pytest.mark.parametrize("window_shards", [1, 3, 7, 100])
def test_each_epoch_is_a_permutation_within_windows(window_shards):
    order, total = EpochOrder(COUNTS, seed=5, window_shards=window_shards), sum(COUNTS)
    all_samples = sorted((shard, row) for shard, count in enumerate(COUNTS) for row in range(count))
    epochs = []
    for epoch in range(3):
        shards, rows = order.sample_at(np.arange(epoch * total, (epoch + 1) * total))
        epochs.append(list(zip(shards.tolist(), rows.tolist(), strict=True)))
        assert sorted(epochs[-1]) == all_samples
        first, last = {}, {}
        for place, shard in enumerate(shards.tolist()):
            first.setdefault(shard, place)
            last[shard] = place
        open_shards = [sum(first[shard] <= place <= last[shard] for shard in first) for place in range(total)]
        assert max(open_shards) <= window_shards
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_seeking_equals_sequential_access():
    order, total = EpochOrder(COUNTS, seed=5, window_shards=2), sum(COUNTS)
    steps = [order.sample_at(range(start, start + 8)) for start in range(0, 5 * total, 8)]
    for step in (0, 3, 11, 20):  # epochs of 33 samples end inside batches of 8
        fresh = EpochOrder(COUNTS, seed=5, window_shards=2).sample_at(range(step * 8, step * 8 + 8))
        np.testing.assert_array_equal(fresh, steps[step])
    far = 10**12
    np.testing.assert_array_equal(order.sample_at([far, 0, far]), EpochOrder(COUNTS, 5, 2).sample_at([far, 0, far]))
    assert order.epochs_at([0, total - 1, total, far]).tolist() == [0, 0, 1, far // total]
    assert not np.array_equal(order.sample_at(range(total)), EpochOrder(COUNTS, 6, 2).sample_at(range(total)))
    with pytest.raises(ValueError, match="it must be at least 0"):
        order.sample_at([-1])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_rank_slices_are_disjoint_and_complete(clean, ranks):
    batch, epoch = 6, NUM_SOURCES - len(UNREADABLE)
    readers = [TokenShardReader(clean, seed=3, window_shards=2) for _ in range(ranks)]
    seen = []
    for step in range(epoch):  # 6 epochs in total
        positions = np.arange(step * batch, (step + 1) * batch)
        parts = [reader.read(positions[rank * batch // ranks:(rank + 1) * batch // ranks]) for rank, reader in enumerate(readers)]
        seen += [sample for part in parts for sample in part.samples_B.tolist()]
    for number in range(batch):
        assert sorted(seen[number * epoch:(number + 1) * epoch]) == list(range(epoch))
    single_process = TokenShardReader(clean, seed=3, window_shards=2).read(range(batch * epoch))
    assert seen == single_process.samples_B.tolist()


def test_views_are_a_function_of_seed_epoch_and_sample():
    epochs, samples = np.repeat(np.arange(6), 3000), np.tile(np.arange(3000), 6)
    views = stored_views(1, epochs, samples, 3).reshape(6, 3000)
    for start in (0, 3):  # 3 consecutive epochs show each view of a sample once
        assert (np.sort(views[start:start + 3], axis=0) == np.arange(3)[:, None]).all()
    assert np.bincount(views[0], minlength=3).min() > 900  # each epoch mixes the views
    assert 0.25 < (views[0] == views[3]).mean() < 0.42  # rounds of 3 epochs are independent
    np.testing.assert_array_equal(stored_views(1, epochs[4000:4010], samples[4000:4010], 3), views.reshape(-1)[4000:4010])
    assert (stored_views(2, epochs, samples, 3).reshape(6, 3000) != views).any()
    assert stored_views(1, epochs, samples, 1).max() == 0


# --- reading ---------------------------------------------------------------------------------------------------------------------------

def test_read_returns_samples_in_the_view_of_their_epoch(clean):
    reader, header = TokenShardReader(clean, seed=9, window_shards=2), make_header()
    stored = [index for index in range(NUM_SOURCES) if index not in UNREADABLE]
    batch = reader.read(range(30, 50))  # crosses an epoch boundary
    assert sorted(set(batch.epochs_B.tolist())) == [0, 1]
    assert set(batch.views_B.tolist()) == {0, 1}
    for ids_T, label, sample, view in zip(batch.ids_BT, batch.labels_B, batch.samples_B, batch.views_B, strict=True):
        index = stored[sample]
        assert label == index % 3
        np.testing.assert_array_equal(ids_T, np.concatenate([ids_of(index, header)[grid.name][view] for grid in GRIDS]))
    copied = copy.deepcopy(reader).read(range(30, 50))  # copies have no open maps, as in a spawned worker
    for field in dataclasses.fields(batch):
        np.testing.assert_array_equal(getattr(copied, field.name), getattr(batch, field.name))
    assert reader.read([]).ids_BT.shape == (0, 14)
    with pytest.raises(InputError, match="stop is 999"):
        reader.sequential(0, 999)


def test_open_maps_are_bounded(clean):
    reader = TokenShardReader(clean, window_shards=1)
    reader.read(range(200))
    assert len(reader._maps) <= 3


def test_reader_rejects_another_token_fingerprint(clean):
    TokenShardReader(clean, token_fingerprint="a" * 64)
    with pytest.raises(InputError) as error:
        TokenShardReader(clean, token_fingerprint="b" * 64, token_fingerprint_path="runs/x/tokenizer")
    assert all(part in str(error.value) for part in ("a" * 64, "b" * 64, "runs/x/tokenizer", str(clean)))


def edit_manifest(folder, change):
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(("damage", "message"), [
    (lambda folder: (folder / "shard-000001.tar").unlink(), "shard-000001.tar is missing"),
    (lambda folder: os.truncate(folder / "shard-000001.tar", 5120), "has 5120 bytes; the manifest says"),
    (lambda folder: (folder / "shard-000001.json").unlink(), "shard-000001.json is missing"),
    (lambda folder: flip_byte(folder / "shard-000001.json"), "shard-000001.json"),
    (lambda folder: shutil.copy(folder / "shard-000003.json", folder / "shard-000001.json"), "does not match the manifest: its sha256"),
    (lambda folder: (folder / "manifest.json").unlink(), "not complete.*5 shards are finished"),
    (lambda folder: (folder / "manifest.json").write_text("{"), "is not JSON"),
    (lambda folder: edit_manifest(folder, lambda m: m.update(schema_version=2)), "schema_version 2; this version reads 1"),
    (lambda folder: edit_manifest(folder, lambda m: m.update(colour="red")), "unknown fields: colour"),
    (lambda folder: edit_manifest(folder, lambda m: m.pop("views")), "missing fields: views"),
    (lambda folder: edit_manifest(folder, lambda m: m["grids"][0].update(colour="red")), "colour"),
    (lambda folder: edit_manifest(folder, lambda m: m["shards"].pop()), "manifest lists 4 shards"),
    (lambda folder: edit_manifest(folder, lambda m: m["grids"][0].update(codebook_size=1024)), "header fingerprint"),
    (shutil.rmtree, "folder of token shards .* does not exist"),
])
def test_reader_rejects_damaged_folders(damaged, damage, message):
    damage(damaged)
    with pytest.raises(InputError, match=message):
        TokenShardReader(damaged)


def test_reader_rejects_the_parent_folder(clean):
    with pytest.raises(InputError, match=r"contains no shards; give one of .*train"):
        TokenShardReader(clean.parent)


def test_out_of_range_ids_are_reported_with_shard_and_key(damaged):
    offset = json.loads((damaged / "shard-000001.json").read_text())["offsets"]["image"][4]
    with open(damaged / "shard-000001.tar", "r+b") as file:
        file.seek(offset)
        file.write((600).to_bytes(2, "little"))
    reader = TokenShardReader(damaged)
    with pytest.raises(InputError, match=r"shard-000001.tar, key 000000014, grid 'image': .* to 600; allowed: 0 to 511"):
        reader.sequential(0, len(reader))


# --- audit -----------------------------------------------------------------------------------------------------------------------------

def members_of(path):
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def forge(folder, shard_index, change, update_records=False):
    """Rewrite the members of a shard. With `update_records`, update its sidecar and the manifest to match."""
    path = folder / f"shard-{shard_index:06d}.tar"
    members = change(members_of(path))
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    if not update_records:
        return
    sidecar = json.loads(path.with_suffix(".json").read_text())
    samples = [(name.split(".")[0], json.loads(content)) for name, content in members if name.endswith(".json")]
    sidecar.update(keys=[key for key, _ in samples], count=len(samples), size=path.stat().st_size, offsets={grid.name: [] for grid in GRIDS},
                   sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    for field, list_name in (("index", "indices"), ("label", "labels"), ("source", "sources")):
        sidecar[list_name] = [sample[field] for _, sample in samples]
    with tarfile.open(path) as tar:
        for member in tar:
            grid = member.name.split(".")[1]
            if grid in sidecar["offsets"]:
                sidecar["offsets"][grid].append(member.offset_data + 128)
    path.with_suffix(".json").write_text(json.dumps(sidecar))

    def update_entry(manifest):
        entry = manifest["shards"][shard_index]
        manifest["num_samples"] += len(samples) - entry["count"]
        entry.update(count=sidecar["count"], size=sidecar["size"], sha256=sidecar["sha256"],
                     sidecar_sha256=hashlib.sha256(path.with_suffix(".json").read_bytes()).hexdigest())
    edit_manifest(folder, update_entry)


def without_source_12(members):
    return [member for member in members if not member[0].startswith("000000012.")]


def source_13_twice(members):
    return members + [(f"copy-{name}", content) for name, content in members if name.startswith("000000013.")]


def source_13_in_place_of_12(members):
    copied = {name.split(".", 1)[1]: content for name, content in members if name.startswith("000000013.")}
    return [(name, copied[name.split(".", 1)[1]] if name.startswith("000000012.") else content) for name, content in members]


def relabelled_14(members):
    def relabel(content):
        return json.dumps(json.loads(content) | {"label": 0}).encode()
    return [(name, relabel(content) if name == "000000014.json" else content) for name, content in members]


def expected_sources():
    return [(source_of(index), index % 3) for index in range(NUM_SOURCES)]


def test_audit_of_a_clean_folder_passes(clean):
    report = audit_folder(clean, expected_sources())
    assert report.problems == []
    assert report.passed
    assert (report.samples, report.shards, report.skipped) == (36, 5, 11)


@pytest.mark.parametrize("update_records", [False, True])
@pytest.mark.parametrize(("change", "messages"), [
    (without_source_12, ["source index 12 is neither stored"]),
    (source_13_twice, ["source index 13 (photos/bee/13.png) is stored 2 times"]),
    (source_13_in_place_of_12, ["source index 13 (photos/bee/13.png) is stored 2 times", "source index 12 is neither stored"]),
    (relabelled_14, ["sources_sha256"]),
])
def test_audit_finds_changed_samples(damaged, change, messages, update_records):
    forge(damaged, 1, change, update_records)
    problems = "\n".join(audit_folder(damaged).problems)
    if update_records and change in (without_source_12, source_13_twice):  # the totals of the manifest reveal these first
        messages = ["the sum must be its num_sources"]
    assert all(message in problems for message in messages), problems
    if not update_records:
        assert "shard-000001.tar: its sha256 is" in problems
        assert "(key, index, label, source)" in problems


def test_audit_finds_a_deleted_sample_recorded_as_skipped(damaged):
    record = {"index": 12, "source": source_of(12), "reason": "unreadable"}
    edit_json(damaged / "shard-000001.json", skipped=[record])
    forge(damaged, 1, without_source_12, update_records=True)
    edit_manifest(damaged, lambda manifest: manifest["skipped"].insert(1, record))
    assert [problem.split(":")[1].split()[0] for problem in audit_folder(damaged, expected_sources()).problems] == ["sources_sha256"]


def test_audit_compares_with_the_data_set(damaged):
    forge(damaged, 1, relabelled_14, update_records=True)
    edit_manifest(damaged, lambda manifest: manifest.update(sources_sha256=hashlib.sha256("".join(
        f"{i}\t{default_key(i)}\t{source_of(i)}\t{0 if i == 14 else i % 3}\n" for i in range(NUM_SOURCES) if i not in UNREADABLE
    ).encode()).hexdigest()))
    assert audit_folder(damaged).problems == []  # the folder is consistent; only the data set reveals the change
    problems = audit_folder(damaged, expected_sources()).problems
    assert len(problems) == 1
    assert problems[0] == ("shard-000001.tar, key 000000014: its source is 'photos/cat/14.png' with label 0; "
                           "the data set has 'photos/cat/14.png' with label 2 at index 14.")
    assert any("the data set has 46" in problem for problem in audit_folder(damaged, expected_sources()[:46]).problems)


@pytest.mark.parametrize("offset", [0, 700, 5000])
def test_audit_finds_a_flipped_byte(damaged, offset):
    flip_byte(damaged / "shard-000003.tar", offset)
    assert any("shard-000003.tar: its sha256 is" in problem for problem in audit_folder(damaged).problems)


def test_audit_finds_wrong_offsets_and_missing_or_stray_files(damaged):
    sidecar = damaged / "shard-000000.json"
    content = json.loads(sidecar.read_text())
    content["offsets"]["image"][0:2] = content["offsets"]["image"][1::-1]
    sidecar.write_text(json.dumps(content))
    (damaged / "shard-000001.tar").unlink()
    (damaged / "shard-000009.tar").write_bytes(b"")
    problems = "\n".join(audit_folder(damaged).problems)
    for message in ("key 000000000: the sidecar's offset", "own digest", "shard-000001.tar: the file is missing",
                    "shard-000009.tar: this file is not listed"):
        assert message in problems


def test_audit_reports_duplicate_names_and_garbage(damaged):
    forge(damaged, 1, lambda members: members[:3] + members[:3])
    (damaged / "shard-000003.tar").write_bytes(b"\0garbage" * 700)
    problems = "\n".join(audit_folder(damaged).problems)
    assert "shard-000001.tar: webdataset fails after 0 samples" in problems
    assert "000000010.image.npy: duplicate file name" in problems
    assert "shard-000003.tar: 0 samples can be read, the manifest says 10" in problems


def test_audit_reports_a_damaged_npy_header(damaged):
    forge(damaged, 1, lambda members: [(name, content.replace(b"), }", b" , }", 1)) for name, content in members], update_records=True)
    assert any("the npy header of grid 'image' is damaged" in problem for problem in audit_folder(damaged).problems)


def test_pickled_arrays_are_rejected(damaged):
    class MaliciousPickle:
        def __reduce__(self):
            return (Path.touch, (damaged / "sprung",))

    stream = io.BytesIO()
    # This array is stored as a pickle, which the audit and the reader must not load.
    np.save(stream, np.array([MaliciousPickle()], dtype=object), allow_pickle=True)
    forge(damaged, 1, lambda members: [(name, stream.getvalue() if name == "000000015.image.npy" else content)
                                       for name, content in members], update_records=True)
    problems = audit_folder(damaged).problems
    assert any("shard-000001.tar, key 000000015: Object arrays cannot be loaded" in problem for problem in problems)
    assert not (damaged / "sprung").exists()
    reader = TokenShardReader(damaged)  # reads the bytes as integers, never as a pickle
    with pytest.raises(InputError, match="key 000000015"):
        reader.sequential(0, len(reader))
    assert not (damaged / "sprung").exists()


def test_audit_of_both_splits(clean, tmp_path):
    shutil.copytree(clean, tmp_path / "train")
    assert [report.passed for report in audit_tokens(tmp_path).values()] == [True, False]  # the validation split is missing
    write_folder(tmp_path / "validation", make_header(split="validation"))
    reports = audit_tokens(tmp_path, {"train": expected_sources(), "validation": expected_sources()})
    assert {split: report.problems for split, report in reports.items()} == {"train": [], "validation": []}
    write_folder(tmp_path / "validation", make_header(token_fingerprint="b" * 64))
    problems = "\n".join(audit_tokens(tmp_path)["validation"].problems)
    assert "contains the split 'train'; expected 'validation'" in problems
    assert "token_fingerprint differs" in problems
    assert list(audit_tokens(clean)) == ["train"]
    with pytest.raises(InputError, match="no folder"):
        audit_folder(tmp_path / "nowhere")
    (tmp_path / "validation" / "manifest.json").unlink()
    assert "is not complete" in audit_tokens(tmp_path)["validation"].problems[0]


def test_import_does_not_load_torch():
    script = ("import sys, token_shards as t; assert 'numpy' not in sys.modules; "
              "[getattr(t, name) for name in dir(t)]; print([m for m in ('torch', 'webdataset') if m in sys.modules])")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="it offers Grid"):
        import token_shards
        token_shards.TokenShardWritr  # noqa: B018
