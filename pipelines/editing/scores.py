"""Scores: how many bits the priors of a pipeline need for the tokens of an image, in total and at each place of the grid."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from stage1_tokenizer.tokenizer_protocol import Tokenizer
from stage2_prior.generation.drawing_order import drawing_orders
from stage2_prior.generation.prior_chain import PriorChain
from token_shards.manifest import grid_columns
from vqmosaic.runs.out_of_memory import FittingBatches, ranges

MAX_LOGITS = 2**26
"""The largest number of logits that are in memory at a time: 256 MiB in float32."""
PARTS = 8
"""Number of parts of the tokens that priors for any order predict, each given all others. The tokens of a part are far from each other."""


class Scores(NamedTuple):
    """The bits of images: the negative logarithm to base 2 of their likelihood. More bits are more unusual."""

    bits: torch.Tensor
    """float32 (B,): the bits of each image."""
    bits_map: torch.Tensor | dict[str, torch.Tensor]
    """float32 (B, h, w): the bits at each place of the grid, which sum to `bits`. A dict by grid name if the tokenizer has several grids."""


def bits_of_tokens(tokenizer: Tokenizer, chain: PriorChain, ids_BT: torch.Tensor, class_indices: Sequence[int] | None,
                   given: Mapping[str, torch.Tensor], orders: Mapping[str, torch.Tensor] | None = None, minus_entropy: bool = False) -> torch.Tensor:
    """The bits (B, T) of the tokens of all grids, float32 on the CPU: each given the tokens before it in raster order.

    `orders` and `minus_entropy` are those of `PriorChain.token_nll`.
    """
    columns, vocabulary = grid_columns(tokenizer.grids), chain.vocabulary
    batch_size = max(1, MAX_LOGITS // (vocabulary.num_tokens * sum(grid.codebook_size for grid in vocabulary.grids)))

    def bits_in(part: range) -> torch.Tensor:
        batch = slice(part.start, part.stop)
        ids = {name: ids_BT[batch, places] for name, places in columns.items()}
        nll = chain.token_nll(ids, class_indices and class_indices[batch], {name: ids_Bn[batch] for name, ids_Bn in given.items()}, orders,
                              minus_entropy)
        return torch.cat([nll[name] for name in columns], dim=1).cpu() / math.log(2)

    return torch.cat([bits_BT for _, bits_BT in FittingBatches(tokenizer.device).run(ranges(len(ids_BT), batch_size), bits_in)])


def unexpected_bits(tokenizer: Tokenizer, chain: PriorChain, ids_BT: torch.Tensor, class_indices: Sequence[int] | None,
                    given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """How much more bits than expected (B, T) each token needs given the others: its bits minus the entropy of the prediction.

    Priors for any order predict a part of the tokens given all others, one part after another. Priors in raster order predict each token given those
    before it.
    """
    if not chain.any_order:
        return bits_of_tokens(tokenizer, chain, ids_BT, class_indices, given, minus_entropy=True)
    spread = {grid.name: torch.from_numpy(drawing_orders("spread", [grid], [0])[0]) for grid in tokenizer.grids}
    bits_BT, columns = torch.zeros(ids_BT.shape), grid_columns(tokenizer.grids)
    for number in range(PARTS):
        orders, is_last_T = {}, torch.zeros(ids_BT.shape[1], dtype=torch.bool)
        for name, places_n in spread.items():
            is_last_n = torch.zeros(len(places_n), dtype=torch.bool)
            is_last_n[places_n[number * len(places_n) // PARTS:(number + 1) * len(places_n) // PARTS]] = True
            orders[name] = is_last_n.int().argsort(stable=True)
            is_last_T[columns[name]] = is_last_n
        bits_BT = torch.where(is_last_T, bits_of_tokens(tokenizer, chain, ids_BT, class_indices, given, orders, minus_entropy=True), bits_BT)
    return bits_BT


def bits_of_tries(tokenizer: Tokenizer, chain: PriorChain, ids_BT: torch.Tensor, class_indices: Sequence[int] | None,
                  given: Mapping[str, torch.Tensor], evidence: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    """The bits (B,) by which tries for the same images are ranked: those of all their tokens, minus the evidence for them."""
    bits_B = bits_of_tokens(tokenizer, chain, ids_BT, class_indices, given).sum(dim=1)
    for name, columns in grid_columns(tokenizer.grids).items():
        if evidence is not None and name in evidence:
            observed_Bn1 = evidence[name].cpu().gather(-1, ids_BT[:, columns, None].cpu())
            bits_B = bits_B - observed_Bn1.flatten(1).sum(dim=1) / math.log(2)
    return bits_B


def scores_of_tokens(tokenizer: Tokenizer, bits_BT: torch.Tensor) -> Scores:
    """The scores of images for the bits of their tokens. The bits of several tokens at one place are added."""
    maps = {}
    for grid, columns in zip(tokenizer.grids, grid_columns(tokenizer.grids).values(), strict=True):
        maps[grid.name] = bits_BT[:, columns].reshape(-1, grid.height, grid.width, grid.depth).sum(dim=-1)
    return Scores(bits_BT.sum(dim=1), maps if len(maps) > 1 else next(iter(maps.values())))
