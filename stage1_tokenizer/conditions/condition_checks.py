"""Quick checks of what the conditions of a recipe need: folders, packages, tokenizers of texts. Reads only names and loads no torch."""

import os
from pathlib import Path

from stage1_tokenizer.conditions.text_tokenizer import check_text_tokenizer
from stage1_tokenizer.data.data_location import check_data_path, image_files, local_path
from stage1_tokenizer.image_files.derived_images import check_derived_kind
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import DataConfig


def check_condition_data(data: DataConfig) -> None:
    """Raise InputError if folders, packages or tokenizers of texts of the conditions are missing. Takes milliseconds."""
    conditions = data.given_conditions
    if data.derived is not None:
        check_derived_kind("data.derived", data.derived)
        if data.derived["kind"] == "paired_folder":
            _check_is_folder("data.derived", data)
            check_pairs_folder(data.derived["path"], data, "data.derived.path")
    for index, condition in enumerate(conditions):
        entry = f"data.conditions[{index}]"
        if condition.kind == "paired_folder":
            _check_is_folder(entry, data)
            check_pairs_folder(condition.path or "", data, f"{entry}.path")
        elif not condition.is_caption:
            check_derived_kind(entry, condition.derivation())
        elif condition.text_tokenizer is not None:
            check_text_tokenizer(condition.text_tokenizer, f"{entry}.text_tokenizer")
        if condition.is_caption and condition.column is None and not condition.templates and check_data_path(data) != "folder":
            raise InputError(f"{entry} has neither column nor templates, so captions are read from .txt files beside the images, but the images are "
                             "not files in a folder. Set column to the text column, or give templates.")
        if condition.templates and not data.use_labels:
            raise InputError(f"{entry} has templates, but data.use_labels is false, so there are no class names. Set data.use_labels to true.")


def _check_is_folder(entry: str, data: DataConfig) -> None:
    if check_data_path(data) != "folder":
        raise InputError(f"{entry} has the kind 'paired_folder', which finds pairs by file name, but the images are not files in a folder. Set "
                         "data.path to a folder of images.")


def check_pairs_folder(path: str, data: DataConfig, field: str = "paired_folder: path") -> Path:
    """The folder of paired images. Raises InputError, which names the field, unless it holds images outside of data.path. Reads only names."""
    root, images = Path(os.path.expanduser(path)), local_path(data)
    if not root.is_dir():
        raise InputError(f"{field} is {path!r}, which is not a folder on this machine (working directory: {os.getcwd()}).")
    if root.resolve().is_relative_to(images.resolve()):
        raise InputError(f"{field} is {path!r}, inside data.path {data.path!r}, so its images would be part of the data set. Move it outside, or set "
                         "data.path to the folder with the images only.")
    if next(image_files(root), None) is None:
        raise InputError(f"{field} is {path!r}, a folder without images.")
    return root
