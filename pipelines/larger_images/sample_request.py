"""Samples the tokens of a checked request: of several tries for an image the most likely one, and larger images window by window."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from pipelines.editing.scores import bits_of_tries
from pipelines.generation_request import Request, tries_seeds
from pipelines.larger_images.sliding_windows import LargerTokens, Report, given_in_window, sample_windows
from stage1_tokenizer.tokenizer_protocol import Ids, Tokenizer, pick_ids
from stage2_prior.generation.prior_chain import PriorChain


class Draw(Protocol):
    """Samples images of the training size."""

    def __call__(self, seeds: Sequence[int], known_BT: torch.Tensor | None, given: Mapping[str, torch.Tensor], callback: Report | None) -> Ids:
        """The ids of all grids for the seed of each image, with the known tokens (B, T), UNKNOWN where to draw."""


def sample_request(tokenizer: Tokenizer, chain: PriorChain, request: Request, draw: Draw, callback: Report | None) -> tuple[Ids, list[int]]:
    """The ids of a request and the seed of each image. Of several tries for an image, the most likely one."""
    seeds_KB = tries_seeds(request.seeds, request.num_tries)
    tries_K, bits_KB = [], []
    for number, seeds in enumerate(seeds_KB):
        def report(done: int, total: int, number: int = number) -> bool | None:
            assert callback is not None  # otherwise this function is not passed on
            return callback(number * total + done, request.num_tries * total)

        ids, bits_of_images = sample_once(tokenizer, chain, request, seeds, draw, report if callback is not None else None)
        if request.num_tries == 1:
            return ids, seeds
        tries_K.append(ids)
        bits_KB.append(bits_of_images())
    best_B = torch.stack(bits_KB).argmin(dim=0).tolist()
    return pick_ids(tries_K, best_B), [seeds_KB[best][image] for image, best in enumerate(best_B)]


def sample_once(tokenizer: Tokenizer, chain: PriorChain, request: Request, seeds: Sequence[int], draw: Draw,
                callback: Report | None) -> tuple[Ids, Callable[[], torch.Tensor]]:
    """The ids of a request for these seeds, and a function that returns the bits (B,) of the images. Those of larger images sum over the windows."""
    def bits_of(ids_BT: torch.Tensor, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return bits_of_tries(tokenizer, chain, ids_BT, request.classes, given, request.evidence)

    tiling = request.tiling
    if tiling is None:
        ids = draw(seeds, request.known_BT, request.given, callback)
        return ids, lambda: bits_of(tokenizer.join_tokens(ids), request.given)
    tokens = LargerTokens(tiling, tokenizer.grids, len(seeds), tokenizer.device, request.known_BT)
    sample_windows(tokens, seeds, lambda place, own_seeds, known_BT, report: tokenizer.join_tokens(
        draw(own_seeds, known_BT, given_in_window(request.given, tiling, place), report)), callback)
    return tokens.public(), lambda: torch.stack([bits_of(tokens.window(place), given_in_window(request.given, tiling, place))
                                                 for place in tiling.places]).sum(dim=0)
