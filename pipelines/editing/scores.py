"""Scores: how many bits the priors of a pipeline need for the tokens of an image, in total and at each place of the grid."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from stage1_tokenizer.tokenizer_protocol import Tokenizer
from stage2_prior.generation.prior_chain import PriorChain
from token_shards.manifest import grid_columns
from vqmosaic.runs.out_of_memory import FittingBatches, ranges

MAX_LOGITS = 2**26
"""The largest number of logits that are in memory at a time: 256 MiB in float32."""


class Scores(NamedTuple):
    """The bits of images: the negative logarithm to base 2 of their likelihood. More bits are more unusual."""

    bits: torch.Tensor
    """float32 (B,): the bits of each image."""
    bits_map: torch.Tensor | dict[str, torch.Tensor]
    """float32 (B, h, w): the bits at each place of the grid, which sum to `bits`. A dict by grid name if the tokenizer has several grids."""


def bits_of_tokens(tokenizer: Tokenizer, chain: PriorChain, ids_BT: torch.Tensor, class_indices: Sequence[int] | None,
                   given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The bits (B, T) of the tokens of all grids, float32 on the CPU: each given the tokens before it in raster order."""
    columns, vocabulary = grid_columns(tokenizer.grids), chain.vocabulary
    batch_size = max(1, MAX_LOGITS // (vocabulary.num_tokens * sum(grid.codebook_size for grid in vocabulary.grids)))

    def bits_in(part: range) -> torch.Tensor:
        batch = slice(part.start, part.stop)
        ids = {name: ids_BT[batch, places] for name, places in columns.items()}
        nll = chain.token_nll(ids, class_indices and class_indices[batch], {name: ids_Bn[batch] for name, ids_Bn in given.items()})
        return torch.cat([nll[name] for name in columns], dim=1).cpu() / math.log(2)

    return torch.cat([bits_BT for _, bits_BT in FittingBatches(tokenizer.device).run(ranges(len(ids_BT), batch_size), bits_in)])


def scores_of_tokens(tokenizer: Tokenizer, bits_BT: torch.Tensor) -> Scores:
    """The scores of images for the bits of their tokens. The bits of several tokens at one place are added."""
    maps = {}
    for grid, columns in zip(tokenizer.grids, grid_columns(tokenizer.grids).values(), strict=True):
        maps[grid.name] = bits_BT[:, columns].reshape(-1, grid.height, grid.width, grid.depth).sum(dim=-1)
    return Scores(bits_BT.sum(dim=1), maps if len(maps) > 1 else next(iter(maps.values())))
