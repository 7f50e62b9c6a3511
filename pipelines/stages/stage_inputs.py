"""Finds the inputs of each stage of a run: their folders and fingerprints. Needs no torch."""

from pathlib import Path

from stage2_prior.digests import fingerprint_of_weights
from token_shards.manifest import TokenShardManifest
from vqmosaic.errors import InputError
from vqmosaic.files.json_files import read_object
from vqmosaic.files.permissions import check_readable
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.tokenizer_sections import CONTINUOUS_QUANTIZERS, QUANTIZER_NAMES

DISCRETE_QUANTIZERS = tuple(name for name in QUANTIZER_NAMES if name not in CONTINUOUS_QUANTIZERS)


def tokenizer_folder(recipe: Recipe) -> Path:
    """The folder of the tokenizer used in preprocessing: tokens.tokenizer of the recipe, or the tokenizer of this run."""
    return Path(recipe.tokens.tokenizer or Path(recipe.run_dir) / "tokenizer")


def token_fingerprint_of_tokenizer(folder: Path) -> str:
    """The token fingerprint in a tokenizer's config.json. Raises InputError if there is no tokenizer."""
    return _read(folder / "config.json", "tokenizer", "vqmosaic train-tokenizer")["token_fingerprint"]


def full_fingerprint_of_tokenizer(folder: Path) -> str:
    """The full fingerprint in a tokenizer's config.json. Raises InputError if there is no tokenizer."""
    content = _read(folder / "config.json", "tokenizer", "vqmosaic train-tokenizer")
    if "full_fingerprint" not in content:
        raise InputError(f"{folder / 'config.json'} has no full_fingerprint. Copy the tokenizer again from its original folder.")
    return content["full_fingerprint"]


def token_fingerprint_of_prior(folder: Path) -> str:
    """The token fingerprint in a prior's vocabulary.json. Raises InputError if there is no prior."""
    return read_vocabulary(folder)["token_fingerprint"]


def read_vocabulary(folder: Path) -> dict:
    """The content of a prior's vocabulary.json. Raises InputError if there is no prior."""
    return _read(folder / "vocabulary.json", "prior", "vqmosaic train-prior")


def check_tokenizer_has_ids(recipe: Recipe, folder: Path | None) -> None:
    """Raise InputError if the tokenizer used in preprocessing has a continuous quantizer, according to the recipe or config.json in `folder`."""
    def continuous_error(what: str, field: str) -> InputError:
        return InputError(f"{what} is {CONTINUOUS_QUANTIZERS[0]!r}, whose latents are continuous. Token shards and priors need discrete ids. "
                          f"Set {field} one of: {', '.join(DISCRETE_QUANTIZERS)}. (train-tokenizer and reconstruct work without ids.)")

    if recipe.tokens.tokenizer is None and recipe.tokenizer.quantizer in CONTINUOUS_QUANTIZERS:
        raise continuous_error("tokenizer.quantizer", "it to")
    if folder is None:
        return
    network = _read(folder / "config.json", "tokenizer", "vqmosaic train-tokenizer").get("network")
    if isinstance(network, dict) and network.get("quantizer") in CONTINUOUS_QUANTIZERS:
        raise continuous_error(f"tokenizer.quantizer of the tokenizer in {folder}", "tokens.tokenizer to the folder of a tokenizer with")


def _read(path: Path, what: str, command: str) -> dict:
    check_readable(path, path.parent / "model.safetensors")
    for name in (path.name, "model.safetensors"):
        in_parts = name == "model.safetensors" and what == "prior" and (path.parent / f"{name}.index.json").is_file()
        if not (path.parent / name).is_file() and not in_parts:
            raise InputError(f"{path.parent} is not a {what}: {name} is missing. `{command}` writes one.")
    content = read_object(path, f"copy the {what} again from its original folder")
    if "token_fingerprint" not in content:
        raise InputError(f"{path.parent} is not a {what}: {path.name} has no token_fingerprint. `{command}` writes one.")
    return content


def inputs_of(recipe: Recipe, stage: str) -> dict[str, str]:
    """Name -> fingerprint of the inputs of a stage from other stages, without the data set. Raises InputError for missing inputs."""
    if stage == "tokens":
        return {"tokenizer": token_fingerprint_of_tokenizer(tokenizer_folder(recipe))}
    if stage == "prior":
        folder = recipe.tokens_folder
        return {"tokens": TokenShardManifest.load(folder / "train").fingerprint,
                "validation tokens": TokenShardManifest.load(folder / "validation").fingerprint}
    if stage == "pipeline":
        tokenizer, prior = tokenizer_folder(recipe), Path(recipe.run_dir) / "prior"
        token_fingerprint_of_prior(prior)
        return {"tokenizer": full_fingerprint_of_tokenizer(tokenizer),
                "prior": fingerprint_of_weights(prior)}
    return {}
