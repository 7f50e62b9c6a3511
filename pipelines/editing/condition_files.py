"""The images of conditions that `vqmosaic edit` and `vqmosaic score` are given with --condition_image. Importing this module does not load torch."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.image_commands import image_conditions
from vqmosaic.errors import InputError, listed_names
from vqmosaic.files.given_paths import check_path

if TYPE_CHECKING:
    from stage2_prior.chain_vocabulary import ChainVocabulary


def add_condition_option(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Add the option --condition_image. `more` is added to its help."""
    parser.add_argument("--condition_image", action="append", default=[], metavar="NAME=FILE",
                        help=f"an image for a prior that is given images, such as edges{more}. Repeat it for several conditions. If there is only "
                             "one, FILE is enough")


def find_condition_images(given: Sequence[str], vocabulary: "ChainVocabulary") -> dict[str, Path]:
    """Name of a condition -> file or folder, from the texts of --condition_image. Raises InputError for unknown and repeated names."""
    names, found = image_conditions(vocabulary), dict[str, Path]()
    for text in given:
        if not names:
            raise InputError(f"--condition_image is {text!r}, but the prior of this pipeline was not trained with images. Leave it out.")
        name, separator, path = text.partition("=")
        if not separator or (name not in names and os.path.exists(os.path.expanduser(text))):  # a name of a file may contain =
            name, path = names[0] if len(names) == 1 else "", text
        if name not in names:
            raise InputError(f"--condition_image is {text!r}; give {' or '.join(f'{each}=FILE' for each in names)}.")
        if name in found:
            raise InputError(f"--condition_image gives two images for {name}: {found[name]} and {path}. Give one.")
        check_path("--condition_image", path)
        found[name] = Path(os.path.expanduser(path))
    return {name: found[name] for name in names if name in found}


def files_for_each(conditions: Mapping[str, Path], images: Mapping[str, Path]) -> dict[str, list[Path]]:
    """Name of a condition -> its image files: a single one for all images, or from a folder one for each image, with the same name.

    `images` are the results of `find_images`. Raises InputError if there is none for an image.
    """
    from pipelines.image_folders.translation_folder import find_images

    found = {}
    for condition, path in conditions.items():
        files = find_images([path])
        for option, given in (("the images", images), ("--condition_image", files)) if path.is_dir() else ():
            numbered = [file.name for name, file in given.items() if Path(name).stem != file.stem]  # find_images has changed its name
            if numbered:
                raise InputError(f"{option}: several images have the same name up to the suffix, such as {listed_names(numbered)}, so images and "
                                 "conditions cannot be paired. Rename them, or score them in separate calls.")
        if path.is_dir() and (missing := [name for name in images if name not in files]):
            stems = [str(Path(name).with_suffix("")) for name in missing]
            raise InputError(f"--condition_image: {path} has no images with these names: {listed_names(stems)}. Give a folder with an image of the "
                             "same name for each image, or a single file for all.")
        found[condition] = [files[name] for name in images] if path.is_dir() else list(files.values())
    return found
