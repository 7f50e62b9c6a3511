"""Writes and checks digests.json: the sha256 of a prior's files, which detect damaged, edited and replaced files. Does not import torch.

Hashing the weights takes up to a few seconds per gigabyte, when a prior is saved and each time it is loaded.
"""

import hashlib
import warnings
from pathlib import Path

from vqmosaic import __version__
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import sha256_of_file, write_json
from vqmosaic.files.json_files import VERSION_FIELD, check_fields, check_format, read_object, written_by
from vqmosaic.files.permissions import check_readable

DIGESTS_NAME = "digests.json"
FORMAT = "vqmosaic.prior_digests"
FORMAT_VERSION = 1
FIELDS = ("format", "format_version", "files")
DIGESTED_FILES = ("config.json", "generation_config.json", "vocabulary.json", "*.safetensors", "*.safetensors.index.json")
"""The files that determine what a prior samples: its configuration, the meaning of its ids, and its weights in one or several files."""


def digests_of(folder: Path) -> dict[str, str]:
    """The sha256 of each of the DIGESTED_FILES in a prior's folder, by file name."""
    return {path.name: sha256_of_file(path) for pattern in DIGESTED_FILES for path in sorted(folder.glob(pattern))}


def write_digests(folder: Path) -> None:
    """Write digests.json for the current files of a folder."""
    write_json(folder / DIGESTS_NAME, {"format": FORMAT, "format_version": FORMAT_VERSION, VERSION_FIELD: __version__, "files": digests_of(folder)})


def remove_stale_files(folder: Path, kept: set[str]) -> None:
    """Delete files of an earlier model that would be loaded or rejected together with the files `kept`: sharded weights, adapters."""
    for pattern in (*DIGESTED_FILES, "adapter_config.json", "adapter_model.*"):
        for path in folder.glob(pattern):
            if path.name not in kept:
                path.unlink()


def check_digests(folder: Path) -> None:
    """Raise InputError, which names the files, if files of a prior changed since it was saved. Warn if there is no digests.json."""
    check_readable(folder)
    path = folder / DIGESTS_NAME
    if not path.is_file():
        warnings.warn(f"{folder} has no {DIGESTS_NAME}: it was saved by vqmosaic 0.1.0 or copied without it, so damaged or edited files cannot "
                      "be detected. To record the current files, bundle the prior again (`vqmosaic bundle`), or call "
                      f"TokenPrior.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r}).", stacklevel=2)
        return
    content = read_object(path, "copy the prior again from where it was trained")
    check_format(content, FORMAT, FORMAT_VERSION, str(path))
    check_fields(content, (*FIELDS, VERSION_FIELD), str(path), written_by(content), FIELDS)
    recorded, found = content["files"], digests_of(folder)
    faults = {"changed": [name for name in recorded if found.get(name, recorded[name]) != recorded[name]],
              "missing": sorted(recorded.keys() - found.keys()), "added": sorted(found.keys() - recorded.keys())}
    if any(faults.values()):
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names)
        raise InputError(f"The prior in {folder} has changed since it was saved ({listed}). If its files are damaged, copy the folder again from "
                         "where it was trained. If you trained it further with transformers, save the model with TokenPrior(model, Vocabulary."
                         "load(folder)).save_pretrained(folder), which records the new files.")


def version_of(folder: Path) -> str | None:
    """The version of vqmosaic that saved a prior, from its digests.json; None if it is not recorded."""
    path = folder / DIGESTS_NAME
    return written_by(read_object(path, "copy the prior again from where it was trained")) if path.is_file() else None


def fingerprint_of_weights(folder: Path) -> str:
    """The sha256 of a prior's model.safetensors. For sharded weights, the sha256 over the names and digests of the shards."""
    single_file = folder / "model.safetensors"
    if single_file.is_file():
        return sha256_of_file(single_file)
    lines = [f"{name} {digest}\n" for name, digest in digests_of(folder).items() if ".safetensors" in name]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
