"""Fingerprints of configurations and weights, so that artefacts that do not belong together are not combined."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from vqmosaic.errors import InputError


def fingerprint(config: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> str:
    """SHA-256 (hex) of a configuration and named float32 arrays: sorted names, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
    arrays = arrays or {}
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name], dtype=np.float32)
        digest.update(f"\n{name} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def check_same_tokens(first: str, first_path: Any, second: str, second_path: Any) -> None:
    """Raise InputError, with both values and paths, unless two token fingerprints are equal."""
    if first != second:
        raise InputError(f"{first_path} and {second_path} do not belong together: their token fingerprints are {first[:16]}... and "
                         f"{second[:16]}... A prior works only with the tokenizer whose tokens it was trained on. Use that "
                         "tokenizer, or preprocess and train the prior again with this one.")
