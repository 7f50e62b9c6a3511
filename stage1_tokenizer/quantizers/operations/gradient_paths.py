"""Gradient estimators for the choice of a code: straight-through, rotation trick, DiVeQ, and softmax over all codes.

The forward values of all of them equal the codes bit for bit, so decoding the ids gives exactly the forward result.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from vqmosaic.errors import InputError

ALL_CODES_LIMIT_BYTES = 2 * 2**30
MIN_NORM = 1e-6


def straight_through(codes_xD: torch.Tensor, latents_xD: torch.Tensor) -> torch.Tensor:
    """The codes (..., D). Their gradient passes unchanged to the latents (..., D) (van den Oord et al. 2017, section 3.2)."""
    return codes_xD.detach() + (latents_xD - latents_xD.detach())


def apply_rotation_trick(codes_xD: torch.Tensor, latents_xD: torch.Tensor) -> torch.Tensor:
    """The codes (..., D). Their gradient passes to the latents (..., D) through the rotation and scaling that map latent to code.

    The rotation trick (Fifty et al. 2024, sections 4.2 and 4.3): q = (|q| / |z|) R z, with R and the ratio treated as constants.
    R = I - 2 w w' + 2 q^ z^' with unit vectors z^ and q^ and w along their sum, so R z needs inner products but no matrix. A latent or code of
    length 0 has no direction. Its gradient passes straight through.
    """
    with torch.no_grad():
        norm_z, norm_q = (vectors_xD.norm(dim=-1, keepdim=True) for vectors_xD in (latents_xD, codes_xD))
        unit_z, unit_q = latents_xD / norm_z.clamp_min(MIN_NORM), codes_xD / norm_q.clamp_min(MIN_NORM)
        bisector = F.normalize(unit_z + unit_q, dim=-1)
        ratio = norm_q / norm_z.clamp_min(MIN_NORM)
        has_directions = (norm_z > MIN_NORM) & (norm_q > MIN_NORM)
    reflected = latents_xD - 2 * bisector * (bisector * latents_xD).sum(-1, keepdim=True)
    rotated = ratio * (reflected + 2 * unit_q * (unit_z * latents_xD).sum(-1, keepdim=True))
    return straight_through(codes_xD, torch.where(has_directions, rotated, latents_xD))


def apply_diveq(codes_xD: torch.Tensor, latents_xD: torch.Tensor) -> torch.Tensor:
    """The codes e (..., D), computed from latents z (..., D) as z + |e - z| u, with the direction u of the error treated as a constant.

    DiVeQ (Vali et al. 2025, arXiv 2509.26469) without its noise on the direction, so that the values equal the codes. Moving a latent along u
    changes |e - z| by the opposite amount and z + |e - z| u not at all, so latents do not get the gradient along u. Codes that require a gradient
    get it, in addition to their own loss. A latent equal to its code has no direction. Its gradient passes straight through.
    """
    errors_xD = codes_xD - latents_xD
    lengths_x1 = torch.linalg.vector_norm(errors_xD, dim=-1, keepdim=True)
    directions_xD = (errors_xD / lengths_x1.clamp_min(MIN_NORM)).detach()
    return straight_through(codes_xD, latents_xD + lengths_x1 * directions_xD)


def choose_gradient_path(rotation_trick: bool, diveq: bool) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The configured function of codes (..., D) and latents (..., D) that returns the codes with a gradient. Default: straight_through."""
    return apply_rotation_trick if rotation_trick else apply_diveq if diveq else straight_through


def straight_through_softmax(ids_N: torch.Tensor, probabilities_NK: torch.Tensor, codebook_KD: torch.Tensor) -> torch.Tensor:
    """The codes (N, D) of ids (N,), as one-hot rows times the codebook. The gradient of the one-hot rows passes to the probabilities (N, K).

    Also passes a gradient to the chosen rows of the codebook. IBQ (Shi et al. 2024) and hard Gumbel-softmax (Jang et al. 2016) use it.
    """
    expected_ND = probabilities_NK @ codebook_KD.detach()
    return F.embedding(ids_N, codebook_KD) + (expected_ND - expected_ND.detach())


def check_all_codes_fit(kind: str, vectors: int, codebook_size: int) -> None:
    """Raise InputError if a float32 matrix (vectors, codebook_size) exceeds 2 GiB. Training holds several of them."""
    size = 4 * vectors * codebook_size
    if size > ALL_CODES_LIMIT_BYTES:
        max_vectors = ALL_CODES_LIMIT_BYTES // (4 * codebook_size)
        raise InputError(f"tokenizer.quantizer {kind} needs the probability of each code for each latent vector: {vectors:,} vectors x "
                         f"{codebook_size:,} codes are {size / 2**30:.1f} GiB. Allowed: 2 GiB ({max_vectors:,} vectors at a time). Raise "
                         "tokenizer_training.accumulation_steps, lower tokenizer_training.batch_size or tokenizer.codebook_size, or set "
                         "tokenizer.quantizer to simvq, fsq or lfq.")
