"""ImageTokenizer: one encoder, quantizer and decoder. It encodes an image to one grid of ids, and is the only tokenizer that can be trained."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.networks import Decoder, Encoder
from stage1_tokenizer.quantizers import QUANTIZERS, QuantizerOutput
from stage1_tokenizer.quantizers.operations.nearest_code import full_precision
from stage1_tokenizer.tokenizer_config import IMAGE_TOKENIZER
from stage1_tokenizer.tokenizer_grids import IMAGE_GRID, image_tokenizer_grids
from stage1_tokenizer.tokenizer_protocol import Tokenizer, ids_shape
from token_shards.manifest import Grid
from vqmosaic.errors import InputError
from vqmosaic.files.json_files import from_fields
from vqmosaic.recipes.field_types import as_integer
from vqmosaic.recipes.tokenizer_sections import LEARNING_FIELDS, RESIDUAL_FIELDS, TokenizerConfig, token_grid
from vqmosaic.seeding import derive_seed

ALWAYS_FINGERPRINTED_FIELDS = ("quantizer", "codebook_size", "code_dim", "latent_channels", "channels", "channel_multipliers", "residual_blocks",
                               "attention_levels", "middle_attention", "l2_normalize")
"""Fields that enter every fingerprint. Fields added later enter only if they differ from their default, so existing fingerprints stay valid.
A new field only needs a default that keeps the old behaviour."""


@dataclass
class TokenizerOutput:
    """Reconstructions (B, C, H, W), not clamped, and the output of the quantizer."""

    reconstructions: torch.Tensor
    quantizer: QuantizerOutput


class ImageTokenizer(Tokenizer):
    """Encoder, quantizer and decoder over images (B, C, H, W) float32 in [-1, 1]. Its only grid is named `image`."""

    FORMAT = IMAGE_TOKENIZER
    TOKEN_PARTS = ("encoder", "quant_conv", "quantizer")
    DECODER_PARTS = ("post_quant_conv", "decoder")

    def __init__(self, config: TokenizerConfig, transform: ImageTransform, class_names: list[str] | None = None, seed: int = 0):
        super().__init__(transform, class_names)
        seed = as_integer("seed", seed)
        token_grid("image_size", transform.image_size, config)  # raises an error if a side does not fit the downsampling
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "tokenizer"))
            self.encoder = Encoder(config, transform.channels)
            self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
            self.quantizer = QUANTIZERS[config.quantizer](config, seed=seed)
            self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, 1)
            self.decoder = Decoder(config, transform.channels)

    @classmethod
    def from_config(cls, network: dict[str, Any], transform: ImageTransform, class_names: list[str] | None, where: str,
                    version: str | None) -> Self:
        return cls(from_fields(TokenizerConfig, network, f"{where}: network", version), transform, class_names)

    @property
    def grids(self) -> list[Grid]:
        return image_tokenizer_grids(self.config, self.transform.image_size)

    @property
    def grid_sides(self) -> tuple[int, int]:
        """Height h and width w of the token grid."""
        return token_grid("image_size", self.transform.image_size, self.config)

    @property
    def grid_size(self) -> int | tuple[int, int]:
        """Tokens along one side of a square grid; the pair (h, w) for other grids."""
        height, width = self.grid_sides
        return height if height == width else (height, width)

    @property
    def grid_shape(self) -> tuple[int, ...]:
        """Shape of one image's ids: (h, w), or (h, w, depth) if each position has several ids. Height and width of the latents without ids."""
        return ids_shape(self.grids[0]) if self.grids else self.grid_sides

    def codebook_parameters(self) -> list[nn.Parameter]:
        """Parameters that are codes. They get no weight decay (no reason to shrink) and no weight averaging (a revived code jumps)."""
        return self.quantizer.codebook_parameters()

    def latents(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Latents (B, D, h, w) before quantization."""
        return self.quant_conv(self.encoder(images_BCHW))

    def forward(self, images_BCHW: torch.Tensor) -> TokenizerOutput:
        quantized = self.quantizer(self.latents(images_BCHW))
        return TokenizerOutput(self._decode_latents(quantized.quantized), quantized)

    def _decode_latents(self, latents_BDhw: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(latents_BDhw.to(self.post_quant_conv.weight.dtype)))  # float32 or from_pretrained's dtype

    @torch.inference_mode()
    def encode_grids(self, images_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        self.check_has_ids()
        ids = self._quantize_images(images_BCHW).ids
        assert ids is not None
        return {IMAGE_GRID: ids}

    @torch.inference_mode()
    def reconstruct(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Encode and decode images. Returns float32 images (B, C, H, W), not clamped. Without ids, decodes the continuous latents.

        Raises:
            ValueError: the images do not have the channels and size of the tokenizer's transform.
        """
        if self.quantizer.has_ids:
            return super().reconstruct(images_BCHW)
        return self._decode_latents(self._quantize_images(images_BCHW).quantized).float()

    def _quantize_images(self, images_BCHW: torch.Tensor) -> QuantizerOutput:
        """Quantizer output for images, in eval mode and float32."""
        self.check_images(images_BCHW)
        was_training = self.training
        self.eval()
        try:
            with full_precision(images_BCHW.device):
                return self.quantizer(self.latents(images_BCHW.float()))
        finally:
            self.train(was_training)

    @torch.inference_mode()
    def decode_grids(self, ids: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Decode ids (B, h, w), or (B, h, w, depth), in [0, K) of the grid `image` to float32 images (B, C, H, W), not clamped.

        Grids of another height and width are decoded to images of another size.

        Raises:
            ValueError: an id lies outside [0, K), the ids have another number of axes or another depth, or the quantizer has no ids.
        """
        self.check_grid_names(ids)
        ids_Bhw = ids[IMAGE_GRID]
        depth_axis = (self.quantizer.depth,) if self.quantizer.depth > 1 else ()
        if ids_Bhw.ndim != 3 + len(depth_axis) or ids_Bhw.shape[3:] != depth_axis:
            expected = ", ".join(map(str, ("B", "h", "w", *depth_axis)))
            raise InputError(f"token ids have shape {tuple(ids_Bhw.shape)}. This tokenizer decodes ({expected}).")
        if ids_Bhw.numel() and not 0 <= int(ids_Bhw.min()) <= int(ids_Bhw.max()) < self.config.codebook_size:
            raise InputError(f"token ids run from {int(ids_Bhw.min())} to {int(ids_Bhw.max())}; allowed: 0 to {self.config.codebook_size - 1}.")
        return self._decode_latents(self.quantizer.ids_to_latents(ids_Bhw)).float()

    def check_has_ids(self) -> None:
        if not self.quantizer.has_ids:
            raise InputError(f"this tokenizer's quantizer is {self.config.quantizer!r}, whose latents are continuous and have no ids. "
                             "Use reconstruct().")

    # --- files -------------------------------------------------------------------------------------------------------------

    def training_only_names(self) -> set[str]:
        return {f"quantizer.{name}" for name in self.quantizer.training_only_names()}

    def after_loading(self) -> None:
        self.quantizer.restart_averages()

    def network_config(self) -> dict[str, Any]:
        return dataclasses.asdict(self.config)

    def _grids_in_config(self) -> dict[str, Any]:
        return {}  # they follow from the other fields, and version 0.1.0 did not write them

    def fingerprinted_config(self) -> dict[str, Any]:
        default = dataclasses.asdict(TokenizerConfig())
        network = {key: value for key, value in self.network_config().items()
                   if key not in LEARNING_FIELDS and (key in ALWAYS_FINGERPRINTED_FIELDS or value != default[key])
                   and (self.config.quantizer == "residual" or key not in RESIDUAL_FIELDS)}
        return {"network": network, "transform": self.transform.to_dict()}
