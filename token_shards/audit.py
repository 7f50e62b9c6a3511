"""Proving a folder of token shards whole: every byte, every sample, each source exactly once or named as skipped.

The samples are decoded by the webdataset library rather than by this package's reader, so that a clean report also says that
the shards are plain WebDataset. What the manifest's digests cannot tell (a manifest rewritten to fit changed shards) is
compared with the data set, where the caller gives its sources.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from token_shards.manifest import MANIFEST_NAME, SPLITS, Grid, ShardEntry, ShardSetHeader, TokenShardManifest, shard_name
from token_shards.sidecar import ShardSidecar, sidecar_path, source_line
from vqmosaic.errors import InputError, printable
from vqmosaic.files.durable_files import TEMPORARY_PREFIX, sha256_of_file
from vqmosaic.files.permissions import check_readable

LISTED_AT_MOST = 10  # of one sort in one shard; a data set out of step would otherwise give a line for every image


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """What an audit found; `passed` when there are no problems."""

    problems: list[str]
    """One text for each: shard, key, what was expected and what was found."""
    samples: int
    """Samples that could be decoded."""
    shards: int
    """Shards that the manifest lists."""
    skipped: int
    """Sources that the manifest names as skipped."""

    @property
    def passed(self) -> bool:
        """True when nothing is wrong."""
        return not self.problems


@dataclass(frozen=True, kw_only=True)
class _Sample:
    shard: str
    key: str
    index: int
    label: int | None
    source: str

    def __str__(self) -> str:
        return f"{self.shard}, key {self.key}"


def audit_tokens(folder: str | Path,
                 expected_sources: Mapping[str, Iterable[tuple[str, int | None]]] | None = None) -> dict[str, AuditReport]:
    """The report of each split in a tokens/ folder with train/ and validation/ inside, or of the one split that `folder` is.

    `expected_sources` has an entry, as `audit_folder` takes it, for each split that is to be compared with its data set.
    Raises InputError where there is nothing to audit.
    """
    folder, expected_sources = Path(folder), expected_sources or {}
    if not any((folder / split).is_dir() for split in SPLITS):
        split = TokenShardManifest.load(folder).split
        return {split: audit_folder(folder, expected_sources.get(split))}
    reports, manifests = {}, {}
    for split in SPLITS:
        if not (folder / split).is_dir():
            reports[split] = AuditReport(problems=[f"{folder / split} is missing."], samples=0, shards=0, skipped=0)
            continue
        reports[split] = audit_folder(folder / split, expected_sources.get(split))
        try:
            manifests[split] = TokenShardManifest.load(folder / split)
        except InputError:
            continue  # audit_folder has said so
        if manifests[split].split != split:
            reports[split].problems.append(f"{folder / split} holds the split {manifests[split].split!r}; expected {split!r}.")
    if len(manifests) == 2:
        for name in ("token_fingerprint", "grids", "class_names"):
            first, second = (getattr(manifests[split], name) for split in SPLITS)
            if first != second:
                reports[SPLITS[1]].problems.append(f"{name} differs: {first} in {folder / SPLITS[0]}, {second} in {folder / SPLITS[1]}.")
    return reports


def audit_folder(folder: str | Path, expected_sources: Iterable[tuple[str, int | None]] | None = None) -> AuditReport:
    """The report of one split's folder. `expected_sources` gives (source, label) of each source of the data set, in index order.

    Raises InputError when the folder does not exist; an incomplete one is a problem in the report.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder} to audit.")
    try:
        manifest = TokenShardManifest.load(folder)
    except InputError as error:
        return AuditReport(problems=[str(error)], samples=0, shards=0, skipped=0)
    problems: list[str] = _strays(folder, manifest)
    samples: list[_Sample] = []
    header_fingerprint = manifest.header.fingerprint
    for shard_index, entry in enumerate(manifest.shards):
        found, stored = audit_shard(folder, manifest, entry, shard_index, header_fingerprint, manifest.skipped)
        problems += found
        samples += stored
    problems += _audit_sources(manifest, samples)
    if expected_sources is not None:
        problems += _compare_with_data_set(manifest, samples, expected_sources)
    return AuditReport(problems=problems, samples=len(samples), shards=len(manifest.shards), skipped=len(manifest.skipped))


def _strays(folder: Path, manifest: TokenShardManifest) -> list[str]:
    wanted = {name for entry in manifest.shards for name in (entry.name, sidecar_path(folder, entry.name).name)}
    present = {path.name for pattern in ("shard-*.tar", "shard-*.json", f"{TEMPORARY_PREFIX}*") for path in folder.glob(pattern)}
    return _listed([f"{name}: lies in the folder and is not in {MANIFEST_NAME}." for name in sorted(present - wanted)])


def audit_shard(folder: Path, header: ShardSetHeader, entry: ShardEntry, shard_index: int, header_fingerprint: str,
                skipped: list[dict]) -> tuple[list[str], list[_Sample]]:
    """The problems of one shard, and its samples as webdataset reads them; `skipped` are the records of the sources that are not stored."""
    name, path = entry.name, folder / entry.name
    check_readable(path)
    if not path.is_file():
        return [f"{name}: the file is missing."], []
    problems = []
    size, digest = path.stat().st_size, sha256_of_file(path)
    if size != entry.size:
        problems.append(f"{name}: it has {size} bytes, the manifest says {entry.size}.")
    if digest != entry.sha256:
        problems.append(f"{name}: its sha256 is {digest}, the manifest says {entry.sha256}.")
    try:
        sidecar = ShardSidecar.load(folder, name)
    except InputError as error:
        problems.append(f"{name}: {error}")
        sidecar = None
    samples, broken, offsets = [], [], []
    content = path.read_bytes()
    try:
        for fields in _webdataset_samples(content, name):
            try:
                sample, arrays = _decode(fields, name, header)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                broken.append(f"{name}, key {fields['__key__']}: {error}")
                continue
            offsets += _misplaced(sample, arrays, content, sidecar, len(samples) + len(broken))
            samples.append(sample)
    except Exception as error:  # damaged bytes can fail anywhere in tarfile and webdataset; all of it is a finding
        broken.append(f"{name}: webdataset cannot read it past {len(samples)} samples: {error!r}")
    problems += _listed(broken)
    if len(samples) != entry.count:
        problems.append(f"{name}: {len(samples)} samples can be read, the manifest says {entry.count}.")
    sources = frozenset(header.source_indices(shard_index))
    problems += _listed([f"{sample}: source index {sample.index} belongs to another shard." for sample in samples if sample.index not in sources])
    if sidecar is not None:
        of_shard = [record for record in skipped if record["index"] in sources]
        problems += _listed(_sidecar_problems(folder, entry, sidecar, samples, of_shard, header_fingerprint)) + _listed(offsets)
    return problems, samples


def _webdataset_samples(content: bytes, name: str) -> Iterator[dict]:
    """The samples of a tar as webdataset groups them, undecoded: its default decoders would unpickle."""
    from webdataset.tariterators import group_by_keys, tar_file_expander  # imported here: it loads torch, if installed

    yield from group_by_keys(tar_file_expander([{"url": name, "stream": io.BytesIO(content)}]))


def _decode(fields: dict, name: str, header: ShardSetHeader) -> tuple[_Sample, dict[str, np.ndarray]]:
    """One sample and its ids by grid. Raises ValueError, TypeError or KeyError for whatever is not as it should be."""
    members = {member for member in fields if not member.startswith("__")}
    expected = {f"{grid.name}.npy" for grid in header.grids} | {"json"}
    if members != expected:
        raise ValueError(f"it has the members {sorted(members)}; expected {sorted(expected)}.")
    arrays = {grid.name: _decode_ids(fields[f"{grid.name}.npy"], grid, len(header.views)) for grid in header.grids}
    facts = json.loads(fields["json"])
    if facts.keys() != {"index", "label", "source", "views"}:
        raise ValueError(f"its json has the fields {sorted(facts)}; expected index, label, source, views.")
    index, label, source = facts["index"], facts["label"], facts["source"]
    if not isinstance(index, int) or not isinstance(source, str) or not (label is None or isinstance(label, int)):
        raise ValueError(f"its json has index {index!r}, label {label!r}, source {source!r}; "
                         "expected an integer, an integer or null, a text.")
    if facts["views"] != len(header.views):
        raise ValueError(f"its json names {facts['views']} views; expected {len(header.views)}.")
    names = header.class_names or []
    if label is not None and not 0 <= label < len(names):
        raise ValueError(f"its label is {label}; there are {len(names)} classes.")
    return _Sample(shard=name, key=fields["__key__"], index=index, label=label, source=source), arrays


def _decode_ids(content: bytes, grid: Grid, views: int) -> np.ndarray:
    stream = io.BytesIO(content)
    ids_VT = np.lib.format.read_array(stream, allow_pickle=False)
    if ids_VT.shape != (views, grid.num_tokens) or ids_VT.dtype != grid.dtype or stream.read(1):
        raise ValueError(f"grid {grid.name!r} is {ids_VT.dtype} {ids_VT.shape}; "
                         f"expected {grid.dtype} {(views, grid.num_tokens)} and nothing after it.")
    low, high = int(ids_VT.min()), int(ids_VT.max())
    if low < 0 or high >= grid.codebook_size:
        raise ValueError(f"grid {grid.name!r} has ids from {low} to {high}; allowed: 0 to {grid.codebook_size - 1}.")
    return ids_VT


def _misplaced(sample: _Sample, arrays: dict[str, np.ndarray], content: bytes, sidecar: ShardSidecar | None, row: int) -> list[str]:
    """What is wrong about the sidecar's offsets of one sample, which mapped readers go by."""
    problems = []
    for grid_name, ids_VT in arrays.items() if sidecar else ():
        listed = sidecar.offsets.get(grid_name, [])
        if row < len(listed) and content[listed[row]:listed[row] + ids_VT.nbytes] != ids_VT.tobytes():
            problems.append(f"{sample}: the sidecar's offset {listed[row]} of grid {grid_name!r} does not lead to its ids.")
    return problems


def _sidecar_problems(folder: Path, entry: ShardEntry, sidecar: ShardSidecar, samples: list[_Sample], skipped: list[dict],
                      header_fingerprint: str) -> list[str]:
    """Where a sidecar differs from the manifest and from the samples in the tar."""
    found = {"sha256": (sidecar.sha256, entry.sha256), "size": (sidecar.size, entry.size), "count": (sidecar.count, entry.count),
             "shard": (sidecar.shard, entry.name), "header fingerprint": (sidecar.header_fingerprint, header_fingerprint),
             "own digest": (sha256_of_file(sidecar_path(folder, entry.name)), entry.sidecar_sha256), "skipped": (sidecar.skipped, skipped)}
    problems = [f"{entry.name}: the sidecar's {what} is {own}, the manifest says {expected}."
                for what, (own, expected) in found.items() if own != expected]
    listed = zip(sidecar.keys, sidecar.indices, sidecar.labels, sidecar.sources, strict=True)
    stored = ((sample.key, sample.index, sample.label, sample.source) for sample in samples)
    for row, (own, expected) in enumerate(zip_longest(listed, stored)):
        if own != expected:
            problems.append(f"{entry.name}: sample {row} (key, index, label, source) is {own} in the sidecar and {expected} in the tar.")
    return problems


def _audit_sources(manifest: TokenShardManifest, samples: list[_Sample]) -> list[str]:
    """Whether each source is there exactly once, and whether it is the source that was written."""
    by_index: dict[int, list[_Sample]] = {}
    by_key: dict[str, list[_Sample]] = {}
    for sample in samples:
        by_index.setdefault(sample.index, []).append(sample)
        by_key.setdefault(sample.key, []).append(sample)
    skipped = {record["index"] for record in manifest.skipped}
    problems = _listed([f"source index {index} ({printable(found[0].source)}) is stored {len(found)} times: {'; '.join(map(str, found))}."
                        for index, found in by_index.items() if len(found) > 1])
    problems += _listed([f"key {key} is stored {len(found)} times: {'; '.join(map(str, found))}."
                         for key, found in by_key.items() if len(found) > 1])
    problems += _listed([f"{by_index[index][0]}: source index {index} is stored, and {MANIFEST_NAME} names it as skipped."
                         for index in sorted(skipped) if index in by_index])
    if len(skipped) < len(manifest.skipped):
        problems.append(f"{MANIFEST_NAME} names {len(manifest.skipped) - len(skipped)} skipped sources twice.")
    for shard_index in range(manifest.num_shards):
        absent = [index for index in manifest.source_indices(shard_index) if index not in by_index and index not in skipped]
        problems += _listed([f"{shard_name(shard_index)}: source index {index} is neither stored nor named as skipped."
                             for index in absent])
    digest = hashlib.sha256()
    for sample in samples:  # in stored order
        digest.update(source_line(sample.index, sample.key, sample.source, sample.label))
    if digest.hexdigest() != manifest.sources_sha256:
        problems.append(f"{MANIFEST_NAME}: sources_sha256 is {manifest.sources_sha256}, the stored samples give {digest.hexdigest()}: "
                        "an index, key, source or label is not the one that was written.")
    return problems


def _compare_with_data_set(manifest: TokenShardManifest, samples: list[_Sample], expected_sources: Iterable) -> list[str]:
    """Where the stored and skipped sources differ from those of the data set."""
    stored: dict[int, _Sample] = {}
    for sample in samples:
        stored.setdefault(sample.index, sample)
    skipped = {record["index"]: record for record in manifest.skipped}
    problems, number = [], 0
    for number, (source, label) in enumerate(expected_sources, start=1):
        index = number - 1
        if index in stored and (stored[index].source, stored[index].label) != (source, label):
            sample = stored[index]
            problems.append(f"{sample}: it is source {sample.source!r} with label {sample.label}; "
                            f"the data set has {source!r} with label {label} at index {index}.")
        elif index not in stored and index in skipped and skipped[index]["source"] != source:
            problems.append(f"{MANIFEST_NAME}: the skipped source {index} is {skipped[index]['source']!r}; "
                            f"the data set has {source!r} there.")
    problems = _listed(problems)
    if number != manifest.num_sources:
        problems.append(f"{MANIFEST_NAME}: it has {manifest.num_sources} sources, the data set has {number}.")
    return problems


def _listed(problems: list[str]) -> list[str]:
    if len(problems) <= LISTED_AT_MOST:
        return problems
    return [*problems[:LISTED_AT_MOST], f"... and {len(problems) - LISTED_AT_MOST} more like the last."]
