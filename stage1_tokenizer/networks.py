"""Convolutional encoder and decoder with the block layout of taming-transformers (VQGAN, Esser et al. 2021).

Blocks, paddings and norms come in the same order, so the weights of taming-transformers and of diffusers' VQModel map one to one onto these
modules. `tokenizer.block: convnext` uses other blocks and norms in the same order.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vqmosaic.kernels.group_norm import GroupNorm
from vqmosaic.kernels.matmul_attention import can_use_matmul_attention, matmul_attention
from vqmosaic.kernels.upsampling import upsample
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels at each position (eps 1e-6), optionally followed by swish."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x_BCHW: torch.Tensor, swish: bool = False) -> torch.Tensor:
        normed_BCHW = super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.silu(normed_BCHW) if swish else normed_BCHW


def make_norm(config: TokenizerConfig, channels: int) -> nn.Module:
    """The norm of the configured block type: GroupNorm (resnet) or LayerNorm over channels (convnext)."""
    return ChannelNorm(channels) if config.block == "convnext" else GroupNorm(channels)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each preceded by norm and swish, with a skip connection."""

    def __init__(self, config: TokenizerConfig, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1 = make_norm(config, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = make_norm(config, channels_out)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        hidden_BCHW = self.conv1(self.norm1(x_BCHW, swish=True))
        return self.conv2(self.dropout(self.norm2(hidden_BCHW, swish=True))) + self.shortcut(x_BCHW)


class ConvNeXtBlock(nn.Module):
    """Depthwise 3x3 convolution, LayerNorm and a pointwise MLP of four times the width, with a skip connection.

    Follows ConvNeXt (Liu et al. 2022), but with 3x3 kernels and swish. It has less than half the weights and multiplications of a ResidualBlock,
    most of them in plain matrix products.
    """

    def __init__(self, config: TokenizerConfig, channels_in: int, channels_out: int):
        super().__init__()
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()
        self.depthwise = nn.Conv2d(channels_out, channels_out, 3, padding=1, groups=channels_out)
        self.norm = nn.LayerNorm(channels_out, eps=1e-6)
        self.widen = nn.Linear(channels_out, 4 * channels_out)
        self.dropout = nn.Dropout(config.dropout)
        self.narrow = nn.Linear(4 * channels_out, channels_out)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        x_BCHW = self.shortcut(x_BCHW)
        hidden_BHWC = self.norm(self.depthwise(x_BCHW).permute(0, 2, 3, 1))
        hidden_BHWC = self.narrow(self.dropout(F.silu(self.widen(hidden_BHWC))))
        return x_BCHW + hidden_BHWC.permute(0, 3, 1, 2)


BLOCKS = {"resnet": ResidualBlock, "convnext": ConvNeXtBlock}


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, with a skip connection."""

    def __init__(self, config: TokenizerConfig, channels: int):
        super().__init__()
        self.norm = make_norm(config, channels)
        self.query, self.key, self.value, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        normed_BCHW = self.norm(x_BCHW)
        # contiguous, because torch's memory-efficient kernels need channels that lie side by side
        query, key, value = (layer(normed_BCHW).flatten(2).transpose(1, 2).contiguous()[:, None] for layer in (self.query, self.key, self.value))
        attend = matmul_attention if can_use_matmul_attention(query, key) else F.scaled_dot_product_attention
        mixed_B1NC = attend(query, key, value, is_causal=False)  # one head, N = HW positions
        return x_BCHW + self.out(mixed_B1NC[:, 0].transpose(1, 2).reshape(x_BCHW.shape))


class Downsample(nn.Module):
    """Halve height and width: convolution of stride 2, padded at the right and bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width by nearest-neighbour upsampling, followed by a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return upsample(self.conv, x_BCHW)


def make_level_blocks(config: TokenizerConfig, level: int, channels_in: int, channels_out: int, count: int) -> nn.ModuleList:
    """The blocks of one level, each followed by attention if config.attention_levels contains the level."""
    blocks = nn.ModuleList()
    for index in range(count):
        blocks.append(BLOCKS[config.block](config, channels_in if index == 0 else channels_out, channels_out))
        if level in config.attention_levels:
            blocks.append(AttentionBlock(config, channels_out))
    return blocks


def make_middle_blocks(config: TokenizerConfig, channels: int) -> nn.Sequential:
    """Block, attention if configured, block, at the lowest resolution."""
    attention_blocks = [AttentionBlock(config, channels)] if config.middle_attention else []
    first, last = (BLOCKS[config.block](config, channels, channels) for _ in range(2))
    return nn.Sequential(first, *attention_blocks, last)


class Encoder(nn.Module):
    """Images (B, C, H, W) to features (B, latent_channels, h, w)."""

    def __init__(self, config: TokenizerConfig, image_channels: int):
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        self.patch_size = config.patch_size
        self.conv_in = nn.Conv2d(image_channels * self.patch_size**2, config.channels, 3, padding=1)
        self.levels = nn.ModuleList()
        channels = config.channels
        for level, width in enumerate(widths):
            blocks = make_level_blocks(config, level, channels, width, config.residual_blocks)
            self.levels.append(nn.Sequential(*blocks, *([Downsample(width)] if level < len(widths) - 1 else [])))
            channels = width
        self.middle = make_middle_blocks(config, channels)
        self.norm_out = make_norm(config, channels)
        self.conv_out = nn.Conv2d(channels, config.latent_channels, 3, padding=1)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        patches = F.pixel_unshuffle(images_BCHW, self.patch_size)  # (B, C p^2, H / p, W / p)
        features = self.conv_in(patches)                      # (B, channels, H / p, W / p)
        for level in self.levels:
            features = level(features)                        # (B, width, H / p / 2^n, W / p / 2^n)
        features = self.middle(features)                      # (B, width, h, w)
        return self.conv_out(self.norm_out(features, swish=True))  # (B, latent_channels, h, w)


class Decoder(nn.Module):
    """Features (B, latent_channels, h, w) to images (B, C, H, W), not clamped."""

    def __init__(self, config: TokenizerConfig, image_channels: int):
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        channels = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.middle = make_middle_blocks(config, channels)
        self.levels = nn.ModuleList()  # from the lowest resolution to the full one
        for level in reversed(range(len(widths))):
            blocks = make_level_blocks(config, level, channels, widths[level], config.residual_blocks + 1)
            self.levels.append(nn.Sequential(*blocks, *([Upsample(widths[level])] if level > 0 else [])))
            channels = widths[level]
        self.norm_out = make_norm(config, channels)
        self.patch_size = config.patch_size
        self.conv_out = nn.Conv2d(channels, image_channels * self.patch_size**2, 3, padding=1)

    @property
    def last_layer(self) -> torch.Tensor:
        """The weight of the last convolution. Its gradient norms give the adaptive adversarial weight."""
        return self.conv_out.weight

    def forward(self, latents_BChw: torch.Tensor) -> torch.Tensor:
        patches = self.conv_out(self.features(latents_BChw))  # (B, C p^2, H / p, W / p)
        return F.pixel_shuffle(patches, self.patch_size)      # (B, C, H, W)

    def __getstate__(self) -> dict[str, Any]:
        """State without a compiled `features`: in a copy, it would still compute with the weights of the original."""
        return {name: value for name, value in super().__getstate__().items() if name != "features"}

    def features(self, latents_BChw: torch.Tensor) -> torch.Tensor:
        """Input of the last convolution: (B, channels, H / p, W / p)."""
        features = self.middle(self.conv_in(latents_BChw))    # (B, width, h, w)
        for level in self.levels:
            features = level(features)                        # (B, width, h * 2^n, w * 2^n)
        return self.norm_out(features, swish=True)


def compile_networks(encoder: Encoder, decoder: Decoder, *others: nn.Module) -> None:
    """Compile the encoder, and the decoder without its last convolution, whose gradient the adaptive adversarial weight needs separately. Compile
    all other networks completely.

    In one process each becomes one graph. Compiling smaller parts would add tens of graph entries and exits per step, which cost as much time as
    some of the parts. (With several processes, torch splits the graphs where gradients are exchanged.)
    """
    # torch limits the recompilations of a function, and compiled modules share one: Module._call_impl
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    encoder.compile()
    for network in others:  # inputs of another size than the encoder's would make torch compile for any size, which fails in torch 2.13
        network.compile(dynamic=False)
    vars(decoder)["features"] = torch.compile(decoder.features)  # this object's attribute hides the method
