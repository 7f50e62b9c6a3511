"""Loads the initial weights for fine-tuning (tokenizer_training.init_from). Reads safetensors only, never a pickle."""

import re

import torch

from stage1_tokenizer.find_initial_weights import FIELD, InitialWeights, check_same_network, check_same_transform, locate_initial_weights
from stage1_tokenizer.tokenizer_protocol import load_tokenizer
from stage1_tokenizer.trainable.trainable_tokenizer import TrainableTokenizer
from vqmosaic.errors import InputError
from vqmosaic.files.weight_files import WeightFileError, read_weight_file
from vqmosaic.files.weights_fit import describe_mismatches
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig
from vqmosaic.training.checkpoints import checkpoint_problems

WRAPPER_PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")
"""Prefixes that the weight average, DistributedDataParallel and torch.compile add to the names in a checkpoint."""


def read_initial_weights(path: str, tokenizer_config: TokenizerConfig) -> dict[str, torch.Tensor]:
    """CPU tensors by state_dict name of the tokenizer. An export lacks the tensors that only training needs.

    Args:
        path: a tokenizer folder, a training checkpoint (its weight average, if it has one) or a run folder.
        tokenizer_config: the network that loads the weights.

    Raises:
        ValueError: the weights are missing or damaged, or their recorded network differs (the message lists both values of each field).
    """
    found = locate_initial_weights(path)
    check_same_network(found, tokenizer_config)
    if found.is_export:  # from_pretrained checks names, shapes and fingerprint against config.json
        tokenizer = load_tokenizer(found.folder)
        training_only = tokenizer.training_only_names()
        return {name: tensor for name, tensor in tokenizer.state_dict().items() if name not in training_only}
    return read_checkpoint(found)


def read_checkpoint(found: InitialWeights) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint, by names without wrapper prefixes. Raises InputError if the checkpoint is damaged."""
    problems = checkpoint_problems(found.folder)
    if problems:
        raise InputError(f"{FIELD} leads to {found.folder}, which is a damaged checkpoint: {'; '.join(problems)}. Give another one, or a "
                         "tokenizer folder.")
    try:
        weights = read_weight_file(found.file)
    except WeightFileError as error:
        raise InputError(f"{FIELD} leads to {found.file}, which is not a weight file ({error}). Give another one.") from error
    return {WRAPPER_PREFIXES.sub("", name): tensor for name, tensor in weights.items() if name != "n_averaged"}


def check_tokens_unchanged(tokenizer: TrainableTokenizer, path: str) -> None:
    """Raise InputError if a tokenizer that loaded the weights at a path gives other tokens than the original. For train_parts decoder.

    A checkpoint has no fingerprint to compare with. This function compares the image transforms instead; network and weights were checked on
    loading.
    """
    found = locate_initial_weights(path)
    check_same_transform(found, tokenizer.transform.to_dict())
    if not found.is_export:
        return
    found_fingerprint, own = found.config["token_fingerprint"], tokenizer.fingerprint_of_tokens()
    if own != found_fingerprint:
        raise RuntimeError(f"the token fingerprint is {own}, expected {found_fingerprint}")


@torch.no_grad()
def load_initial_weights(tokenizer: TrainableTokenizer, path: str) -> None:
    """Load the weights at a path into a tokenizer. If they lack the quantizers' moving averages, those restart from the loaded codes.

    Raises:
        ValueError: see `read_initial_weights`; also lists weights that are missing, unexpected or of the wrong shape.
    """
    found, own = read_initial_weights(path, tokenizer.config), tokenizer.state_dict()
    training_only = tokenizer.training_only_names() - found.keys()
    if problems := describe_mismatches(found, own, training_only):
        raise InputError(f"{FIELD} is {path!r}, whose weights do not fit the network of this recipe: {problems}. "
                         f"Set the tokenizer fields and data.channels to the values of the weights, or {FIELD} to weights of this network.")
    tokenizer.load_state_dict(found | {name: own[name] for name in training_only})
    if training_only:
        tokenizer.after_loading()
