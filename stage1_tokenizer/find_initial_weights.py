"""Where the weights are that a fine-tuning starts from (tokenizer_training.init_from), and whether they can fit. Imports no torch."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stage1_tokenizer.data.data_location import nearest_sibling
from vqmosaic.errors import InputError
from vqmosaic.files.permissions import check_readable, naming_denied_permissions
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.tokenizer_sections import LEARNING_FIELDS, RESIDUAL_FIELDS, TokenizerConfig
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.runs.stage_records import load_record

FIELD = "tokenizer_training.init_from"
TOKENIZER_FORMAT = "vqmosaic.image_tokenizer"
ALLOWED = ("a tokenizer folder (config.json and model.safetensors), a training checkpoint (a folder such as checkpoints/tokenizer/step-00000500) "
           "or the folder of a run with a finished tokenizer")
TRANSFORM_FIELDS = ("image_size", "channels")
"""Fields of section data that decide tokens: of the whole section nothing else is in the token fingerprint."""


@dataclass(frozen=True)
class InitialWeights:
    """A file of weights, and what is known of the network that it belongs to."""

    folder: Path
    """The tokenizer folder or the checkpoint."""
    file: Path
    """The safetensors file in it."""
    is_export: bool
    """A tokenizer folder, or else a checkpoint."""
    config: dict[str, Any]
    """config.json of a tokenizer folder; of a checkpoint in its run folder {"network": ..., "transform": ...} as its run recorded it; else empty."""


@naming_denied_permissions()
def locate_initial_weights(path: str) -> InitialWeights:
    """The weights that a path leads to. Looks at names and small files only.

    Raises:
        ValueError: there is nothing of that path, or it is neither a tokenizer folder nor a checkpoint nor a run folder with a tokenizer.
    """
    given = Path(path).expanduser()
    if not given.is_dir():
        nearest = nearest_sibling(given)
        hint = f" Did you mean {nearest!r}?" if nearest and not given.exists() else ""
        raise InputError(f"{FIELD} is {path!r}, which {'is a file' if given.exists() else 'does not exist'}; give {ALLOWED}.{hint}")
    for folder in (given, given / "tokenizer"):
        check_readable(folder / "config.json", folder / "model.safetensors", folder / "checksums.json")
        if (config := _read_json(folder / "config.json")).get("format") == TOKENIZER_FORMAT and (folder / "model.safetensors").is_file():
            return InitialWeights(folder, folder / "model.safetensors", True, config)
    for name in ("weights_ema.safetensors", "model.safetensors"):  # what a training exports is the average, where there is one
        if (given / "checksums.json").is_file() and (given / name).is_file():
            return InitialWeights(given, given / name, False, _recorded(given))
    steps = sorted(given.glob("step-*")) or sorted(given.glob("checkpoints/tokenizer/step-*"))
    hint = f" There is the checkpoint {str(steps[-1])!r}." if steps else ""
    raise InputError(f"{FIELD} is {path!r}, which is none of these: {ALLOWED}.{hint}")


def check_init_from(recipe: Recipe, resumes: bool = False) -> None:
    """Raise InputError where tokenizer_training.init_from is set and a training of this recipe could not start from it, as far as names tell.

    Where a training `resumes` from a checkpoint of its own, what it once started from may be gone.
    """
    path, run = recipe.tokenizer_training.init_from, RunFolder(Path(recipe.run_dir))
    if path is None or (resumes and not Path(path).expanduser().exists() and any(run.checkpoints("tokenizer").glob("step-*"))):
        return
    found = locate_initial_weights(path)
    for own in (run.export("tokenizer"), run.checkpoints("tokenizer"), run.export("pipeline")):
        if found.folder.resolve().is_relative_to(own.resolve()):
            raise InputError(f"{FIELD} is {path!r}, which this run itself writes and --redo removes; set run_dir to another folder, "
                             "or copy the weights out of it.")
    check_same_network(found, recipe.tokenizer)
    channels = found.config.get("transform", {}).get("channels", recipe.data.channels)
    if channels != recipe.data.channels:
        raise InputError(f"data.channels is {recipe.data.channels}, but {FIELD} leads to {found.folder}, which was trained with {channels}; "
                         f"set data.channels to {channels}.")
    if recipe.tokenizer_training.train_parts == "decoder":
        check_same_transform(found, vars(recipe.data))


def check_same_network(found: InitialWeights, config: TokenizerConfig) -> None:
    """Raise InputError that names every field in which the network of found weights is another one than the recipe's."""
    if "network" not in found.config:
        return
    theirs = vars(TokenizerConfig()) | found.config["network"]  # a field that came later has a default that means what was done before
    without_effect = LEARNING_FIELDS if config.quantizer == "residual" else (*LEARNING_FIELDS, *RESIDUAL_FIELDS)
    differing = {name: value for name, value in vars(config).items() if name not in without_effect and theirs[name] != value}
    if differing:
        listed = "; ".join(f"tokenizer.{name} is {value!r} here and {theirs[name]!r} there" for name, value in differing.items())
        fields = ", ".join(f"tokenizer.{name}" for name in differing)
        raise InputError(f"{FIELD} leads to {found.folder}, which holds another network: {listed}. Set {fields} to what it is there, "
                         f"or {FIELD} to weights of this network.")


def check_same_transform(found: InitialWeights, own: Mapping[str, Any]) -> None:
    """Raise InputError where images of another size or other channels than the found weights were trained with would give other tokens.

    Called where a decoder is trained alone, for which the tokens have to stay the same. Weights of which nothing tells are refused too.

    Args:
        own: what the recipe says, by the names of the fields in its section data.
    """
    theirs = found.config.get("transform", {})
    for name in TRANSFORM_FIELDS:
        if name not in theirs:
            raise InputError(f"tokenizer_training.train_parts is 'decoder', but nothing tells with which data.{name} the weights in {found.folder} "
                             f"were trained, and with another one they give other tokens. Set {FIELD} to a tokenizer folder or to the checkpoint "
                             "inside the run that wrote it (<run_dir>/checkpoints/tokenizer), or tokenizer_training.train_parts to all.")
        if theirs[name] != own[name]:
            raise InputError(f"data.{name} is {own[name]!r}, but {FIELD} leads to {found.folder}, made with {theirs[name]!r}: with "
                             "tokenizer_training.train_parts decoder the tokens have to stay the same. "
                             f"Set data.{name} to {theirs[name]!r}, or tokenizer_training.train_parts to all.")


def fingerprint_of_initial_weights(path: str) -> str:
    """What identifies the weights a path leads to: the full fingerprint of a tokenizer folder, of a checkpoint the sha256 of its checksums.

    Raises:
        ValueError: as `locate_initial_weights`.
    """
    found = locate_initial_weights(path)
    if found.is_export:
        return str(found.config.get("full_fingerprint"))
    return hashlib.sha256((found.folder / "checksums.json").read_bytes()).hexdigest()


def _recorded(checkpoint: Path) -> dict[str, Any]:
    """{"network": fields, "transform": fields} as the run of a checkpoint recorded them; empty where it lies outside a run with a record."""
    run = RunFolder(checkpoint.absolute().parents[2]) if len(checkpoint.absolute().parents) > 2 else None
    if run is None or run.checkpoints("tokenizer") != checkpoint.absolute().parent:
        return {}
    record = load_record(run, "tokenizer")
    if record is None:
        return {}
    return {"network": {name.partition(".")[2]: value for name, value in record.fields.items() if name.startswith("tokenizer.")},
            "transform": {name: record.fields[f"data.{name}"] for name in TRANSFORM_FIELDS if f"data.{name}" in record.fields}}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
