"""ImageTokenizer: images to ids and back, a folder with config.json and model.safetensors.

config.json holds the network's configuration, the deterministic image transform, the class names of the training data and two
fingerprints: the token fingerprint over all that decides ids (encoder, quantizer, transform), the full one over the decoder too.
"""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from stage1_tokenizer.image_files.images import TRANSFORM_FIELDS, ImageTransform
from stage1_tokenizer.networks import Decoder, Encoder
from stage1_tokenizer.quantizers import QUANTIZERS, QuantizerOutput
from stage1_tokenizer.quantizers.nearest_code import full_precision
from vqmosaic import __version__
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import publish, removed_on_failure, temporary_sibling, write_json
from vqmosaic.files.exported_weights import exportable_weights
from vqmosaic.files.fingerprints import fingerprint
from vqmosaic.files.full_disks import naming_full_disks
from vqmosaic.files.json_files import VERSION_FIELD, check_fields, from_fields, read_object, version_hint, written_by
from vqmosaic.files.permissions import check_readable, naming_denied_permissions
from vqmosaic.files.weights_fit import misfits
from vqmosaic.recipes.field_types import as_integer
from vqmosaic.recipes.tokenizer_sections import LEARNING_FIELDS, RESIDUAL_FIELDS, TokenizerConfig
from vqmosaic.runs.devices import as_device, as_dtype
from vqmosaic.seeding import derive_seed

FORMAT = "vqmosaic.image_tokenizer"
FORMAT_VERSION = 1
CONFIG_FIELDS = ("format", "format_version", "network", "transform", "class_names", "token_fingerprint", "full_fingerprint",
                 VERSION_FIELD, "config_digest")
"""Fields of config.json. The last two are optional. config_digest covers all other fields; version 0.1.0 did not write it."""
DECIDES_IDS = ("encoder.", "quant_conv.", "quantizer.")
# Fields that every fingerprint holds. Those that came later enter only where they differ from their default, so that the fingerprints of
# tokenizers from before them stay what they are; a new field needs nothing but a default that means what was done before.
FIRST_FIELDS = ("quantizer", "codebook_size", "code_dim", "latent_channels", "channels", "channel_multipliers", "residual_blocks",
                "attention_levels", "middle_attention", "l2_normalize")


@dataclass
class TokenizerOutput:
    """reconstructions (B, C, H, W), not clamped, and what the quantizer made of the latents."""

    reconstructions: torch.Tensor
    quantizer: QuantizerOutput


class ImageTokenizer(nn.Module):
    """Encoder, quantizer and decoder over images (B, C, H, W) float32 in [-1, 1]."""

    def __init__(self, config: TokenizerConfig, transform: ImageTransform, class_names: list[str] | None = None, seed: int = 0):
        super().__init__()
        seed = as_integer("seed", seed)
        self.config, self.transform, self.class_names = config, transform, class_names
        self.token_fingerprint: str | None = None  # set by save_pretrained and from_pretrained, carried from there on
        self.full_fingerprint: str | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "tokenizer"))
            self.encoder = Encoder(config, transform.channels)
            self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
            self.quantizer = QUANTIZERS[config.quantizer].from_config(config, seed)
            self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, 1)
            self.decoder = Decoder(config, transform.channels)

    @property
    def grid_size(self) -> int:
        """Tokens along one side."""
        return self.transform.image_size // self.config.downsampling

    @property
    def grid_shape(self) -> tuple[int, ...]:
        """Shape of one image's ids: (h, w), or (h, w, depth) where there are several for each position."""
        return (self.grid_size, self.grid_size, *([self.config.depth] if self.config.depth > 1 else []))

    @property
    def device(self) -> torch.device:
        """Where the tokenizer computes."""
        return self.quant_conv.weight.device

    def codebook_parameters(self) -> list[nn.Parameter]:
        """Parameters that are codes: not decayed, having no reason to shrink, and not averaged, since a revived code jumps."""
        return self.quantizer.codebook_parameters()

    def latents(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Latents (B, D, h, w) before quantization."""
        return self.quant_conv(self.encoder(images_BCHW))

    def forward(self, images_BCHW: torch.Tensor) -> TokenizerOutput:
        quantized = self.quantizer(self.latents(images_BCHW))
        return TokenizerOutput(self._decoded(quantized.quantized), quantized)

    def _decoded(self, latents_BDhw: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(latents_BDhw.to(self.post_quant_conv.weight.dtype)))  # float32, or what it was loaded as

    @torch.inference_mode()
    def encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Ids (B, h, w), or (B, h, w, depth), int64 in [0, K) of images (B, C, H, W) in [-1, 1]; always computed in float32.

        Raises:
            ValueError: the images do not have the channels and size of the tokenizer's transform, or its quantizer has no ids.
        """
        if not self.quantizer.has_ids:
            raise InputError(f"this tokenizer's quantizer is {self.config.quantizer!r}, whose latents are continuous and have no ids; "
                             "reconstruct() works with it.")
        return self._quantized(images_BCHW).ids

    @torch.inference_mode()
    def reconstruct(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) float32, not clamped, after the way to ids and back; through the latents where the quantizer has no ids.

        Raises:
            ValueError: the images do not have the channels and size of the tokenizer's transform.
        """
        if self.quantizer.has_ids:
            return self.decode(self.encode(images_BCHW))
        return self._decoded(self._quantized(images_BCHW).quantized).float()

    def _quantized(self, images_BCHW: torch.Tensor) -> QuantizerOutput:
        """What the quantizer makes of images in evaluation mode, computed in float32."""
        expected = (self.transform.channels, self.transform.image_size, self.transform.image_size)
        if tuple(images_BCHW.shape[1:]) != expected:
            raise InputError(f"images have shape {tuple(images_BCHW.shape)}; this tokenizer takes (B, {', '.join(map(str, expected))}).")
        was_training = self.training
        self.eval()
        try:
            with full_precision(images_BCHW.device):
                return self.quantizer(self.latents(images_BCHW.float()))
        finally:
            self.train(was_training)

    @torch.inference_mode()
    def decode(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) float32 as the decoder gives them, not clamped, of ids (B, h, w), or (B, h, w, depth), in [0, K).

        Raises:
            ValueError: an id lies outside [0, K), the ids do not have that shape, or the tokenizer's quantizer has no ids.
        """
        axes = 4 if self.quantizer.depth > 1 else 3
        if self.quantizer.has_ids and (ids_Bhw.ndim != axes or ids_Bhw.shape[3:] != (self.quantizer.depth,)[:axes - 3]):
            raise InputError(f"token ids have shape {tuple(ids_Bhw.shape)}; this tokenizer decodes "
                             f"(B, h, w{f', {self.quantizer.depth}' if self.quantizer.depth > 1 else ''}).")
        if ids_Bhw.numel() and not 0 <= int(ids_Bhw.min()) <= int(ids_Bhw.max()) < self.config.codebook_size:
            raise InputError(f"token ids run from {int(ids_Bhw.min())} to {int(ids_Bhw.max())}; allowed: 0 to {self.config.codebook_size - 1}.")
        return self._decoded(self.quantizer.ids_to_latents(ids_Bhw)).float()

    # --- files -------------------------------------------------------------------------------------------------------------

    def training_only_names(self) -> set[str]:
        """Names, in the state_dict, of what only training needs; an export leaves it out."""
        return {f"quantizer.{name}" for name in self.quantizer.training_only_names()}

    def _export_weights(self) -> dict[str, torch.Tensor]:
        with torch.device("meta"):
            fresh = ImageTokenizer(self.config, self.transform)
        weights, left_out = exportable_weights(self, fresh, "this tokenizer"), fresh.training_only_names()
        return {name: tensor.float().cpu().clone(memory_format=torch.contiguous_format)  # cloned: safetensors refuses tied tensors
                for name, tensor in weights.items() if name not in left_out}

    def _fingerprints(self, weights: dict[str, torch.Tensor]) -> tuple[str, str]:
        arrays = {name: tensor.numpy() for name, tensor in weights.items()}
        default = dataclasses.asdict(TokenizerConfig())
        network = {key: value for key, value in dataclasses.asdict(self.config).items()
                   if key not in LEARNING_FIELDS and (key in FIRST_FIELDS or value != default[key])
                   and (self.config.quantizer == "residual" or key not in RESIDUAL_FIELDS)}
        config = {"network": network, "transform": self.transform.to_dict()}
        of_tokens = fingerprint(config, {name: array for name, array in arrays.items() if name.startswith(DECIDES_IDS)})
        return of_tokens, fingerprint(config, arrays)

    def fingerprint_of_tokens(self) -> str:
        """The token fingerprint of the weights as they are now, in float32."""
        return self._fingerprints(self._export_weights())[0]

    @naming_denied_permissions()
    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors (float32, inference weights only) so that the folder is whole or absent.

        Parts wrapped by torch.compile or DistributedDataParallel are saved without the wrapper.

        Raises:
            ValueError: the folder exists and holds something other than a tokenizer, which would be lost; or the weights do not match
                the configuration (adapters, quantized or offloaded parts), so the folder could not be loaded again.
        """
        folder = Path(folder)
        is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        if not is_free and not is_tokenizer(folder):
            raise InputError(f"{folder} exists and is no tokenizer; what is in it would be lost. Give the path of a new folder.")
        weights = self._export_weights()
        token_fingerprint, full_fingerprint = self._fingerprints(weights)
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, VERSION_FIELD: __version__, "network": dataclasses.asdict(self.config),
                   "transform": self.transform.to_dict(), "class_names": self.class_names,
                   "token_fingerprint": token_fingerprint, "full_fingerprint": full_fingerprint}
        partial = temporary_sibling(folder)
        shutil.rmtree(partial, ignore_errors=True)
        with naming_full_disks(folder.parent, sum(tensor.nbytes for tensor in weights.values())), removed_on_failure(partial):
            partial.mkdir(parents=True)
            save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
            write_json(partial / "config.json", content | {"config_digest": fingerprint(content)})
            publish(partial, folder)
        self.token_fingerprint, self.full_fingerprint = token_fingerprint, full_fingerprint

    @classmethod
    @naming_denied_permissions()
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu",
                        dtype: torch.dtype | str | None = torch.float32) -> "ImageTokenizer":
        """The tokenizer of a folder, in eval mode. dtype (a torch.dtype or its name) is for the decoder; encoder and quantizer stay float32.

        Raises:
            ValueError: the folder is not a tokenizer, its weights do not match the configuration exactly, or they have changed since export;
                the name of the device or dtype is unknown.
        """
        folder, device, dtype = Path(folder), as_device(device), as_dtype(dtype)
        content = read_config(folder)
        where, version = folder / "config.json", written_by(content)
        config = from_fields(TokenizerConfig, content["network"], f"{where}: network", version)
        check_fields(content["transform"], TRANSFORM_FIELDS, f"{where}: transform", version, TRANSFORM_FIELDS)
        tokenizer = cls(config, ImageTransform.from_dict(content["transform"]), content["class_names"])
        try:
            weights = load_file(folder / "model.safetensors")
        except SafetensorError as error:
            raise InputError(f"{folder}/model.safetensors is cut short or no weight file ({error}); copy the folder again.") from error
        own, left_out = tokenizer.state_dict(), tokenizer.training_only_names()
        if problems := misfits(weights, {name: tensor for name, tensor in own.items() if name not in left_out}):
            raise InputError(f"{folder}/model.safetensors does not fit {folder}/config.json: {problems}.")
        tokenizer.load_state_dict(weights | {name: own[name] for name in left_out})
        tokenizer.quantizer.restart_averages()
        found = tokenizer._fingerprints(weights)
        if found != (content["token_fingerprint"], content["full_fingerprint"]):
            raise InputError(f"{folder}/model.safetensors has changed since it was exported: its fingerprint is {found[1][:16]}..., config.json "
                             f"says {content['full_fingerprint'][:16]}...; copy the folder again from where it was trained.")
        if content.get("config_digest") not in (None, fingerprint({name: value for name, value in content.items() if name != "config_digest"})):
            raise InputError(f"{where} has changed since it was exported (its class_names, or another field that the fingerprints do not cover); "
                             "copy the folder again from where it was trained.")
        tokenizer.token_fingerprint, tokenizer.full_fingerprint = found
        tokenizer.to(device)
        tokenizer.post_quant_conv.to(dtype)
        tokenizer.decoder.to(dtype)
        return tokenizer.eval().requires_grad_(False)


def is_tokenizer(folder: Path) -> bool:
    """Whether a folder has the config.json of a tokenizer of any version."""
    check_readable(folder / "config.json")
    try:
        return read_object(folder / "config.json", "").get("format") == FORMAT
    except (OSError, InputError):
        return False


def read_config(folder: Path) -> dict:
    """config.json of a tokenizer folder, checked for format, version and fields."""
    path = folder / "config.json"
    check_readable(path, folder / "model.safetensors")
    if not path.is_file() or not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder} is no tokenizer: it needs config.json and model.safetensors; "
                         "`vqmosaic train-tokenizer` writes them to <run_dir>/tokenizer.")
    content = read_object(path, "copy the tokenizer again from where it was trained")
    if content.get("format") != FORMAT or content.get("format_version") != FORMAT_VERSION:
        raise InputError(f"{path} says format {content.get('format')!r} version {content.get('format_version')!r}; "
                         f"this vqmosaic reads {FORMAT!r} version {FORMAT_VERSION}.{version_hint(written_by(content))}")
    check_fields(content, CONFIG_FIELDS, str(path), written_by(content), CONFIG_FIELDS[:-2])
    return content
