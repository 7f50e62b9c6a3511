"""The interface of all tokenizers: images to named grids of ids and back. `load_tokenizer` loads a folder of any format.

A tokenizer is saved as a folder with config.json and model.safetensors. config.json holds the settings of its class, the deterministic image
transform, the class names of the training data and two fingerprints. The token fingerprint covers everything that determines ids; the full one also
the decoder.
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from safetensors.torch import save_file
from torch import nn

from stage1_tokenizer.image_files.images import OPTIONAL_TRANSFORM_KEYS, TRANSFORM_KEYS, ImageTransform
from stage1_tokenizer.tokenizer_config import FORMAT_VERSION, is_tokenizer, read_tokenizer_config, tokenizer_class
from token_shards.manifest import Grid
from vqmosaic import __version__
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import publish, removed_on_failure, temporary_sibling, write_json
from vqmosaic.files.exported_weights import exportable_weights
from vqmosaic.files.fingerprints import fingerprint
from vqmosaic.files.full_disks import explain_full_disk
from vqmosaic.files.json_files import VERSION_FIELD, check_fields, written_by
from vqmosaic.files.permissions import explain_permission_errors
from vqmosaic.files.weight_files import WeightFileError, read_weight_file
from vqmosaic.files.weights_fit import describe_mismatches
from vqmosaic.runs.devices import as_device, as_dtype

Ids = torch.Tensor | dict[str, torch.Tensor]
"""int64 ids of B images: a tensor (B, h, w), or (B, h, w, depth), if the tokenizer has one grid; a dict of them by grid name if it has several."""

GRID_FIELDS = ("name", "codebook_size", "height", "width", "depth")
"""Fields of a grid in config.json and in the fingerprints."""


class Tokenizer(nn.Module, ABC):
    """Base class of the tokenizers. A subclass defines `grids`, `encode_grids`, `decode_grids`, `network_config` and `from_config`.

    All other code uses only the methods and attributes of this class. tokenizer_config.FORMATS lists the subclasses.
    """

    FORMAT: ClassVar[str]
    """`format` in config.json."""
    TOKEN_PARTS: ClassVar[tuple[str, ...]] = ()
    """Names of the submodules that determine ids. Training with train_parts `decoder` leaves them unchanged, and they stay in float32."""
    DECODER_PARTS: ClassVar[tuple[str, ...]] = ()
    """Names of the submodules that only decode. The dtype of `from_pretrained` applies to them."""
    transform: ImageTransform
    """Image size, channels and resampling."""
    class_names: list[str] | None
    """Class names of the training data."""

    def __init__(self, transform: ImageTransform, class_names: list[str] | None = None):
        super().__init__()
        self.transform, self.class_names = transform, class_names
        self.token_fingerprint: str | None = None  # both set by save_pretrained and from_pretrained
        self.full_fingerprint: str | None = None

    @property
    @abstractmethod
    def grids(self) -> list[Grid]:
        """The grids of one image, in the order of their tokens. Empty if the tokenizer has no ids."""

    @abstractmethod
    def encode_grids(self, images_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode images (B, C, H, W) in [-1, 1] to int64 ids (B, h, w), or (B, h, w, depth), of each grid, computed in float32.

        Raises:
            ValueError: the images do not have the channels and size of the tokenizer's transform, or the tokenizer has no ids.
        """

    @abstractmethod
    def decode_grids(self, ids: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Decode the ids of all grids to float32 images (B, C, H, W), not clamped.

        Raises:
            ValueError: a grid is missing or unknown, its ids have another shape or are out of range, or the tokenizer has no ids.
        """

    @abstractmethod
    def network_config(self) -> dict[str, Any]:
        """The settings of this class as JSON content: `network` in config.json."""

    @classmethod
    @abstractmethod
    def from_config(cls, network: dict[str, Any], transform: ImageTransform, class_names: list[str] | None, where: str,
                    version: str | None) -> Self:
        """A new tokenizer with the settings of `network_config`. Raises InputError, which names `where` and `version`, for invalid ones.

        Args:
            where: the file.
            version: the version of vqmosaic that wrote it, if known.
        """

    def fingerprinted_config(self) -> dict[str, Any]:
        """The settings that enter the fingerprints. Must not change for tokenizers that exist already."""
        return {"format": self.FORMAT, "network": self.network_config(), "transform": self.transform.to_dict(), **self._grids_in_config()}

    def training_only_names(self) -> set[str]:
        """State dict names of the tensors that only training needs. An export omits them."""
        return set()

    def after_loading(self) -> None:
        """Called when the weights of an export are loaded. Resets state that the export lacks."""

    @property
    def device(self) -> torch.device:
        """The device that the tokenizer computes on. The CPU if it has no weights."""
        tensor = next(self._tensors(), None)
        return torch.device("cpu") if tensor is None else tensor.device

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from self.parameters()
        yield from self.buffers()

    # --- ids ---------------------------------------------------------------------------------------------------------------

    def encode(self, images_BCHW: torch.Tensor) -> Ids:
        """Encode images (B, C, H, W) in [-1, 1] to int64 ids: a tensor (B, h, w), or (B, h, w, depth), for one grid; a dict of them for several.

        Raises:
            ValueError: see `encode_grids`.
        """
        return self._public(self.encode_grids(images_BCHW))

    def decode(self, ids: torch.Tensor | Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Decode ids in the form that `encode` returns to float32 images (B, C, H, W), not clamped. A dict is accepted for one grid, too.

        Raises:
            ValueError: see `decode_grids`. Also if a tensor is given but the tokenizer has several grids.
        """
        return self.decode_grids(self.ids_by_grid(ids))

    def reconstruct(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Encode and decode images. Returns float32 images (B, C, H, W), not clamped.

        Raises:
            ValueError: the images do not have the channels and size of the tokenizer's transform.
        """
        return self.decode_grids(self.encode_grids(images_BCHW))

    def vectors_and_codes(self, images_BCHW: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """For each grid whose ids are those of the nearest codes: the vectors (B, h, w, F) of images in [-1, 1], and the codes (K, F), in float32.

        Other grids are left out, so tokenizers that choose ids in another way return nothing.
        """
        return {}

    def join_tokens(self, ids: torch.Tensor | Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The tokens (B, T) of all grids, in order, for ids as `encode` returns them."""
        by_grid = self.ids_by_grid(ids)
        return torch.cat([by_grid[grid.name].flatten(1) for grid in self.grids], dim=1)

    def split_tokens(self, ids_BT: torch.Tensor) -> Ids:
        """The ids, as `encode` returns them, for the tokens (B, T) of all grids. The inverse of `join_tokens`."""
        self.check_has_ids()
        parts = ids_BT.split([grid.num_tokens for grid in self.grids], dim=1)
        return self._public({grid.name: part.reshape(len(part), *ids_shape(grid)) for grid, part in zip(self.grids, parts, strict=True)})

    def _public(self, ids: dict[str, torch.Tensor]) -> Ids:
        return ids if len(ids) > 1 else next(iter(ids.values()))

    def ids_by_grid(self, ids: torch.Tensor | Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Ids in the form of `encode` as a dict by grid name. Raises InputError unless there are ids of exactly the grids of this tokenizer."""
        names = [grid.name for grid in self.grids]
        if len(names) > 1 and not isinstance(ids, Mapping):
            raise InputError(f"the ids are a tensor of shape {tuple(ids.shape)}, but this tokenizer has the grids {', '.join(names)}. Give a dict "
                             "with the ids of each.")
        by_grid = ids if isinstance(ids, Mapping) else dict.fromkeys(names, ids)
        self.check_grid_names(by_grid)
        return by_grid

    def check_grid_names(self, ids: Mapping[str, torch.Tensor]) -> None:
        """Raise InputError unless there are ids of exactly the grids of this tokenizer, and it has any."""
        self.check_has_ids()
        names = [grid.name for grid in self.grids]
        if {*ids} != {*names}:
            raise InputError(f"the ids are of the grids {', '.join(map(str, ids)) or 'none'}; this tokenizer has: {', '.join(names)}.")

    def check_has_ids(self) -> None:
        """Raise InputError if the tokenizer has no grids."""
        if not self.grids:
            raise InputError("this tokenizer has no ids, so it can neither encode nor decode. Use reconstruct().")

    def check_images(self, images_BCHW: torch.Tensor) -> None:
        """Raise InputError unless images have the channels and size of the transform."""
        expected = self.transform.shape
        if tuple(images_BCHW.shape[1:]) != expected:
            raise InputError(f"images have shape {tuple(images_BCHW.shape)}. This tokenizer takes (B, {', '.join(map(str, expected))}).")

    # --- trainable parts ---------------------------------------------------------------------------------------------------

    def frozen_modules(self, train_parts: str) -> list[nn.Module]:
        """The modules that training with these tokenizer_training.train_parts leaves unchanged: `all`, or `decoder`, which keeps the tokens."""
        return [getattr(self, name) for name in self.TOKEN_PARTS] if train_parts == "decoder" else []

    # --- files -------------------------------------------------------------------------------------------------------------

    def _export_weights(self) -> dict[str, torch.Tensor]:
        with torch.device("meta"):
            fresh = self.from_config(self.network_config(), self.transform, self.class_names, "this tokenizer", __version__)
        weights, training_only = exportable_weights(self, fresh, "this tokenizer"), fresh.training_only_names()
        return {name: tensor.float().cpu().clone(memory_format=torch.contiguous_format)  # clone, because safetensors refuses tied tensors
                for name, tensor in weights.items() if name not in training_only}

    def _fingerprints(self, weights: dict[str, torch.Tensor]) -> tuple[str, str]:
        arrays, config = {name: tensor.numpy() for name, tensor in weights.items()}, self.fingerprinted_config()
        prefixes = tuple(f"{name}." for name in self.TOKEN_PARTS)
        token_fingerprint = fingerprint(config, {name: array for name, array in arrays.items() if name.startswith(prefixes)})
        return token_fingerprint, fingerprint(config, arrays)

    def fingerprint_of_tokens(self) -> str:
        """The token fingerprint of the current weights in float32."""
        return self._fingerprints(self._export_weights())[0]

    def _grids_in_config(self) -> dict[str, Any]:
        return {"grids": [{name: getattr(grid, name) for name in GRID_FIELDS} for grid in self.grids]}

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
        content = {"format": self.FORMAT, "format_version": FORMAT_VERSION, VERSION_FIELD: __version__, "network": self.network_config(),
                   "transform": self.transform.to_dict(), "class_names": self.class_names, **self._grids_in_config(),
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
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = torch.float32) -> Self:
        """Load a tokenizer in eval mode. dtype (a torch.dtype or its name) applies to the decoder; the parts that determine ids stay float32.

        Raises:
            ValueError: the folder is not a tokenizer of this class, its weights do not match the configuration exactly or have changed since the
                export, or the device or dtype is unknown.
        """
        folder, device, dtype = Path(folder), as_device(device), as_dtype(dtype)
        content = read_tokenizer_config(folder)
        where, version = folder / "config.json", written_by(content)
        if content["format"] != cls.FORMAT:
            raise InputError(f"{where} says format {content['format']!r}; {cls.__name__} reads {cls.FORMAT!r}. Use load_tokenizer.")
        check_fields(content["transform"], (*TRANSFORM_KEYS, *OPTIONAL_TRANSFORM_KEYS), f"{where}: transform", version, TRANSFORM_KEYS)
        tokenizer = cls.from_config(content["network"], ImageTransform.from_dict(content["transform"]), content["class_names"], str(where), version)
        try:
            weights = read_weight_file(folder / "model.safetensors")
        except WeightFileError as error:
            raise InputError(f"{folder}/model.safetensors is truncated or not a weight file ({error}). Copy the folder again.") from error
        own, training_only = tokenizer.state_dict(), tokenizer.training_only_names()
        if problems := describe_mismatches(weights, {name: tensor for name, tensor in own.items() if name not in training_only}):
            raise InputError(f"{folder}/model.safetensors does not fit {folder}/config.json: {problems}.")
        tokenizer.load_state_dict(weights | {name: own[name] for name in training_only})
        tokenizer.after_loading()
        found = tokenizer._fingerprints(weights)
        if found != (content["token_fingerprint"], content["full_fingerprint"]):
            raise InputError(f"{folder}/model.safetensors has changed since it was exported: its fingerprint starts with {found[1][:16]}, that in "
                             f"config.json with {content['full_fingerprint'][:16]}. Copy the folder again from where it was trained.")
        if content.get("config_digest") not in (None, fingerprint({name: value for name, value in content.items() if name != "config_digest"})):
            raise InputError(f"{where} has changed since it was exported (its class_names, or another field that the fingerprints do not cover). "
                             "Copy the folder again from where it was trained.")
        tokenizer.token_fingerprint, tokenizer.full_fingerprint = found
        tokenizer.to(device)
        for name in cls.DECODER_PARTS:
            getattr(tokenizer, name).to(dtype)
        return tokenizer.eval().requires_grad_(False)


def load_tokenizer(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = torch.float32) -> Tokenizer:
    """Load the tokenizer of a folder, of the class that `format` in its config.json selects. The arguments are those of `from_pretrained`.

    Raises:
        ValueError: see `Tokenizer.from_pretrained`. Also if the format is unknown; the message lists the known ones.
    """
    return tokenizer_class(read_tokenizer_config(Path(folder))["format"]).from_pretrained(folder, device, dtype)


def ids_shape(grid: Grid) -> tuple[int, ...]:
    """The shape of one image's ids in a grid: (h, w), or (h, w, depth) if each position has several ids."""
    return (grid.height, grid.width) if grid.depth == 1 else (grid.height, grid.width, grid.depth)


def concatenate_ids(parts: Sequence[Ids]) -> Ids:
    """The ids of all images of several batches, on the CPU."""
    first = parts[0]
    if isinstance(first, dict):
        return {name: torch.cat([cast(dict[str, torch.Tensor], part)[name].cpu() for part in parts]) for name in first}
    return torch.cat([cast(torch.Tensor, part).cpu() for part in parts])


def split_ids(ids: Ids, batch_size: int, device: torch.device) -> Iterator[Ids]:
    """Yield batches of ids on a device."""
    if isinstance(ids, dict):
        for parts in zip(*(grid_ids.split(batch_size) for grid_ids in ids.values()), strict=True):
            yield {name: part.to(device) for name, part in zip(ids, parts, strict=True)}
    else:
        yield from (part.to(device) for part in ids.split(batch_size))


def ids_in(ids: Ids, part: range, device: torch.device) -> Ids:
    """The ids of the images with these numbers, on a device."""
    batch = slice(part.start, part.stop)
    return {name: grid_ids[batch].to(device) for name, grid_ids in ids.items()} if isinstance(ids, dict) else ids[batch].to(device)


def first_ids(ids: Ids, count: int) -> Ids:
    """The ids of the first images."""
    return {name: grid_ids[:count] for name, grid_ids in ids.items()} if isinstance(ids, dict) else ids[:count]


def pick_ids(tries: Sequence[Ids], best_B: Sequence[int]) -> Ids:
    """The ids of each image from the try with this number."""
    first = tries[0]
    if isinstance(first, dict):
        return {name: torch.stack([cast(dict[str, torch.Tensor], tries[best])[name][image] for image, best in enumerate(best_B)]) for name in first}
    return torch.stack([cast(torch.Tensor, tries[best])[image] for image, best in enumerate(best_B)])
