"""Conditions of validation images, read from token shards, for pictures and measures of priors that are given more than the class."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pipelines.condition_inputs import ConditionInputs
from stage1_tokenizer.image_files.channels import visible_pixels
from stage1_tokenizer.image_files.images import to_uint8
from stage1_tokenizer.pictures import titled_picture, viewing_scale
from stage2_prior.chain_vocabulary import ChainVocabulary
from stage2_prior.segments import CLASS_NAME
from stage2_prior.token_batches import validation_samples
from stage2_prior.token_columns import check_same_tokens
from stage2_prior.vocabulary import Vocabulary
from token_shards.manifest import grid_columns
from token_shards.reader import TokenShardReader

SAMPLES_OF_CONDITIONS = 6
"""Number of samples in a row of a picture, which belong to the conditions of one image."""


class StoredImages(NamedTuple):
    """N images in token shards."""

    classes: list[int] | None
    """The class index of each image, or None without classes."""
    ids: dict[str, torch.Tensor]
    """Grid name -> int64 ids (N, n), for all grids and texts in the shards."""

    def learned_by(self, vocabulary: ChainVocabulary) -> tuple[list[int] | None, dict[str, torch.Tensor]]:
        """The classes, and the ids of the conditions by name, as far as the priors were trained with them."""
        classes = self.classes if vocabulary.learned_class_names is not None else None
        return classes, {condition.name: self.ids[condition.name] for condition in vocabulary.learned_conditions}


def stored_images(reader: TokenShardReader, vocabularies: Sequence[Vocabulary], count: int) -> StoredImages:
    """The classes and ids of `count` images of a validation split, the same at every call. If it has fewer, they repeat.

    With classes, images without a label are left out. Raises InputError if the shards were not made by the tokenizers of the vocabularies.
    """
    for vocabulary in vocabularies:
        check_same_tokens(reader, vocabulary)
    samples_N = validation_samples(reader, count)
    has_classes = vocabularies[0].class_names is not None
    if has_classes:
        labelled_N = samples_N[reader.labels_N[samples_N] >= 0]
        samples_N = labelled_N if len(labelled_N) else samples_N
    batch = reader.samples(np.resize(samples_N, count))
    ids = {name: torch.from_numpy(batch.ids_BT[:, part]) for name, part in grid_columns(reader.manifest.grids).items()}
    return StoredImages(batch.labels_B.tolist() if has_classes and (batch.labels_B >= 0).all() else None, ids)


def condition_images(inputs: ConditionInputs, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name -> images (N, C, h, w) of each image condition, decoded from their ids."""
    return {name: inputs.decode_images(name, given[name]) for name in inputs.tokenizers if name in given}


def comparison_picture(conditions: Mapping[str, torch.Tensor], titles: Sequence[str], samples_BHWC: np.ndarray,
                       originals_BCHW: torch.Tensor) -> Image.Image:
    """A picture with a row for each image: its conditions, samples, and the image itself, as the tokenizer reconstructs it. Columns have headings.

    Args:
        conditions: name -> images (N, C, h, w) in [-1, 1] of each condition. They are enlarged without smoothing.
        titles: a text above each row, such as its class and its captions.
        samples_BHWC: uint8, the same number of samples of each of the N images, image by image.
        originals_BCHW: the N images.
    """
    sides, count = samples_BHWC.shape[1:3], len(originals_BCHW)
    parts = [visible_pixels(to_uint8(F.interpolate(images.float(), size=sides, mode="nearest"))) for images in conditions.values()]
    samples, originals = visible_pixels(samples_BHWC), visible_pixels(to_uint8(originals_BCHW))
    channels = max(pixels.shape[-1] for pixels in (*parts, samples, originals))
    parts = [as_channels(pixels, channels) for pixels in parts]
    samples, originals = as_channels(samples, channels), as_channels(originals, channels)
    per_image = len(samples) // count
    rows = [np.concatenate([*(part[row:row + 1] for part in parts), samples[row * per_image:(row + 1) * per_image], originals[row:row + 1]])
            for row in range(count)]
    headings = [[*([("given", len(conditions))] if conditions else []), ("samples", per_image), ("original", 1)]]
    if conditions:
        headings.append([*((name, 1) for name in conditions), ("", per_image + 1)])
    return titled_picture(rows, headings, titles, viewing_scale(sides))


def row_titles(classes: Sequence[str] | None, texts: Mapping[str, Sequence[str]], count: int) -> list[str]:
    """The title of each of `count` rows: its class and its texts, such as "class: boat; text: a small red boat"."""
    given = {**({} if classes is None else {CLASS_NAME: classes}), **texts}
    return ["; ".join(f"{name}: {each[row]}" for name, each in given.items()) for row in range(count)]


def as_channels(pixels_BHWC: np.ndarray, channels: int) -> np.ndarray:
    """Grey images repeated to this number of channels; other images unchanged."""
    return np.repeat(pixels_BHWC, channels, axis=-1) if pixels_BHWC.shape[-1] == 1 else pixels_BHWC


def texts_of(inputs: ConditionInputs, given: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """Name -> the texts of the N images, decoded from their ids as far as their tokenizer allows."""
    return {name: inputs.texts[name].texts(given[name]) for name in inputs.texts if name in given}
