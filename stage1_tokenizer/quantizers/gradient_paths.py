"""How the gradient gets past the choice of a code: straight through, rotated, along a fixed direction, or through the probabilities of all codes.

The values are the codes to the last bit in all of them, so that ids lead back to exactly what forward gave.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from vqmosaic.errors import InputError

ALL_CODES_LIMIT_BYTES = 2 * 2**30
SMALLEST_NORM = 1e-6


def straight_through(codes_xD: torch.Tensor, latents_xD: torch.Tensor) -> torch.Tensor:
    """The codes (..., D), whose gradient goes to the latents (..., D) unchanged (van den Oord et al. 2017, section 3.2)."""
    return codes_xD.detach() + (latents_xD - latents_xD.detach())


def rotated(codes_xD: torch.Tensor, latents_xD: torch.Tensor) -> torch.Tensor:
    """The codes (..., D), whose gradient goes to the latents (..., D) turned and scaled as latent to code.

    Fifty et al. 2024, sections 4.2 and 4.3: q = (|q| / |z|) R z with R and the ratio held constant. R = I - 2 w w' + 2 q^ z^' with unit
    vectors z^ and q^ and w along their sum, so that R z takes three inner products and no matrix. A latent or a code of length 0 has
    no direction: there the gradient passes straight through.
    """
    with torch.no_grad():
        norm_z, norm_q = (each.norm(dim=-1, keepdim=True) for each in (latents_xD, codes_xD))
        unit_z, unit_q = latents_xD / norm_z.clamp_min(SMALLEST_NORM), codes_xD / norm_q.clamp_min(SMALLEST_NORM)
        between = F.normalize(unit_z + unit_q, dim=-1)
        ratio = norm_q / norm_z.clamp_min(SMALLEST_NORM)
        has_directions = (norm_z > SMALLEST_NORM) & (norm_q > SMALLEST_NORM)
    reflected = latents_xD - 2 * between * (between * latents_xD).sum(-1, keepdim=True)
    turned = ratio * (reflected + 2 * unit_q * (unit_z * latents_xD).sum(-1, keepdim=True))
    return straight_through(codes_xD, torch.where(has_directions, turned, latents_xD))


def along_direction(codes_xD: torch.Tensor, latents_xD: torch.Tensor) -> torch.Tensor:
    """The codes (..., D) as z + |e - z| u, latents (..., D) moved by the length of the error along its direction u, which is held constant.

    DiVeQ (Vali et al. 2025, arXiv 2509.26469), without the noise that they add to the direction, so that the values are the codes. A step of a
    latent along u changes the length of the error by as much, and z + |e - z| u not at all: that part of the gradient does not arrive at latents. It
    goes to codes that require a gradient, beside their own loss. A latent on its code has no direction: the gradient passes straight through.
    """
    errors_xD = codes_xD - latents_xD
    lengths_x1 = torch.linalg.vector_norm(errors_xD, dim=-1, keepdim=True)
    directions_xD = (errors_xD / lengths_x1.clamp_min(SMALLEST_NORM)).detach()
    return straight_through(codes_xD, latents_xD + lengths_x1 * directions_xD)


def gradient_path(rotation_trick: bool, diveq: bool) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """What leads from codes (..., D) and latents (..., D) to the codes with a gradient: straight_through where neither is asked for."""
    return rotated if rotation_trick else along_direction if diveq else straight_through


def through_probabilities(ids_N: torch.Tensor, probabilities_NK: torch.Tensor, codebook_KD: torch.Tensor) -> torch.Tensor:
    """The codes (N, D) of ids (N,), as one-hot rows times the codebook with the one-hot rows' gradient going to the probabilities (N, K).

    The codebook's gradient goes to the chosen rows.
    """
    expected_ND = probabilities_NK @ codebook_KD.detach()
    return F.embedding(ids_N, codebook_KD) + (expected_ND - expected_ND.detach())


def check_all_codes_fit(kind: str, vectors: int, codebook_size: int) -> None:
    """Raise InputError where one float32 matrix of vectors times codes would be larger than 2 GiB; a training holds several."""
    size = 4 * vectors * codebook_size
    if size > ALL_CODES_LIMIT_BYTES:
        most = ALL_CODES_LIMIT_BYTES // (4 * codebook_size)
        raise InputError(f"tokenizer.quantizer {kind} needs the probability of each code for each latent vector: {vectors:,} vectors x "
                         f"{codebook_size:,} codes are {size / 2**30:.1f} GiB, allowed: 2 GiB ({most:,} vectors at a time). Raise "
                         "tokenizer_training.accumulation_steps, lower tokenizer_training.batch_size or tokenizer.codebook_size, or take "
                         "tokenizer.quantizer simvq, fsq or lfq.")
