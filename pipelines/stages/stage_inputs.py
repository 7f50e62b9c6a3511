"""Finds the inputs of each stage of a run: their folders and fingerprints. Needs no torch.

The token fingerprint of a tokenizer identifies the weights that determine its ids and latents. A prior records the token fingerprint of the
tokenizer whose ids it generates. The full fingerprint covers all weights, including the decoder.
"""

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
    return _read_tokenizer_config(folder)["token_fingerprint"]


def full_fingerprint_of_tokenizer(folder: Path) -> str:
    """The full fingerprint in a tokenizer's config.json. Raises InputError if there is no tokenizer."""
    content = _read_tokenizer_config(folder)
    if "full_fingerprint" not in content:
        raise InputError(f"{folder / 'config.json'} has no full_fingerprint. Copy the tokenizer again from its original folder.")
    return content["full_fingerprint"]


def token_fingerprint_of_prior(folder: Path) -> str:
    """The token fingerprint in a prior's vocabulary.json. Raises InputError if there is no prior."""
    return read_vocabulary(folder)["token_fingerprint"]


def read_vocabulary(folder: Path) -> dict:
    """The content of a prior's vocabulary.json. Raises InputError if there is no prior."""
    return _read_description(folder / "vocabulary.json", "prior", "vqmosaic train-prior")


def check_tokenizer_has_ids(recipe: Recipe, folder: Path | None) -> None:
    """Raise InputError if the tokenizer used in preprocessing has a continuous quantizer.

    Args:
        recipe: its tokenizer section is checked, unless it takes the tokenizer from another folder (tokens.tokenizer).
        folder: folder of the tokenizer, whose config.json is checked too. None if the tokenizer is not trained yet.
    """
    def continuous_error(subject: str, quantizer: str, remedy: str) -> InputError:
        return InputError(f"{subject} is {quantizer!r}, whose latents are continuous. Token shards and priors need discrete ids. "
                          f"{remedy} one of: {', '.join(DISCRETE_QUANTIZERS)}. (train-tokenizer and reconstruct work without ids.)")

    if recipe.tokens.tokenizer is None and recipe.tokenizer.quantizer in CONTINUOUS_QUANTIZERS:
        raise continuous_error("tokenizer.quantizer", recipe.tokenizer.quantizer, "Set it to")
    if folder is None:
        return
    network = _read_tokenizer_config(folder).get("network")
    if isinstance(network, dict) and network.get("quantizer") in CONTINUOUS_QUANTIZERS:
        raise continuous_error(f"tokenizer.quantizer of the tokenizer in {folder}", network["quantizer"],
                               "Set tokens.tokenizer to the folder of a tokenizer with")


def _read_tokenizer_config(folder: Path) -> dict:
    """The content of a tokenizer's config.json. Raises InputError if there is no tokenizer."""
    return _read_description(folder / "config.json", "tokenizer", "vqmosaic train-tokenizer")


def _read_description(path: Path, part: str, command: str) -> dict:
    """The content of the JSON file of a tokenizer or prior. Raises InputError if it has no token fingerprint, or if the weights are missing.

    Args:
        part: "tokenizer" or "prior". The weights of a prior may be split over several files.
        command: the command that writes this part, for the error message.
    """
    check_readable(path, path.parent / "model.safetensors")
    for name in (path.name, "model.safetensors"):
        is_split = name == "model.safetensors" and part == "prior" and (path.parent / f"{name}.index.json").is_file()
        if not (path.parent / name).is_file() and not is_split:
            raise InputError(f"{path.parent} is not a {part}: {name} is missing. `{command}` writes one.")
    content = read_object(path, f"copy the {part} again from its original folder")
    if "token_fingerprint" not in content:
        raise InputError(f"{path.parent} is not a {part}: {path.name} has no token_fingerprint. `{command}` writes one.")
    return content


def input_fingerprints(recipe: Recipe, stage: str) -> dict[str, str]:
    """The inputs that a stage takes from other stages, as name -> fingerprint, without the data set. Raises InputError for missing inputs."""
    if stage == "tokens":
        return {"tokenizer": token_fingerprint_of_tokenizer(tokenizer_folder(recipe))}
    if stage == "prior":
        folder = recipe.tokens_folder
        return {"tokens": TokenShardManifest.load(folder / "train").fingerprint,
                "validation tokens": TokenShardManifest.load(folder / "validation").fingerprint}
    if stage == "pipeline":
        tokenizer, prior = tokenizer_folder(recipe), Path(recipe.run_dir) / "prior"
        read_vocabulary(prior)  # raises InputError if there is no prior
        return {"tokenizer": full_fingerprint_of_tokenizer(tokenizer),
                "prior": fingerprint_of_weights(prior)}
    return {}
