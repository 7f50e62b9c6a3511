"""A PatchGAN discriminator (Isola et al. 2017) with the layout of pix2pix and taming-transformers, but without batch norm.

Batch norm would make the logits of an image depend on the other images in the batch, and on how the batch is split over processes.
"""

import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from vqmosaic.recipes.tokenizer_sections import AdversarialConfig, patches_per_side
from vqmosaic.seeding import derive_seed

MAX_WIDTH_MULTIPLIER = 8
LEAKY_SLOPE = 0.2


class PatchDiscriminator(nn.Module):
    """Images (B, C, H, W) in [-1, 1] to logits (B, 1, h, w), one for each overlapping patch; larger means "real".

    config.layers 4x4 convolutions of stride 2, one of stride 1, and one of stride 1 to a single channel, with leaky ReLUs between them. With
    config.norm == "group", GroupNorm follows every convolution except the first and the last. Weights are drawn with `seed` from a normal
    distribution of standard deviation 0.02. The global random state does not change.

    With config.spectral_norm (Miyato et al. 2018), each weight is divided by an estimate of its largest singular value. The singular vectors of
    the estimate are buffers in the state_dict. Forward passes do not change them. Training calls commit() after each accepted optimizer step, that
    is, a step with finite loss and gradients. So refused steps have no effect on them, and several micro-batches count as one step.
    """

    def __init__(self, config: AdversarialConfig, image_channels: int, seed: int):
        super().__init__()
        self.config = config
        widths = [config.channels * min(2**index, MAX_WIDTH_MULTIPLIER) for index in range(config.layers + 1)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "discriminator"))
            self.blocks = nn.ModuleList()
            channels = image_channels
            for index, width in enumerate(widths):
                convolution = self._convolution(channels, width, stride=2 if index < config.layers else 1)
                norm = [nn.GroupNorm(group_count(width), width)] if index > 0 and config.norm == "group" else []
                self.blocks.append(nn.Sequential(convolution, *norm, nn.LeakyReLU(LEAKY_SLOPE)))
                channels = width
            self.conv_out = self._convolution(channels, 1, stride=1)

    def _convolution(self, channels_in: int, channels_out: int, stride: int) -> nn.Conv2d:
        convolution = nn.Conv2d(channels_in, channels_out, 4, stride=stride, padding=1)
        assert convolution.bias is not None
        nn.init.normal_(convolution.weight, 0.0, 0.02)
        nn.init.zeros_(convolution.bias)
        if self.config.spectral_norm:
            spectral_norm(convolution)  # changes the module in place
        return convolution

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.features(images_BCHW)[0]

    def features(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits (B, 1, h, w), and the feature map after each of the config.layers + 1 leaky ReLUs, from fine to coarse.

        Raises:
            ValueError: the images are too small for config.layers.
        """
        patches_per_side(min(images_BCHW.shape[2:]), self.config.layers)
        with parametrize.cached():  # the weights are computed here, outside autocast, and kept for this forward pass
            self._compute_weights(images_BCHW.device.type, run_power_iteration=False)
            maps: list[torch.Tensor] = []
            features = images_BCHW
            for block in self.blocks:
                features = block(features)                    # (B, width, H / 2^n, W / 2^n), at the last one (.., h + 1, w + 1)
                maps.append(features)
            return self.conv_out(features), maps              # (B, 1, h, w)

    def _compute_weights(self, device_type: str, run_power_iteration: bool) -> None:
        """Compute the weights with spectral norm, in float32. Inside parametrize.cached(), torch keeps them.

        With `run_power_iteration`, torch's spectral_norm is in training mode: computing a weight first updates its singular vectors.
        """
        with torch.autocast(device_type, enabled=False):
            for convolution in self._normalized_convolutions():
                convolution.get_submodule("parametrizations.weight").train(run_power_iteration)
                _ = convolution.weight  # reading the attribute computes the weight

    @torch.no_grad()
    def commit(self) -> None:
        """Update the estimated singular vectors by one power iteration. Call this after each accepted optimizer step."""
        self._compute_weights(next(self.parameters()).device.type, run_power_iteration=True)

    def _normalized_convolutions(self) -> Iterator[nn.Module]:
        return (module for module in self.modules() if parametrize.is_parametrized(module, "weight"))


def group_count(width: int) -> int:
    """Number of GroupNorm groups for `width` channels, a multiple of 4: the largest power of two up to 32 that divides width / 4.

    So each group has at least four channels.
    """
    return math.gcd(32, width // 4)
