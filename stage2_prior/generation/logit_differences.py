"""Measures the difference between the logits used in sampling and those of the float32 model: the cost of a narrower dtype or a faster path."""

from collections.abc import Mapping, Sequence

import torch

from stage2_prior.generation.decoding import make_decoder
from stage2_prior.generation.sampling import evaluation_mode
from stage2_prior.given_ids import start_ids
from stage2_prior.prior import TokenPrior


def step_logits(prior: TokenPrior, ids_BT: torch.Tensor, class_indices: Sequence[int],
                given: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Float32 logits (B, T, K), computed step by step as in sampling, for given ids."""
    vocabulary, device = prior.vocabulary, next(prior.parameters()).device
    ids_BT = ids_BT.to(device)
    start_BP = start_ids(vocabulary, torch.tensor(class_indices, dtype=torch.int64, device=device), given, ids_BT)
    ids_B, first, rows = start_BP[:, -1], start_BP.shape[1] - 1, []
    with torch.inference_mode(), evaluation_mode(prior.model):
        decoder = make_decoder(prior.model, vocabulary.num_codes, len(ids_BT), first + vocabulary.num_tokens)
        for place in range(first):  # the class and the conditions
            decoder.step(start_BP[:, place], place)
        for position, (start, stop) in enumerate(vocabulary.position_ranges()):
            rows.append(torch.nn.functional.pad(decoder.step(ids_B, first + position)[:, start:stop].float(),
                                                (0, vocabulary.most_codes - (stop - start)), value=-torch.inf))
            ids_B = vocabulary.to_vocabulary_at(position, ids_BT[:, position])
    return torch.stack(rows, dim=1)


def largest_logit_difference(prior: TokenPrior, reference: TokenPrior, ids_BT: torch.Tensor, class_indices: Sequence[int],
                             given: Mapping[str, torch.Tensor] | None = None) -> float:
    """The largest difference between the logits of `prior`, computed as in sampling, and those of `reference` in one forward pass, for given ids."""
    device = next(reference.parameters()).device
    with torch.inference_mode(), evaluation_mode(reference.model):
        expected_BTK = reference(ids_BT.to(device), torch.tensor(class_indices, dtype=torch.int64, device=device), given).float()
    found_BTK = step_logits(prior, ids_BT, class_indices, given).to(device)
    return (found_BTK - expected_BTK)[expected_BTK.isfinite()].abs().max().item()
