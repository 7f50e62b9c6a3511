"""Finds the inputs of each stage of a run: their folders and fingerprints. Needs no torch.

The token fingerprint of a tokenizer identifies the weights that determine its ids and latents. A prior records the token fingerprint of the
tokenizer whose ids it generates. The full fingerprint covers all weights, including the decoder.
"""

from pathlib import Path

from stage1_tokenizer.tokenizer_config import is_tokenizer, read_tokenizer_config
from stage1_tokenizer.tokenizer_grids import grids_of_tokenizer
from stage2_prior.digests import fingerprint_of_weights
from stage2_prior.recipe_vocabulary import token_inputs
from stage2_prior.vocabulary import VOCABULARY_NAME, Vocabulary
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


def condition_folders(recipe: Recipe) -> dict[str, Path]:
    """Name of a condition -> the folder of its tokenizer: a given one, or that of this run. Captions whose ids are bytes have none."""
    folders = {}
    for condition in recipe.data.given_conditions:
        if condition.is_caption:
            given = condition.text_tokenizer
        else:
            given = condition.tokenizer or str(Path(recipe.run_dir) / "conditions" / condition.name / "tokenizer")
        if given is not None:
            folders[condition.name] = Path(given).expanduser()
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
    if recipe.tokens.tokenizer is None and recipe.tokenizer.quantizer in CONTINUOUS_QUANTIZERS:
        raise InputError(f"tokenizer.quantizer is {recipe.tokenizer.quantizer!r}, whose latents are continuous. Token shards and priors need "
                         f"discrete ids. Set it to one of: {', '.join(DISCRETE_QUANTIZERS)}. (train-tokenizer and reconstruct work without ids.)")
    if folder is not None and not grids_of_tokenizer(folder):
        raise InputError(f"The tokenizer in {folder} has no ids, so there are no tokens. Set tokens.tokenizer to a tokenizer with ids.")


def input_fingerprints(recipe: Recipe, stage: str) -> dict[str, str]:
    """The inputs that a stage takes from other stages, as name -> fingerprint, without the data set. Raises InputError for missing inputs."""
    if stage == "tokens":
        return {"tokenizer": token_fingerprint_of_tokenizer(tokenizer_folder(recipe))}
    if stage == "prior":
        folder = recipe.tokens_folder
        return token_inputs(recipe, TokenShardManifest.load(folder / "train"), TokenShardManifest.load(folder / "validation"))
    if stage == "pipeline":
        tokenizer, prior = tokenizer_folder(recipe), Path(recipe.run_dir) / "prior"
        vocabulary_of_prior(prior)  # raises InputError if there is no prior
        conditions = {f"condition {name}": token_fingerprint_of_tokenizer(folder) for name, folder in condition_folders(recipe).items()
                      if (folder / "config.json").is_file() and is_tokenizer(folder)}
        return {"tokenizer": full_fingerprint_of_tokenizer(tokenizer), "prior": fingerprint_of_weights(prior), **conditions}
    return {}
