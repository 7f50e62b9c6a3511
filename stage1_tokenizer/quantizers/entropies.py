"""Entropies (in nats) of code probabilities, for the losses that make choices sure and their use even (Yu et al. 2023, MAGVIT-v2, eq. 5)."""

import torch
import torch.nn.functional as F

EXACT_CODES = 2**18
"""Up to so many codes the batch entropy of independent bits is taken over all codes; above, group by group."""
SMALLEST_PROBABILITY = 1e-12


def entropy(probabilities_xK: torch.Tensor) -> torch.Tensor:
    """Entropy (...) of probabilities (..., K)."""
    return -(probabilities_xK * probabilities_xK.clamp_min(SMALLEST_PROBABILITY).log()).sum(-1)


def entropy_of_logits(logits_NK: torch.Tensor, diversity: float) -> torch.Tensor:
    """Mean entropy of each row's softmax - diversity * entropy of their mean, of logits (N, K); a scalar."""
    log_probabilities_NK = F.log_softmax(logits_NK, dim=-1)
    probabilities_NK = log_probabilities_NK.exp()
    each = -(probabilities_NK * log_probabilities_NK).sum(-1).mean()
    return each - diversity * entropy(probabilities_NK.mean(0)) if diversity else each


def entropy_of_bits(logits_Nb: torch.Tensor, diversity: float) -> torch.Tensor:
    """Mean entropy of each row's code - diversity * entropy of the batch's codes, of independent bits with logits (N, bits); a scalar.

    A row's entropy is the sum over its bits, exactly. The batch's is exact over all 2^bits codes up to EXACT_CODES of them; above, the
    bits are split into groups of at most half as many bits as EXACT_CODES has, whose entropies add up to an upper bound of it.
    """
    each = (F.softplus(logits_Nb) - logits_Nb * logits_Nb.sigmoid()).sum(-1).mean()
    return each - diversity * batch_entropy_of_bits(logits_Nb) if diversity else each


def batch_entropy_of_bits(logits_Nb: torch.Tensor) -> torch.Tensor:
    """Entropy (a scalar) of the mean code distribution of independent bits with logits (N, bits); by groups above EXACT_CODES codes."""
    bits, exact_bits = logits_Nb.shape[1], EXACT_CODES.bit_length() - 1
    if bits > exact_bits:
        groups = logits_Nb.chunk(-(-bits // max(1, exact_bits // 2)), dim=1)
        return torch.stack([entropy(group_probabilities(group_Nb).mean(0)) for group_Nb in groups]).sum()
    # a code's probability is that of its first half of bits times that of its second: the mean over N is one product of two
    # small matrices, and N x K is never held
    first_Na, second_Nc = (group_probabilities(half_Nb) for half_Nb in logits_Nb.tensor_split(2, dim=1))
    return entropy((first_Na.T @ second_Nc / len(logits_Nb)).flatten())


def group_probabilities(logits_Nb: torch.Tensor) -> torch.Tensor:
    """Probabilities (N, 2^b) of all codes of a few independent bits with logits (N, b), the first bit the most significant."""
    probabilities_NK = torch.ones(len(logits_Nb), 1, device=logits_Nb.device)
    for bit_N in logits_Nb.unbind(1):
        of_bit_N2 = torch.stack([(-bit_N).sigmoid(), bit_N.sigmoid()], dim=1)
        probabilities_NK = (probabilities_NK[:, :, None] * of_bit_N2[:, None, :]).flatten(1)
    return probabilities_NK
