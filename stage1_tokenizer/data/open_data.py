"""Opens the data set of a recipe. Imports only the module for its kind of source."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from stage1_tokenizer.data.data_location import check_data_path
from stage1_tokenizer.data.image_sources import ImageSplits
from vqmosaic.recipes.data_section import DIGITS
from vqmosaic.recipes.fields_from_data import DataSize
from vqmosaic.recipes.recipe_sections import DataConfig


def open_splits(data: DataConfig) -> ImageSplits:
    """The training and validation images of a recipe. Raises InputError for paths, splits, columns and layouts that it cannot use.

    With data.derived of the kind paired_folder, these are the paired images.
    """
    if data.derived is not None and data.derived["kind"] == "paired_folder":
        from stage1_tokenizer.conditions.image_pairs import paired_splits
        return paired_splits(open_splits(dataclasses.replace(data, derived=None)), data)
    source = check_data_path(data)
    if source in DIGITS:
        from stage1_tokenizer.data.digits_source import open_digits
        return open_digits(data)
    if source == "folder":
        from stage1_tokenizer.data.folder_source import open_folder
        return open_folder(data)
    from stage1_tokenizer.data.huggingface_source import open_huggingface
    return open_huggingface(data)


def open_recorded_splits(data: DataConfig, inputs: Mapping[str, str] | None,
                         class_names: list[str] | None = None) -> tuple[ImageSplits, ImageSplits, str]:
    """The images as opened, the images as a stage recorded them in `inputs`, and the fingerprint of the latter in the recorded format.

    Without a record (None), the second result has the class order of `class_names`. Reads some bytes of each image.
    """
    opened = open_splits(data)
    splits = opened.as_recorded(inputs) if inputs is not None else opened.in_class_order_of(class_names)
    return opened, splits, splits.comparable_fingerprint(inputs.get("data set") if inputs is not None else None)


def count_training_images(recipe: Mapping[str, Any]) -> DataSize | None:
    """The number of training images; None if the recipe names no data set. `recipe` maps the dotted names of its fields to their values."""
    data = DataConfig(**{name.removeprefix("data."): value for name, value in recipe.items() if name.startswith("data.")})
    if data.source == "auto" and data.path is None:  # DIGITS need no path; for the other sources, open_splits reports a missing path
        return None
    return DataSize(len(open_splits(data).train))
