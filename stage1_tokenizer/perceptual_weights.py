"""Where the weights of the perceptual loss are (tokenizer_training.perceptual_weights). Imports torch only to download."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from vqmosaic.errors import InputError

FIELD = "tokenizer_training.perceptual_weights"
VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG16_NAMES = ("vgg16-397923af.pth", "vgg16-397923af.safetensors", "vgg16.pth", "vgg16.safetensors")
"""torchvision's VGG16 trained on ImageNet, as torchvision caches it, or saved anew."""
CACHED_LINEAR_NAMES = ("vgg_lpips.pth", "vgg_lpips.safetensors")
LINEAR_NAMES = (*CACHED_LINEAR_NAMES, "vgg.pth", "vgg.safetensors", "weights/v0.1/vgg.pth")
"""The linear weights of LPIPS 0.1: vgg.pth in the lpips package, in torchmetrics and as taming-transformers caches it."""
PACKAGES_WITH_LINEAR = {"lpips": "weights/v0.1/vgg.pth", "torchmetrics": "functional/image/lpips_models/vgg.pth"}


@dataclass(frozen=True)
class PerceptualWeights:
    """The two files that LPIPS is made of."""

    vgg16: Path
    linear: Path


def resolve_perceptual_weights(path: str | None) -> PerceptualWeights:
    """The files of LPIPS's weights, found by their names; nothing is read.

    What `path` does not hold is looked for in torch hub's cache, the linear weights then in the packages lpips and torchmetrics (which brings
    them along). Where torchvision is installed, a missing VGG16 is downloaded into torch hub's cache.

    Args:
        path: a folder with both files or one of them, or one of the files; None for the usual places only.

    Raises:
        ValueError: `path` does not exist or holds neither file, or a file was found nowhere: what was looked for where, and how to get it.
    """
    given = [] if path is None else _given(Path(path).expanduser())
    cache = hub_checkpoints()
    vgg16 = _named(given, VGG16_NAMES) or [cache / name for name in VGG16_NAMES]
    linear = _named(given, LINEAR_NAMES) or [*(cache / name for name in CACHED_LINEAR_NAMES), *_in_packages()]
    found = {"vgg16": _first_file(vgg16), "linear": _first_file(linear)}
    missing = [name for name, file in found.items() if file is None]
    if missing == ["vgg16"] and importlib.util.find_spec("torchvision") is not None:
        found["vgg16"], missing = _download(cache / VGG16_NAMES[0]), []
    if missing:
        raise InputError(_not_found(path, missing, {"vgg16": vgg16, "linear": linear}))
    return PerceptualWeights(**found)


def hub_checkpoints() -> Path:
    """The folder of files that torch hub has downloaded, by the rules of torch.hub.get_dir()."""
    home = os.environ.get("TORCH_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "torch")
    return Path(home).expanduser() / "hub" / "checkpoints"


def _given(given: Path) -> list[Path]:
    """The files of known names that the user's path leads to."""
    if given.is_dir():
        files = [given / name for name in (*VGG16_NAMES, *LINEAR_NAMES)]
        found = [file for file in files if file.is_file()]
        what = "holds none of them"
    else:
        found = [given] if given.is_file() and given.name in (*VGG16_NAMES, *LINEAR_NAMES) else []
        what = "is a file of another name" if given.is_file() else "does not exist"
    if not found:
        raise InputError(f"{FIELD} is {str(given)!r}, which {what}; give a folder with the weights of VGG16 ({', '.join(VGG16_NAMES)}) and the "
                         f"linear weights of LPIPS ({', '.join(LINEAR_NAMES)}), or one of these files.")
    return found


def _named(files: list[Path], names: tuple[str, ...]) -> list[Path]:
    """Those of the files that bear one of the names, in the order of the names."""
    return [file for name in names for file in files if file.parts[-name.count("/") - 1:] == tuple(name.split("/"))]


def _in_packages() -> list[Path]:
    """Where the linear weights would be in the packages that bring them along; looks for the packages, does not import them."""
    places = []
    for package, file in PACKAGES_WITH_LINEAR.items():
        spec = importlib.util.find_spec(package)
        if spec is not None:
            places += [Path(folder) / file for folder in spec.submodule_search_locations or []]
    return places


def _first_file(places: list[Path]) -> Path | None:
    return next((file for file in places if file.is_file()), None)


def _download(file: Path) -> Path:
    """Fetch VGG16 as torchvision would, its hash compared; InputError where that fails."""
    import torch.hub  # imported here: whoever has the file does without torch until it is loaded

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(VGG16_URL, str(file), hash_prefix="397923af")
    except (OSError, RuntimeError) as error:  # no network, no room; another hash
        raise InputError(f"{FIELD}: the weights of VGG16 are not in {file.parent}, and the download of {VGG16_URL} failed ({error}). "
                         f"{_remedies(['vgg16'])}") from error
    return file


def _not_found(path: str | None, missing: list[str], places: dict[str, list[Path]]) -> str:
    words = {"vgg16": "the weights of VGG16", "linear": "the linear weights of LPIPS"}
    looked = "; ".join(f"{words[name]}: {', '.join(map(str, places[name]))}" for name in missing)
    return (f"{FIELD} is {'not given' if path is None else repr(path)}, and {' and '.join(words[name] for name in missing)} are in none of the "
            f"places that were looked at ({looked}). {_remedies(missing)}")


def _remedies(missing: list[str]) -> str:
    """How to get what is missing, and how to do without."""
    ways = {"vgg16": f"download {VGG16_URL} where there is a network (or install torchvision, with which it is downloaded from here)",
            "linear": "take weights/v0.1/vgg.pth from the Python package lpips (pip install lpips)"}
    return (f"To get them: {'; '.join(ways[name] for name in missing)}; put the files into one folder and set {FIELD} to it. "
            "tokenizer_training.perceptual_loss discriminator_features needs no weights.")
