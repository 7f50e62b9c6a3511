"""Finds the initial weights for fine-tuning (tokenizer_training.init_from) and checks that they match the recipe.

Importing this module does not load torch.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stage1_tokenizer.data.data_location import nearest_sibling
from stage1_tokenizer.tokenizer_config import FORMAT_OF_KIND, is_tokenizer, read_tokenizer_config
from vqmosaic.errors import InputError
from vqmosaic.files.permissions import check_readable, explain_permission_errors
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.recipe_sections import DataConfig
from vqmosaic.recipes.tokenizer_sections import HIERARCHICAL_FIELDS, LEARNING_FIELDS, QUANTIZER_FIELDS, RESIDUAL_FIELDS, TokenizerConfig
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.runs.stage_records import load_record

FIELD = "tokenizer_training.init_from"
ALLOWED = ("a tokenizer folder (config.json and model.safetensors), a training checkpoint (a folder such as checkpoints/tokenizer/step-00000500) "
           "or the folder of a run with a finished tokenizer")
DATA_FIELDS_THAT_DECIDE_TOKENS = ("image_size", "channels", "value_range", "derived")
"""The fields of section data on which the tokens depend. The token fingerprint covers no other field of that section."""
_OPTIONAL_DATA_FIELDS = ("value_range", "derived")
"""Those of them that files contain only if they are set."""


@dataclass(frozen=True)
class InitialWeights:
    """A weight file and the known configuration of its network."""

    folder: Path
    """The tokenizer folder or the checkpoint."""
    file: Path
    """The safetensors file in it."""
    is_export: bool
    """True for a tokenizer folder, False for a checkpoint."""
    config: dict[str, Any]
    """A tokenizer folder: its config.json. A checkpoint in its run folder: {"network": ..., "transform": ...} from the stage record. Else empty.
    `network` has the fields of TokenizerConfig."""


@explain_permission_errors()
def locate_initial_weights(path: str) -> InitialWeights:
    """Find the weights at a path. Reads only file names and small files.

    Raises:
        InputError: the path does not exist, or is not a tokenizer folder, a checkpoint or a run folder with a tokenizer.
    """
    given = Path(path).expanduser()
    if not given.is_dir():
        nearest = nearest_sibling(given)
        hint = f" Did you mean {nearest!r}?" if nearest and not given.exists() else ""
        raise InputError(f"{FIELD} is {path!r}, which {'is a file' if given.exists() else 'does not exist'}. Give {ALLOWED}.{hint}")
    for folder in (given, given / "tokenizer"):
        check_readable(folder / "config.json", folder / "model.safetensors", folder / "checksums.json")
        if is_tokenizer(folder) and (folder / "model.safetensors").is_file():
            config = read_tokenizer_config(folder)
            kinds = {name: kind for kind, name in FORMAT_OF_KIND.items()}
            if config["format"] not in kinds:
                raise InputError(f"{FIELD} is {path!r}, a tokenizer of format {config['format']!r}. Only tokenizers of format "
                                 f"{' or '.join(map(repr, kinds))} can be trained. Set {FIELD} to one of them.")
            network = config["network"] | {"kind": kinds[config["format"]]}
            return InitialWeights(folder, folder / "model.safetensors", True, config | {"network": network})
    for name in ("weights_ema.safetensors", "model.safetensors"):  # prefer the weight average: it is what training exports
        if (given / "checksums.json").is_file() and (given / name).is_file():
            return InitialWeights(given, given / name, False, _recorded_config(given))
    steps = sorted(given.glob("step-*")) or sorted(given.glob("checkpoints/tokenizer/step-*"))
    hint = f" Did you mean the checkpoint {str(steps[-1])!r}?" if steps else ""
    raise InputError(f"{FIELD} is {path!r}, which is none of these: {ALLOWED}.{hint}")


def check_init_from(recipe: Recipe, resumes: bool = False) -> None:
    """Raise InputError if tokenizer_training.init_from is set and its weights cannot match the recipe. Reads no tensors.

    When training resumes from its own checkpoint (`resumes`), missing initial weights are not an error.
    """
    path, run = recipe.tokenizer_training.init_from, RunFolder(Path(recipe.run_dir))
    if path is None or (resumes and not Path(path).expanduser().exists() and any(run.checkpoints("tokenizer").glob("step-*"))):
        return
    found = locate_initial_weights(path)
    for output in (run.export("tokenizer"), run.checkpoints("tokenizer"), run.export("pipeline")):
        if found.folder.resolve().is_relative_to(output.resolve()):
            raise InputError(f"{FIELD} is {path!r}, which this run writes and --redo deletes. Set run_dir to another folder, "
                             "or copy the weights elsewhere.")
    check_same_network(found, recipe.tokenizer)
    own = recipe.data.transform_config  # with data.derived, that of the derived images
    channels = found.config.get("transform", {}).get("channels", own["channels"])
    if channels != own["channels"]:
        raise InputError(f"data.channels is {own['channels']}, but the weights of {FIELD} ({found.folder}) were trained with {channels}. "
                         f"Set data.channels to {channels}.")
    if recipe.tokenizer_training.train_parts == "decoder":
        check_same_transform(found, own)


def check_same_network(found: InitialWeights, config: TokenizerConfig) -> None:
    """Raise InputError if the network of the weights differs from the recipe's. The message lists every field that differs."""
    if "network" not in found.config:
        return
    theirs = compared_fields(TokenizerConfig(**{name: value for name, value in found.config["network"].items() if name in vars(config)}))
    ours = compared_fields(config) if config.kind == theirs["kind"] else {"kind": config.kind}
    differing = {name: value for name, value in ours.items() if theirs[name] != value}
    if differing:
        listed = "; ".join(f"tokenizer.{name} is {value!r} in the recipe and {theirs[name]!r} in the weights" for name, value in differing.items())
        fields = ", ".join(f"tokenizer.{name}" for name in differing)
        raise InputError(f"the weights of {FIELD} ({found.folder}) belong to another network: {listed}. Set {fields} to the values of the "
                         f"weights, or {FIELD} to weights of this network.")


def compared_fields(config: TokenizerConfig) -> dict[str, Any]:
    """The fields that must equal those of initial weights, by their names in section tokenizer, such as top.codebook_size for the top level."""
    ignored = HIERARCHICAL_FIELDS if config.kind == "image" else ("top",)
    fields: dict[str, Any] = {"kind": config.kind}
    for level in config.levels.values():
        without_effect = LEARNING_FIELDS if level.quantizer == "residual" else (*LEARNING_FIELDS, *RESIDUAL_FIELDS)
        prefix, names = ("", tuple(vars(level))) if level is config else ("top.", QUANTIZER_FIELDS)
        fields |= {f"{prefix}{name}": getattr(level, name) for name in names if name not in (*ignored, *without_effect)}
    return fields


def check_same_transform(found: InitialWeights, data: Mapping[str, Any]) -> None:
    """Raise InputError unless the weights were trained with the recipe's image size, channels, value range and derived images.

    For training the decoder alone (train_parts decoder), where the tokens must not change. Weights whose size or channels are unknown are refused.

    Args:
        data: the recipe's image transform, by field name of section data. Fields that do not affect tokens are ignored.
    """
    theirs = found.config.get("transform", {})
    for name in DATA_FIELDS_THAT_DECIDE_TOKENS:
        if name not in theirs and name not in _OPTIONAL_DATA_FIELDS:
            raise InputError(f"tokenizer_training.train_parts is 'decoder', which must not change the tokens, but the data.{name} that the weights "
                             f"in {found.folder} were trained with is unknown. Set {FIELD} to a tokenizer folder or to the checkpoint "
                             "inside the run that wrote it (<run_dir>/checkpoints/tokenizer), or tokenizer_training.train_parts to all.")
        given, needed = data.get(name), theirs.get(name)
        if given != needed:
            given, needed = ("null" if value is None else repr(value) for value in (given, needed))
            raise InputError(f"data.{name} is {given}, but the weights of {FIELD} ({found.folder}) were trained with {needed}, "
                             "and tokenizer_training.train_parts decoder must not change the tokens. "
                             f"Set data.{name} to {needed}, or tokenizer_training.train_parts to all.")


def fingerprint_of_initial_weights(path: str) -> str:
    """The full fingerprint of a tokenizer folder, or the sha256 of a checkpoint's checksums.json.

    Raises:
        InputError: see `locate_initial_weights`.
    """
    found = locate_initial_weights(path)
    if found.is_export:
        return found.config["full_fingerprint"]
    return hashlib.sha256((found.folder / "checksums.json").read_bytes()).hexdigest()


def _recorded_config(checkpoint: Path) -> dict[str, Any]:
    """{"network": fields, "transform": fields} from the stage record of the checkpoint's run. Empty if there is no such record."""
    parents = checkpoint.absolute().parents
    run = RunFolder(parents[2]) if len(parents) > 2 else None  # a checkpoint is <run_dir>/checkpoints/tokenizer/step-...
    if run is None or run.checkpoints("tokenizer") != parents[0]:
        return {}
    record = load_record(run, "tokenizer")
    if record is None:
        return {}
    data = {name: record.fields[f"data.{name}"] for name in DATA_FIELDS_THAT_DECIDE_TOKENS if record.fields.get(f"data.{name}") is not None}
    transform = DataConfig(**data).transform_config if {"image_size", "channels"} <= data.keys() else data
    return {"network": {name.partition(".")[2]: value for name, value in record.fields.items() if name.startswith("tokenizer.")},
            "transform": transform}
