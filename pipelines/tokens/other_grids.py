"""Reads the ids of grids that the tokenizer of the recipe does not make, for repairs of shards with grids of several tokenizers."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np

from token_shards.manifest import ShardSetHeader, shard_name
from vqmosaic.errors import InputError


def other_grids(header: ShardSetHeader) -> dict[str, str]:
    """Grid name -> token fingerprint, for the grids that the tokenizer of the recipe does not make."""
    return {name: fingerprint for name, fingerprint in header.token_fingerprints.items() if fingerprint != header.token_fingerprint}


def read_other_ids(folder: Path, header: ShardSetHeader, index: int) -> dict[int, dict[str, np.ndarray]]:
    """Source index -> grid name -> ids (V, T) of the other grids in a damaged shard. Raises InputError if they cannot all be read.

    The digest of the repaired shard shows whether they are damaged.
    """
    others, path = other_grids(header), folder / shard_name(index)
    if not others:
        return {}
    found: dict[int, dict[str, np.ndarray]] = {}
    try:
        with tarfile.open(path) as tar:
            members = {member.name: file.read() for member in tar if (file := tar.extractfile(member)) is not None}
        for name in [name for name in members if name.endswith(".json")]:
            key = name.removesuffix(".json")
            found[json.loads(members[name])["index"]] = {
                grid: np.lib.format.read_array(io.BytesIO(members[f"{key}.{grid}.npy"]), allow_pickle=False) for grid in others}
    except (OSError, tarfile.TarError, ValueError, KeyError, TypeError, EOFError) as error:
        made_by = ", ".join(f"{name} (tokenizer {fingerprint[:16]}...)" for name, fingerprint in others.items())
        raise InputError(f"{path} cannot be repaired: it has grids of other tokenizers than that of the recipe: {made_by}. Their ids cannot be "
                         f"read from the damaged shard ({error}). Restore the shard from a copy, or write all shards again.") from None
    return found
