"""Start a training from the weights of an earlier one (tokenizer_training.init_from). Reads safetensors only, never a pickle."""

import re

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from stage1_tokenizer.find_initial_weights import FIELD, InitialWeights, check_same_network, check_same_transform, locate_initial_weights
from stage1_tokenizer.tokenizer import ImageTokenizer
from vqmosaic.errors import InputError
from vqmosaic.files.weights_fit import misfits
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig
from vqmosaic.training.checkpoints import broken_files

WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")
"""What the weight average, several processes and torch.compile put before the names in a checkpoint."""


def read_initial_weights(path: str, tokenizer_config: TokenizerConfig) -> dict[str, torch.Tensor]:
    """Tensors on the CPU by the names of ImageTokenizer's state_dict; those that only training needs are missing in an export.

    Args:
        path: a tokenizer folder, a training checkpoint (its weight average, where there is one) or a run folder.
        tokenizer_config: the network that the weights are for.

    Raises:
        ValueError: there are no such weights, they are damaged, or their network is known to be another one (both values of each field).
    """
    found = locate_initial_weights(path)
    check_same_network(found, tokenizer_config)
    if found.is_export:  # loaded as a tokenizer, so that its names, shapes and fingerprint are checked against its own config.json
        tokenizer = ImageTokenizer.from_pretrained(found.folder)
        left_out = tokenizer.training_only_names()
        return {name: tensor for name, tensor in tokenizer.state_dict().items() if name not in left_out}
    return read_checkpoint(found)


def read_checkpoint(found: InitialWeights) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint by plain names; InputError where it is not whole."""
    problems = broken_files(found.folder)
    if problems:
        raise InputError(f"{FIELD} leads to {found.folder}, which is no whole checkpoint: {'; '.join(problems)}. Give another one, or a "
                         "tokenizer folder.")
    try:
        weights = load_file(found.file)
    except SafetensorError as error:
        raise InputError(f"{FIELD} leads to {found.file}, which is no weight file ({error}); give another one.") from error
    return {WRAPPERS.sub("", name): tensor for name, tensor in weights.items() if name != "n_averaged"}


def check_tokens_stay(tokenizer: ImageTokenizer, path: str) -> None:
    """Raise InputError where a tokenizer with the weights of a path would give other tokens than they gave before, which a decoder alone must not.

    A checkpoint has no fingerprint to compare with, but what goes into one is compared: the size and channels of images here, network and weights
    when they were loaded.
    """
    found = locate_initial_weights(path)
    check_same_transform(found, tokenizer.transform.to_dict())
    if not found.is_export:
        return
    found_fingerprint, own = found.config["token_fingerprint"], tokenizer.fingerprint_of_tokens()
    if own != found_fingerprint:
        raise RuntimeError(f"the token fingerprint became {own} instead of {found_fingerprint}")


@torch.no_grad()
def load_initial_weights(tokenizer: ImageTokenizer, path: str) -> None:
    """Put the weights that a path leads to into a tokenizer; what its quantizer averages starts from them where the path holds no averages.

    Raises:
        ValueError: as `read_initial_weights`, and where weights are missing, unexpected or of another shape, which are listed.
    """
    found, own = read_initial_weights(path, tokenizer.config), tokenizer.state_dict()
    left_out = tokenizer.training_only_names() - found.keys()
    if problems := misfits(found, own, left_out):
        raise InputError(f"{FIELD} is {path!r}, whose weights do not fit the network of this recipe: {problems}. "
                         f"Set the fields of section tokenizer and data.channels as they were there, or {FIELD} to weights of this network.")
    tokenizer.load_state_dict(found | {name: own[name] for name in left_out})
    if left_out:
        tokenizer.quantizer.restart_averages()
