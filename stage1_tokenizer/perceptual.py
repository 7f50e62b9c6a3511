"""Perceptual losses: LPIPS on features of VGG16 (Zhang et al. 2018), and feature matching on those of the discriminator. In float32."""

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from stage1_tokenizer.perceptual_weights import FIELD, PerceptualWeights, resolve_perceptual_weights
from vqmosaic.errors import InputError
from vqmosaic.files.permissions import check_readable

__all__ = ["LPIPS", "feature_matching_loss", "resolve_perceptual_weights"]

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Widths of VGG16's convolutions between its poolings (Simonyan & Zisserman 2015, configuration D)."""
CLASSIFIER = {f"classifier.{index}.{kind}" for index in (0, 3, 6) for kind in ("weight", "bias")}
"""Tensors of VGG16 that come after its features."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""ImageNet's mean and deviation for images in [-1, 1], as LPIPS rounds them."""
NORM_EPS = 1e-8
"""Inside the root: its gradient is finite where all features are 0."""
SMALLEST_SIDE = 16
"""Four poolings leave one place of it."""
FEATURE_EPS = 1e-6
LISTED = 8


class LPIPS(nn.Module):
    """Learned perceptual distance of images (version 0.1, VGG16), frozen and in eval mode from the start.

    Raises:
        ValueError: a weight file cannot be read, or its tensors are not those of the network, which are listed.
    """

    def __init__(self, files: PerceptualWeights | None = None):
        super().__init__()
        files = files or resolve_perceptual_weights(None)
        self.stages, shapes, index, channels = nn.ModuleList(), {}, 0, 3
        with torch.device("meta"):  # nothing is initialized that the files bring
            for widths in STAGES:
                stage = nn.ModuleDict()
                for width in widths:  # keys are torchvision's: convolution, rectifier, ..., pooling are numbered through
                    stage[str(index)] = nn.Conv2d(channels, width, 3, padding=1)
                    shapes |= {f"features.{index}.weight": (width, channels, 3, 3), f"features.{index}.bias": (width,)}
                    index, channels = index + 2, width
                index += 1
                self.stages.append(stage)
        vgg16 = _read(files.vgg16, shapes, ignored=CLASSIFIER)
        linear = _read(files.linear, {f"lin{number}.model.1.weight": (1, widths[-1], 1, 1) for number, widths in enumerate(STAGES)})
        self.load_state_dict({f"stages.{number}.{key}.{kind}": vgg16[f"features.{key}.{kind}"]
                              for number, stage in enumerate(self.stages) for key in stage for kind in ("weight", "bias")}, assign=True)
        for number in range(len(STAGES)):
            self.register_buffer(f"linear_{number}", linear[f"lin{number}.model.1.weight"])
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def forward(self, first_BCHW: torch.Tensor, second_BCHW: torch.Tensor) -> torch.Tensor:
        """The mean distance of the i-th images of two batches, a float32 scalar; 0 where they are equal, the same either way round.

        Args:
            first_BCHW, second_BCHW: images in [-1, 1] with 1 or 3 channels, at least 16 pixels a side. Gradients flow to both.

        Raises:
            ValueError: the images are too small.
        """
        if min(first_BCHW.shape[2:]) < SMALLEST_SIDE:
            raise InputError(f"images of shape {tuple(first_BCHW.shape)} are too small for LPIPS; it needs at least {SMALLEST_SIDE} pixels a side.")
        with torch.autocast(first_BCHW.device.type, enabled=False):
            pairs = zip(self._features(first_BCHW.float()), self._features(second_BCHW.float()), strict=True)
            distances = [F.conv2d((_unit(first) - _unit(second)).square(), getattr(self, f"linear_{number}")).mean()
                         for number, (first, second) in enumerate(pairs)]
            return torch.stack(distances).sum()

    def _features(self, images_BCHW: torch.Tensor) -> list[torch.Tensor]:
        """VGG16's features before each pooling, from (B, 64, H, W) to (B, 512, H / 16, W / 16)."""
        features = (images_BCHW.expand(-1, 3, -1, -1) - self.shift) / self.scale  # grey becomes three equal channels
        maps: list[torch.Tensor] = []
        for stage in self.stages:
            if maps:
                features = F.max_pool2d(features, 2)
            for convolution in stage.values():
                features = F.relu(convolution(features))
            maps.append(features)
        return maps


def _unit(features_BCHW: torch.Tensor) -> torch.Tensor:
    """Each place's vector of features at length 1; the zero vector stays zero."""
    return features_BCHW / (features_BCHW.square().sum(1, keepdim=True) + NORM_EPS).sqrt()


def _read(file: Path, shapes: dict[str, tuple[int, ...]], ignored: set[str] = frozenset()) -> dict[str, torch.Tensor]:
    """Float32 tensors of exactly these names and shapes from a file, never an object's own code."""
    check_readable(file)
    try:
        found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise InputError(f"{FIELD} leads to {file}, which is no file of weights: {' '.join(str(error).split())[:300]}. Get it anew.") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise InputError(f"{FIELD} leads to {file}, which holds something else than named tensors; give a state dict.")
    problems = [f"missing {name}" for name in shapes.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in found.keys() - shapes.keys() - ignored]
    problems += [f"{name} has shape {tuple(found[name].shape)}, not {shapes[name]}"
                 for name in shapes.keys() & found.keys() if tuple(found[name].shape) != shapes[name]]
    if problems:
        more = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise InputError(f"{FIELD} leads to {file}, whose tensors are not those that are needed: {'; '.join(sorted(problems)[:LISTED])}{more}. "
                         "VGG16 is torchvision's without batch norm, the linear weights are those of LPIPS 0.1 for VGG16.")
    return {name: found[name].float() for name in shapes}


def feature_matching_loss(real_features: list[torch.Tensor], fake_features: list[torch.Tensor]) -> torch.Tensor:
    """Mean over layers of the absolute difference of a discriminator's features (Salimans et al. 2016; Wang et al. 2018, pix2pixHD).

    A float32 scalar. Each layer is measured in units of its mean absolute real feature, so that wide and narrow ranges count alike.

    Args:
        real_features: feature maps (B, C, H, W) of the images; detached here.
        fake_features: those of their reconstructions, in the same order, from the same draws of augmentation.
    """
    losses = []
    for real, fake in zip(real_features, fake_features, strict=True):
        real, fake = real.detach().float(), fake.float()
        losses.append((real - fake).abs().mean() / (real.abs().mean() + FEATURE_EPS))
    return torch.stack(losses).mean()
