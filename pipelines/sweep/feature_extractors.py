"""Feature extractors for Frechet and kernel distances, from a file that the user names. Nothing is downloaded.

    TorchScript (no --features_model)     gets uint8 images 0..255, (B, 3, H, W), in the pipeline's own size; it resizes and scales by itself,
                                          as the published Inception files for FID do
    weights of a timm model               gets float32 images, first scaled to [0, 1], resized to the network's input size (bicubic,
                                          antialiased, no crop), then normalised by the mean and deviation that timm names for it

Grey images are repeated to three channels. A TorchScript file is a program (torch.jit.load; no pickle of Python objects is read, but its
code runs): use one only from where you would install a package. Weights are read as tensors alone, safetensors or torch.load(weights_only=True).
"""

import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from pipelines.sweep.feature_file import FeatureFile
from vqmosaic.errors import InputError, nearest_name
from vqmosaic.files.weights_fit import misfits

RETURN_FEATURES = "return_features"
"""Argument of NVIDIA's Inception file (inception-2015-12-05.pt), which without it gives class probabilities."""
WRAPPERS = ("state_dict", "model")
"""Names under which training programs keep the weights in a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class NamedNetwork:
    """A network without its classifier and without its weights, and what its input has to look like."""

    module: nn.Module
    """Gives features (B, F) of normalised float32 images."""
    size: tuple[int, int]
    """Height and width of its input."""
    mean: tuple[float, ...]
    """Of each channel, for images in [0, 1]."""
    deviation: tuple[float, ...]
    """Of each channel, for images in [0, 1]."""
    classifier: tuple[str, ...]
    """Names of the layers that are not built, but may be in the file."""


class FeatureExtractor(nn.Module):
    """Float64 features (B, F), on the CPU, of uint8 images (B, C, H, W) with 1 or 3 channels; `num_features` is F."""

    def __init__(self, file: FeatureFile, network: nn.Module, prepare: Callable[[torch.Tensor], torch.Tensor], device: torch.device):
        super().__init__()
        self.file, self.network, self.prepare, self.device = file, network.to(device), prepare, device
        self.num_features = 0
        self.eval()

    @torch.inference_mode()
    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        images_B3HW = images_BCHW.to(self.device).expand(-1, 3, -1, -1).contiguous()
        return self.network(self.prepare(images_B3HW)).cpu().double()  # in this order: Apple's devices have no float64

    def try_out(self, image_size: int) -> None:
        """Set `num_features` after one batch of two images. Raises InputError where that does not give two different rows of features."""
        images_BCHW = torch.randint(0, 256, (2, 3, image_size, image_size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        images_BCHW[1] = 0
        given = f"a batch of two {image_size} x {image_size} images ({'uint8, 0 to 255' if self.file.model is None else 'float32, normalised'})"
        try:
            features_BF = self(images_BCHW)
        except Exception as error:  # what a foreign network raises can be anything
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise InputError(f"--features {self.file.path} fails on {given}: {reason[0][:300]}") from error
        if features_BF.ndim != 2 or len(features_BF) != 2 or not features_BF.shape[1]:
            raise InputError(f"--features {self.file.path} gives an output of shape {tuple(features_BF.shape)} for {given}; it must be (2, F), "
                             "one row of features an image.")
        if not features_BF.isfinite().all():
            raise InputError(f"--features {self.file.path} gives features that are not finite for {given}.")
        if torch.equal(features_BF[0], features_BF[1]):
            raise InputError(f"--features {self.file.path} gives equal features for noise and for black, {given}; its input must be something else.")
        self.num_features = features_BF.shape[1]


def load_feature_extractor(file: FeatureFile, image_size: int, device: torch.device,
                           build: Callable[[str], NamedNetwork] | None = None) -> FeatureExtractor:
    """The extractor of a file in evaluation mode, tried out on one batch of images of this size.

    Args:
        build: makes the network that `file.model` names; timm's by default.

    Raises:
        ValueError: the file cannot be read, its tensors are not those of the network, or it gives no features (B, F).
    """
    if file.model is None:
        extractor = FeatureExtractor(file, load_torchscript(file.path, device), lambda images_BCHW: images_BCHW, device)
    else:
        named = (build or timm_network)(file.model)
        load_weights(named, file)
        extractor = FeatureExtractor(file, named.module.requires_grad_(False), lambda images_BCHW: normalised(images_BCHW, named), device)
    extractor.try_out(image_size)
    return extractor


def load_torchscript(path: Path, device: torch.device) -> nn.Module:
    """The module of a TorchScript archive; one that can be asked for its features instead of its classes is."""
    try:
        module = torch.jit.load(path, map_location=device)
        arguments = [argument.name for argument in module.forward.schema.arguments]
    except (RuntimeError, ValueError, OSError, AttributeError) as error:
        raise InputError(f"--features is {str(path)!r}, which is no TorchScript module: {' '.join(str(error).split())[:200]}. For the weights "
                         "of a timm model add --features_model NAME.") from error
    return AskedForFeatures(module) if RETURN_FEATURES in arguments else module


class AskedForFeatures(nn.Module):
    """A module that is called with return_features=True."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.module(images_BCHW, **{RETURN_FEATURES: True})


def normalised(images_BCHW: torch.Tensor, named: NamedNetwork) -> torch.Tensor:
    """Float32 images (B, 3, H, W) as a named network wants them, of uint8 images of any size."""
    images_BCHW = images_BCHW.float() / 255
    if images_BCHW.shape[2:] != tuple(named.size):
        images_BCHW = F.interpolate(images_BCHW, named.size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    mean, deviation = (images_BCHW.new_tensor(values).view(1, -1, 1, 1) for values in (named.mean, named.deviation))
    return (images_BCHW - mean) / deviation


def timm_network(name: str) -> NamedNetwork:
    """timm's network of a name, untrained, without its classifier; nothing is downloaded. Raises InputError for a name timm does not know."""
    import timm
    from timm.data import resolve_model_data_config

    if not timm.is_model(name):
        nearest = nearest_name(name, timm.list_models())
        hint = f" Did you mean {nearest!r}?" if nearest else ""
        raise InputError(f"--features_model is {name!r}, which is none of the {len(timm.list_models())} models of timm.{hint}")
    module = timm.create_model(name, pretrained=False, num_classes=0)
    config = resolve_model_data_config(module)
    classifier = module.pretrained_cfg.get("classifier") or ()
    return NamedNetwork(module=module, size=tuple(config["input_size"][1:]), mean=tuple(config["mean"]), deviation=tuple(config["std"]),
                        classifier=(classifier,) if isinstance(classifier, str) else tuple(classifier))


def load_weights(named: NamedNetwork, file: FeatureFile) -> None:
    """Give a named network the weights of a file. Raises InputError that lists missing, unexpected and wrongly shaped tensors."""
    found, expected = read_weights(file.path), named.module.state_dict()
    left_out = {key for key in found.keys() - expected.keys() if key.startswith(tuple(f"{layer}." for layer in named.classifier))}
    if problems := misfits(found, expected, left_out):
        raise InputError(f"--features {file.path} does not hold the weights of --features_model {file.model}: {problems}. "
                         "Give the name that they were trained under.")
    named.module.load_state_dict({key: found[key] for key in expected})


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Named tensors of a safetensors file or of a .pth file, in which they may lie under state_dict or model."""
    try:
        with warnings.catch_warnings():  # that it is TorchScript: the error below says so
            warnings.simplefilter("ignore", UserWarning)
            found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise InputError(f"--features is {str(path)!r}, which is no file of weights: {' '.join(str(error).split())[:200]}. "
                         "For a TorchScript file leave --features_model out.") from error
    for name in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not found or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise InputError(f"--features is {str(path)!r}, which holds something else than named tensors; give a state dict.")
    return found
