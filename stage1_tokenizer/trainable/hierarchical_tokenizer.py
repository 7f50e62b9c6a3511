"""HierarchicalTokenizer: two levels of latents, a top grid for the whole image and a bottom grid for its details (VQ-VAE-2, Razavi et al. 2019).

    images -> bottom_encoder -> features (B, C, h, w) -> top_encoder -> top_quantizer -> top_decoder -> decoded_top (B, C, h, w)
    features and decoded_top -> bottom_quantizer
    codes of both grids -> decoder -> images

The bottom latents depend on the top codes (figure 2a of the paper), so the bottom grid only has to add what the top grid lacks. The decoder sees
both.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.networks import Decoder, Encoder, Upsample
from stage1_tokenizer.quantizers import QUANTIZERS, Quantizer, QuantizerOutput
from stage1_tokenizer.tokenizer_config import HIERARCHICAL_TOKENIZER
from stage1_tokenizer.trainable.trainable_tokenizer import TrainableTokenizer, fingerprinted_fields, network_fields
from vqmosaic.errors import InputError
from vqmosaic.recipes.field_types import as_integer
from vqmosaic.recipes.tokenizer_sections import BOTTOM_GRID, QUANTIZER_FIELDS, TOP_GRID, TokenizerConfig
from vqmosaic.seeding import derive_seed


class HierarchicalTokenizer(TrainableTokenizer):
    """Two quantizers over images (B, C, H, W) float32 in [-1, 1]. Its grids are `top` (h / f, w / f) and `bottom` (h, w), with f = top_factor.

    Ids are dicts by grid name. A level can have any quantizer. If one of them has no ids, the tokenizer has no grids and only reconstructs.
    """

    FORMAT = HIERARCHICAL_TOKENIZER
    KIND = "hierarchical"
    TOKEN_PARTS = ("bottom_encoder", "top_encoder", "top_quant_conv", "top_quantizer", "top_post_quant_conv", "top_decoder", "bottom_quant_conv",
                   "bottom_quantizer")
    DECODER_PARTS = ("upsample_top", "post_quant_conv", "decoder")

    def __init__(self, config: TokenizerConfig, transform: ImageTransform, class_names: list[str] | None = None, seed: int = 0):
        super().__init__(config, transform, class_names)
        seed = as_integer("seed", seed)
        top, channels, inner = config.levels[TOP_GRID], config.latent_channels, config_between_levels(config)
        doublings = len(inner.channel_multipliers) - 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "tokenizer"))
            self.bottom_encoder = Encoder(config, transform.channels)
            self.top_encoder = Encoder(inner, channels)
            self.top_quant_conv = nn.Conv2d(channels, top.code_dim, 1)
            self.top_quantizer = QUANTIZERS[top.quantizer](top, seed=derive_seed(seed, "top quantizer"))
            self.top_post_quant_conv = nn.Conv2d(top.code_dim, channels, 1)
            self.top_decoder = Decoder(inner, channels)
            self.bottom_quant_conv = nn.Conv2d(2 * channels, config.code_dim, 1)
            self.bottom_quantizer = QUANTIZERS[config.quantizer](config, seed=seed)
            self.upsample_top = nn.Sequential(nn.Conv2d(top.code_dim, channels, 1), *(Upsample(channels) for _ in range(doublings)))
            self.post_quant_conv = nn.Conv2d(channels + config.code_dim, channels, 1)
            self.decoder = Decoder(config, transform.channels)

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        return {TOP_GRID: self.top_quantizer, BOTTOM_GRID: self.bottom_quantizer}

    def networks(self) -> tuple[Encoder, Decoder, Encoder, Decoder]:
        return self.bottom_encoder, self.decoder, self.top_encoder, self.top_decoder

    def quantize(self, images_BCHW: torch.Tensor) -> dict[str, QuantizerOutput]:
        features_BChw = self.bottom_encoder(images_BCHW)
        top = self.top_quantizer(self._top_latents(features_BChw))
        return {TOP_GRID: top, BOTTOM_GRID: self.bottom_quantizer(self._bottom_latents(features_BChw, top.quantized))}

    def latents(self, images_BCHW: torch.Tensor, name: str) -> torch.Tensor:
        features_BChw = self.bottom_encoder(images_BCHW)
        top_BDhw = self._top_latents(features_BChw)
        return top_BDhw if name == TOP_GRID else self._bottom_latents(features_BChw, self.top_quantizer(top_BDhw).quantized)

    def _top_latents(self, features_BChw: torch.Tensor) -> torch.Tensor:
        return self.top_quant_conv(self.top_encoder(features_BChw))                                # (B, D_top, h / f, w / f)

    def _bottom_latents(self, features_BChw: torch.Tensor, quantized_top: torch.Tensor) -> torch.Tensor:
        decoded_top_BChw = self.top_decoder(self.top_post_quant_conv(quantized_top))               # (B, C, h, w)
        return self.bottom_quant_conv(torch.cat([decoded_top_BChw, features_BChw], dim=1))         # (B, D, h, w)

    def decode_latents(self, quantized: Mapping[str, torch.Tensor]) -> torch.Tensor:
        dtype = self.post_quant_conv.weight.dtype  # float32 or from_pretrained's dtype
        top_BChw = self.upsample_top(quantized[TOP_GRID].to(dtype))                                # (B, C, h, w)
        both_BChw = torch.cat([top_BChw, quantized[BOTTOM_GRID].to(top_BChw.dtype)], dim=1)        # (B, C + D, h, w)
        return self.decoder(self.post_quant_conv(both_BChw))

    def decode_grids(self, ids: Mapping[str, torch.Tensor]) -> torch.Tensor:
        self.check_grid_names(ids)
        top, bottom = (tuple(ids[name].shape) for name in (TOP_GRID, BOTTOM_GRID))
        factor = self.config.top_factor
        if bottom[:1] != top[:1] or bottom[1:3] != tuple(side * factor for side in top[1:3]):
            raise InputError(f"the ids of grid 'top' have shape {top} and those of grid 'bottom' {bottom}. There must be as many images in both, and "
                             f"'bottom' must have {factor} times as many rows and columns (tokenizer.top_factor).")
        return super().decode_grids(ids)

    # --- files -------------------------------------------------------------------------------------------------------------

    def network_config(self) -> dict[str, Any]:
        return {"top_factor": self.config.top_factor, "top": dict(self.config.top), **network_fields(self.config)}

    def fingerprinted_config(self) -> dict[str, Any]:
        top = fingerprinted_fields(self.config.levels[TOP_GRID])
        levels = {"top_factor": self.config.top_factor, "top": {name: value for name, value in top.items() if name in QUANTIZER_FIELDS}}
        return super().fingerprinted_config() | {"network": fingerprinted_fields(self.config) | levels}


def config_between_levels(config: TokenizerConfig) -> TokenizerConfig:
    """The configuration of the networks between the bottom and the top resolution: `top_factor` as halvings, each as wide as the lowest level of
    the bottom networks, and with attention if that level has attention.
    """
    count, lowest = config.top_factor.bit_length(), len(config.channel_multipliers) - 1
    return dataclasses.replace(config, kind="image", top={}, patch_size=1, channel_multipliers=config.channel_multipliers[-1:] * count,
                               attention_levels=list(range(count)) if lowest in config.attention_levels else [])
