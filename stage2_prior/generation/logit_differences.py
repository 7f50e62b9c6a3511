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
    first, rows = start_BP.shape[1] - 1, []
    with torch.inference_mode(), evaluation_mode(prior.model):
        decoder = make_decoder(prior.model, vocabulary.num_codes, len(ids_BT), first + vocabulary.num_tokens)
        for position, (start, stop) in enumerate(vocabulary.position_ranges()):
            if position == 0:
                logits_BV = decoder.start(start_BP)
            else:
                logits_BV = decoder.step(vocabulary.to_vocabulary_at(position - 1, ids_BT[:, position - 1]), first + position)
            padding = (0, vocabulary.most_codes - (stop - start))
            rows.append(torch.nn.functional.pad(logits_BV[:, start:stop].float(), padding, value=-torch.inf))
    return torch.stack(rows, dim=1)


def largest_logit_difference(prior: TokenPrior, reference: TokenPrior, ids_BT: torch.Tensor, class_indices: Sequence[int],
                             given: Mapping[str, torch.Tensor] | None = None) -> float:
    """The largest difference between the logits of `prior`, computed as in sampling, and those of `reference` in one forward pass, for given ids."""
    device = next(reference.parameters()).device
    with torch.inference_mode(), evaluation_mode(reference.model):
        expected_BTK = reference(ids_BT.to(device), torch.tensor(class_indices, dtype=torch.int64, device=device), given).float()
    found_BTK = step_logits(prior, ids_BT, class_indices, given).to(device)
    return (found_BTK - expected_BTK)[expected_BTK.isfinite()].abs().max().item()
