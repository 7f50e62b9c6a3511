"""Entropy losses in nats: low entropy of each vector's code, high entropy of the codes of a batch (MAGVIT-v2, Yu et al. 2023, eq. 5)."""

import torch
import torch.nn.functional as F

MAX_EXACT_CODES = 2**18
"""Largest number of codes for which the batch entropy of independent bits is exact. Larger codebooks split the bits into groups."""
MIN_PROBABILITY = 1e-12


def entropy(probabilities_xK: torch.Tensor) -> torch.Tensor:
    """Entropy (...) of probabilities (..., K)."""
    return -(probabilities_xK * probabilities_xK.clamp_min(MIN_PROBABILITY).log()).sum(-1)


def entropy_loss_of_logits(logits_NK: torch.Tensor, diversity: float) -> torch.Tensor:
    """Scalar loss of logits (N, K): mean entropy of the rows' softmax - diversity * entropy of the mean softmax."""
    log_probabilities_NK = F.log_softmax(logits_NK, dim=-1)
    probabilities_NK = log_probabilities_NK.exp()
    mean_entropy = -(probabilities_NK * log_probabilities_NK).sum(-1).mean()
    return mean_entropy - diversity * entropy(probabilities_NK.mean(0)) if diversity else mean_entropy


def entropy_loss_of_bits(logits_Nb: torch.Tensor, diversity: float) -> torch.Tensor:
    """Scalar loss of independent bits with logits (N, bits): mean entropy of a row's code - diversity * entropy of the batch's codes.

    The entropy of a row is exactly the sum over its bits. The batch entropy is exact for up to MAX_EXACT_CODES codes. For more codes, the bits are
    split into groups of at most log2(MAX_EXACT_CODES) / 2 bits; the sum of the group entropies is an upper bound.
    """
    mean_entropy = (F.softplus(logits_Nb) - logits_Nb * logits_Nb.sigmoid()).sum(-1).mean()
    return mean_entropy - diversity * batch_entropy_of_bits(logits_Nb) if diversity else mean_entropy


def batch_entropy_of_bits(logits_Nb: torch.Tensor) -> torch.Tensor:
    """Scalar entropy of the mean code distribution of independent bits with logits (N, bits). For more than MAX_EXACT_CODES codes, an upper bound."""
    bits, exact_bits = logits_Nb.shape[1], MAX_EXACT_CODES.bit_length() - 1
    if bits > exact_bits:
        groups = logits_Nb.chunk(-(-bits // max(1, exact_bits // 2)), dim=1)
        return torch.stack([entropy(bit_code_probabilities(group_Nb).mean(0)) for group_Nb in groups]).sum()
    # the probability of a code is the product over its two halves of bits, so the mean over N is one product of two small
    # matrices, without an N x K matrix
    first_Na, second_Nc = (bit_code_probabilities(half_Nb) for half_Nb in logits_Nb.tensor_split(2, dim=1))
    return entropy((first_Na.T @ second_Nc / len(logits_Nb)).flatten())


def bit_code_probabilities(logits_Nb: torch.Tensor) -> torch.Tensor:
    """Probabilities (N, 2^b) of all codes of b independent bits with logits (N, b). The first bit is the most significant."""
    probabilities_NK = torch.ones(len(logits_Nb), 1, device=logits_Nb.device)
    for bit_N in logits_Nb.unbind(1):
        bit_probabilities_N2 = torch.stack([(-bit_N).sigmoid(), bit_N.sigmoid()], dim=1)
        probabilities_NK = (probabilities_NK[:, :, None] * bit_probabilities_N2[:, None, :]).flatten(1)
    return probabilities_NK
