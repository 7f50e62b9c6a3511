"""The base class of tokenizers that stage 1 can train: encoder networks, one quantizer per grid, and a decoder.

Training, validation and fine-tuning use only this interface, so they do not depend on the number of levels.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import nn

from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.networks import Decoder, Encoder
from stage1_tokenizer.quantizers import Quantizer, QuantizerOutput
from stage1_tokenizer.quantizers.operations.nearest_code import full_precision
from stage1_tokenizer.tokenizer_grids import grids_of_config
from stage1_tokenizer.tokenizer_protocol import Tokenizer
from token_shards.manifest import Grid
from vqmosaic.errors import InputError
from vqmosaic.files.json_files import from_fields
from vqmosaic.recipes.tokenizer_sections import HIERARCHICAL_FIELDS, LEARNING_FIELDS, RESIDUAL_FIELDS, TokenizerConfig, token_grids

ALWAYS_FINGERPRINTED_FIELDS = ("quantizer", "codebook_size", "code_dim", "latent_channels", "channels", "channel_multipliers", "residual_blocks",
                               "attention_levels", "middle_attention", "l2_normalize")
"""Fields that enter every fingerprint. Fields added later enter only if they differ from their default, so existing fingerprints stay valid.
A new field only needs a default that keeps the old behaviour."""


@dataclass
class TokenizerOutput:
    """Reconstructions (B, C, H, W), not clamped, and the output of each quantizer by grid name."""

    reconstructions: torch.Tensor
    levels: dict[str, QuantizerOutput]

    @property
    def quantizer_loss(self) -> torch.Tensor:
        """The sum of the quantizers' losses."""
        losses = [level.loss for level in self.levels.values()]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    @property
    def quantizer(self) -> QuantizerOutput:
        """The output of the only quantizer. Raises ValueError if there are several."""
        output, = self.levels.values()
        return output


class TrainableTokenizer(Tokenizer):
    """Base class of tokenizers with a TokenizerConfig. A subclass defines `quantizers`, `quantize`, `latents`, `decode_latents`, `networks`,
    `network_config`, `decoder`, which makes the images, and a constructor (config, transform, class_names, seed).
    """

    KIND: ClassVar[str]
    """`tokenizer.kind` in a recipe."""
    config: TokenizerConfig
    decoder: Decoder

    def __init__(self, config: TokenizerConfig, transform: ImageTransform, class_names: list[str] | None = None):
        super().__init__(transform, class_names)
        if config.kind != self.KIND:
            raise InputError(f"tokenizer.kind is {config.kind!r}; {type(self).__name__} needs {self.KIND!r}.")
        token_grids("image_size", transform.image_size, config)  # raises an error if a side does not fit the downsampling
        self.config = config

    @classmethod
    def from_config(cls, network: dict[str, Any], transform: ImageTransform, class_names: list[str] | None, where: str,
                    version: str | None) -> Self:
        return cls(from_fields(TokenizerConfig, network | {"kind": cls.KIND}, f"{where}: network", version), transform, class_names)

    # --- levels ------------------------------------------------------------------------------------------------------------

    @property
    def grids(self) -> list[Grid]:
        return grids_of_config(self.config, self.transform.image_size)

    @property
    def level_sides(self) -> dict[str, tuple[int, int]]:
        """Height h and width w of the latents of each level, by grid name."""
        return token_grids("image_size", self.transform.image_size, self.config)

    @property
    @abstractmethod
    def quantizers(self) -> dict[str, Quantizer]:
        """The quantizers by grid name, in the order of the grids. The latents of a quantizer depend only on the quantizers before it."""

    @abstractmethod
    def quantize(self, images_BCHW: torch.Tensor) -> dict[str, QuantizerOutput]:
        """The output of each quantizer by grid name, for images in [-1, 1]."""

    @abstractmethod
    def latents(self, images_BCHW: torch.Tensor, name: str) -> torch.Tensor:
        """Latents (B, D, h, w) before the quantizer with this name."""

    @abstractmethod
    def decode_latents(self, quantized: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Images (B, C, H, W), not clamped, from the quantized latents of each level."""

    def forward(self, images_BCHW: torch.Tensor) -> TokenizerOutput:
        levels = self.quantize(images_BCHW)
        return TokenizerOutput(self.decode_latents({name: output.quantized for name, output in levels.items()}), levels)

    # --- training ----------------------------------------------------------------------------------------------------------

    @abstractmethod
    def networks(self) -> tuple[Encoder, Decoder, *tuple[Encoder | Decoder, ...]]:
        """The main encoder and decoder, and further networks. Training can compile each."""

    def codebook_parameters(self) -> list[nn.Parameter]:
        """Parameters that are codes. They get no weight decay (no reason to shrink) and no weight averaging (a revived code jumps)."""
        return [parameter for quantizer in self.quantizers.values() for parameter in quantizer.codebook_parameters()]

    def set_progress(self, share: float) -> None:
        """Update annealed values of all quantizers, for the training progress in [0, 1]."""
        for quantizer in self.quantizers.values():
            quantizer.set_progress(share)

    def commit(self) -> None:
        """Apply the statistics that all quantizers collected since the last commit."""
        for quantizer in self.quantizers.values():
            quantizer.commit()

    def discard(self) -> None:
        """Drop the statistics that all quantizers collected since the last commit."""
        for quantizer in self.quantizers.values():
            quantizer.discard()

    # --- ids ---------------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode_grids(self, images_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        self.check_has_ids()
        return {name: output.ids for name, output in self._quantize_exactly(images_BCHW).items() if output.ids is not None}

    @torch.inference_mode()
    def reconstruct(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Encode and decode images. Returns float32 images (B, C, H, W), not clamped. Without ids, decodes the continuous latents.

        Raises:
            ValueError: the images do not have the channels and size of the tokenizer's transform.
        """
        if self.grids:
            return super().reconstruct(images_BCHW)
        levels = self._quantize_exactly(images_BCHW)
        return self.decode_latents({name: output.quantized for name, output in levels.items()}).float()

    @torch.inference_mode()
    def vectors_and_codes(self, images_BCHW: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        with self._exactly(images_BCHW):
            found = {name: quantizer.vectors_and_codes(self.latents(images_BCHW.float(), name)) for name, quantizer in self.quantizers.items()}
        return {name: each for name, each in found.items() if each is not None}

    def _quantize_exactly(self, images_BCHW: torch.Tensor) -> dict[str, QuantizerOutput]:
        """Quantizer outputs for images, in eval mode and float32."""
        with self._exactly(images_BCHW):
            return self.quantize(images_BCHW.float())

    @contextmanager
    def _exactly(self, images_BCHW: torch.Tensor) -> Iterator[None]:
        """Check the images, and compute in eval mode and float32 inside of the block."""
        self.check_images(images_BCHW)
        was_training = self.training
        self.eval()
        try:
            with full_precision(images_BCHW.device):
                yield
        finally:
            self.train(was_training)

    @torch.inference_mode()
    def decode_grids(self, ids: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Decode ids (B, h, w), or (B, h, w, depth), in [0, K) of each grid to float32 images (B, C, H, W), not clamped.

        Grids of another height and width are decoded to images of another size.

        Raises:
            ValueError: an id lies outside [0, K), the ids have another number of axes or another depth, or a quantizer has no ids.
        """
        self.check_grid_names(ids)
        for name, quantizer in self.quantizers.items():
            self._check_ids(ids[name], quantizer, f" of grid {name!r}" if len(ids) > 1 else "")
        return self.decode_latents({name: quantizer.ids_to_latents(ids[name]) for name, quantizer in self.quantizers.items()}).float()

    @staticmethod
    def _check_ids(ids_Bhw: torch.Tensor, quantizer: Quantizer, of_grid: str) -> None:
        depth_axis = (quantizer.depth,) if quantizer.depth > 1 else ()
        if ids_Bhw.ndim != 3 + len(depth_axis) or ids_Bhw.shape[3:] != depth_axis:
            expected = ", ".join(map(str, ("B", "h", "w", *depth_axis)))
            raise InputError(f"token ids{of_grid} have shape {tuple(ids_Bhw.shape)}. This tokenizer decodes ({expected}).")
        if ids_Bhw.numel() and not 0 <= int(ids_Bhw.min()) <= int(ids_Bhw.max()) < quantizer.codebook_size:
            raise InputError(f"token ids{of_grid} run from {int(ids_Bhw.min())} to {int(ids_Bhw.max())}; allowed: 0 to "
                             f"{quantizer.codebook_size - 1}.")

    def check_has_ids(self) -> None:
        for quantizer in self.quantizers.values():
            if not quantizer.has_ids:
                raise InputError(f"this tokenizer's quantizer is {quantizer.KIND!r}, whose latents are continuous and have no ids. "
                                 "Use reconstruct().")

    # --- files -------------------------------------------------------------------------------------------------------------

    def training_only_names(self) -> set[str]:
        modules = {id(module): name for name, module in self.named_modules()}
        return {f"{modules[id(quantizer)]}.{name}" for quantizer in self.quantizers.values() for name in quantizer.training_only_names()}

    def after_loading(self) -> None:
        for quantizer in self.quantizers.values():
            quantizer.restart_averages()


def fingerprinted_fields(config: TokenizerConfig) -> dict[str, Any]:
    """The fields of one level that enter fingerprints."""
    default = vars(TokenizerConfig())
    return {name: value for name, value in network_fields(config).items()
            if name not in LEARNING_FIELDS and (name in ALWAYS_FINGERPRINTED_FIELDS or value != default[name])
            and (config.quantizer == "residual" or name not in RESIDUAL_FIELDS)}


def network_fields(config: TokenizerConfig) -> dict[str, Any]:
    """The fields of one level, without those that describe the levels."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in HIERARCHICAL_FIELDS}
