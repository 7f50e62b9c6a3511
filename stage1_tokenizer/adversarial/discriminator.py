"""A PatchGAN discriminator (Isola et al. 2017), laid out like that of pix2pix and taming-transformers, but with norms that see one image.

Batch norm would make the verdict on an image depend on its neighbours in the batch, and on how a batch is split over processes.
"""

import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from vqmosaic.recipes.tokenizer_sections import AdversarialConfig, patch_grid
from vqmosaic.seeding import derive_seed

LARGEST_MULTIPLIER = 8
SLOPE = 0.2


class PatchDiscriminator(nn.Module):
    """Images (B, C, H, W) in [-1, 1] to logits (B, 1, h, w), one for each overlapping patch; larger means "real".

    config.layers convolutions 4x4 of stride 2, one of stride 1, and one to a single channel, with leaky rectifiers between them. The first one
    has no norm. Weights start as N(0, 0.02), drawn from `seed`; the global generators are left as they were.

    With config.spectral_norm the estimates of the singular vectors are buffers, and part of the state_dict. No forward changes them; commit()
    moves them on once, after an accepted step: so a refused step changes nothing, and micro-batches make no difference.
    """

    def __init__(self, config: AdversarialConfig, image_channels: int, seed: int):
        super().__init__()
        self.config = config
        widths = [config.channels * min(2**index, LARGEST_MULTIPLIER) for index in range(config.layers + 1)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "discriminator"))
            self.blocks = nn.ModuleList()
            channels = image_channels
            for index, width in enumerate(widths):
                convolution = self._convolution(channels, width, stride=2 if index < config.layers else 1)
                norm = [nn.GroupNorm(group_count(width), width)] if index > 0 and config.norm == "group" else []
                self.blocks.append(nn.Sequential(convolution, *norm, nn.LeakyReLU(SLOPE)))
                channels = width
            self.conv_out = self._convolution(channels, 1, stride=1)

    def _convolution(self, channels_in: int, channels_out: int, stride: int) -> nn.Conv2d:
        convolution = nn.Conv2d(channels_in, channels_out, 4, stride=stride, padding=1)
        nn.init.normal_(convolution.weight, 0.0, 0.02)
        nn.init.zeros_(convolution.bias)
        return spectral_norm(convolution) if self.config.spectral_norm else convolution

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.features(images_BCHW)[0]

    def features(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits (B, 1, h, w), and the feature map after each rectifier: config.layers + 1 of them, from fine to coarse.

        Raises:
            ValueError: the images are too small for config.layers.
        """
        patch_grid(min(images_BCHW.shape[2:]), self.config.layers)
        with parametrize.cached():  # a weight is normalized once a forward, outside autocast
            self._normalize_weights(images_BCHW.device.type)
            maps: list[torch.Tensor] = []
            features = images_BCHW
            for block in self.blocks:
                features = block(features)                    # (B, width, H / 2^n, W / 2^n), at the last one (.., h + 1, w + 1)
                maps.append(features)
            return self.conv_out(features), maps              # (B, 1, h, w)

    def _normalize_weights(self, device_type: str, move_on: bool = False) -> None:
        """Divide the weights by their singular values, in float32; `move_on` lets the estimates of these follow the weights first."""
        with torch.autocast(device_type, enabled=False):
            for convolution in self._normalized():
                convolution.parametrizations.weight.train(move_on)
                _ = convolution.weight  # computed here, and cached where that is asked for

    @torch.no_grad()
    def commit(self) -> None:
        """Let the estimates of the singular vectors follow the weights, after an accepted step."""
        self._normalize_weights(self.conv_out.bias.device.type, move_on=True)

    def _normalized(self) -> Iterator[nn.Module]:
        return (module for module in self.modules() if parametrize.is_parametrized(module, "weight"))


def group_count(width: int) -> int:
    """Groups of a GroupNorm over this many channels: at most 32, each of at least four channels."""
    return math.gcd(32, width // 4)
