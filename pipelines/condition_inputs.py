"""Turns the prompts and images of a request into the ids of the conditions that the priors of a pipeline are given."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipelines.decoded_images import map_batches, tokenizer_batch_size
from pipelines.pipeline_parts import is_bytes
from pipelines.prompts import TextEncoder
from stage1_tokenizer.image_files.images import as_batches
from stage1_tokenizer.tiles.tiled_images import encode_tiled
from stage1_tokenizer.tiles.tiling import Tiling
from stage1_tokenizer.tokenizer_protocol import Tokenizer, load_tokenizer
from stage2_prior.chain_vocabulary import ChainVocabulary, describe_conditions
from stage2_prior.segments import GivenGrid, GivenText
from token_shards.manifest import Grid
from vqmosaic.errors import InputError

LOW_RESOLUTION = "low_resolution"
"""The kind of a condition for super_resolve. All other images are for translate."""


class ConditionInputs:
    """The tokenizers of a pipeline's conditions: those of images, and those of texts."""

    def __init__(self, vocabulary: ChainVocabulary, tokenizers: Mapping[str, Tokenizer], texts: Mapping[str, TextEncoder]):
        """Raises InputError unless there is the right tokenizer for each condition of the vocabulary."""
        self.vocabulary, self.tokenizers, self.texts = vocabulary, dict(tokenizers), dict(texts)
        missing = [condition.name for condition in vocabulary.conditions if condition.name not in {**self.tokenizers, **self.texts}]
        if missing:
            raise InputError(f"the prior is given {describe_conditions(vocabulary.conditions)} besides the class, but there is no tokenizer for "
                             f"{', '.join(missing)}. Load the pipeline from a folder that `vqmosaic bundle` has written, or give inputs.")
        for name, tokenizer in self.tokenizers.items():
            expected = vocabulary.token_fingerprints.get(name)
            if expected is not None and tokenizer.token_fingerprint != expected:
                raise InputError(f"The tokenizer of the condition {name!r} has the token fingerprint {str(tokenizer.token_fingerprint)[:16]}..., but "
                                 f"the prior was trained with ids of {expected[:16]}.... Use the tokenizer that made them.")

    @classmethod
    def load(cls, vocabulary: ChainVocabulary, folders: Mapping[str, Path], device: torch.device | str) -> "ConditionInputs":
        """Load the tokenizers of the conditions from their folders. Those of texts whose ids are bytes need none."""
        texts, tokenizers = {}, {}
        for condition in vocabulary.conditions:
            if isinstance(condition, GivenText):
                texts[condition.name] = TextEncoder.load(condition, None if is_bytes(condition) else folders[condition.name])
            else:
                tokenizers[condition.name] = load_tokenizer(folders[condition.name], device)
        return cls(vocabulary, tokenizers, texts)

    # --- ids ---------------------------------------------------------------------------------------------------------------

    def ids(self, prompt: Any = None, image: Any = None, ids: Mapping[str, torch.Tensor] | None = None,
            tiling: Tiling | None = None) -> dict[str, torch.Tensor]:
        """Condition name -> int64 ids (N, n) on the CPU of everything that is given. Raises InputError for what the prior was not trained with.

        Args:
            prompt: a text or a list of texts, or a dict of them by name if there are several texts.
            image: a PIL image, a list of them or a tensor (N, C, H, W) in [-1, 1]; a dict of them by name if there are several images.
            ids: ids of conditions by name, as token shards hold them; -1 is the null id.
            tiling: the windows of images that are larger than the training images. The ids of images are then those of the whole image.
        """
        found: dict[str, torch.Tensor] = {}
        for name, texts in self.by_name("prompt", prompt, self.text_names).items():
            found[name] = self.texts[name].ids(texts)
        for name, images in self.by_name("image", image, self.image_names).items():
            found[name] = self.encode_images(name, images, tiling)
        if ids:
            if twice := sorted(ids.keys() & found.keys()):
                raise InputError(f"{', '.join(twice)} is given as ids and as {self.argument_of(twice[0])}. Give one of them.")
            if tiling is not None and (given := sorted(ids.keys() & {*self.image_names})):
                raise InputError(f"size is given, and given_ids has {', '.join(given)}. Give the image itself, which is encoded at its full size.")
            self.check_ids(ids)
            found |= {name: each.cpu().long().flatten(1) for name, each in ids.items()}
        return found

    def describe_cut(self, prompt: Any) -> list[str]:
        """A message for each condition with prompts that are longer than its captions in training. `ids` cuts them."""
        messages = (self.texts[name].describe_cut(texts) for name, texts in self.by_name("prompt", prompt, self.text_names).items())
        return [message for message in messages if message is not None]

    def by_name(self, argument: str, given: Any, names: Sequence[str]) -> dict[str, Any]:
        """The given value by the name of its condition. Raises InputError if the prior does not take it, or several conditions do."""
        if given is None:
            return {}
        if not names:
            raise InputError(f"{argument} is given, but this prior was not trained with {'a text' if argument == 'prompt' else 'an image'}. "
                             f"{self.describe_taken()}")
        if isinstance(given, Mapping):
            if unknown := [str(name) for name in given if name not in names]:
                raise InputError(f"{argument} has {', '.join(unknown)}; this pipeline takes: {', '.join(names)}.")
            return dict(given)
        if len(names) > 1:
            raise InputError(f"this pipeline takes several of {argument}: {', '.join(names)}. Give a dict by name, such as "
                             f"{argument}={{{names[0]!r}: ...}}.")
        return {names[0]: given}

    def encode_images(self, name: str, images: Any, tiling: Tiling | None = None) -> torch.Tensor:
        """The ids (N, n) of images of a condition, such as images at low resolution. They are resized to the size of the condition.

        With `tiling`, they are resized to the size that belongs to the larger images, and encoded in tiles.
        """
        tokenizer = self.tokenizers[name]
        transform, batch_size = tokenizer.transform.without_derivation, tokenizer_batch_size(tokenizer.transform.image_size)
        if tiling is not None:
            sides = [side * length // trained for side, length, trained in zip(transform.sides, tiling.image, tiling.sides, strict=True)]
            transform = dataclasses.replace(transform, image_size=sides)

        def encode(images_BCHW: torch.Tensor) -> torch.Tensor:
            ids = tokenizer.encode(images_BCHW) if tiling is None else encode_tiled(tokenizer, images_BCHW, batch_size=batch_size)
            return tokenizer.join_tokens(ids).cpu()

        try:
            parts = map_batches(as_batches(images, transform, batch_size), tokenizer.device, encode)
        except InputError as error:
            raise InputError(f"image for the condition {name!r}: {error}") from None
        return torch.cat(parts)

    def decode_images(self, name: str, ids_Bn: torch.Tensor) -> torch.Tensor:
        """The images (B, C, H, W) of ids of a condition, on the CPU. Images of dropped conditions (ids -1) are grey."""
        tokenizer = self.tokenizers[name]
        is_dropped_B = (ids_Bn < 0).any(dim=1)
        images_BCHW = tokenizer.decode(tokenizer.split_tokens(ids_Bn.clamp_min(0).to(tokenizer.device))).cpu().clamp(-1, 1)
        return images_BCHW.masked_fill(is_dropped_B[:, None, None, None], 0.0)

    def check_ids(self, ids: Mapping[str, torch.Tensor]) -> None:
        """Raise InputError unless ids are of conditions of this pipeline, and have their shapes and ranges."""
        if unknown := sorted(ids.keys() - {*self.text_names, *self.image_names}):
            raise InputError(f"given_ids has {', '.join(unknown)}, which this prior was not trained with. {self.describe_taken()}")
        for vocabulary in self.vocabulary.vocabularies:
            own = [condition.name for condition in vocabulary.conditions]
            vocabulary.check_conditions({name: each for name, each in ids.items() if name in own}, check_ids=True)

    def save(self, folder: Path) -> dict[str, Path]:
        """Write the tokenizers of the conditions into sub-folders. Returns their paths by name; texts whose ids are bytes have none."""
        paths = {}
        for name, tokenizer in self.tokenizers.items():
            tokenizer.save_pretrained(folder / name)
            paths[name] = folder / name
        return paths | {name: text.folder for name, text in self.texts.items() if text.folder is not None}

    # --- what can be given -------------------------------------------------------------------------------------------------

    @property
    def text_names(self) -> list[str]:
        """Names of the texts that can be given."""
        return [condition.name for condition in self.vocabulary.learned_conditions if condition.name in self.texts]

    @property
    def image_grids(self) -> list[Grid]:
        """The grids of the images that can be given."""
        return [condition.grid for condition in self.vocabulary.learned_conditions if isinstance(condition, GivenGrid)]

    @property
    def image_names(self) -> list[str]:
        """Names of the images that can be given."""
        return [condition.name for condition in self.vocabulary.learned_conditions if condition.name in self.tokenizers]

    def argument_of(self, name: str) -> str:
        """The argument of a call for a condition: prompt or image."""
        return "prompt" if name in self.texts else "image"

    def label_of(self, name: str) -> str:
        """What a message calls the given value of a condition: its argument, with its name if there are several of them."""
        argument, names = self.argument_of(name), self.text_names if name in self.texts else self.image_names
        return argument if len(names) == 1 else f"{argument} ({name})"

    def describe_taken(self) -> str:
        """A sentence that lists what can be given: what the priors were trained with."""
        taken = ["class_labels"] if self.vocabulary.learned_class_names else []
        taken += [f"{self.argument_of(condition.name)} ({condition.name})" for condition in self.vocabulary.learned_conditions]
        return f"This pipeline takes: {', '.join(taken) or 'nothing'}."

    def remedy_without_guidance(self) -> str:
        """What to do about guidance of images for which nothing is given."""
        names = ["class_labels"] if self.vocabulary.learned_class_names else []
        names += dict.fromkeys(self.argument_of(condition.name) for condition in self.vocabulary.learned_conditions)
        return f"give {' or '.join(names)}, or leave it out" if names else "leave it out"

    def kind_of(self, name: str) -> str:
        """The kind of an image condition, such as low_resolution. Images that are not derived from the image itself are paired."""
        derived = self.tokenizers[name].transform.derived
        return "paired_folder" if derived is None else str(derived["kind"])

    def image_for(self, task: str) -> str:
        """The name of the condition for super_resolve (a low resolution) or translate (any other image). Raises InputError unless there is one."""
        is_wanted = {"super_resolve": lambda kind: kind == LOW_RESOLUTION, "translate": lambda kind: kind != LOW_RESOLUTION}[task]
        names = [name for name in self.image_names if is_wanted(self.kind_of(name))]
        what = "an image at low resolution" if task == "super_resolve" else "an image of another kind, such as edges or a paired image"
        if not names:
            raise InputError(f"{task} needs a prior that is given {what}, and this one is not. {self.describe_taken()}")
        if len(names) > 1:
            raise InputError(f"{task}: this pipeline takes several such images: {', '.join(names)}. Call the pipeline with a dict, such as "
                             f"image={{{names[0]!r}: ...}}.")
        return names[0]
