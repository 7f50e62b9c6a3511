"""ImageGenerationPipeline: sample tokens from the prior, decode them to images.

    from pipelines import ImageGenerationPipeline
    pipe = ImageGenerationPipeline.from_pretrained("runs/quickstart")
    out = pipe(class_labels=["3", 7], num_images_per_label=4, seed=1)
    out.images[0].save("three.png")
"""

import dataclasses
import operator
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pipelines.bundle import check_replaceable, class_indices, find_pipeline, make_bundle, read_bundle, recommended_sampling, usable_device
from stage1_tokenizer.images import as_batch, to_pil, to_uint8
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage2_prior.precision import largest_logit_difference
from stage2_prior.prior import TokenPrior
from stage2_prior.sampling import SamplingStopped
from stage2_prior.vocabulary import NO_CLASS
from vqmosaic.errors import InputError, check_name, check_range
from vqmosaic.exported_weights import same_weights
from vqmosaic.fingerprints import check_same_tokens
from vqmosaic.recipe_sections import SamplingConfig
from vqmosaic.seeding import image_seeds

OUTPUT_TYPES = ("pil", "np", "pt")


@dataclass
class GenerationOutput:
    """images as asked for; token_ids (B, h, w), or (B, h, w, depth), int64 on the CPU; seeds and class_indices of each image; stopped or not."""

    images: list[Image.Image] | Any = field(default_factory=list)
    token_ids: torch.Tensor | None = None
    seeds: list[int] = field(default_factory=list)
    class_indices: list[int] | None = None
    stopped: bool = False


class ImageGenerationPipeline:
    """A tokenizer and a prior that belong together, with the sampling settings their maker recommends."""

    def __init__(self, tokenizer: ImageTokenizer, prior: TokenPrior, sampling: SamplingConfig | None = None, source: Path | None = None):
        if tokenizer.token_fingerprint is None:
            raise InputError("the tokenizer has no token fingerprint yet, by which the prior could belong to it; its save_pretrained gives it one.")
        check_same_tokens(tokenizer.token_fingerprint, "the tokenizer", prior.vocabulary.token_fingerprint, "the prior")
        self.tokenizer, self.prior, self.sampling, self._source = tokenizer, prior, sampling or SamplingConfig(), source

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device | None = None,
                        dtype: torch.dtype = torch.float32) -> "ImageGenerationPipeline":
        """The pipeline of a pipeline folder or a run folder, on the device given (by default the best there is).

        dtype is that of the prior and the decoder; encoder and quantizer stay float32.

        Raises:
            ValueError: there is no pipeline, its parts do not belong together, or this machine has no such device.
        """
        folder = find_pipeline(path)
        content = read_bundle(folder)
        device = usable_device(device)
        tokenizer = ImageTokenizer.from_pretrained(folder / "tokenizer", device, dtype)
        prior = TokenPrior.from_pretrained(folder / "prior", device=device, dtype=dtype)
        check_same_tokens(tokenizer.token_fingerprint, folder / "tokenizer", prior.vocabulary.token_fingerprint, folder / "prior")
        return cls(tokenizer, prior, recommended_sampling(folder, content), folder)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the pipeline to another folder, with the recommended settings as they are now.

        The files that it was loaded from are copied where its weights are still those, in whatever number format; else the weights are saved.
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
        else:  # weights in memory may be cast, those in the files are not
            make_bundle(self._source / "tokenizer", self._source / "prior", folder, self.sampling)

    def _is_as_loaded(self, source: Path) -> bool:
        """Whether tokenizer and prior are those in a folder, and not trained further or exchanged since they were loaded from it."""
        return (same_weights(self.tokenizer, ImageTokenizer.from_pretrained(source / "tokenizer"))
                and same_weights(self.prior, TokenPrior.from_pretrained(source / "prior")))

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

        Args:
            class_labels: class names (strings) or indices (integers); None for a pipeline without classes, or for images of any class.
            num_images_per_label: images for each label.
            seed: a number that fixes the result; None draws one (out.seeds tells the seed of each image).
            guidance_scale, temperature, top_k, top_p, min_p: None takes the recommended setting; 1.0, 1.0, 0, 1.0 and 0.0 are off.
            output_type: pil, np (uint8, B H W C) or pt (float32 in [-1, 1], B C H W).
            callback: called as callback(done, total) after each token; returning False stops, then out.stopped is True and out.images is empty.
            batch_size: images that are sampled together.
            guidance_schedule, guidance_power, guidance_interval: as in SamplingConfig; None takes the recommended setting.
            compile: record the step of the prior as a CUDA graph, which pays where few images are sampled together; elsewhere it changes nothing.

        Raises:
            ValueError: a class that does not exist, or a setting out of its range.
        """
        # 1. check inputs
        check_name("output_type", output_type, OUTPUT_TYPES)
        check_range("num_images_per_label", num_images_per_label, at_least=1)
        check_range("batch_size", batch_size, at_least=1)
        given = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
                 "guidance_schedule": guidance_schedule, "guidance_power": guidance_power,
                 "guidance_interval": None if guidance_interval is None else list(guidance_interval)}
        sampling = dataclasses.replace(self.sampling, **{name: value for name, value in given.items() if value is not None})
        classes = self._classes(class_labels, num_images_per_label)
        if classes is None and guidance_scale is None:  # the recommended guidance is for classes
            sampling = dataclasses.replace(sampling, guidance_scale=1.0)
        total = num_images_per_label if classes is None else len(classes)
        if sampling.top_k > self.tokenizer.config.codebook_size:
            raise InputError(f"top_k is {sampling.top_k}; allowed: 0 (off) to {self.tokenizer.config.codebook_size}, the codebook size.")

        # 2. seeds
        seeds = image_seeds(secrets.randbits(62) if seed is None else seed, total)

        # 3. tokens, batch by batch
        batches = [slice(start, min(start + batch_size, total)) for start in range(0, total, batch_size)]
        tokens_each = self.prior.vocabulary.num_tokens
        ids = []
        try:
            for number, part in enumerate(batches):
                def report(done: int, _: int, number=number) -> bool | None:
                    return callback(number * tokens_each + done, len(batches) * tokens_each)

                ids.append(self.prior.sample(None if classes is None else classes[part], sampling, seeds=seeds[part],
                                             callback=report if callback is not None else None, compile=compile))
        except SamplingStopped:
            return GenerationOutput(seeds=seeds, class_indices=classes, stopped=True)
        ids_Bhw = torch.cat(ids).view(total, *self.tokenizer.grid_shape)

        # 4. images
        images_BCHW = torch.cat([self.tokenizer.decode(ids_Bhw[part]) for part in batches])
        return GenerationOutput(self._output(images_BCHW, output_type), ids_Bhw.cpu(), seeds, classes)

    def logit_difference(self, token_ids: torch.Tensor, class_indices: Sequence[int] | None) -> float:
        """The largest difference between the logits that sampling sees and those of the float32 weights in the folder, for ids that were drawn.

        Raises ValueError where the pipeline was not loaded from a folder.
        """
        if self._source is None:
            raise InputError("the pipeline was not loaded from a folder, so there are no float32 weights to compare with; load a saved one.")
        reference = TokenPrior.from_pretrained(self._source / "prior", device=self.device)
        classes = [NO_CLASS] * len(token_ids) if class_indices is None else class_indices
        return largest_logit_difference(self.prior, reference, token_ids.flatten(1), classes)

    def encode(self, images: Image.Image | Sequence[Image.Image] | torch.Tensor) -> torch.Tensor:
        """Ids (B, h, w), or (B, h, w, depth), int64 on the CPU of one PIL image, a list of them, or a tensor (B, C, H, W) in [-1, 1]."""
        return self.tokenizer.encode(as_batch(images, self.tokenizer.transform).to(self.device)).cpu()

    def decode(self, token_ids: torch.Tensor) -> list[Image.Image]:
        """PIL images of ids (B, h, w), or (B, h, w, depth) where the tokenizer has several for each position."""
        return to_pil(self.tokenizer.decode(torch.as_tensor(token_ids).to(self.device)).cpu())

    def reconstruct(self, images: Image.Image | Sequence[Image.Image] | torch.Tensor) -> list[Image.Image]:
        """The images after the way through the tokens and back."""
        return to_pil(self.tokenizer.reconstruct(as_batch(images, self.tokenizer.transform).to(self.device)).cpu())

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

    @staticmethod
    def _output(images_BCHW: torch.Tensor, output_type: str):
        images_BCHW = images_BCHW.clamp(-1, 1).cpu()
        if output_type == "pt":
            return images_BCHW
        return to_uint8(images_BCHW) if output_type == "np" else to_pil(images_BCHW)


def as_index(value: Any) -> int | None:
    """A single integer of any kind (int, numpy, torch) as int, or None for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        return None
