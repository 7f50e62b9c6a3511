"""Settings of `enhance` and their checks. Importing this module does not load torch."""

from typing import Any

from vqmosaic.errors import InputError

NOISE = 25.0
"""The default level of noise, on the 8-bit scale (0 to 255)."""


def checked_noise(noise: Any, name: str = "noise") -> float:
    """A noise above 0 and at most 255. Raises InputError, which calls it `name`, for anything else."""
    if not is_number(noise) or not 0 < noise <= 255:
        raise InputError(f"{name} is {noise!r}; allowed: above 0, at most 255. It is the standard deviation of the noise on the 8-bit scale, for "
                         "images of every type.")
    return float(noise)


def checked_strength(strength: Any, name: str = "strength") -> float:
    """A share of the tokens above 0 and at most 1. Raises InputError, which calls it `name`, for anything else."""
    if not is_number(strength) or not 0 < strength <= 1:
        raise InputError(f"{name} is {strength!r}; allowed: above 0, at most 1.")
    return float(strength)


def is_number(value: Any) -> bool:
    """Whether a value is a number. True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
