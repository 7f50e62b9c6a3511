"""Finds the inputs of each stage of a run: their folders and fingerprints. Needs no torch.

The token fingerprint of a tokenizer identifies the weights that determine its ids and latents. A prior records the token fingerprint of the
tokenizer whose ids it generates. The full fingerprint covers all weights, including the decoder.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from stage1_tokenizer.conditions.text_tokenizer import text_fingerprint
from stage1_tokenizer.tokenizer_config import is_tokenizer, read_tokenizer_config
from stage1_tokenizer.tokenizer_grids import grids_of_tokenizer
from stage2_prior.digests import fingerprint_of_weights
from stage2_prior.vocabulary import VOCABULARY_NAME, Vocabulary
from token_shards.manifest import TokenShardManifest
from vqmosaic.errors import InputError
from vqmosaic.files.json_files import read_object
from vqmosaic.files.permissions import check_readable
from vqmosaic.recipes.conditions import ConditionConfig
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.tokenizer_sections import CONTINUOUS_QUANTIZERS, QUANTIZER_NAMES
from vqmosaic.wording import counted

DISCRETE_QUANTIZERS = tuple(name for name in QUANTIZER_NAMES if name not in CONTINUOUS_QUANTIZERS)


def tokenizer_folder(recipe: Recipe) -> Path:
    """The folder of the tokenizer used in preprocessing: tokens.tokenizer of the recipe, or the tokenizer of this run."""
    return Path(recipe.tokens.tokenizer or Path(recipe.run_dir) / "tokenizer")


def condition_tokenizer_folder(recipe: Recipe, condition: ConditionConfig) -> Path:
    """The folder of the tokenizer of an image condition: the given one, or that of this run."""
    return Path(os.path.expanduser(condition.tokenizer or Path(recipe.run_dir) / "conditions" / condition.name / "tokenizer"))


def check_condition_tokenizer(recipe: Recipe, condition: ConditionConfig) -> None:
    """Raise InputError unless the tokenizer of an image condition exists, has one grid, and was trained on images like those of the condition."""
    folder = condition_tokenizer_folder(recipe, condition)
    where = f"data.conditions ({condition.name})"
    if condition.tokenizer is None and not (folder / "config.json").is_file():
        raise InputError(f"{where} has no tokenizer yet: {folder} does not exist. Train it with `vqmosaic run`, or with `vqmosaic train-tokenizer "
                         f"RECIPE --condition {condition.name}`, or set its field tokenizer to the folder of a trained one.")
    found = read_tokenizer_config(folder)["transform"]
    expected = dataclasses.replace(recipe.data, conditions=[], derived=condition.derivation()).transform_config
    for name in ("derived", "image_size", "channels", "value_range"):
        if found.get(name) != expected.get(name):
            raise InputError(f"{where} needs a tokenizer of images with {name} {as_text(expected.get(name))}, but that in {folder} was trained with "
                             f"{as_text(found.get(name))}. Give another tokenizer, or leave out its field tokenizer to train one.")
    grids = grids_of_tokenizer(folder)
    if len(grids) != 1:
        raise InputError(f"{where}: the tokenizer in {folder} has {counted(len(grids), 'grid')}; that of a condition must have one.")


def as_text(value: Any) -> str:
    """A value of a config.json for a message."""
    return "null" if value is None else json.dumps(value)


def condition_fingerprints(recipe: Recipe) -> dict[str, str]:
    """The inputs of the tokens stage that the conditions add: name -> token fingerprint of the tokenizer. Raises InputError for missing ones."""
    inputs = {}
    for condition in recipe.data.given_conditions:
        if condition.is_caption:
            inputs[f"tokenizer of {condition.name}"] = text_fingerprint(condition.text_tokenizer)
        else:
            check_condition_tokenizer(recipe, condition)
            inputs[f"tokenizer of {condition.name}"] = token_fingerprint_of_tokenizer(condition_tokenizer_folder(recipe, condition))
    return inputs


def condition_folders(recipe: Recipe) -> dict[str, Path]:
    """Name of a condition -> the folder of its tokenizer, given or of this run. Captions whose ids are bytes have none."""
    folders = {}
    for condition in recipe.data.given_conditions:
        if not condition.is_caption:
            folders[condition.name] = condition_tokenizer_folder(recipe, condition)
        elif condition.text_tokenizer is not None:
            folders[condition.name] = Path(os.path.expanduser(condition.text_tokenizer))
    return folders


def token_fingerprint_of_tokenizer(folder: Path) -> str:
    """The token fingerprint in a tokenizer's config.json. Raises InputError if there is no tokenizer."""
    return read_tokenizer_config(folder)["token_fingerprint"]


def full_fingerprint_of_tokenizer(folder: Path) -> str:
    """The full fingerprint in a tokenizer's config.json. Raises InputError if there is no tokenizer."""
    return read_tokenizer_config(folder)["full_fingerprint"]


def vocabulary_of_prior(folder: Path) -> Vocabulary:
    """The vocabulary of a prior, which records the token fingerprint. Raises InputError if there is no prior, or if it has no weights."""
    check_readable(folder / VOCABULARY_NAME, folder / "model.safetensors")
    for names in ((VOCABULARY_NAME,), ("model.safetensors", "model.safetensors.index.json")):  # large weights are in several files with an index
        if not any((folder / name).is_file() for name in names):
            raise InputError(f"{folder} is not a prior: {names[0]} is missing. `vqmosaic train-prior` writes one.")
    return Vocabulary.load(folder)


def predicts_in_any_order(prior: Path) -> bool:
    """Whether a prior was trained to predict tokens in any order, according to its config.json."""
    return bool(read_object(prior / "config.json", "train the prior again").get("query_blocks", 0))


def check_tokenizer_has_ids(recipe: Recipe, folder: Path | None) -> None:
    """Raise InputError if the tokenizer used in preprocessing has no ids.

    Args:
        recipe: its tokenizer section is checked, unless it takes the tokenizer from another folder (tokens.tokenizer).
        folder: folder of the tokenizer, whose config.json is checked too. None if the tokenizer is not trained yet.
    """
    for level in recipe.tokenizer.levels.values() if recipe.tokens.tokenizer is None else ():
        if not level.has_ids:
            raise InputError(f"{level.SECTION}.quantizer is {level.quantizer!r}, whose latents are continuous. Token shards and priors need "
                             f"discrete ids. Set it to one of: {', '.join(DISCRETE_QUANTIZERS)}. (train-tokenizer and reconstruct work without ids.)")
    if folder is not None and not grids_of_tokenizer(folder):
        raise InputError(f"The tokenizer in {folder} has no ids, so there are no tokens. Set tokens.tokenizer to a tokenizer with ids.")


def input_fingerprints(recipe: Recipe, stage: str) -> dict[str, str]:
    """The inputs that a stage takes from other stages, as name -> fingerprint, without the data set. Raises InputError for missing inputs."""
    if stage == "tokens":
        return {"tokenizer": token_fingerprint_of_tokenizer(tokenizer_folder(recipe)), **condition_fingerprints(recipe)}
    if stage == "prior":
        folder = recipe.tokens_folder
        return {"tokens": TokenShardManifest.load(folder / "train").fingerprint,
                "validation tokens": TokenShardManifest.load(folder / "validation").fingerprint}
    if stage == "pipeline":
        tokenizer, prior = tokenizer_folder(recipe), Path(recipe.run_dir) / "prior"
        vocabulary_of_prior(prior)  # raises InputError if there is no prior
        conditions = {f"condition {name}": token_fingerprint_of_tokenizer(folder) for name, folder in condition_folders(recipe).items()
                      if (folder / "config.json").is_file() and is_tokenizer(folder)}
        return {"tokenizer": full_fingerprint_of_tokenizer(tokenizer), "prior": fingerprint_of_weights(prior), **conditions}
    return {}
