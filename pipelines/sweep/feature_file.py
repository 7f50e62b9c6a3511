"""The file of a feature extractor as a user names it: looked at by name and digest only, so that errors come before torch is loaded."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import sha256_of_file
from vqmosaic.files.permissions import naming_denied_permissions

STATE_DICT_SUFFIXES = (".safetensors",)
"""Suffixes of files that cannot be TorchScript."""


@dataclass(frozen=True, kw_only=True)
class FeatureFile:
    """A TorchScript archive, or the weights of a network that timm knows by name."""

    path: Path
    """The file."""
    model: str | None
    """timm's name of the architecture that the weights are for; None for TorchScript, which brings its own."""
    sha256: str
    """Digest of the file's bytes, by which a record tells what was measured with."""

    @property
    def kind(self) -> str:
        """torchscript or timm."""
        return "torchscript" if self.model is None else "timm"

    def to_dict(self) -> dict[str, str | None]:
        """What a record says about the file: its name without the folders above it, its digest, and how it is read."""
        return {"kind": self.kind, "file": self.path.name, "model": self.model, "sha256": self.sha256}


@naming_denied_permissions()
def resolve_feature_file(path: Path, model: str | None) -> FeatureFile:
    """The file, with its digest. Its content is read by feature_extractors.py.

    Raises:
        ValueError: there is no such file, a file of weights has no --features_model to go with it, or timm is needed and not installed.
    """
    path = path.expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"--features is {str(path)!r}, which {what}; give a TorchScript file, or the weights of a timm model "
                         "(.safetensors or .pth) with --features_model NAME.")
    if model is None and path.suffix in STATE_DICT_SUFFIXES:
        raise InputError(f"--features is {str(path)!r}, which holds weights only; give --features_model the name by which timm knows their network, "
                         "such as resnet50.")
    if model is not None and importlib.util.find_spec("timm") is None:
        raise InputError(f"--features_model is {model!r}, which needs timm, and that is not installed: pip install 'vqmosaic[features]'. "
                         "A TorchScript file as --features needs neither.")
    return FeatureFile(path=path, model=model, sha256=sha256_of_file(path))
