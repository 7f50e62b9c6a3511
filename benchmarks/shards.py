"""Compares token shards with other formats: images per second, time to the first batch, bytes, and the waiting time of a training step.

    python -m benchmarks.shards               # two CPU threads, about five minutes on an idle machine
    python -m benchmarks.shards --record      # also write to RESULTS.md

The data are 50,000 images x 2 views x 64 random ids of 512 codes. Each contestant reads all images once, in one random view each and in shuffled
order, in batches of 128, in one process without workers. The time includes opening the data. All files are in the page cache. The other contestants
read as their own programs do: 1d-tokenizer's PretoeknizedDataSetJSONL (data/webdataset_reader.py), LlamaGen's CustomDataset (dataset/imagenet.py),
and webdataset on the same shards as ours.
"""

import dataclasses
import functools
import hashlib
import json
import linecache
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset

from benchmarks.measuring import ratio, record, time_alternately, use_two_cpu_threads
from benchmarks.prior_step import Ours
from stage2_prior.token_batches import TokenBatches
from token_shards import Grid, ShardEntry, ShardSetHeader, TokenShardManifest, TokenShardReader, TokenShardWriter, default_key
from token_shards.manifest import shard_name
from token_shards.sidecar import ShardSidecar, sidecar_path
from vqmosaic.runs.accelerator import cpu_has_bf16

IMAGES, VIEWS, SIDE, CODES, CLASSES = 50_000, 2, 8, 512, 10
BATCH, BUFFER, ROUNDS = 128, 10_000, 3
MILLION = 1_000_000
MAX_OPENING_SECONDS = 1.0
MAX_WAITING_SHARE = 0.02
STEPS = {32: 60, 128: 16}
"""Number of timed training steps by batch size."""
OURS, WEBDATASET, JSON_LINES, NPY_FILES = "ours", "webdataset, the same shards", "JSON lines", "npy files"

Batch = tuple[np.ndarray, np.ndarray]


def header(images: int) -> ShardSetHeader:
    """The header of the shards, for this number of images."""
    return ShardSetHeader(split="train", token_fingerprint="0" * 64, grids=[Grid("image", CODES, SIDE, SIDE)], dataset={"name": "made up"},
                          views=[{"name": str(view)} for view in range(VIEWS)], class_names=[str(label) for label in range(CLASSES)],
                          encoding={}, images_per_shard=1000, num_sources=images)


def write_everything(folder: Path) -> None:
    """Write the same tokens in each format."""
    ids_NVT = np.random.default_rng(0).integers(0, CODES, (IMAGES, VIEWS, SIDE**2))
    writer = TokenShardWriter(folder / "shards", header(IMAGES))
    for number in range(writer.num_shards):
        with writer.shard(number) as shard:
            for index in writer.header.source_range(number):
                shard.add(index=index, key=default_key(index), source=f"{index}.png", label=index % CLASSES, ids={"image": ids_NVT[index]})
    writer.finish()
    with open(folder / "tokens.jsonl", "w") as file:
        for index, ids_VT in enumerate(ids_NVT.tolist()):
            for ids_T in ids_VT:
                file.write(json.dumps({"class_id": index % CLASSES, "tokens": ids_T}) + "\n")
    for name in ("codes", "labels"):
        (folder / "files" / name).mkdir(parents=True)
    for index, ids_VT in enumerate(ids_NVT):
        np.save(folder / f"files/codes/{index}.npy", ids_VT[None], allow_pickle=False)
        np.save(folder / f"files/labels/{index}.npy", np.array([index % CLASSES]), allow_pickle=False)


# --- contestants: each yields the batches of one epoch, ids (B, T) and labels (B) int64 -----------------------------------------


def read_token_shards(folder: Path) -> Iterator[Batch]:
    """TokenShardReader, in the order of training."""
    reader = TokenShardReader(folder / "shards", seed=0)
    for start in range(0, IMAGES, BATCH):
        batch = reader.read(np.arange(start, min(start + BATCH, IMAGES)))
        yield batch.ids_BT, batch.labels_B


def read_webdataset(folder: Path) -> Iterator[Batch]:
    """webdataset: shuffled shards, and a shuffle buffer of samples."""
    urls = sorted(map(str, (folder / "shards").glob("shard-*.tar")))
    random = np.random.default_rng(0)
    samples = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(BUFFER).decode().to_tuple("image.npy", "json")
    yield from batched((ids_VT[random.integers(VIEWS)], facts["label"]) for ids_VT, facts in samples)


def read_json_lines(folder: Path) -> Iterator[Batch]:
    """1d-tokenizer: counts the lines, then reads them with linecache, one view per line."""
    path = str(folder / "tokens.jsonl")
    with open(path) as file:
        count = sum(1 for _ in file)
    linecache.clearcache()  # as in a new process

    def read(number: int) -> tuple[np.ndarray, int]:
        data = json.loads(linecache.getline(path, number + 1).strip())
        return np.array(data["tokens"]), data["class_id"]

    random = np.random.default_rng(0)
    chosen = random.permutation(count // VIEWS) * VIEWS + random.integers(0, VIEWS, count // VIEWS)
    yield from batched(map(read, chosen.tolist()))


def read_npy_files(folder: Path) -> Iterator[Batch]:
    """LlamaGen: two npy files per image."""
    random = np.random.default_rng(0)

    def read(number: int) -> tuple[np.ndarray, int]:
        features = np.load(folder / f"files/codes/{number}.npy", allow_pickle=False)
        return features[0, random.integers(VIEWS)], np.load(folder / f"files/labels/{number}.npy", allow_pickle=False)[0]

    yield from batched(map(read, random.permutation(IMAGES).tolist()))


def batched(samples: Iterator[tuple[np.ndarray, int]]) -> Iterator[Batch]:
    """Group samples into batches."""
    ids, labels = [], []
    for ids_T, label in samples:
        ids.append(ids_T)
        labels.append(label)
        if len(ids) == BATCH:
            yield np.stack(ids).astype(np.int64), np.array(labels, dtype=np.int64)
            ids, labels = [], []
    if ids:
        yield np.stack(ids).astype(np.int64), np.array(labels, dtype=np.int64)


CONTESTANTS = {OURS: read_token_shards, WEBDATASET: read_webdataset, JSON_LINES: read_json_lines, NPY_FILES: read_npy_files}
PATHS = {OURS: ["shards"], WEBDATASET: ["shards/*.tar"], JSON_LINES: ["tokens.jsonl"], NPY_FILES: ["files/codes", "files/labels"]}


def read_epoch(contestant: str, folder: Path, first_seconds: dict[str, list[float]]) -> None:
    """Read one epoch, append the seconds until the first batch to `first_seconds`, and check the number of images in each class."""
    started, images, classes = time.perf_counter(), 0, np.zeros(CLASSES, dtype=np.int64)
    for ids_BT, labels_B in CONTESTANTS[contestant](folder):
        if not images:
            first_seconds[contestant].append(time.perf_counter() - started)
        assert ids_BT.shape == (len(labels_B), SIDE**2)
        images += len(ids_BT)
        classes += np.bincount(labels_B, minlength=CLASSES)
    assert images == IMAGES and (classes == IMAGES // CLASSES).all()


def bytes_per_image(folder: Path, patterns: list[str]) -> tuple[float, float]:
    """Bytes per image: in the files, and in their disk blocks."""
    found = [top for pattern in patterns for top in folder.glob(pattern)]
    stats = [path.stat() for top in found for path in ([top] if top.is_file() else top.iterdir())]
    return sum(stat.st_size for stat in stats) / IMAGES, sum(stat.st_blocks * 512 for stat in stats) / IMAGES


# --- opening a million images, and waiting for data ---------------------------------------------------------------------------------


def write_million(folder: Path) -> None:
    """Write the manifest and the sidecars of a million images. The tars are sparse files of the right size, because opening does not read them."""
    folder.mkdir()
    full_header = header(MILLION)
    entries, fingerprint = [], full_header.fingerprint
    for number in range(full_header.num_shards):
        sources, name = full_header.source_range(number), shard_name(number)
        size = 10240 + 2560 * len(sources)
        ShardSidecar(shard=name, count=len(sources), size=size, sha256="0" * 64, header_fingerprint=fingerprint, skipped=[],
                     keys=list(map(default_key, sources)), indices=list(sources), labels=[index % CLASSES for index in sources],
                     sources=[f"n01440764/n01440764_{index}.JPEG" for index in sources],
                     offsets={"image": [640 + 2560 * row for row in range(len(sources))]}).save(folder)
        with open(folder / name, "wb") as file:
            file.truncate(size)
        entries.append(ShardEntry(name=name, count=len(sources), size=size, sha256="0" * 64,
                                  sidecar_sha256=hashlib.sha256(sidecar_path(folder, name).read_bytes()).hexdigest()))
    header_fields = {field.name: getattr(full_header, field.name) for field in dataclasses.fields(full_header)}
    TokenShardManifest(**header_fields, num_samples=MILLION, skipped=[], sources_sha256="0" * 64, shards=entries).save(folder)


def measure_waiting(folder: Path, batch_size: int) -> tuple[float, float]:
    """The median seconds of a training step, and the fraction of the training time spent waiting for data.

    The prior is the fastest one in benchmarks/prior_step.py that is not compiled.
    """
    reader = TokenShardReader(folder / "shards", seed=0)
    prior = Ours("grid_transformer", "adamw", "bf16" if cpu_has_bf16() else "no", batch_size)
    batches = TokenBatches(reader, dataclasses.replace(prior.prior.vocabulary, token_fingerprint=reader.manifest.token_fingerprint,
                                                       grids=reader.manifest.grids, class_names=reader.manifest.class_names), 0, 0.1)
    for _ in range(3):  # warm-up
        prior.step(torch.zeros(batch_size, SIDE**2, dtype=torch.int64), torch.zeros(batch_size, dtype=torch.int64))
    waits, steps = [], []
    for number in range(STEPS[batch_size]):
        started = time.perf_counter()
        batch = batches.batch(number, batch_size)
        waits.append(time.perf_counter() - started)
        prior.step(batch.ids_BT, batch.classes_B)
        steps.append(time.perf_counter() - started)
    return statistics.median(steps), sum(waits) / sum(steps)


def main() -> int:
    """Print the tables. Returns exit code 1 if a target is missed."""
    use_two_cpu_threads()
    text, checks = [], []
    with tempfile.TemporaryDirectory(prefix="vqmosaic-shards-") as name:
        folder = Path(name)
        write_everything(folder)
        first_seconds = {contestant: [] for contestant in CONTESTANTS}
        epochs = {contestant: functools.partial(read_epoch, contestant, folder, first_seconds) for contestant in CONTESTANTS}
        seconds = time_alternately(epochs, ROUNDS, warm_up=0)  # no warm-up: the new files are in the page cache
        text += ["| | images/s | times slower than ours | first batch after, ms | bytes an image | on the disk |", "|---|---|---|---|---|---|"]
        for contestant in CONTESTANTS:
            in_files, on_disk = bytes_per_image(folder, PATHS[contestant])
            text.append(f"| {contestant} | {IMAGES / statistics.median(seconds[contestant]):,.0f} | {ratio(seconds, contestant, OURS):.1f} | "
                        f"{statistics.median(first_seconds[contestant]) * 1000:,.0f} | {in_files:,.0f} | {on_disk:,.0f} |")
            if contestant != OURS:
                checks.append((ratio(seconds, contestant, OURS) > 1, f"faster than {contestant}", f"{ratio(seconds, contestant, OURS):.1f} times"))
        write_million(folder / "million")
        opening = statistics.median(time_alternately({OURS: lambda: TokenShardReader(folder / "million")}, ROUNDS)[OURS])
        checks.append((opening < MAX_OPENING_SECONDS, f"a million images open in less than {MAX_OPENING_SECONDS:g} s", f"{opening:.2f} s"))
        text += ["", "| batch | training step, ms | of it waiting for data |", "|---|---|---|"]
        for batch_size in STEPS:
            step, share = measure_waiting(folder, batch_size)
            text.append(f"| {batch_size} | {step * 1000:.0f} | {share:.2%} |")
            checks.append((share < MAX_WAITING_SHARE, f"a step of batch {batch_size} waits less than {MAX_WAITING_SHARE:.0%} for data",
                           f"{share:.2%}"))
    text += ["", *(f"- {'kept' if kept else 'NOT kept'}: {promise}: {found}" for kept, promise, found in checks), "",
             f"The data are synthetic: {IMAGES:,} images x {VIEWS} views x {SIDE**2} ids of {CODES} codes, all in the page cache. The table shows "
             f"one shuffled epoch in batches of {BATCH} in one process, including opening, as the median of {ROUNDS} alternating rounds. The JSON "
             f"lines are held in memory as a whole. The training steps are those of a grid_transformer of preset tiny with "
             f"AdamW{', in bf16' if cpu_has_bf16() else ''} (`benchmarks.prior_step`): "
             f"the first {' and the first '.join(f'{count} with batch {size}' for size, count in STEPS.items())}, including the opening of the first "
             "window of shards."]
    record("Token shards", text, ("webdataset", "numpy"))
    return int(not all(kept for kept, _, _ in checks))


if __name__ == "__main__":
    sys.exit(main())
