"""ImageTokenizer: one encoder, quantizer and decoder. It encodes an image to one grid of ids."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.networks import Decoder, Encoder
from stage1_tokenizer.quantizers import QUANTIZERS, Quantizer, QuantizerOutput
from stage1_tokenizer.tokenizer_config import IMAGE_TOKENIZER
from stage1_tokenizer.tokenizer_protocol import ids_shape
from stage1_tokenizer.trainable.trainable_tokenizer import TrainableTokenizer, fingerprinted_fields, network_fields
from vqmosaic.recipes.field_types import as_integer
from vqmosaic.recipes.tokenizer_sections import IMAGE_GRID, TokenizerConfig
from vqmosaic.seeding import derive_seed


class ImageTokenizer(TrainableTokenizer):
    """Encoder, quantizer and decoder over images (B, C, H, W) float32 in [-1, 1]. Its only grid is named `image`."""

    FORMAT = IMAGE_TOKENIZER
    KIND = "image"
    TOKEN_PARTS = ("encoder", "quant_conv", "quantizer")
    DECODER_PARTS = ("post_quant_conv", "decoder")

    def __init__(self, config: TokenizerConfig, transform: ImageTransform, class_names: list[str] | None = None, seed: int = 0):
        super().__init__(config, transform, class_names)
        seed = as_integer("seed", seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "tokenizer"))
            self.encoder = Encoder(config, transform.channels)
            self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
            self.quantizer = QUANTIZERS[config.quantizer](config, seed=seed)
            self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, 1)
            self.decoder = Decoder(config, transform.channels)

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        return {IMAGE_GRID: self.quantizer}

    @property
    def grid_sides(self) -> tuple[int, int]:
        """Height h and width w of the token grid."""
        return self.level_sides[IMAGE_GRID]

    @property
    def grid_size(self) -> int | tuple[int, int]:
        """Tokens along one side of a square grid; the pair (h, w) for other grids."""
        height, width = self.grid_sides
        return height if height == width else (height, width)

    @property
    def grid_shape(self) -> tuple[int, ...]:
        """Shape of one image's ids: (h, w), or (h, w, depth) if each position has several ids. Height and width of the latents without ids."""
        return ids_shape(self.grids[0]) if self.grids else self.grid_sides

    def networks(self) -> tuple[Encoder, Decoder]:
        return self.encoder, self.decoder

    def latents(self, images_BCHW: torch.Tensor, name: str = IMAGE_GRID) -> torch.Tensor:
        """Latents (B, D, h, w) before quantization."""
        return self.quant_conv(self.encoder(images_BCHW))

    def quantize(self, images_BCHW: torch.Tensor) -> dict[str, QuantizerOutput]:
        return {IMAGE_GRID: self.quantizer(self.latents(images_BCHW))}

    def decode_latents(self, quantized: Mapping[str, torch.Tensor]) -> torch.Tensor:
        latents_BDhw = quantized[IMAGE_GRID].to(self.post_quant_conv.weight.dtype)  # float32 or from_pretrained's dtype
        return self.decoder(self.post_quant_conv(latents_BDhw))

    # --- files -------------------------------------------------------------------------------------------------------------

    def network_config(self) -> dict[str, Any]:
        return network_fields(self.config)

    def _grids_in_config(self) -> dict[str, Any]:
        return {}  # they follow from the other fields, and version 0.1.0 did not write them

    def fingerprinted_config(self) -> dict[str, Any]:
        return {"network": fingerprinted_fields(self.config), "transform": self.transform.to_dict()}
