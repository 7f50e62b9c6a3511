"""Rotary embedding as a product of complex numbers: one operator in place of eight. On every device, except under torch.compile."""

import torch


def reference(heads: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Rotate each pair of neighbours in heads (..., d) by a cosine and a sine (..., p, 2), in float32, or float64 for float64."""
    pairs = (heads if heads.dtype == torch.float64 else heads.float()).unflatten(-1, (-1, 2))
    (first, second), (cosines, sines) = pairs.unbind(-1), rotations.unbind(-1)
    return torch.stack([first * cosines - second * sines, first * sines + second * cosines], dim=-1).flatten(-2).to(heads.dtype)


def can_rotate_as_complex(heads: torch.Tensor) -> bool:
    """Whether rotate_as_complex applies: torch.compile does not support complex numbers, and rotations are in float32."""
    return heads.dtype != torch.float64 and not torch.compiler.is_compiling()


def rotate_as_complex(heads: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """The same as the reference, up to rounding."""
    pairs = heads.float().unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotations)).flatten(-2).to(heads.dtype)
