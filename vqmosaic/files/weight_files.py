"""Reads files of named tensors. Never runs pickled code."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vqmosaic.files.permissions import permission_denied

MAX_REASON = 300
"""Largest number of characters of the reason in an error message."""


class WeightFileError(ValueError):
    """A file is not a weight file, or it is damaged. The message is the reason."""


def read_weight_file(path: Path) -> Any:
    """The content of a weight file on the CPU.

    For a .safetensors file, this is a dict of tensors. Other files are read with torch.load(weights_only=True), so they can hold something else.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except PermissionError as error:
            raise permission_denied(path) from error
        except SafetensorError as error:
            raise WeightFileError(shortened(error)) from error
    try:
        with warnings.catch_warnings():  # torch warns about TorchScript files; the error below covers them
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise permission_denied(path) from error
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise WeightFileError(shortened(error)) from error


def shortened(error: Exception) -> str:
    """The message of an error on one line, cut at MAX_REASON characters."""
    return " ".join(str(error).split())[:MAX_REASON]
