"""What each stage of a run starts from, looked up without torch: where it lies, and its fingerprint."""

import json
from pathlib import Path

from token_shards.manifest import TokenShardManifest
from vqmosaic.durable_files import sha256_of_file
from vqmosaic.errors import InputError
from vqmosaic.recipe import Recipe


def tokenizer_folder(recipe: Recipe) -> Path:
    """The tokenizer that preprocessing uses: the recipe's, or this run's own."""
    return Path(recipe.tokens.tokenizer or Path(recipe.run_dir) / "tokenizer")


def tokens_folder(recipe: Recipe) -> Path:
    """The token shards that the prior is trained on: the recipe's, or this run's own."""
    return Path(recipe.prior_training.tokens or Path(recipe.run_dir) / "tokens")


def token_fingerprint_of_tokenizer(folder: Path) -> str:
    """The token fingerprint in a tokenizer's config.json; InputError where there is no tokenizer."""
    return _read(folder / "config.json", "tokenizer", "vqmosaic train-tokenizer")["token_fingerprint"]


def token_fingerprint_of_prior(folder: Path) -> str:
    """The token fingerprint in a prior's vocabulary.json; InputError where there is no prior."""
    return _read(folder / "vocabulary.json", "prior", "vqmosaic train-prior")["token_fingerprint"]


def _read(path: Path, what: str, command: str) -> dict:
    if not path.is_file():
        raise InputError(f"{path.parent} is no {what}: {path.name} is missing. `{command}` makes one.")
    return json.loads(path.read_text())


def inputs_of(recipe: Recipe, stage: str) -> dict[str, str]:
    """Name -> fingerprint of what a stage reads from other stages; InputError names what is missing. The data set is not looked at."""
    if stage == "tokens":
        return {"tokenizer": token_fingerprint_of_tokenizer(tokenizer_folder(recipe))}
    if stage == "prior":
        folder = tokens_folder(recipe)
        return {"tokens": TokenShardManifest.load(folder / "train").fingerprint,
                "validation tokens": TokenShardManifest.load(folder / "validation").fingerprint}
    if stage == "pipeline":
        tokenizer, prior = tokenizer_folder(recipe), Path(recipe.run_dir) / "prior"
        token_fingerprint_of_prior(prior)
        return {"tokenizer": _read(tokenizer / "config.json", "tokenizer", "vqmosaic train-tokenizer")["full_fingerprint"],
                "prior": sha256_of_file(prior / "model.safetensors")}
    return {}
