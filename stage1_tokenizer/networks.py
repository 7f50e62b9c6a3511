"""Convolutional encoder and decoder, laid out block for block like those of taming-transformers (VQGAN, Esser et al. 2021).

The order of blocks, paddings and norms is kept so that weights of taming-transformers and of diffusers' VQModel can be mapped
onto these modules one to one. With `tokenizer.block: convnext` the blocks and norms are others, in the same order.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vqmosaic.kernels.group_norm import GroupNorm
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each place, with eps 1e-6, and swish after it if that is asked for."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x_BCHW: torch.Tensor, swish: bool = False) -> torch.Tensor:
        normed_BCHW = super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.silu(normed_BCHW) if swish else normed_BCHW


def normalization(config: TokenizerConfig, channels: int) -> nn.Module:
    """The norm that goes with the kind of blocks: GroupNorm, or LayerNorm over channels."""
    return ChannelNorm(channels) if config.block == "convnext" else GroupNorm(channels)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after norm and swish, around a skip connection."""

    def __init__(self, config: TokenizerConfig, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1 = normalization(config, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = normalization(config, channels_out)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        hidden_BCHW = self.conv1(self.norm1(x_BCHW, swish=True))
        return self.conv2(self.dropout(self.norm2(hidden_BCHW, swish=True))).add_(self.shortcut(x_BCHW))


class ConvNeXtBlock(nn.Module):
    """Depthwise 3x3 convolution, LayerNorm, and two layers on each place with four times the width between them, around a skip connection.

    After ConvNeXt (Liu et al. 2022), with swish as everywhere here. It has less than half of a ResidualBlock's weights and multiplications, and most
    of them in plain matrix products.
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
    """One-head self-attention over all positions, around a skip connection.

    Its 1x1 convolutions, which they are by their weights, are computed as plain matrix products, without a change of memory order between them.
    """

    def __init__(self, config: TokenizerConfig, channels: int):
        super().__init__()
        self.norm = normalization(config, channels)
        self.query, self.key, self.value, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        normed_BHWC = self.norm(x_BCHW).permute(0, 2, 3, 1)
        query, key, value = (pointwise(layer, normed_BHWC).flatten(1, 2) for layer in (self.query, self.key, self.value))  # (B, HW, C)
        mixed_BHWC = attention(query, key, value).view(normed_BHWC.shape)
        return x_BCHW + pointwise(self.out, mixed_BHWC).permute(0, 3, 1, 2)


def attention(query_BNC: torch.Tensor, key_BNC: torch.Tensor, value_BNC: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt(C)) V, (B, N, C).

    On a CPU in bf16 the gradient of torch's kernel takes, for few places, up to four times as long as that of the products it is made of.
    """
    if query_BNC.device.type == "cpu" and query_BNC.dtype == torch.bfloat16 and query_BNC.requires_grad and query_BNC.shape[1] <= 256:
        scores_BNN = torch.baddbmm(query_BNC.new_zeros(()), query_BNC, key_BNC.transpose(1, 2), alpha=query_BNC.shape[2]**-0.5)
        return torch.bmm(scores_BNN.softmax(dim=-1), value_BNC)
    return F.scaled_dot_product_attention(*(each[:, None] for each in (query_BNC, key_BNC, value_BNC)))[:, 0]


def pointwise(layer: nn.Conv2d, x_BHWC: torch.Tensor) -> torch.Tensor:
    """What a 1x1 convolution makes of channels that come last, as one matrix product: (B, H, W, C_out)."""
    return F.linear(x_BHWC, layer.weight.flatten(1), layer.bias)


class Downsample(nn.Module):
    """Half the height and width: stride 2 with padding at the right and bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the height and width: what nearest neighbour and then a 3x3 convolution give, at 4/9 of the multiplications.

    Where each pixel stands four times, several taps of the kernel meet the same pixel. Added up beforehand they are the 4x4 kernel of a
    transposed convolution over the small image.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        kernel_IO44 = fold_taps(fold_taps(self.conv.weight, 2), 3).transpose(0, 1)
        doubled_BCHW = F.conv_transpose2d(x_BCHW, kernel_IO44, stride=2, padding=1)
        # as the operator's own bias it would have a gradient that takes a CPU longer than the rest of it
        return doubled_BCHW + self.conv.bias.to(doubled_BCHW.dtype)[:, None, None]


def fold_taps(kernel: torch.Tensor, dim: int) -> torch.Tensor:
    """Three taps over an image in which each pixel stands twice, as the four taps of a transposed convolution of stride 2."""
    first, second, third = kernel.unbind(dim)
    return torch.stack([third, second + third, first + second, first], dim)


def level_blocks(config: TokenizerConfig, level: int, channels_in: int, channels_out: int, count: int) -> nn.ModuleList:
    """The blocks of one level, each followed by attention where the configuration has it at this level."""
    blocks = nn.ModuleList()
    for index in range(count):
        blocks.append(BLOCKS[config.block](config, channels_in if index == 0 else channels_out, channels_out))
        if level in config.attention_levels:
            blocks.append(AttentionBlock(config, channels_out))
    return blocks


def middle_blocks(config: TokenizerConfig, channels: int) -> nn.Sequential:
    """Block, attention if configured, block, at the lowest resolution."""
    attention = [AttentionBlock(config, channels)] if config.middle_attention else []
    first, last = (BLOCKS[config.block](config, channels, channels) for _ in range(2))
    return nn.Sequential(first, *attention, last)


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
            blocks = level_blocks(config, level, channels, width, config.residual_blocks)
            self.levels.append(nn.Sequential(*blocks, *([Downsample(width)] if level < len(widths) - 1 else [])))
            channels = width
        self.middle = middle_blocks(config, channels)
        self.norm_out = normalization(config, channels)
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
        self.middle = middle_blocks(config, channels)
        self.levels = nn.ModuleList()  # from the lowest resolution to the full one
        for level in reversed(range(len(widths))):
            blocks = level_blocks(config, level, channels, widths[level], config.residual_blocks + 1)
            self.levels.append(nn.Sequential(*blocks, *([Upsample(widths[level])] if level > 0 else [])))
            channels = widths[level]
        self.norm_out = normalization(config, channels)
        self.patch_size = config.patch_size
        self.conv_out = nn.Conv2d(channels, image_channels * self.patch_size**2, 3, padding=1)

    @property
    def last_layer(self) -> torch.Tensor:
        """The weight nearest to the pixels, against whose gradient adversarial losses are balanced."""
        return self.conv_out.weight

    def forward(self, latents_BChw: torch.Tensor) -> torch.Tensor:
        patches = self.conv_out(self.features(latents_BChw))  # (B, C p^2, H / p, W / p)
        return F.pixel_shuffle(patches, self.patch_size)      # (B, C, H, W)

    def __getstate__(self) -> dict[str, Any]:
        """Of a compiled decoder without what is compiled, which would go on computing with this one's weights in a copy."""
        return {name: value for name, value in super().__getstate__().items() if name != "features"}

    def features(self, latents_BChw: torch.Tensor) -> torch.Tensor:
        """What the last layer makes pixels of: (B, channels, H / p, W / p)."""
        features = self.middle(self.conv_in(latents_BChw))    # (B, width, h, w)
        for level in self.levels:
            features = level(features)                        # (B, width, h * 2^n, w * 2^n)
        return self.norm_out(features, swish=True)


def compile_networks(encoder: Encoder, decoder: Decoder) -> None:
    """Compile the encoder, and the decoder up to its last layer, against whose gradient alone adversarial losses are balanced.

    In one process each is one graph: parts of it, compiled by themselves, would be entered and left tens of times a step, which takes as long as
    some of them. (With several, torch parts them where gradients are exchanged.)
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # all modules share their entry, and each compiles it anew
    encoder.compile()
    decoder.features = torch.compile(decoder.features)
