"""Checks of data.channels and data.value_range. Loads no torch."""

import math
from collections.abc import Sequence
from typing import Any

from vqmosaic.errors import InputError
from vqmosaic.recipes.field_types import as_integer, as_number

CHANNELS = {1: "grey", 2: "grey and alpha", 3: "RGB", 4: "RGB and alpha"}
"""The allowed numbers of channels, and what the channels are."""
_ALLOWED_RANGE = "null for 8-bit images, or two numbers [low, high] with low < high, such as [0, 65535]"


def checked_channels(field: str, given: Any) -> int:
    """The number of channels. Raises InputError, which names the field, unless it is one of CHANNELS."""
    channels = as_integer(field, given)
    if channels not in CHANNELS:
        allowed = ", ".join(f"{count} ({words})" for count, words in CHANNELS.items())
        raise InputError(f"{field} is {channels}; allowed: {allowed}.")
    return channels


def checked_value_range(field: str, given: Any) -> list[float] | None:
    """The range in the form in which recipes and config.json store it: None, or the list [low, high] of floats.

    Raises InputError, which names the field, for anything else, and unless low < high and both are finite.
    """
    if given is None:
        return None
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != 2:
        raise InputError(f"{field} is {given!r}; allowed: {_ALLOWED_RANGE}.")
    low, high = (float(as_number(f"{field}: an entry", value)) for value in given)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"{field} is {[low, high]}; allowed: {_ALLOWED_RANGE}.")
    return [low, high]
