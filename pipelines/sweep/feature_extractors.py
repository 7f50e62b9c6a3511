"""Loads feature extractors for the Frechet and kernel distances from a local file. Nothing is downloaded.

    TorchScript (no --features_model)     takes uint8 images 0..255, (B, 3, H, W), in the image size of the pipeline, and does its own resizing and
                                          scaling, like the published Inception files for FID
    weights of a timm model               takes float32 images, scaled to [0, 1], resized to the network's input size (bicubic, antialiased, no crop)
                                          and normalised by the mean and standard deviation that timm lists for the model

Grey images are repeated to three channels, and so is the first of 2 channels. Of 4 channels, the first three are used.
A TorchScript file is a program: torch.jit.load reads no pickled Python objects, but runs the code in the
file. Use only files from sources that you would install a package from. weight_files.py reads weights as tensors only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from pipelines.sweep.feature_file import FeatureFile
from stage1_tokenizer.image_files.channels import colour_channels
from vqmosaic.errors import InputError, did_you_mean
from vqmosaic.files.weight_files import WeightFileError, read_weight_file
from vqmosaic.files.weights_fit import describe_mismatches
from vqmosaic.recipes.image_sizes import ImageSize, height_and_width

RETURN_FEATURES = "return_features"
"""Argument of NVIDIA's Inception file (inception-2015-12-05.pt). Without it, the network returns class probabilities."""
CHECKPOINT_WEIGHT_KEYS = ("state_dict", "model")
"""Keys under which training programs store the weights in a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """An untrained network without its classifier, and the format of its input."""

    module: nn.Module
    """Returns features (B, F) for normalised float32 images."""
    size: tuple[int, int]
    """Height and width of the input."""
    mean: tuple[float, ...]
    """Mean of each channel, for images in [0, 1]."""
    deviation: tuple[float, ...]
    """Standard deviation of each channel, for images in [0, 1]."""
    classifier: tuple[str, ...]
    """Names of the layers that the module lacks but the weights file may contain."""


class FeatureExtractor(nn.Module):
    """Maps uint8 images (B, C, H, W) with 1 to 4 channels, without alpha, to float64 features (B, F) on the CPU. `num_features` is F."""

    def __init__(self, file: FeatureFile, network: nn.Module, prepare: Callable[[torch.Tensor], torch.Tensor], device: torch.device):
        super().__init__()
        self.file, self.network, self.prepare, self.device = file, network.to(device), prepare, device
        self.num_features = 0
        self.eval()

    @torch.inference_mode()
    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        images_B3HW = colour_channels(images_BCHW.to(self.device)).expand(-1, 3, -1, -1).contiguous()
        return self.network(self.prepare(images_B3HW)).cpu().double()  # in this order, because Apple devices have no float64

    def check_on_test_batch(self, image_size: ImageSize) -> None:
        """Run the network on a noise image and a black image, and set `num_features`. Raises InputError if the features are invalid or equal."""
        height, width = height_and_width(image_size)
        images_BCHW = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        images_BCHW[1] = 0
        batch = f"a batch of two {height} x {width} images ({'uint8, 0 to 255' if self.file.model is None else 'float32, normalised'})"
        try:
            features_BF = self(images_BCHW)
        except Exception as error:  # a user's network can raise anything
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise InputError(f"--features {self.file.path} fails on {batch}: {reason[0][:300]}") from error
        if features_BF.ndim != 2 or len(features_BF) != 2 or not features_BF.shape[1]:
            raise InputError(f"--features {self.file.path} returns the shape {tuple(features_BF.shape)} for {batch}; it must return (2, F), one row "
                             "of features per image.")
        if not features_BF.isfinite().all():
            raise InputError(f"--features {self.file.path} returns features that are not finite for {batch}.")
        if torch.equal(features_BF[0], features_BF[1]):
            raise InputError(f"--features {self.file.path} returns equal features for a noise image and a black image, given {batch}. It probably "
                             "needs another input format.")
        self.num_features = features_BF.shape[1]


def load_feature_extractor(file: FeatureFile, image_size: ImageSize, device: torch.device,
                           build: Callable[[str], FeatureNetwork] | None = None) -> FeatureExtractor:
    """The extractor in a file, in evaluation mode, checked on one batch of images of this size.

    Args:
        build: builds the network with the name `file.model`; by default, a timm network.

    Raises:
        InputError: the file cannot be read, its tensors do not fit the network, or the network does not return features (B, F).
    """
    if file.model is None:
        extractor = FeatureExtractor(file, load_torchscript(file.path, device), lambda images_BCHW: images_BCHW, device)
    else:
        network = (build or timm_network)(file.model)
        load_weights(network, file)
        extractor = FeatureExtractor(file, network.module.requires_grad_(False), lambda images_BCHW: normalise_images(images_BCHW, network), device)
    extractor.check_on_test_batch(image_size)
    return extractor


def load_torchscript(path: Path, device: torch.device) -> nn.Module:
    """The module in a TorchScript archive. If its forward has the argument return_features, it is called with True."""
    try:
        module = torch.jit.load(path, map_location=device)
        arguments = [argument.name for argument in module.forward.schema.arguments]
    except (RuntimeError, ValueError, OSError, AttributeError) as error:
        raise InputError(f"--features is {str(path)!r}, which is not a TorchScript module: {' '.join(str(error).split())[:200]}. For the weights "
                         "of a timm model, add --features_model NAME.") from error
    return ReturnFeatures(module) if RETURN_FEATURES in arguments else module


class ReturnFeatures(nn.Module):
    """Calls a module with return_features=True."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.module(images_BCHW, **{RETURN_FEATURES: True})


def normalise_images(images_BCHW: torch.Tensor, network: FeatureNetwork) -> torch.Tensor:
    """Convert uint8 images of any size to the input of a network: float32 images (B, 3, H, W), resized and normalised."""
    images_BCHW = images_BCHW.float() / 255
    if images_BCHW.shape[2:] != tuple(network.size):
        images_BCHW = F.interpolate(images_BCHW, network.size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    mean, deviation = (images_BCHW.new_tensor(values).view(1, -1, 1, 1) for values in (network.mean, network.deviation))
    return (images_BCHW - mean) / deviation


def timm_network(name: str) -> FeatureNetwork:
    """The timm network with this name, untrained and without its classifier. Nothing is downloaded. Raises InputError for an unknown name."""
    import timm
    from timm.data import resolve_model_data_config

    if not timm.is_model(name):
        names = timm.list_models()
        raise InputError(f"--features_model is {name!r}, which is not one of the {len(names)} timm models.{did_you_mean(name, names)}")
    module = timm.create_model(name, pretrained=False, num_classes=0)
    config = resolve_model_data_config(module)
    classifier = module.pretrained_cfg.get("classifier") or ()
    return FeatureNetwork(module=module, size=tuple(config["input_size"][1:]), mean=tuple(config["mean"]), deviation=tuple(config["std"]),
                        classifier=(classifier,) if isinstance(classifier, str) else tuple(classifier))


def load_weights(network: FeatureNetwork, file: FeatureFile) -> None:
    """Load the weights in a file into a network. Raises InputError, which lists missing, unexpected and wrongly shaped tensors."""
    found, expected = read_weights(file.path), network.module.state_dict()
    classifier_keys = {key for key in found.keys() - expected.keys() if key.startswith(tuple(f"{layer}." for layer in network.classifier))}
    if problems := describe_mismatches(found, expected, classifier_keys):
        raise InputError(f"--features {file.path} does not contain the weights of --features_model {file.model}: {problems}. "
                         "Give the timm name of the model that they were trained for.")
    network.module.load_state_dict({key: found[key] for key in expected})


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor of a safetensors or .pth file. In a .pth file, the tensors can be nested under state_dict or model."""
    try:
        found = read_weight_file(path)
    except WeightFileError as error:
        raise InputError(f"--features is {str(path)!r}, which is not a weights file: {error}. For a TorchScript file, omit "
                         "--features_model.") from error
    for name in CHECKPOINT_WEIGHT_KEYS:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not found or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise InputError(f"--features is {str(path)!r}, which does not contain only named tensors; give a state dict.")
    return found
