"""Reads the ids of grids that the recipe does not make, for repairs of shards with grids of several tokenizers."""

import json
import tarfile
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import numpy as np

from pipelines.tokens.origin import load_manifest, load_sidecar
from token_shards.audit import decode_ids
from token_shards.manifest import MANIFEST_NAME, SPLITS, Grid, ShardSetHeader, TokenShardManifest, shard_name
from vqmosaic.errors import InputError
from vqmosaic.wording import counted


def other_grids(header: ShardSetHeader) -> dict[str, str]:
    """Grid name -> token fingerprint, for the grids that are made neither by the tokenizer of the recipe nor for its conditions."""
    given = {record["name"] for record in header.conditions}
    return {name: fingerprint for name, fingerprint in header.token_fingerprints.items()
            if fingerprint != header.token_fingerprint and name not in given}


def stored_grids(folder: Path, header: ShardSetHeader) -> list[Grid]:
    """The grids of a split's shards: those of the header, and the grids of other tokenizers that a manifest lists.

    If the manifest of the split is missing or damaged, that of the other split is used. Raises InputError if no manifest describes further grids that
    the sidecars have.
    """
    own, other = (load_manifest(path) for path in (folder, *(folder.resolve().parent / split for split in SPLITS if split != header.split)))
    if own is not None and has_grids(own, header):
        return own.grids
    sidecars = [load_sidecar(folder, shard_name(index)) for index in range(header.num_shards)]
    found = Counter(tuple(sidecar.offsets) for sidecar in sidecars if sidecar is not None).most_common(1)
    names = [*found[0][0]] if found else []
    if other is not None and has_grids(other, header) and names in ([], [grid.name for grid in other.grids]):
        return other.grids
    made = [grid.name for grid in header.grids]
    further = [name for name in names if name not in made]
    if own is None and further and {*made} <= {*names}:
        raise InputError(f"{folder} cannot be repaired: {MANIFEST_NAME} is missing, and its shards have grids that the tokenizer of the recipe does "
                         f"not make: {', '.join(further)}. Only the manifest says which tokenizers made them. Restore {MANIFEST_NAME} from a copy, "
                         "or write all shards again.")
    return header.grids


def has_grids(manifest: TokenShardManifest, header: ShardSetHeader) -> bool:
    """Whether a manifest has the tokenizer and all grids of a header."""
    return manifest.token_fingerprint == header.token_fingerprint and all(grid in manifest.grids for grid in header.grids)


def read_other_ids(folder: Path, header: ShardSetHeader, index: int, skipped: Collection[int]) -> dict[int, dict[str, np.ndarray]]:
    """Source index -> grid name -> ids (V, T) of the other grids in a damaged shard. `skipped` are the source indices that the shard does not store.

    Raises InputError if the ids of all other sources cannot be read. The digest of the repaired shard shows whether they are damaged.
    """
    others, path, views = other_grids(header), folder / shard_name(index), len(header.views)
    if not others:
        return {}
    grids, expected = [grid for grid in header.grids if grid.name in others], {*header.source_indices(index)} - {*skipped}
    found: dict[int, dict[str, np.ndarray]] = {}
    try:
        with tarfile.open(path) as tar:  # ends without an error at a damaged header of a member
            members = {member.name: file.read() for member in tar if (file := tar.extractfile(member)) is not None}
        for name in [name for name in members if name.endswith(".json")]:
            key = name.removesuffix(".json")
            found[json.loads(members[name])["index"]] = {grid.name: decode_ids(members[f"{key}.{grid.name}.npy"], grid, views) for grid in grids}
        if found.keys() != expected:
            raise ValueError(f"it has {len(found.keys() & expected)} of {counted(len(expected), 'sample')}")
    except (OSError, tarfile.TarError, ValueError, KeyError, TypeError, EOFError) as error:
        made_by = ", ".join(f"{name} (tokenizer {fingerprint[:16]}...)" for name, fingerprint in others.items())
        raise InputError(f"{path} cannot be repaired: it has grids of other tokenizers than that of the recipe: {made_by}. Their ids cannot be "
                         f"read from the damaged shard ({str(error).removesuffix('.')}). Restore the shard from a copy, or write all "
                         "shards again.") from None
    return found
