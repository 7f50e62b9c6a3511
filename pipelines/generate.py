"""ImageGenerationPipeline: samples tokens from the prior and decodes them to images.

    from pipelines import ImageGenerationPipeline
    pipe = ImageGenerationPipeline.from_pretrained("runs/quickstart")
    out = pipe(class_labels=["3", 7], num_images_per_label=4, seed=1)
    out.images[0].save("three.png")

    for out in pipe.batches(num_images_per_label=50_000, class_labels=3, seed=1):      # many images, one batch in memory at a time
        ...
"""

import dataclasses
import math
import operator
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image

from pipelines.bundle import (
    check_replaceable,
    check_same_grids,
    class_indices,
    find_pipeline,
    make_bundle,
    read_bundle,
    recommended_sampling,
    usable_device,
)
from stage1_tokenizer.image_files.images import as_batches, to_pil, to_uint8
from stage1_tokenizer.tokenizer_protocol import Ids, Tokenizer, concatenate_ids, load_tokenizer, split_ids
from stage2_prior.generation.logit_differences import largest_logit_difference
from stage2_prior.generation.sampling import SamplingStopped
from stage2_prior.prior import TokenPrior
from stage2_prior.vocabulary import NO_CLASS
from vqmosaic.errors import InputError, check_name, check_range, listed_names
from vqmosaic.files.exported_weights import same_weights
from vqmosaic.files.fingerprints import check_same_tokens
from vqmosaic.recipes.field_types import as_boolean, as_integer
from vqmosaic.recipes.image_sizes import ImageSize, height_and_width
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.runs.devices import as_dtype
from vqmosaic.seeding import image_seeds

OUTPUT_TYPES = ("pil", "np", "pt")
SAMPLING_SETTINGS = tuple(field.name for field in dataclasses.fields(SamplingConfig))
GUIDANCE_SETTINGS = tuple(name for name in SAMPLING_SETTINGS if name.startswith("guidance_"))
FORMER_POSITIONS = ("guidance_scale", "temperature", "top_k", "top_p", "output_type", "callback", "batch_size")
"""The arguments of a call that could be positional in version 0.1.0, after seed."""
MAX_BATCH_PIXELS, MAX_BATCH_IMAGES = 8 * 256**2, 64
"""Largest number of pixels and of images in a batch of the encoder or decoder, whose feature maps are far larger than the images."""


def tokenizer_batch_size(image_size: ImageSize) -> int:
    """Number of images of this size in a batch of the encoder or decoder."""
    return max(1, min(MAX_BATCH_IMAGES, MAX_BATCH_PIXELS // math.prod(height_and_width(image_size))))


def decode_in_batches(tokenizer: Tokenizer, ids: Ids) -> Iterator[torch.Tensor]:
    """Decode ids, as `Tokenizer.encode` returns them, and yield batches of images (B, C, H, W) in [-1, 1] on the tokenizer's device.

    Raises InputError if a dict does not have ids of all grids, for the same number of images.
    """
    if isinstance(ids, dict):
        tokenizer.check_grid_names(ids)
        if len({len(grid_ids) for grid_ids in ids.values()}) > 1:
            counts = ", ".join(f"{name}: {len(grid_ids)}" for name, grid_ids in ids.items())
            raise InputError(f"the grids have ids of different numbers of images ({counts}). Give the ids of the same images in all grids.")
    for batch in split_ids(ids, tokenizer_batch_size(tokenizer.transform.image_size), tokenizer.device):
        yield tokenizer.decode(batch)


class Request(NamedTuple):
    """A checked request to a pipeline: the sampling settings, the class index of each image (None without classes) and its seed."""

    sampling: SamplingConfig
    classes: list[int] | None
    seeds: list[int]
    known_BT: torch.Tensor | None = None
    """Ids of all grids that are kept; -1 is a token to draw. None draws all."""


@dataclass
class GenerationOutput:
    """Generated images. If the callback stopped the sampling, there are none, but seeds and class_indices are those of the whole request."""

    images: list[Image.Image] | Any = field(default_factory=list)
    """The images in the requested output type. Empty after a stop."""
    token_ids: Ids | None = None
    """int64 (B, h, w), or (B, h, w, depth), on the CPU. A dict by grid name if the tokenizer has several grids. None after a stop."""
    seeds: list[int] = field(default_factory=list)
    """The seed of each image."""
    class_indices: list[int] | None = None
    """The class index of each image; None if the request has no classes."""
    stopped: bool = False
    """True if the callback stopped the sampling."""
    places: range = range(0)
    """The positions of the images in the request, starting at 0. Empty after a stop."""


class ImageGenerationPipeline:
    """A tokenizer and a prior that belong together, with recommended sampling settings."""

    def __init__(self, tokenizer: Tokenizer, prior: TokenPrior, sampling: SamplingConfig | None = None, source: Path | None = None):
        if tokenizer.token_fingerprint is None:
            raise InputError("the tokenizer has no token fingerprint yet, so it cannot be matched with the prior. Call its save_pretrained first.")
        check_same_tokens(tokenizer.token_fingerprint, "the tokenizer", prior.vocabulary.token_fingerprint, "the prior")
        check_same_grids(tokenizer.grids, "the tokenizer", prior.vocabulary, "the prior")
        self.tokenizer, self.prior, self.sampling, self._source = tokenizer, prior, sampling or SamplingConfig(), source

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device | None = None,
                        dtype: torch.dtype | str = torch.float32) -> "ImageGenerationPipeline":
        """Load the pipeline of a pipeline folder or a run folder to a device, by default the best available one.

        dtype, a torch.dtype or its name such as "bfloat16", applies to the prior and the decoder. Encoder and quantizer stay in float32.

        Raises:
            ValueError: there is no pipeline, its parts do not belong together, this machine does not have the device, or the dtype is unknown.
        """
        folder, dtype = find_pipeline(path), as_dtype(dtype)
        content = read_bundle(folder)
        device = usable_device(device)
        tokenizer = load_tokenizer(folder / "tokenizer", device, dtype)
        prior = TokenPrior.from_pretrained(folder / "prior", device=device, dtype=dtype)
        assert tokenizer.token_fingerprint is not None  # every saved tokenizer has one
        check_same_tokens(tokenizer.token_fingerprint, folder / "tokenizer", prior.vocabulary.token_fingerprint, folder / "prior")
        return cls(tokenizer, prior, recommended_sampling(folder, content), folder)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the pipeline to another folder, with the current recommended settings.

        If the weights have not changed since loading, except by a cast, the original files are copied. Otherwise the weights are saved.
        """
        folder = Path(folder)
        if self._source is None or not self._has_loaded_weights(self._source):
            check_replaceable(folder)
            parts = folder.with_name(f".parts-{folder.name}")
            try:
                self.tokenizer.save_pretrained(parts / "tokenizer")
                self.prior.save_pretrained(parts / "prior")
                make_bundle(parts / "tokenizer", parts / "prior", folder, self.sampling)
            finally:
                shutil.rmtree(parts, ignore_errors=True)
        else:  # copy the files, because the weights in memory may have been cast
            make_bundle(self._source / "tokenizer", self._source / "prior", folder, self.sampling)

    def _has_loaded_weights(self, source: Path) -> bool:
        """Whether tokenizer and prior still have the weights in the folder. Loads both models again and compares. False if loading fails."""
        try:
            return (same_weights(self.tokenizer, load_tokenizer(source / "tokenizer"))
                    and same_weights(self.prior, TokenPrior.from_pretrained(source / "prior")))
        except InputError:  # the folder was deleted or replaced
            return False

    @property
    def class_names(self) -> list[str] | None:
        """The class names, or None if the prior was trained without classes."""
        return self.prior.vocabulary.class_names

    @property
    def device(self) -> torch.device:
        """The device of the tokenizer and the prior."""
        return self.tokenizer.device

    def __call__(self, class_labels: Sequence[str | int] | str | int | None = None, num_images_per_label: int = 1, seed: int | None = None,
                 *positional: Any, output_type: str = "pil", callback: Callable[[int, int], bool | None] | None = None, batch_size: int = 64,
                 compile: bool = False, **settings: Any) -> GenerationOutput:
        """Generate images, label by label. Image i depends on the seed, i and its class, not on the other images.

        Returns all images together. `batches` yields them one batch at a time.

        Args:
            class_labels: class names (strings) or indices (integers). None for a pipeline without classes, or for unconditional images.
            num_images_per_label: images per label.
            seed: a number that determines the result. None draws a random one (out.seeds has the seed of each image).
            output_type: pil, np (uint8, B H W C) or pt (float32 in [-1, 1], B C H W). np and pt have all channels; pil images are for viewing,
                without alpha (to_pil). tokenizer.transform.to_stored_values converts pt images to data.value_range.
            callback: called as callback(done, total) after each pass of each batch, with the number of tokens so far. total is the number of
                batches times the tokens per image. If it returns False, sampling stops: out.stopped is True and out.images is empty.
            batch_size: images sampled in parallel.
            compile: record the step of the prior as a CUDA graph. This is faster for small batches on CUDA and has no effect on other devices.
            settings: guidance_scale, temperature, top_k, top_p, min_p and the other fields of SamplingConfig. None, or a setting that is not
                given, uses the recommended one. Unconditional images are sampled without guidance, which would have no effect.
            positional: deprecated; the arguments that version 0.1.0 accepted by position.

        Raises:
            ValueError: an unknown class, a setting out of range or of the wrong type, or guidance without class_labels.
        """
        if positional:
            former = keywords_from_former_positions(positional)
            keywords = {"output_type": output_type, "callback": callback, "batch_size": batch_size}
            if twice := former.keys() & settings.keys():
                raise TypeError(f"{', '.join(sorted(twice))} given both by position and by keyword")
            return self(class_labels, num_images_per_label, seed, compile=compile, **settings, **keywords | former)
        request = self._check_request(class_labels, num_images_per_label, seed, settings)
        try:
            batches = list(self._sample_batches(request, output_type, callback, batch_size, compile))
        except SamplingStopped:
            return GenerationOutput(seeds=request.seeds, class_indices=request.classes, stopped=True)
        ids = concatenate_ids([batch.token_ids for batch in batches if batch.token_ids is not None])
        return GenerationOutput(concatenate(batch.images for batch in batches), ids, request.seeds, request.classes,
                                places=range(len(request.seeds)))

    def batches(self, class_labels: Sequence[str | int] | str | int | None = None, num_images_per_label: int = 1, seed: int | None = None, *,
                output_type: str = "pil", callback: Callable[[int, int], bool | None] | None = None, batch_size: int = 64, compile: bool = False,
                skip: Callable[[range], bool] | None = None, **settings: Any) -> Iterator[GenerationOutput]:
        """Yield the same images as a call with these arguments, one batch at a time, so that memory does not grow with their number.

        Args:
            skip: called with the positions of each batch in the request before sampling starts. Batches for which it returns True are skipped,
                and the callback's total does not count them.
            settings: guidance_scale, temperature and the other sampling settings of `__call__`.

        The other arguments are those of `__call__`. If the callback returns False, the iterator raises
        stage2_prior.generation.sampling.SamplingStopped.

        Raises:
            ValueError: as in `__call__`, before the first batch.
        """
        request = self._check_request(class_labels, num_images_per_label, seed, settings)
        return self._sample_batches(request, output_type, callback, batch_size, compile, skip)

    def _check_request(self, class_labels: Sequence[str | int] | str | int | None, num_images_per_label: int, seed: int | None,
                       settings: dict[str, Any]) -> Request:
        """Check the arguments of a call and resolve classes, seeds and sampling settings. Raises InputError for invalid ones."""
        for name in settings:
            check_name("a setting", name, SAMPLING_SETTINGS)
        count = as_integer("num_images_per_label", num_images_per_label)
        check_range("num_images_per_label", count, at_least=1)
        given = {name: value for name, value in settings.items() if value is not None}
        sampling = dataclasses.replace(self.sampling, **given)
        codes = self.prior.vocabulary.most_codes
        if sampling.top_k > codes:
            raise InputError(f"top_k is {sampling.top_k}; allowed: 0 (off) to {codes}, the codebook size.")
        classes = self._resolve_classes(class_labels, count)
        if classes is None:
            guided = {name: given[name] for name in GUIDANCE_SETTINGS if name in given}
            if guided and guided.get("guidance_scale") != 1:
                remedy = "leave it out" if self.class_names is None else "give class_labels, or leave it out"
                words = " and ".join(f"{name} is {value}" for name, value in guided.items())
                raise InputError(f"{words}, but no class_labels are given, so guidance has no effect; {remedy}.")
            sampling = dataclasses.replace(sampling, guidance_scale=1.0)  # the recommended guidance needs classes
        return Request(sampling, classes, image_seeds(secrets.randbits(62) if seed is None else seed, count if classes is None else len(classes)))

    def _sample_batches(self, request: Request, output_type: str, callback: Callable[[int, int], bool | None] | None, batch_size: int,
                        compile: bool, skip: Callable[[range], bool] | None = None) -> Iterator[GenerationOutput]:
        """Check the arguments immediately and return an iterator that samples one batch at a time."""
        check_name("output_type", output_type, OUTPUT_TYPES)
        check_range("batch_size", as_integer("batch_size", batch_size), at_least=1)
        compile, total = as_boolean("compile", compile), len(request.seeds)
        batches = [range(start, min(start + batch_size, total)) for start in range(0, total, batch_size)]
        batches = [positions for positions in batches if skip is None or not skip(positions)]
        tokens_per_image = self.prior.vocabulary.num_tokens

        def sample() -> Iterator[GenerationOutput]:  # a generator of its own, so that the checks above do not wait for the first batch
            for number, positions in enumerate(batches):
                def report(done: int, _: int, number=number) -> bool | None:  # the default keeps the number of this batch
                    assert callback is not None  # otherwise this function is not passed on
                    return callback(number * tokens_per_image + done, len(batches) * tokens_per_image)

                batch = slice(positions.start, positions.stop)
                classes, seeds = request.classes and request.classes[batch], request.seeds[batch]
                known_BT = None if request.known_BT is None else request.known_BT[batch]
                ids_BT = self.prior.sample(classes, request.sampling, seeds, report if callback is not None else None, compile, known_BT=known_BT)
                decoded = decode_in_batches(self.tokenizer, self.tokenizer.split_tokens(ids_BT))
                images = concatenate(to_output_type(images_BCHW, output_type) for images_BCHW in decoded)
                yield GenerationOutput(images, self.tokenizer.split_tokens(ids_BT.cpu()), seeds, classes, places=positions)

        return sample()

    def _image_batches(self, images: Image.Image | Sequence[Image.Image] | torch.Tensor) -> Iterator[torch.Tensor]:
        """The given images as batches (B, C, H, W) in [-1, 1] on the pipeline's device."""
        transform = self.tokenizer.transform
        return (images_BCHW.to(self.device) for images_BCHW in as_batches(images, transform, tokenizer_batch_size(transform.image_size)))

    def logit_difference(self, token_ids: Ids, class_indices: Sequence[int] | None) -> float:
        """The largest absolute difference between the logits used in sampling and those of the float32 prior, at every position of sampled images.

        Loads the prior again from the folder, in float32. For priors that draw tokens in any order, it measures raster order.

        Args:
            token_ids: the ids of the images, such as out.token_ids.
            class_indices: the class index of each image. None for unconditional images.

        Raises:
            ValueError: the pipeline was not loaded from a folder.
        """
        if self._source is None:
            raise InputError("the pipeline was not loaded from a folder, so there are no float32 weights to compare with. Load a saved pipeline.")
        reference = TokenPrior.from_pretrained(self._source / "prior", device=self.device)
        ids_BT = self.tokenizer.join_tokens(token_ids)
        classes = [NO_CLASS] * len(ids_BT) if class_indices is None else list(class_indices)
        batches = [slice(start, start + MAX_BATCH_IMAGES) for start in range(0, len(ids_BT), MAX_BATCH_IMAGES)]
        return max(largest_logit_difference(self.prior, reference, ids_BT[batch], classes[batch]) for batch in batches)

    def encode(self, images: Image.Image | Sequence[Image.Image] | torch.Tensor) -> Ids:
        """Encode a PIL image, a list of them, or a tensor (B, C, H, W) in [-1, 1] to int64 ids (B, h, w), or (B, h, w, depth), on the CPU.

        If the tokenizer has several grids, returns a dict with the ids of each.
        """
        return concatenate_ids([self.tokenizer.encode(images_BCHW) for images_BCHW in self._image_batches(images)])

    def decode(self, token_ids: torch.Tensor | Mapping[str, torch.Tensor]) -> list[Image.Image]:
        """Decode ids (B, h, w), or (B, h, w, depth) if the tokenizer has several ids per position, to PIL images (see to_pil).

        Several grids are a dict.
        """
        batches = decode_in_batches(self.tokenizer, as_ids(token_ids))
        return [image for images_BCHW in batches for image in to_pil(images_BCHW)]

    def reconstruct(self, images: Image.Image | Sequence[Image.Image] | torch.Tensor) -> list[Image.Image]:
        """Encode images to tokens and decode them again, to PIL images (see to_pil). `pipe.tokenizer.reconstruct` returns tensors."""
        return [image for images_BCHW in self._image_batches(images) for image in to_pil(self.tokenizer.reconstruct(images_BCHW))]

    def _resolve_classes(self, class_labels: Sequence[str | int] | str | int | None, count: int) -> list[int] | None:
        """The class index of each image, `count` images per label, or None if no labels are given."""
        if class_labels is None:
            if self.class_names is not None and not self.prior.vocabulary.is_trained(0):
                raise InputError("class_labels is not given, but this prior was trained without label drop and cannot sample unconditionally. "
                                 f"Give class_labels; allowed: {listed_names(self.class_names, 50)}.")
            return None
        single_label = class_labels if isinstance(class_labels, str) else as_index(class_labels)  # None for a sequence
        labels = list(cast("Sequence[str | int]", class_labels)) if single_label is None else [single_label]
        if not labels:
            raise InputError("class_labels is empty; give class names or indices, or None.")
        return [index for index in class_indices(self.class_names, labels) for _ in range(count)]


def keywords_from_former_positions(positional: Sequence[Any]) -> dict[str, Any]:
    """Name the deprecated positional arguments of a call of the pipeline, and warn its caller. Raises TypeError if there are too many."""
    if len(positional) > len(FORMER_POSITIONS):
        raise TypeError(f"a call takes at most {3 + len(FORMER_POSITIONS)} positional arguments")
    keywords = dict(zip(FORMER_POSITIONS[:len(positional)], positional, strict=True))
    warnings.warn(f"pass {', '.join(keywords)} by keyword", DeprecationWarning, stacklevel=3)
    return keywords


def to_output_type(images_BCHW: torch.Tensor, output_type: str) -> list[Image.Image] | np.ndarray | torch.Tensor:
    """Convert decoded images in [-1, 1] to an output type (pil, np or pt), on the CPU."""
    if output_type == "pt":
        return images_BCHW.clamp(-1, 1).cpu()
    return to_uint8(images_BCHW) if output_type == "np" else to_pil(images_BCHW)


def concatenate(batches: Iterable[list | np.ndarray | torch.Tensor]) -> list | np.ndarray | torch.Tensor:
    """Concatenate batches of one type: lists, arrays or tensors."""
    batches = list(batches)
    if isinstance(batches[0], list):
        return [image for batch in batches for image in batch]
    return np.concatenate(batches) if isinstance(batches[0], np.ndarray) else torch.cat(cast("list[torch.Tensor]", batches))  # all of one type


def as_ids(token_ids: Any) -> Ids:
    """Ids that a user gave as tensors, arrays or lists, as a tensor or a dict of tensors. A scalar gets an axis, because it cannot be split."""
    if isinstance(token_ids, Mapping):
        return {name: torch.atleast_1d(torch.as_tensor(ids)) for name, ids in token_ids.items()}
    return torch.atleast_1d(torch.as_tensor(token_ids))


def as_index(value: Any) -> int | None:
    """A single integer of any type (int, numpy, torch) as int, or None for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        return None
