"""Finds the origin of the tokens in a folder: their run, its recipe, and the images they were made from.

Importing this module does not load torch.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from token_shards.manifest import MANIFEST_NAME, SPLITS, TokenShardManifest
from token_shards.sidecar import ShardSidecar
from vqmosaic.errors import InputError
from vqmosaic.files.permissions import PermissionDenied
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.recipe_files import load_recipe

if TYPE_CHECKING:
    from stage1_tokenizer.data.image_sources import ImageSource


def is_imported(folder: Path) -> bool:
    """Whether the tokens were imported, so that no data set belongs to them. False if no manifest can be read."""
    for split_folder in (folder, *(folder / split for split in SPLITS)):
        if (split_folder / MANIFEST_NAME).is_file():
            try:
                return "imported" in TokenShardManifest.load(split_folder).encoding
            except InputError:
                continue
    return False


def load_manifest(folder: Path) -> TokenShardManifest | None:
    """The manifest of a split's folder, or None if it is missing or malformed."""
    try:
        return TokenShardManifest.load(folder)
    except PermissionDenied:
        raise
    except InputError:
        return None


def load_sidecar(folder: Path, name: str) -> ShardSidecar | None:
    """The sidecar of a shard, or None if it is missing or malformed."""
    try:
        return ShardSidecar.load(folder, name)
    except PermissionDenied:
        raise
    except InputError:
        return None


def load_run_recipe(folder: Path) -> Recipe | None:
    """The recipe of the run that contains a tokens folder or the folder of one split, or None."""
    root = find_run(folder)
    return None if root is None else load_recipe(str(root))


def find_run(folder: Path) -> Path | None:
    """The run folder of a tokens folder or of the folder of one split; None if the tokens are outside a run.

    The run folder contains recipe.yaml and is the parent or grandparent of `folder`.
    """
    return next((parent for parent in folder.resolve().parents[:2] if (parent / "recipe.yaml").is_file()), None)


def find_readable(source: "ImageSource", skipped: Sequence[dict], check_given: Callable[[int], object] = lambda index: None) -> list[dict]:
    """The records of skipped images (from a manifest or a sidecar) whose image can be read now. Tries to read each of them. Loads torch.

    Leaves out records whose index is not in `source` or belongs to another file name there. `check_given` raises UnreadableImage for an image whose
    pair or caption is missing.
    """
    from stage1_tokenizer.image_files.images import UnreadableImage

    found = []
    for record in skipped:
        if record["index"] >= len(source) or source.source_name(record["index"]) != record["source"]:
            continue  # the data set has changed; the audit compares the names and reports it
        with suppress(UnreadableImage):
            check_given(record["index"])
            source.read(record["index"])
            found.append(record)
    return found
