"""The cache of a call of GridTransformer.forward, and the positions, rotations and mask that follow from it.

`past_length` is the number of ids in the cache: an int, or for a static cache a tensor on the device, which the first block changes.
In comments: S new positions, p pairs of a head.
"""

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig

from stage2_prior.model.forward_arguments import check_length
from vqmosaic.errors import InputError


def choose_cache(config: PreTrainedConfig, cache: Cache | None, length: int, use_cache: bool | None, labels: torch.Tensor | None,
                 checkpoints: bool) -> Cache | None:
    """The given cache, a new one, or None: by default, none with labels or gradient checkpointing. Raises InputError if `length` ids do not fit."""
    if use_cache is None:
        use_cache = config.use_cache and labels is None and not checkpoints
    if checkpoints and (use_cache or cache is not None):
        raise InputError("Training with gradient checkpointing cannot use a cache. Set use_cache False, or call eval() first.")
    if cache is None and use_cache:
        cache = DynamicCache()
    check_length(cache, length, config.max_position_embeddings)
    return cache


def count_keys(cache: Cache | None, length: int) -> tuple[int | torch.Tensor, int]:
    """`past_length`, and the number of all keys of attention (filled or not), which is 0 without a cache."""
    past_length, num_keys = 0, 0
    if cache is not None:
        past_length, (num_keys, _) = cache.get_seq_length(), cache.get_mask_sizes(length, 0)
    return past_length, num_keys


def new_positions(past_length: int | torch.Tensor, length: int, device: torch.device) -> torch.Tensor:
    """Positions (S,) of the new ids."""
    if isinstance(past_length, torch.Tensor):
        return torch.arange(length, device=device) + past_length
    return torch.arange(past_length, past_length + length, device=device)


def select_rotations(tables: torch.Tensor, positions_S: torch.Tensor, past_length: int | torch.Tensor, length: int) -> torch.Tensor:
    """The rotations (S, 2, p, 2) of the new positions; a view unless the cache is static."""
    return tables[positions_S if isinstance(past_length, torch.Tensor) else slice(past_length, past_length + length)]


def causal_mask(positions_S: torch.Tensor, past_length: int | torch.Tensor, length: int, num_keys: int) -> torch.Tensor | None:
    """The keys (S, keys) that each new position attends to, or None if torch's causal attention or attention to all keys is the same."""
    if isinstance(past_length, torch.Tensor) or num_keys > past_length + length or (past_length and length > 1):
        return torch.arange(num_keys, device=positions_S.device) <= positions_S[:, None]
    return None


def mask_of_all(past_length: int | torch.Tensor, length: int, num_keys: int, device: torch.device) -> torch.Tensor | None:
    """The keys (1, keys) that are filled, for queries that attend to all of them. None if all keys are filled."""
    if isinstance(past_length, torch.Tensor) or num_keys > past_length + length:
        return (torch.arange(num_keys, device=device) < past_length + length)[None]
    return None
