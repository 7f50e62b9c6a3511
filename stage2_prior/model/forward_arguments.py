"""Checks of the arguments of GridTransformer.forward: an unsupported argument is an error, and no argument is ignored.

In comments: B batch, S sequence (class token and tokens), K codes.
"""

from typing import Any

import torch
from transformers import Cache, EncoderDecoderCache, PreTrainedConfig

from stage2_prior.model.text_embedding import text_slices
from vqmosaic.errors import InputError

REASONS = {
    "inputs_embeds": "each block looks up its own embeddings by id, so the model needs input_ids",
    "position_ids": "positions follow from the order of the ids and from the cache; leave it out",
    "output_attentions": "attention weights are never materialized; use output_hidden_states, or leave it out",
}
IGNORED_LABEL = -100
"""The label of positions that the loss ignores, as in transformers."""


def check_call(config: PreTrainedConfig, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, labels: torch.Tensor | None,
               logits_to_keep: int | torch.Tensor, output_hidden_states: bool | None, others: dict[str, Any]) -> bool:
    """Check all arguments but the cache. Returns `output_hidden_states`, or that of the configuration if it is None."""
    if output_hidden_states is None:
        output_hidden_states = config.output_hidden_states
    others.setdefault("output_attentions", config.output_attentions)
    check_arguments(input_ids, attention_mask, output_hidden_states, others)
    assert input_ids is not None
    if labels is not None:
        check_labels(labels, input_ids, logits_to_keep, config.num_codes)
    return bool(output_hidden_states)


def check_arguments(input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, output_hidden_states: bool | None,
                    others: dict[str, Any]) -> None:
    """Raise InputError unless there are ids, the mask is all ones, and `others` is empty. Arguments that are None or False count as not given."""
    for name in [name for name, value in others.items() if value is not None and value is not False]:
        raise InputError(f"A grid_transformer does not support the argument {name}: {REASONS.get(name, 'it is unknown; leave it out')}.")
    if not isinstance(output_hidden_states, bool):
        raise InputError(f"output_hidden_states is {output_hidden_states!r}; allowed: True, to return the hidden states of all blocks, and False.")
    if input_ids is None or input_ids.dim() != 2:
        raise InputError(f"input_ids is {'missing' if input_ids is None else f'of shape {tuple(input_ids.shape)}'}; a grid_transformer needs ids of "
                         "shape (batch, sequence).")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise InputError(f"attention_mask has {attention_mask.dim()} dimensions; a grid_transformer builds its own causal mask, so only a mask of "
                         "shape (batch, sequence) that is all ones is allowed. Leave it out.")
    if attention_mask is not None and not attention_mask.is_meta and not bool(attention_mask.all()):
        raise InputError("attention_mask has zeros; a grid_transformer has no padding, since all sequences of a grid have the same length. Give "
                         "sequences of one length and leave attention_mask out.")


def check_length(cache: Cache | None, length: int, max_length: int) -> None:
    """Raise InputError for a cache with a sliding window or without room for `length` more ids, and for more than `max_length` ids in total.

    The number of ids in a static cache is known only on the device. If there are too many, torch raises an IndexError.
    """
    past_length, room = 0, max_length
    if cache is not None:
        if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
            raise InputError(f"past_key_values is a {type(cache).__name__}; allowed: caches of transformers for decoders, such as DynamicCache and "
                             "StaticCache.")
        if any(cache.is_sliding):
            raise InputError("past_key_values has a sliding window; in a grid_transformer each token attends to all tokens before it. Use a cache "
                             "without a window.")
        past_length, room = cache.get_seq_length(), cache.get_max_length(0)
        past_length = 0 if isinstance(past_length, torch.Tensor) else past_length
    if past_length + length > max_length:
        raise InputError(f"The sequence has {past_length + length} ids, including those in the cache; allowed: {max_length}, the class and the "
                         "tokens of all grids.")
    if 0 <= room < past_length + length:
        raise InputError(f"past_key_values has room for {room} ids, but needs room for {past_length + length}; use max_cache_len {max_length}.")


def check_labels(labels: torch.Tensor, input_ids: torch.Tensor, logits_to_keep: int | torch.Tensor, num_codes: int) -> None:
    """Raise InputError unless labels have the shape (B, S) of the ids and, apart from the first of each row, are codes or IGNORED_LABEL.

    Values are not checked while torch.compile traces the model, and on the device `meta`.
    """
    if labels.shape != input_ids.shape:
        raise InputError(f"labels have the shape {tuple(labels.shape)} and input_ids {tuple(input_ids.shape)}; give labels of the same shape. They "
                         "are shifted inside the model.")
    if not isinstance(logits_to_keep, int) or logits_to_keep:
        raise InputError("Both labels and logits_to_keep are given; the loss needs the logits of all positions. Leave one of them out.")
    if labels.is_meta or torch.compiler.is_compiling():
        return
    targets = labels[:, 1:]
    invalid = targets[((targets < 0) | (targets >= num_codes)) & (targets != IGNORED_LABEL)]
    if len(invalid):
        raise InputError(f"labels hold {int(invalid[0])} after the first position; allowed: codes from 0 to {num_codes - 1}, and {IGNORED_LABEL} for "
                         "positions to ignore. A class is never predicted: it stands first, and the first label is not used.")


def check_targets(config: PreTrainedConfig, input_ids: torch.Tensor | None, places: torch.Tensor | None, targets: torch.Tensor | None,
                  labels: torch.Tensor | None, cache: Cache | None) -> None:
    """Raise InputError unless places and targets are either both missing, or fit the ids and a model with query blocks."""
    assert input_ids is not None
    if places is None and targets is None:
        return
    if not config.query_blocks:
        raise InputError("places and targets are given, but this grid_transformer predicts tokens only in raster order: it has no query_blocks. "
                         "Leave them out.")
    if places is None or targets is None or places.shape != input_ids.shape or targets.dim() != 2 or len(targets) != len(input_ids):
        shapes = ["missing" if given is None else str(tuple(given.shape)) for given in (places, targets)]
        raise InputError(f"places is {shapes[0]} and targets is {shapes[1]}; give both, places of the shape {tuple(input_ids.shape)} of input_ids, "
                         f"and targets of shape ({len(input_ids)}, number of places to predict).")
    if cache is None and targets.shape != input_ids.shape:
        raise InputError(f"targets has the shape {tuple(targets.shape)}; without a cache, each id predicts one target, so give the shape "
                         f"{tuple(input_ids.shape)} of input_ids.")
    if labels is not None:
        raise InputError("Both labels and targets are given; labels are for raster order. Leave one of them out.")


def check_texts(config: PreTrainedConfig, past_length: int | torch.Tensor) -> None:
    """Raise InputError if the cache holds a part of the texts: their n-grams need all bytes in one call. Static caches cannot be checked."""
    if config.text_ngram_rows and isinstance(past_length, int) and 0 < past_length < text_slices(config.given)[-1].stop:
        raise InputError(f"The cache holds {past_length} ids, which end before or inside of a text. Give the class and all conditions in the first "
                         "call, without prefill_chunk_size.")
