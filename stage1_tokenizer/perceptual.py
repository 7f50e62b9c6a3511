"""Perceptual losses in float32: LPIPS on VGG16 features (Zhang et al. 2018) and feature matching on discriminator features."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from stage1_tokenizer.image_files.channels import colour_channels
from stage1_tokenizer.perceptual_weights import FIELD, PerceptualWeights, resolve_perceptual_weights
from vqmosaic.errors import InputError
from vqmosaic.files.permissions import check_readable
from vqmosaic.files.weight_files import WeightFileError, read_weight_file
from vqmosaic.files.weights_fit import describe_mismatches

__all__ = ["LPIPS", "feature_matching_loss", "resolve_perceptual_weights"]

VGG16_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of the VGG16 convolutions, in the five stages between the pooling layers (Simonyan & Zisserman 2015, configuration D)."""
CLASSIFIER_TENSORS = frozenset(f"classifier.{index}.{kind}" for index in (0, 3, 6) for kind in ("weight", "bias"))
"""Tensors of the VGG16 classifier, which LPIPS does not use."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""ImageNet mean and standard deviation for images in [-1, 1], rounded as in LPIPS."""
NORM_EPS = 1e-8
"""Added to squared norms before the square root, so that the gradient is finite where all features are 0."""
MIN_IMAGE_SIDE = 16
"""Smallest height and width in pixels. The four poolings reduce it to 1 x 1."""
FEATURE_EPS = 1e-6
"""Added to the mean absolute real feature before feature matching divides by it."""


class LPIPS(nn.Module):
    """Learned perceptual image distance (version 0.1, VGG16). Frozen and in eval mode.

    Args:
        files: the weight files. None searches for them, see resolve_perceptual_weights.

    Raises:
        ValueError: a weight file is not found or cannot be read, or its tensors do not match the network (the message lists them).
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, files: PerceptualWeights | None = None):
        super().__init__()
        files = files or resolve_perceptual_weights(None)
        self.stages = nn.ModuleList()
        vgg16_expected: dict[str, torch.Tensor] = {}
        index, channels = 0, 3  # torchvision numbers convolutions, ReLUs and poolings consecutively
        with torch.device("meta"):  # the files provide all weights, so skip their initialization
            for widths in VGG16_WIDTHS:
                stage = nn.ModuleDict()
                for width in widths:
                    stage[str(index)] = nn.Conv2d(channels, width, 3, padding=1)
                    vgg16_expected |= {f"features.{index}.{kind}": tensor for kind, tensor in stage[str(index)].state_dict().items()}
                    index, channels = index + 2, width  # skip the ReLU
                index += 1  # skip the pooling
                self.stages.append(stage)
            linear_expected = {f"lin{number}.model.1.weight": torch.empty(1, widths[-1], 1, 1) for number, widths in enumerate(VGG16_WIDTHS)}
        vgg16 = _read_weights(files.vgg16, vgg16_expected, ignored=CLASSIFIER_TENSORS)
        linear = _read_weights(files.linear, linear_expected)
        self.load_state_dict({f"stages.{number}.{key}.{kind}": vgg16[f"features.{key}.{kind}"]
                              for number, stage in enumerate(self.stages)
                              for key, _ in stage.named_children() for kind in ("weight", "bias")}, assign=True)
        for number in range(len(VGG16_WIDTHS)):
            self.register_buffer(f"linear_{number}", linear[f"lin{number}.model.1.weight"])
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def forward(self, first_BCHW: torch.Tensor, second_BCHW: torch.Tensor) -> torch.Tensor:
        """LPIPS distance between corresponding images, averaged over the batch (Zhang et al. 2018, eq. 1).

        A float32 scalar. It is symmetric, and 0 for equal images.

        Args:
            first_BCHW, second_BCHW: images in [-1, 1] with 1 to 4 channels (colour_channels), at least 16 pixels per side. Gradients flow to both.

        Raises:
            ValueError: the images are too small.
        """
        if min(first_BCHW.shape[2:]) < MIN_IMAGE_SIDE:
            raise InputError(f"images of shape {tuple(first_BCHW.shape)} are too small for LPIPS. "
                             f"It needs at least {MIN_IMAGE_SIDE} pixels per side.")
        with torch.autocast(first_BCHW.device.type, enabled=False):
            feature_pairs = zip(self._features(first_BCHW.float()), self._features(second_BCHW.float()), strict=True)
            distances = []
            for number, (first, second) in enumerate(feature_pairs):
                squared_differences = (_normalize_channels(first) - _normalize_channels(second)).square()
                distances.append(F.conv2d(squared_differences, getattr(self, f"linear_{number}")).mean())
            return torch.stack(distances).sum()

    def _features(self, images_BCHW: torch.Tensor) -> list[torch.Tensor]:
        """The output of each of the five VGG16 stages, from (B, 64, H, W) to (B, 512, H / 16, W / 16)."""
        features = (colour_channels(images_BCHW).expand(-1, 3, -1, -1) - self.shift) / self.scale  # repeats a single channel
        maps: list[torch.Tensor] = []
        for stage in self.stages:
            if maps:
                features = F.max_pool2d(features, 2)
            for convolution in stage.children():
                features = F.relu(convolution(features))
            maps.append(features)
        return maps


def _normalize_channels(features_BCHW: torch.Tensor) -> torch.Tensor:
    """Scale the feature vector at each position to unit length. Zero vectors stay zero."""
    return features_BCHW / (features_BCHW.square().sum(1, keepdim=True) + NORM_EPS).sqrt()


def _read_weights(file: Path, expected: dict[str, torch.Tensor], ignored: frozenset[str] = frozenset()) -> dict[str, torch.Tensor]:
    """Read the tensors with the names and shapes of `expected` from a file, as float32. Never runs pickled code.

    Raises InputError if the file cannot be read, or if tensors are missing, have another shape, or are neither in `expected` nor in `ignored`.
    """
    check_readable(file)
    try:
        found = read_weight_file(file)
    except WeightFileError as error:
        raise InputError(f"{FIELD}: {file} is not a weight file: {error}. Download it again.") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise InputError(f"{FIELD}: {file} does not hold a dict of tensors. Give a state dict.")
    if problems := describe_mismatches(found, expected, ignored):
        raise InputError(f"{FIELD}: the tensors in {file} do not match the network: {problems}. "
                         "Give torchvision's VGG16 without batch norm, and the linear weights of LPIPS 0.1 for VGG16.")
    return {name: found[name].float() for name in expected}


def feature_matching_loss(real_features: list[torch.Tensor], fake_features: list[torch.Tensor]) -> torch.Tensor:
    """Mean absolute difference of discriminator features, averaged over layers (Salimans et al. 2016; Wang et al. 2018, pix2pixHD).

    A float32 scalar. Each layer's difference is divided by its mean absolute real feature, so layers of different scale count equally.

    Args:
        real_features: one feature map (B, C, H, W) of the images per discriminator layer; detached here.
        fake_features: the same for the reconstructions, with the same random augmentations.
    """
    losses = []
    for real, fake in zip(real_features, fake_features, strict=True):
        real, fake = real.detach().float(), fake.float()
        losses.append((real - fake).abs().mean() / (real.abs().mean() + FEATURE_EPS))
    return torch.stack(losses).mean()
