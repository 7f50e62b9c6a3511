"""Checks a folder of token shards: every byte, every sample, every source exactly once (stored or listed as skipped).

The webdataset library decodes the samples, not this package's reader, so a report without problems also shows that the shards are plain
WebDataset. The manifest's digests cannot detect a manifest that was rewritten to match changed shards. To detect that, pass the sources of the
data set.
"""

import hashlib
import io
import json
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from token_shards.manifest import MANIFEST_NAME, SPLITS, Grid, ShardEntry, ShardSetHeader, TokenShardManifest, shard_name
from token_shards.sidecar import ShardSidecar, sidecar_path, source_line, unlisted_files
from vqmosaic.errors import InputError, printable
from vqmosaic.files.durable_files import sha256_of_file
from vqmosaic.files.permissions import check_readable

MAX_LISTED_PROBLEMS = 10  # of one kind in one shard; otherwise, a data set with shifted indices would give one line for every image


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """Result of an audit."""

    problems: list[str]
    """One message for each problem: shard, key, what was expected and what was found."""
    samples: int
    """Number of samples that could be decoded."""
    shards: int
    """Number of shards that the manifest lists."""
    skipped: int
    """Number of sources that the manifest lists as skipped."""

    @property
    def passed(self) -> bool:
        """True if there are no problems."""
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
    """Split -> report, for a tokens folder that contains train/ and validation/, or for the folder of one split.

    `expected_sources` has an entry, in the form that `audit_folder` takes, for each split to compare with its data set.
    Raises InputError if there is nothing to audit.
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
            continue  # audit_folder has reported it
        if manifests[split].split != split:
            reports[split].problems.append(f"{folder / split} contains the split {manifests[split].split!r}; expected {split!r}.")
    if len(manifests) == 2:
        for name in ("token_fingerprint", "grids", "class_names"):
            first, second = (getattr(manifests[split], name) for split in SPLITS)
            if first != second:
                reports[SPLITS[1]].problems.append(f"{name} differs: {first} in {folder / SPLITS[0]}, {second} in {folder / SPLITS[1]}.")
    return reports


def audit_folder(folder: str | Path, expected_sources: Iterable[tuple[str, int | None]] | None = None) -> AuditReport:
    """The report on one split's folder. `expected_sources` gives (source, label) of each source of the data set, in index order.

    Raises InputError if the folder does not exist. An incomplete folder is a problem in the report.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}.")
    try:
        manifest = TokenShardManifest.load(folder)
    except InputError as error:
        return AuditReport(problems=[str(error)], samples=0, shards=0, skipped=0)
    problems: list[str] = _unlisted_files(folder, manifest)
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


def _unlisted_files(folder: Path, manifest: TokenShardManifest) -> list[str]:
    names = unlisted_files(folder, [entry.name for entry in manifest.shards])
    return _truncated([f"{name}: this file is not listed in {MANIFEST_NAME}." for name in names])


def audit_shard(folder: Path, header: ShardSetHeader, entry: ShardEntry, shard_index: int, header_fingerprint: str,
                skipped: list[dict]) -> tuple[list[str], list[_Sample]]:
    """The problems of one shard, and its samples as webdataset reads them. `skipped` holds the records of the sources that are not stored."""
    name, path = entry.name, folder / entry.name
    check_readable(path)
    if not path.is_file():
        return [f"{name}: the file is missing."], []
    problems = []
    size, digest = path.stat().st_size, sha256_of_file(path)
    if size != entry.size:
        problems.append(f"{name}: its size is {size} bytes, the manifest says {entry.size}.")
    if digest != entry.sha256:
        problems.append(f"{name}: its sha256 is {digest}, the manifest says {entry.sha256}.")
    try:
        sidecar = ShardSidecar.load(folder, name)
    except InputError as error:
        problems.append(f"{name}: {error}")
        sidecar = None
    samples: list[_Sample] = []
    broken, offset_problems = [], []
    content = path.read_bytes()
    try:
        for fields in _webdataset_samples(content, name):
            try:
                sample, arrays = _decode(fields, name, header)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                broken.append(f"{name}, key {fields['__key__']}: {error}")
                continue
            offset_problems += _offset_problems(sample, arrays, content, sidecar, len(samples) + len(broken))
            samples.append(sample)
    except Exception as error:  # damaged bytes can raise any error in tarfile and webdataset; each is reported as a problem
        broken.append(f"{name}: webdataset fails after {len(samples)} samples: {error!r}")
    problems += _truncated(broken)
    if len(samples) != entry.count:
        problems.append(f"{name}: {len(samples)} samples can be read, the manifest says {entry.count}.")
    sources = frozenset(header.source_indices(shard_index))
    problems += _truncated([f"{sample}: source index {sample.index} belongs to another shard." for sample in samples if sample.index not in sources])
    if sidecar is not None:
        skipped_in_shard = [record for record in skipped if record["index"] in sources]
        problems += (_truncated(_sidecar_problems(folder, entry, sidecar, samples, skipped_in_shard, header_fingerprint))
                     + _truncated(offset_problems))
    return problems, samples


def _webdataset_samples(content: bytes, name: str) -> Iterator[dict]:
    """The samples of a tar as webdataset groups them. They are not decoded, because webdataset's default decoders would unpickle."""
    from webdataset.tariterators import group_by_keys, tar_file_expander  # imported here: it loads torch, if installed

    yield from group_by_keys(tar_file_expander([{"url": name, "stream": io.BytesIO(content)}]))


def _decode(fields: dict, name: str, header: ShardSetHeader) -> tuple[_Sample, dict[str, np.ndarray]]:
    """One sample and its ids by grid name. Raises ValueError, TypeError or KeyError if the sample is malformed."""
    members = {member for member in fields if not member.startswith("__")}
    expected = {f"{grid.name}.npy" for grid in header.grids} | {"json"}
    if members != expected:
        raise ValueError(f"the members are {sorted(members)}; expected {sorted(expected)}.")
    arrays = {grid.name: decode_ids(fields[f"{grid.name}.npy"], grid, len(header.views)) for grid in header.grids}
    record = json.loads(fields["json"])
    if record.keys() != {"index", "label", "source", "views"}:
        raise ValueError(f"the json has the fields {sorted(record)}; expected index, label, source, views.")
    index, label, source = record["index"], record["label"], record["source"]
    if not isinstance(index, int) or not isinstance(source, str) or not (label is None or isinstance(label, int)):
        raise ValueError(f"the json has index {index!r}, label {label!r}, source {source!r}; "
                         "expected an integer, an integer or null, a string.")
    if record["views"] != len(header.views):
        raise ValueError(f"the json says {record['views']} views; expected {len(header.views)}.")
    names = header.class_names or []
    if label is not None and not 0 <= label < len(names):
        raise ValueError(f"the label is {label}; there are {len(names)} classes.")
    return _Sample(shard=name, key=fields["__key__"], index=index, label=label, source=source), arrays


def decode_ids(content: bytes, grid: Grid, views: int) -> np.ndarray:
    """The ids (V, T) in the npy file of one grid. Raises ValueError if they have another shape or type, or are out of range."""
    stream = io.BytesIO(content)
    try:
        ids_VT = np.lib.format.read_array(stream, allow_pickle=False)
    except tokenize.TokenError as error:  # numpy raises it for an npy header with an open bracket
        raise ValueError(f"the npy header of grid {grid.name!r} is damaged ({error.args[0]}).") from None
    if ids_VT.shape != (views, grid.num_tokens) or ids_VT.dtype != grid.dtype or stream.read(1):
        raise ValueError(f"grid {grid.name!r} is {ids_VT.dtype} {ids_VT.shape}; "
                         f"expected {grid.dtype} {(views, grid.num_tokens)} and no bytes after it.")
    low, high = int(ids_VT.min()), int(ids_VT.max())
    if low < 0 or high >= grid.codebook_size:
        raise ValueError(f"grid {grid.name!r} has ids from {low} to {high}; allowed: 0 to {grid.codebook_size - 1}.")
    return ids_VT


def _offset_problems(sample: _Sample, arrays: dict[str, np.ndarray], content: bytes, sidecar: ShardSidecar | None, row: int) -> list[str]:
    """Problems with the sidecar's offsets of one sample. Readers that map the tar into memory rely on these offsets."""
    if sidecar is None:
        return []
    problems = []
    for grid_name, ids_VT in arrays.items():
        offsets = sidecar.offsets.get(grid_name, [])
        if row < len(offsets) and content[offsets[row]:offsets[row] + ids_VT.nbytes] != ids_VT.tobytes():
            problems.append(f"{sample}: the sidecar's offset {offsets[row]} of grid {grid_name!r} does not point to its ids.")
    return problems


def _sidecar_problems(folder: Path, entry: ShardEntry, sidecar: ShardSidecar, samples: list[_Sample], skipped: list[dict],
                      header_fingerprint: str) -> list[str]:
    """Differences between a sidecar and the manifest, and between the sidecar and the samples in the tar."""
    pairs = {"sha256": (sidecar.sha256, entry.sha256), "size": (sidecar.size, entry.size), "count": (sidecar.count, entry.count),
             "shard": (sidecar.shard, entry.name), "header fingerprint": (sidecar.header_fingerprint, header_fingerprint),
             "own digest": (sha256_of_file(sidecar_path(folder, entry.name)), entry.sidecar_sha256), "skipped": (sidecar.skipped, skipped)}
    problems = [f"{entry.name}: the sidecar's {field} is {found}, the manifest says {expected}."
                for field, (found, expected) in pairs.items() if found != expected]
    in_sidecar = zip(sidecar.keys, sidecar.indices, sidecar.labels, sidecar.sources, strict=True)
    in_tar = ((sample.key, sample.index, sample.label, sample.source) for sample in samples)
    for row, (found, expected) in enumerate(zip_longest(in_sidecar, in_tar)):
        if found != expected:
            problems.append(f"{entry.name}: sample {row} (key, index, label, source) is {found} in the sidecar and {expected} in the tar.")
    return problems


def _audit_sources(manifest: TokenShardManifest, samples: list[_Sample]) -> list[str]:
    """Problems with the set of sources: each must be stored or skipped exactly once, and the stored ones must match sources_sha256."""
    by_index: dict[int, list[_Sample]] = {}
    by_key: dict[str, list[_Sample]] = {}
    for sample in samples:
        by_index.setdefault(sample.index, []).append(sample)
        by_key.setdefault(sample.key, []).append(sample)
    skipped = {record["index"] for record in manifest.skipped}
    problems = _truncated([f"source index {index} ({printable(found[0].source)}) is stored {len(found)} times: {'; '.join(map(str, found))}."
                           for index, found in by_index.items() if len(found) > 1])
    problems += _truncated([f"key {key} is stored {len(found)} times: {'; '.join(map(str, found))}."
                            for key, found in by_key.items() if len(found) > 1])
    problems += _truncated([f"{by_index[index][0]}: source index {index} is stored, but {MANIFEST_NAME} lists it as skipped."
                            for index in sorted(skipped) if index in by_index])
    if len(skipped) < len(manifest.skipped):
        problems.append(f"{MANIFEST_NAME} lists {len(manifest.skipped) - len(skipped)} skipped sources twice.")
    for shard_index in range(manifest.num_shards):
        missing = [index for index in manifest.source_indices(shard_index) if index not in by_index and index not in skipped]
        problems += _truncated([f"{shard_name(shard_index)}: source index {index} is neither stored nor listed as skipped."
                                for index in missing])
    digest = hashlib.sha256()
    for sample in samples:  # in stored order
        digest.update(source_line(sample.index, sample.key, sample.source, sample.label))
    if digest.hexdigest() != manifest.sources_sha256:
        problems.append(f"{MANIFEST_NAME}: sources_sha256 is {manifest.sources_sha256}, the stored samples give {digest.hexdigest()}: "
                        "an index, key, source or label has changed since it was written.")
    return problems


def _compare_with_data_set(manifest: TokenShardManifest, samples: list[_Sample], expected_sources: Iterable) -> list[str]:
    """Differences between the stored and skipped sources and those of the data set."""
    stored: dict[int, _Sample] = {}
    for sample in samples:
        stored.setdefault(sample.index, sample)
    skipped = {record["index"]: record for record in manifest.skipped}
    problems, count = [], 0
    for count, (source, label) in enumerate(expected_sources, start=1):
        index = count - 1
        if index in stored and (stored[index].source, stored[index].label) != (source, label):
            sample = stored[index]
            problems.append(f"{sample}: its source is {sample.source!r} with label {sample.label}; "
                            f"the data set has {source!r} with label {label} at index {index}.")
        elif index not in stored and index in skipped and skipped[index]["source"] != source:
            problems.append(f"{MANIFEST_NAME}: the skipped source {index} is {skipped[index]['source']!r}; "
                            f"the data set has {source!r} at this index.")
    problems = _truncated(problems)
    if count != manifest.num_sources:
        problems.append(f"{MANIFEST_NAME}: it has {manifest.num_sources} sources, the data set has {count}.")
    return problems


def _truncated(problems: list[str]) -> list[str]:
    """The first MAX_LISTED_PROBLEMS problems and a line with the number of the others."""
    if len(problems) <= MAX_LISTED_PROBLEMS:
        return problems
    return [*problems[:MAX_LISTED_PROBLEMS], f"... and {len(problems) - MAX_LISTED_PROBLEMS} more problems of this kind."]
