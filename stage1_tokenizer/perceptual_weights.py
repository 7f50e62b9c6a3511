"""Finds the weight files of the perceptual loss (tokenizer_training.perceptual_weights). Imports torch only for downloads."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from vqmosaic.errors import InputError

FIELD = "tokenizer_training.perceptual_weights"
VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG16_NAMES = ("vgg16-397923af.pth", "vgg16-397923af.safetensors", "vgg16.pth", "vgg16.safetensors")
"""File names of torchvision's VGG16 trained on ImageNet: the name in torchvision's cache, and names for saved copies."""
CACHED_LINEAR_NAMES = ("vgg_lpips.pth", "vgg_lpips.safetensors")
"""The file names in LINEAR_NAMES that are also searched in torch hub's cache. vgg.pth could be another network there."""
LINEAR_NAMES = (*CACHED_LINEAR_NAMES, "vgg.pth", "vgg.safetensors", "weights/v0.1/vgg.pth")
"""File names of the linear weights of LPIPS 0.1. vgg.pth is the name in the packages lpips and torchmetrics and in taming-transformers' cache."""
PACKAGES_WITH_LINEAR = {"lpips": "weights/v0.1/vgg.pth", "torchmetrics": "functional/image/lpips_models/vgg.pth"}
"""Package name -> path of the linear weights inside the package."""


@dataclass(frozen=True)
class PerceptualWeights:
    """The two weight files of LPIPS."""

    vgg16: Path
    """The weights of VGG16."""
    linear: Path
    """The linear weights: the learned weight of each VGG16 channel in the distance."""


def resolve_perceptual_weights(path: str | None) -> PerceptualWeights:
    """Find the weight files of LPIPS by name, without reading them. Downloads VGG16 if it is the only missing file and torchvision is installed.

    Searches `path`, then torch hub's cache. The linear weights are also found in the packages lpips and torchmetrics. The download goes into
    torch hub's cache.

    Args:
        path: a folder with one or both files, or one of the files. None searches only the cache and the packages.

    Raises:
        InputError: `path` does not exist or contains neither file, or a file is not found. The message lists the searched paths and remedies.
    """
    given = [] if path is None else _find_at_path(Path(path).expanduser())
    cache = hub_checkpoints()
    candidates = {
        "vgg16": _select_by_name(given, VGG16_NAMES) or [cache / name for name in VGG16_NAMES],
        "linear": _select_by_name(given, LINEAR_NAMES) or [*(cache / name for name in CACHED_LINEAR_NAMES), *_paths_in_packages()],
    }
    found = {name: _first_existing(paths) for name, paths in candidates.items()}
    missing = [name for name, file in found.items() if file is None]
    if missing == ["vgg16"] and importlib.util.find_spec("torchvision") is not None:
        found["vgg16"], missing = _download(cache / VGG16_NAMES[0]), []
    if missing:
        raise InputError(_missing_message(path, missing, candidates))
    return PerceptualWeights(**{name: file for name, file in found.items() if file is not None})  # the condition is for mypy


def hub_checkpoints() -> Path:
    """Torch hub's folder of downloaded checkpoints, as torch.hub.get_dir() determines it."""
    home = os.environ.get("TORCH_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "torch")
    return Path(home).expanduser() / "hub" / "checkpoints"


def _find_at_path(path: Path) -> list[Path]:
    """The files with known names at the user's path. Raises InputError if there are none."""
    if path.is_dir():
        files = [path / name for name in (*VGG16_NAMES, *LINEAR_NAMES)]
        found = [file for file in files if file.is_file()]
        reason = "contains no weight file with a known name"
    else:
        found = [path] if path.is_file() and path.name in (*VGG16_NAMES, *LINEAR_NAMES) else []
        reason = "has an unknown file name" if path.is_file() else "does not exist"
    if not found:
        raise InputError(f"{FIELD} is {str(path)!r}, which {reason}. Give a folder with the weights of VGG16 ({', '.join(VGG16_NAMES)}) and the "
                         f"linear weights of LPIPS ({', '.join(LINEAR_NAMES)}), or one of these files.")
    return found


def _select_by_name(files: list[Path], names: tuple[str, ...]) -> list[Path]:
    """The files whose paths end with one of the names, in the order of the names. A name may contain folders."""
    return [file for name in names for file in files if file.parts[-len(name.split("/")):] == tuple(name.split("/"))]


def _paths_in_packages() -> list[Path]:
    """Paths of the linear weights in the installed packages that contain them. Does not import the packages."""
    paths = []
    for package, file in PACKAGES_WITH_LINEAR.items():
        spec = importlib.util.find_spec(package)
        if spec is not None:
            paths += [Path(folder) / file for folder in spec.submodule_search_locations or []]
    return paths


def _first_existing(paths: list[Path]) -> Path | None:
    return next((file for file in paths if file.is_file()), None)


def _download(file: Path) -> Path:
    """Download VGG16 and verify its hash, as torchvision does. Raises InputError on failure."""
    import torch.hub  # imported here, so that finding an existing file needs no torch

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(VGG16_URL, str(file), hash_prefix="397923af")
    except (OSError, RuntimeError) as error:  # no network, full disk, wrong hash
        raise InputError(f"{FIELD}: the weights of VGG16 are not in {file.parent}, and the download of {VGG16_URL} failed ({error}). "
                         f"{_how_to_get(['vgg16'])}") from error
    return file


def _missing_message(path: str | None, missing: list[str], candidates: dict[str, list[Path]]) -> str:
    """The error message for the files in `missing` ("vgg16", "linear"), with the paths that were searched and instructions."""
    descriptions = {"vgg16": "the weights of VGG16", "linear": "the linear weights of LPIPS"}
    searched = "; ".join(f"{descriptions[name]}: {', '.join(map(str, candidates[name]))}" for name in missing)
    return (f"{FIELD} is {'not given' if path is None else repr(path)}, and {' and '.join(descriptions[name] for name in missing)} were not found. "
            f"Searched: {searched}. {_how_to_get(missing)}")


def _how_to_get(missing: list[str]) -> str:
    """Instructions for getting the missing files, or for training without them."""
    ways = {"vgg16": f"download {VGG16_URL} on a machine with network access (or install torchvision, and it is downloaded automatically)",
            "linear": "take weights/v0.1/vgg.pth from the Python package lpips (pip install lpips)"}
    return (f"To get them: {'; '.join(ways[name] for name in missing)}. Put the files into one folder and set {FIELD} to it. "
            "Or set tokenizer_training.perceptual_loss to discriminator_features, which needs no weights.")
