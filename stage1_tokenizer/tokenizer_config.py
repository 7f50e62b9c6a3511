"""The kinds of tokenizers, and config.json of a tokenizer folder. Imports neither torch nor numpy."""

import importlib
from pathlib import Path
from typing import Any

from vqmosaic.errors import InputError
from vqmosaic.files.json_files import VERSION_FIELD, check_fields, check_format, read_object, version_hint, written_by
from vqmosaic.files.permissions import check_readable

IMAGE_TOKENIZER, HIERARCHICAL_TOKENIZER = "vqmosaic.image_tokenizer", "vqmosaic.hierarchical_tokenizer"
FORMATS = {
    IMAGE_TOKENIZER: ("stage1_tokenizer.tokenizer", "ImageTokenizer"),
    HIERARCHICAL_TOKENIZER: ("stage1_tokenizer.trainable.hierarchical_tokenizer", "HierarchicalTokenizer"),
}
"""`format` in config.json -> module and name of the class, a subclass of tokenizer_protocol.Tokenizer. The module is imported on first use."""
FORMAT_OF_KIND = {"image": IMAGE_TOKENIZER, "hierarchical": HIERARCHICAL_TOKENIZER}
"""tokenizer.kind of a recipe -> `format` of the tokenizer that it trains. Its class is a trainable.trainable_tokenizer.TrainableTokenizer."""
FORMAT_VERSION = 1
OPTIONAL_FIELDS = (VERSION_FIELD, "config_digest", "grids")
CONFIG_FIELDS = ("format", "format_version", "network", "transform", "class_names", "token_fingerprint", "full_fingerprint", *OPTIONAL_FIELDS)
"""Fields of config.json. `network` has the settings of the class. config_digest covers all other fields; version 0.1.0 did not write it. `grids` is
missing for ImageTokenizer, where it follows from network and transform."""


def tokenizer_class(name: str) -> Any:
    """The class of a format. Imports its module."""
    module, class_name = FORMATS[name]
    return getattr(importlib.import_module(module), class_name)


def is_tokenizer(folder: Path) -> bool:
    """Whether a folder contains the config.json of a tokenizer of a known format, in any version."""
    check_readable(folder / "config.json")
    try:
        return read_object(folder / "config.json", "").get("format") in FORMATS
    except (OSError, InputError, TypeError):
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
    if content["format"] not in [*FORMATS]:
        raise InputError(f"{path} says format {content['format']!r}; this vqmosaic reads tokenizers of the formats: {', '.join(FORMATS)}."
                         f"{version_hint(written_by(content))}")
    check_format(content, content["format"], FORMAT_VERSION, str(path))
    check_fields(content, CONFIG_FIELDS, str(path), written_by(content), [name for name in CONFIG_FIELDS if name not in OPTIONAL_FIELDS])
    for name, kind in (("network", dict), ("transform", dict), ("token_fingerprint", str), ("full_fingerprint", str), ("grids", list)):
        if not isinstance(content.get(name, kind()), kind):
            words = {dict: "an object", list: "a list", str: "a string"}[kind]
            raise InputError(f"{path}: {name} is {content[name]!r}; it must be {words}. Copy the tokenizer again from where it was trained.")
    return content
