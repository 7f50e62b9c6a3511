"""Reads config.json of a tokenizer folder. Imports neither torch nor numpy."""

from pathlib import Path
from typing import Any

from vqmosaic.errors import InputError
from vqmosaic.files.json_files import VERSION_FIELD, check_fields, check_format, read_object, written_by
from vqmosaic.files.permissions import check_readable

FORMAT = "vqmosaic.image_tokenizer"
FORMAT_VERSION = 1
CONFIG_FIELDS = ("format", "format_version", "network", "transform", "class_names", "token_fingerprint", "full_fingerprint",
                 VERSION_FIELD, "config_digest")
"""Fields of config.json. The last two are optional. config_digest covers all other fields; version 0.1.0 did not write it."""


def is_tokenizer(folder: Path) -> bool:
    """Whether a folder contains the config.json of a tokenizer, of any format version."""
    check_readable(folder / "config.json")
    try:
        return read_object(folder / "config.json", "").get("format") == FORMAT
    except (OSError, InputError):
        return False


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """The content of config.json, after a check of its format, version and fields. Raises InputError if the folder is not a tokenizer."""
    path, remedy = folder / "config.json", "`vqmosaic train-tokenizer` writes one to <run_dir>/tokenizer"
    check_readable(path, folder / "model.safetensors")
    for name in (path.name, "model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not a tokenizer: {name} is missing. {remedy}.")
    content = read_object(path, "copy the tokenizer again from where it was trained")
    if "format" not in content:
        raise InputError(f"{folder} is not a tokenizer: {path.name} has no format. {remedy}.")
    check_format(content, FORMAT, FORMAT_VERSION, str(path))
    check_fields(content, CONFIG_FIELDS, str(path), written_by(content), CONFIG_FIELDS[:-2])
    for name, kind in (("network", dict), ("transform", dict), ("token_fingerprint", str), ("full_fingerprint", str)):
        if not isinstance(content[name], kind):
            raise InputError(f"{path}: {name} is {content[name]!r}; it must be {'an object' if kind is dict else 'a string'}. Copy the tokenizer "
                             "again from where it was trained.")
    return content
