"""Checks the file of a feature extractor without loading it, so that errors appear before torch is imported."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import sha256_of_file
from vqmosaic.files.permissions import explain_permission_errors

WEIGHTS_SUFFIXES = (".safetensors",)
"""Suffixes of files that always contain only weights. A .pth file may also be TorchScript."""


@dataclass(frozen=True, kw_only=True)
class FeatureFile:
    """A TorchScript archive, or the weights of a timm model."""

    path: Path
    """Path of the file."""
    model: str | None
    """The timm name of the model, or None for TorchScript, which includes the architecture."""
    sha256: str
    """Digest of the file. Sweep records use it to identify the extractor."""

    @property
    def kind(self) -> str:
        """The kind of extractor: "torchscript" or "timm"."""
        return "torchscript" if self.model is None else "timm"

    def to_dict(self) -> dict[str, str | None]:
        """The entry for a sweep record: kind, file name without folders, model and digest."""
        return {"kind": self.kind, "file": self.path.name, "model": self.model, "sha256": self.sha256}


@explain_permission_errors()
def resolve_feature_file(path: Path, model: str | None) -> FeatureFile:
    """Check that a file can be a feature extractor and compute its digest. feature_extractors.py loads its content.

    Raises:
        ValueError: the file does not exist, a .safetensors file is given without --features_model, or timm is needed but not installed.
    """
    path = path.expanduser()
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"--features is {str(path)!r}, which {problem}; give a TorchScript file, or the weights of a timm model "
                         "(.safetensors or .pth) with --features_model NAME.")
    if model is None and path.suffix in WEIGHTS_SUFFIXES:
        raise InputError(f"--features is {str(path)!r}, which contains only weights; give --features_model the timm name of the model, "
                         "such as resnet50.")
    if model is not None and importlib.util.find_spec("timm") is None:
        raise InputError(f"--features_model is {model!r}, which needs timm, but timm is not installed: pip install 'vqmosaic[features]'. "
                         "Or give a TorchScript file as --features, without --features_model.")
    return FeatureFile(path=path, model=model, sha256=sha256_of_file(path))
