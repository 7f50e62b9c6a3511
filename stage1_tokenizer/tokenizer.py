"""ImageTokenizer: encodes images to ids and decodes ids to images. Saved as a folder with config.json and model.safetensors.

config.json holds the network's configuration, the deterministic image transform, the class names of the training data and two
fingerprints. The token fingerprint covers everything that determines ids (encoder, quantizer, transform); the full one also the decoder.
"""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from stage1_tokenizer.image_files.images import OPTIONAL_TRANSFORM_KEYS, TRANSFORM_KEYS, ImageTransform
from stage1_tokenizer.networks import Decoder, Encoder
from stage1_tokenizer.quantizers import QUANTIZERS, QuantizerOutput
from stage1_tokenizer.quantizers.operations.nearest_code import full_precision
from stage1_tokenizer.tokenizer_config import FORMAT, FORMAT_VERSION, is_tokenizer, read_tokenizer_config
from vqmosaic import __version__
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import publish, removed_on_failure, temporary_sibling, write_json
from vqmosaic.files.exported_weights import exportable_weights
from vqmosaic.files.fingerprints import fingerprint
from vqmosaic.files.full_disks import explain_full_disk
from vqmosaic.files.json_files import VERSION_FIELD, check_fields, from_fields, written_by
from vqmosaic.files.permissions import explain_permission_errors
from vqmosaic.files.weight_files import WeightFileError, read_weight_file
from vqmosaic.files.weights_fit import describe_mismatches
from vqmosaic.recipes.field_types import as_integer
from vqmosaic.recipes.tokenizer_sections import LEARNING_FIELDS, RESIDUAL_FIELDS, TokenizerConfig, token_grid
from vqmosaic.runs.devices import as_device, as_dtype
from vqmosaic.seeding import derive_seed

TOKEN_WEIGHT_PREFIXES = ("encoder.", "quant_conv.", "quantizer.")
ALWAYS_FINGERPRINTED_FIELDS = ("quantizer", "codebook_size", "code_dim", "latent_channels", "channels", "channel_multipliers", "residual_blocks",
                               "attention_levels", "middle_attention", "l2_normalize")
"""Fields that enter every fingerprint. Fields added later enter only if they differ from their default, so existing fingerprints stay valid.
A new field only needs a default that keeps the old behaviour."""


@dataclass
class TokenizerOutput:
    """Reconstructions (B, C, H, W), not clamped, and the output of the quantizer."""

    reconstructions: torch.Tensor
    quantizer: QuantizerOutput


class ImageTokenizer(nn.Module):
    """Encoder, quantizer and decoder over images (B, C, H, W) float32 in [-1, 1]."""

    def __init__(self, config: TokenizerConfig, transform: ImageTransform, class_names: list[str] | None = None, seed: int = 0):
        super().__init__()
        seed = as_integer("seed", seed)
        token_grid("image_size", transform.image_size, config)  # raises an error if a side does not fit the downsampling
        self.config, self.transform, self.class_names = config, transform, class_names
        self.token_fingerprint: str | None = None  # both set by save_pretrained and from_pretrained
        self.full_fingerprint: str | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "tokenizer"))
            self.encoder = Encoder(config, transform.channels)
            self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
            self.quantizer = QUANTIZERS[config.quantizer](config, seed=seed)
            self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, 1)
            self.decoder = Decoder(config, transform.channels)

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
        """Shape of one image's ids: (h, w), or (h, w, depth) if each position has several ids."""
        return (*self.grid_sides, *([self.config.depth] if self.config.depth > 1 else []))

    @property
    def device(self) -> torch.device:
        """The device that the tokenizer computes on."""
        return self.quant_conv.weight.device

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
    def encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Encode images (B, C, H, W) in [-1, 1] to int64 ids (B, h, w), or (B, h, w, depth), in [0, K). Always computed in float32.

        Raises:
            ValueError: the images do not have the channels and size of the tokenizer's transform, or its quantizer has no ids.
        """
        if not self.quantizer.has_ids:
            raise InputError(f"this tokenizer's quantizer is {self.config.quantizer!r}, whose latents are continuous and have no ids. "
                             "Use reconstruct().")
        ids = self._quantize_images(images_BCHW).ids
        assert ids is not None
        return ids

    @torch.inference_mode()
    def reconstruct(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Encode and decode images. Returns float32 images (B, C, H, W), not clamped. Without ids, decodes the continuous latents.

        Raises:
            ValueError: the images do not have the channels and size of the tokenizer's transform.
        """
        if self.quantizer.has_ids:
            return self.decode(self.encode(images_BCHW))
        return self._decode_latents(self._quantize_images(images_BCHW).quantized).float()

    def _quantize_images(self, images_BCHW: torch.Tensor) -> QuantizerOutput:
        """Quantizer output for images, in eval mode and float32."""
        expected = self.transform.shape
        if tuple(images_BCHW.shape[1:]) != expected:
            raise InputError(f"images have shape {tuple(images_BCHW.shape)}. This tokenizer takes (B, {', '.join(map(str, expected))}).")
        was_training = self.training
        self.eval()
        try:
            with full_precision(images_BCHW.device):
                return self.quantizer(self.latents(images_BCHW.float()))
        finally:
            self.train(was_training)

    @torch.inference_mode()
    def decode(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        """Decode ids (B, h, w), or (B, h, w, depth), in [0, K) to float32 images (B, C, H, W), not clamped.

        Raises:
            ValueError: an id lies outside [0, K), the ids have another shape, or the quantizer has no ids.
        """
        depth_axis = (self.quantizer.depth,) if self.quantizer.depth > 1 else ()
        if self.quantizer.has_ids and (ids_Bhw.ndim != 3 + len(depth_axis) or ids_Bhw.shape[3:] != depth_axis):
            expected = ", ".join(map(str, ("B", "h", "w", *depth_axis)))
            raise InputError(f"token ids have shape {tuple(ids_Bhw.shape)}. This tokenizer decodes ({expected}).")
        if ids_Bhw.numel() and not 0 <= int(ids_Bhw.min()) <= int(ids_Bhw.max()) < self.config.codebook_size:
            raise InputError(f"token ids run from {int(ids_Bhw.min())} to {int(ids_Bhw.max())}; allowed: 0 to {self.config.codebook_size - 1}.")
        return self._decode_latents(self.quantizer.ids_to_latents(ids_Bhw)).float()

    # --- files -------------------------------------------------------------------------------------------------------------

    def training_only_names(self) -> set[str]:
        """State dict names of the tensors that only training needs. An export omits them."""
        return {f"quantizer.{name}" for name in self.quantizer.training_only_names()}

    def _export_weights(self) -> dict[str, torch.Tensor]:
        with torch.device("meta"):
            fresh = ImageTokenizer(self.config, self.transform)
        weights, training_only = exportable_weights(self, fresh, "this tokenizer"), fresh.training_only_names()
        return {name: tensor.float().cpu().clone(memory_format=torch.contiguous_format)  # clone, because safetensors refuses tied tensors
                for name, tensor in weights.items() if name not in training_only}

    def _fingerprints(self, weights: dict[str, torch.Tensor]) -> tuple[str, str]:
        arrays = {name: tensor.numpy() for name, tensor in weights.items()}
        default = dataclasses.asdict(TokenizerConfig())
        network = {key: value for key, value in dataclasses.asdict(self.config).items()
                   if key not in LEARNING_FIELDS and (key in ALWAYS_FINGERPRINTED_FIELDS or value != default[key])
                   and (self.config.quantizer == "residual" or key not in RESIDUAL_FIELDS)}
        config = {"network": network, "transform": self.transform.to_dict()}
        token_fingerprint = fingerprint(config, {name: array for name, array in arrays.items() if name.startswith(TOKEN_WEIGHT_PREFIXES)})
        return token_fingerprint, fingerprint(config, arrays)

    def fingerprint_of_tokens(self) -> str:
        """The token fingerprint of the current weights in float32."""
        return self._fingerprints(self._export_weights())[0]

    @explain_permission_errors()
    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors (float32, inference weights only). Atomic: the folder is complete or absent.

        Strips the wrappers of torch.compile and DistributedDataParallel.

        Raises:
            ValueError: the folder exists and contains something other than a tokenizer, which would be lost, or the weights do not match the
                configuration (adapters, quantized or offloaded parts), so the saved folder could not be loaded.
        """
        folder = Path(folder)
        is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        if not is_free and not is_tokenizer(folder):
            raise InputError(f"{folder} exists and is not a tokenizer folder. Its contents would be lost. Give the path of a new folder.")
        weights = self._export_weights()
        token_fingerprint, full_fingerprint = self._fingerprints(weights)
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, VERSION_FIELD: __version__, "network": dataclasses.asdict(self.config),
                   "transform": self.transform.to_dict(), "class_names": self.class_names,
                   "token_fingerprint": token_fingerprint, "full_fingerprint": full_fingerprint}
        partial = temporary_sibling(folder)
        shutil.rmtree(partial, ignore_errors=True)
        with explain_full_disk(folder.parent, sum(tensor.nbytes for tensor in weights.values())), removed_on_failure(partial):
            partial.mkdir(parents=True)
            save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
            write_json(partial / "config.json", content | {"config_digest": fingerprint(content)})
            publish(partial, folder)
        self.token_fingerprint, self.full_fingerprint = token_fingerprint, full_fingerprint

    @classmethod
    @explain_permission_errors()
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu",
                        dtype: torch.dtype | str | None = torch.float32) -> "ImageTokenizer":
        """Load a tokenizer in eval mode. dtype (a torch.dtype or its name) applies to the decoder; encoder and quantizer stay float32.

        Raises:
            ValueError: the folder is not a tokenizer, its weights do not match the configuration exactly or have changed since the export, or
                the device or dtype is unknown.
        """
        folder, device, dtype = Path(folder), as_device(device), as_dtype(dtype)
        content = read_tokenizer_config(folder)
        where, version = folder / "config.json", written_by(content)
        config = from_fields(TokenizerConfig, content["network"], f"{where}: network", version)
        check_fields(content["transform"], (*TRANSFORM_KEYS, *OPTIONAL_TRANSFORM_KEYS), f"{where}: transform", version, TRANSFORM_KEYS)
        tokenizer = cls(config, ImageTransform.from_dict(content["transform"]), content["class_names"])
        try:
            weights = read_weight_file(folder / "model.safetensors")
        except WeightFileError as error:
            raise InputError(f"{folder}/model.safetensors is truncated or not a weight file ({error}). Copy the folder again.") from error
        own, training_only = tokenizer.state_dict(), tokenizer.training_only_names()
        if problems := describe_mismatches(weights, {name: tensor for name, tensor in own.items() if name not in training_only}):
            raise InputError(f"{folder}/model.safetensors does not fit {folder}/config.json: {problems}.")
        tokenizer.load_state_dict(weights | {name: own[name] for name in training_only})
        tokenizer.quantizer.restart_averages()
        found = tokenizer._fingerprints(weights)
        if found != (content["token_fingerprint"], content["full_fingerprint"]):
            raise InputError(f"{folder}/model.safetensors has changed since it was exported: its fingerprint starts with {found[1][:16]}, that in "
                             f"config.json with {content['full_fingerprint'][:16]}. Copy the folder again from where it was trained.")
        if content.get("config_digest") not in (None, fingerprint({name: value for name, value in content.items() if name != "config_digest"})):
            raise InputError(f"{where} has changed since it was exported (its class_names, or another field that the fingerprints do not cover). "
                             "Copy the folder again from where it was trained.")
        tokenizer.token_fingerprint, tokenizer.full_fingerprint = found
        tokenizer.to(device)
        tokenizer.post_quant_conv.to(dtype)
        tokenizer.decoder.to(dtype)
        return tokenizer.eval().requires_grad_(False)
