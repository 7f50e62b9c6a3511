"""ImageGenerationPipeline: sample tokens from the prior, decode them to images.

    from pipelines import ImageGenerationPipeline
    pipe = ImageGenerationPipeline.from_pretrained("runs/quickstart")
    out = pipe(class_labels=["3", 7], num_images_per_label=4, seed=1)
    out.images[0].save("three.png")

    for out in pipe.batches(num_images_per_label=50_000, class_labels=3, seed=1):      # many images, one batch in memory at a time
        ...
"""

import dataclasses
import operator
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from pipelines.bundle import check_replaceable, class_indices, find_pipeline, make_bundle, read_bundle, recommended_sampling, usable_device
from stage1_tokenizer.image_files.images import as_batches, to_pil, to_uint8
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage2_prior.generation.logit_differences import largest_logit_difference
from stage2_prior.generation.sampling import SamplingStopped
from stage2_prior.prior import TokenPrior
from stage2_prior.vocabulary import NO_CLASS
from vqmosaic.errors import InputError, check_name, check_range
from vqmosaic.files.exported_weights import same_weights
from vqmosaic.files.fingerprints import check_same_tokens
from vqmosaic.recipes.field_types import as_boolean, as_integer
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.runs.devices import as_dtype
from vqmosaic.seeding import image_seeds

OUTPUT_TYPES = ("pil", "np", "pt")
GUIDANCE_SETTINGS = ("guidance_scale", "guidance_schedule", "guidance_power", "guidance_interval")
PIXELS_TOGETHER, MOST_TOGETHER = 8 * 256**2, 64
"""Encoder and decoder process at most this many pixels and images at a time, because their feature maps are far larger than the images."""


def images_together(image_size: int) -> int:
    """The number of images of this size that the encoder or the decoder processes at a time."""
    return max(1, min(MOST_TOGETHER, PIXELS_TOGETHER // image_size**2))


def decoded_in_parts(tokenizer: ImageTokenizer, ids_Bhw: torch.Tensor) -> Iterator[torch.Tensor]:
    """Images (B, C, H, W) of ids, a few at a time, on the tokenizer's device."""
    for part_Bhw in ids_Bhw.split(images_together(tokenizer.transform.image_size)):
        yield tokenizer.decode(part_Bhw.to(tokenizer.device))


class Request(NamedTuple):
    """A checked request to a pipeline: the settings, the class index of each image (None: no classes) and its seed."""

    sampling: SamplingConfig
    classes: list[int] | None
    seeds: list[int]


@dataclass
class GenerationOutput:
    """images as asked for; token_ids (B, h, w), or (B, h, w, depth), int64 on the CPU; seeds and class_indices of each image; stopped or not.

    places are the positions of these images in the request, counted from 0.
    """

    images: list[Image.Image] | Any = field(default_factory=list)
    token_ids: torch.Tensor | None = None
    seeds: list[int] = field(default_factory=list)
    class_indices: list[int] | None = None
    stopped: bool = False
    places: range = range(0)


class ImageGenerationPipeline:
    """A tokenizer and a prior that belong together, with the sampling settings their maker recommends."""

    def __init__(self, tokenizer: ImageTokenizer, prior: TokenPrior, sampling: SamplingConfig | None = None, source: Path | None = None):
        if tokenizer.token_fingerprint is None:
            raise InputError("the tokenizer has no token fingerprint yet, by which the prior could belong to it; its save_pretrained gives it one.")
        check_same_tokens(tokenizer.token_fingerprint, "the tokenizer", prior.vocabulary.token_fingerprint, "the prior")
        self.tokenizer, self.prior, self.sampling, self._source = tokenizer, prior, sampling or SamplingConfig(), source

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device | None = None,
                        dtype: torch.dtype | str = torch.float32) -> "ImageGenerationPipeline":
        """The pipeline of a pipeline folder or a run folder, on the device given (by default the best there is).

        dtype, a torch.dtype or its name such as "bfloat16", is for the prior and the decoder; encoder and quantizer stay float32.

        Raises:
            ValueError: there is no pipeline, its parts do not belong together, this machine does not have the device, or the dtype is unknown.
        """
        folder, dtype = find_pipeline(path), as_dtype(dtype)
        content = read_bundle(folder)
        device = usable_device(device)
        tokenizer = ImageTokenizer.from_pretrained(folder / "tokenizer", device, dtype)
        prior = TokenPrior.from_pretrained(folder / "prior", device=device, dtype=dtype)
        check_same_tokens(tokenizer.token_fingerprint, folder / "tokenizer", prior.vocabulary.token_fingerprint, folder / "prior")
        return cls(tokenizer, prior, recommended_sampling(folder, content), folder)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the pipeline to another folder, with the recommended settings as they are now.

        If the weights have not changed since loading, except by a cast, the original files are copied. Otherwise the weights are saved.
        """
        folder = Path(folder)
        if self._source is None or not self._is_as_loaded(self._source):
            check_replaceable(folder)
            parts = folder.with_name(f".parts-{folder.name}")
            try:
                self.tokenizer.save_pretrained(parts / "tokenizer")
                self.prior.save_pretrained(parts / "prior")
                make_bundle(parts / "tokenizer", parts / "prior", folder, self.sampling)
            finally:
                shutil.rmtree(parts, ignore_errors=True)
        else:  # weights in memory may have been cast, those in the files have not
            make_bundle(self._source / "tokenizer", self._source / "prior", folder, self.sampling)

    def _is_as_loaded(self, source: Path) -> bool:
        """Whether tokenizer and prior still have the weights in the folder. They do not if they were trained further or replaced."""
        try:
            return (same_weights(self.tokenizer, ImageTokenizer.from_pretrained(source / "tokenizer"))
                    and same_weights(self.prior, TokenPrior.from_pretrained(source / "prior")))
        except InputError:  # the folder is gone or holds something else now
            return False

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes that can be asked for, or None."""
        return self.prior.vocabulary.class_names

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes."""
        return self.tokenizer.device

    def __call__(self, class_labels: Sequence[str | int] | str | int | None = None, num_images_per_label: int = 1, seed: int | None = None,
                 guidance_scale: float | None = None, temperature: float | None = None, top_k: int | None = None, top_p: float | None = None,
                 output_type: str = "pil", callback: Callable[[int, int], bool | None] | None = None, batch_size: int = 64, *,
                 min_p: float | None = None, guidance_schedule: str | None = None, guidance_power: float | None = None,
                 guidance_interval: Sequence[float] | None = None, compile: bool = False) -> GenerationOutput:
        """Generated images, label by label; image i depends on seed, i and its class, not on its neighbours.

        All images are returned at once; use `batches` to get many images one batch at a time.

        Args:
            class_labels: class names (strings) or indices (integers); None for a pipeline without classes, or for images of any class.
            num_images_per_label: images for each label.
            seed: a number that fixes the result; None draws one (out.seeds tells the seed of each image).
            guidance_scale, temperature, top_k, top_p, min_p: None takes the recommended setting; 1.0, 1.0, 0, 1.0 and 0.0 are off. Images of
                any class are sampled without the recommended guidance, which would have no effect.
            output_type: pil, np (uint8, B H W C) or pt (float32 in [-1, 1], B C H W).
            callback: called as callback(done, total) after each token; returning False stops, then out.stopped is True and out.images is empty.
            batch_size: images that are sampled together.
            guidance_schedule, guidance_power, guidance_interval: as in SamplingConfig; None takes the recommended setting.
            compile: record the step of the prior as a CUDA graph, which pays where few images are sampled together; elsewhere it changes nothing.

        Raises:
            ValueError: a class that does not exist, a setting out of range or of the wrong type, or guidance without class_labels.
        """
        settings = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
                    "guidance_schedule": guidance_schedule, "guidance_power": guidance_power, "guidance_interval": guidance_interval}
        request = self._request(class_labels, num_images_per_label, seed, settings)
        try:
            parts = list(self._batches(request, output_type, callback, batch_size, compile))
        except SamplingStopped:
            return GenerationOutput(seeds=request.seeds, class_indices=request.classes, stopped=True)
        return GenerationOutput(joined(part.images for part in parts), torch.cat([part.token_ids for part in parts]), request.seeds, request.classes,
                                places=range(len(request.seeds)))

    def batches(self, class_labels: Sequence[str | int] | str | int | None = None, num_images_per_label: int = 1, seed: int | None = None, *,
                output_type: str = "pil", callback: Callable[[int, int], bool | None] | None = None, batch_size: int = 64, compile: bool = False,
                skip: Callable[[range], bool] | None = None, **settings: Any) -> Iterator[GenerationOutput]:
        """Yields the same images as a call with these arguments, one batch at a time, so memory does not grow with their number.

        Args:
            skip: called with the places of each batch before sampling starts. Batches for which it returns True are left out.
            settings: guidance_scale, temperature and the other settings that a call takes.
            others: as in a call. If the callback returns False, the iterator raises stage2_prior.generation.sampling.SamplingStopped.

        Raises:
            ValueError: as in a call.
        """
        for name in settings:
            check_name("a setting", name, [field.name for field in dataclasses.fields(SamplingConfig)])
        return self._batches(self._request(class_labels, num_images_per_label, seed, settings), output_type, callback, batch_size, compile, skip)

    def _request(self, class_labels: Sequence[str | int] | str | int | None, num_images_per_label: int, seed: int | None,
                 settings: dict[str, Any]) -> Request:
        """The checked request."""
        count = as_integer("num_images_per_label", num_images_per_label)
        check_range("num_images_per_label", count, at_least=1)
        given = {name: value for name, value in settings.items() if value is not None}
        sampling = dataclasses.replace(self.sampling, **given)
        if sampling.top_k > self.tokenizer.config.codebook_size:
            raise InputError(f"top_k is {sampling.top_k}; allowed: 0 (off) to {self.tokenizer.config.codebook_size}, the codebook size.")
        classes = self._classes(class_labels, count)
        if classes is None:
            guided = {name: given[name] for name in GUIDANCE_SETTINGS if name in given}
            if guided and guided.get("guidance_scale") != 1:
                remedy = "leave it out" if self.class_names is None else "give class_labels, or leave it out"
                words = " and ".join(f"{name} is {value}" for name, value in guided.items())
                raise InputError(f"{words}, but no class_labels are given, so guidance has no effect; {remedy}.")
            sampling = dataclasses.replace(sampling, guidance_scale=1.0)  # the recommended guidance is for classes
        return Request(sampling, classes, image_seeds(secrets.randbits(62) if seed is None else seed, count if classes is None else len(classes)))

    def _batches(self, request: Request, output_type: str, callback: Callable[[int, int], bool | None] | None, batch_size: int, compile: bool,
                 skip: Callable[[range], bool] | None = None) -> Iterator[GenerationOutput]:
        """The images of a request, one batch at a time. Arguments are checked at once; each batch is sampled when it is requested."""
        check_name("output_type", output_type, OUTPUT_TYPES)
        check_range("batch_size", as_integer("batch_size", batch_size), at_least=1)
        compile, total = as_boolean("compile", compile), len(request.seeds)
        batches = [range(start, min(start + batch_size, total)) for start in range(0, total, batch_size)]
        batches = [places for places in batches if skip is None or not skip(places)]
        tokens = self.prior.vocabulary.num_tokens

        def sampled() -> Iterator[GenerationOutput]:
            for number, places in enumerate(batches):
                def report(done: int, _: int, number=number) -> bool | None:
                    return callback(number * tokens + done, len(batches) * tokens)

                part = slice(places.start, places.stop)
                classes, seeds = request.classes and request.classes[part], request.seeds[part]
                ids_BT = self.prior.sample(classes, request.sampling, seeds, report if callback is not None else None, compile)
                ids_Bhw = ids_BT.view(len(places), *self.tokenizer.grid_shape)
                images = joined(as_output_type(images_BCHW, output_type) for images_BCHW in decoded_in_parts(self.tokenizer, ids_Bhw))
                yield GenerationOutput(images, ids_Bhw.cpu(), seeds, classes, places=places)

        return sampled()

    def _prepared(self, images: Image.Image | Sequence[Image.Image] | torch.Tensor) -> Iterator[torch.Tensor]:
        """The given images, a few at a time, on the pipeline's device."""
        transform = self.tokenizer.transform
        return (images_BCHW.to(self.device) for images_BCHW in as_batches(images, transform, images_together(transform.image_size)))

    def logit_difference(self, token_ids: torch.Tensor, class_indices: Sequence[int] | None) -> float:
        """The largest difference between the logits that sampling sees and those of the float32 weights in the folder, for ids that were drawn.

        Raises ValueError where the pipeline was not loaded from a folder.
        """
        if self._source is None:
            raise InputError("the pipeline was not loaded from a folder, so there are no float32 weights to compare with; load a saved one.")
        reference = TokenPrior.from_pretrained(self._source / "prior", device=self.device)
        classes = [NO_CLASS] * len(token_ids) if class_indices is None else list(class_indices)
        return max(largest_logit_difference(self.prior, reference, token_ids[start:start + MOST_TOGETHER].flatten(1),
                                            classes[start:start + MOST_TOGETHER]) for start in range(0, len(token_ids), MOST_TOGETHER))

    def encode(self, images: Image.Image | Sequence[Image.Image] | torch.Tensor) -> torch.Tensor:
        """Ids (B, h, w), or (B, h, w, depth), int64 on the CPU of one PIL image, a list of them, or a tensor (B, C, H, W) in [-1, 1]."""
        return torch.cat([self.tokenizer.encode(images_BCHW).cpu() for images_BCHW in self._prepared(images)])

    def decode(self, token_ids: torch.Tensor) -> list[Image.Image]:
        """PIL images of ids (B, h, w), or (B, h, w, depth) where the tokenizer has several for each position."""
        parts = decoded_in_parts(self.tokenizer, torch.atleast_1d(torch.as_tensor(token_ids)))
        return [image for images_BCHW in parts for image in to_pil(images_BCHW)]

    def reconstruct(self, images: Image.Image | Sequence[Image.Image] | torch.Tensor) -> list[Image.Image]:
        """The images after the way through the tokens and back."""
        return [image for images_BCHW in self._prepared(images) for image in to_pil(self.tokenizer.reconstruct(images_BCHW))]

    def _classes(self, class_labels: Sequence[str | int] | str | int | None, count: int) -> list[int] | None:
        if class_labels is None:
            if self.class_names is not None and self.prior.vocabulary.label_drop == 0:
                raise InputError("class_labels is not given, and this prior was trained without label drop, so it knows no image of any class; "
                                 f"give class_labels out of: {', '.join(self.class_names[:50])}.")
            return None
        asked = class_labels if isinstance(class_labels, str) else as_index(class_labels)
        asked = list(class_labels) if asked is None else [asked]
        if not asked:
            raise InputError("class_labels is empty; give class names or indices, or None.")
        return [index for index in class_indices(self.class_names, asked) for _ in range(count)]


def as_output_type(images_BCHW: torch.Tensor, output_type: str) -> list[Image.Image] | np.ndarray | torch.Tensor:
    """Decoded images as pil, np or pt, on the CPU."""
    if output_type == "pt":
        return images_BCHW.clamp(-1, 1).cpu()
    return to_uint8(images_BCHW) if output_type == "np" else to_pil(images_BCHW)


def joined(parts: Iterable[list | np.ndarray | torch.Tensor]) -> list | np.ndarray | torch.Tensor:
    """Several parts of the same kind as one."""
    parts = list(parts)
    if isinstance(parts[0], list):
        return [image for part in parts for image in part]
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else torch.cat(parts)


def as_index(value: Any) -> int | None:
    """A single integer of any kind (int, numpy, torch) as int, or None for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        return None
