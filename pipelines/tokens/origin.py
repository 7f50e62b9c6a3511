"""Where the tokens in a folder come from: the run they belong to, and the images that they were made of. Loads no torch."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from token_shards.manifest import MANIFEST_NAME, SPLITS, TokenShardManifest
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.recipe_files import load_recipe

if TYPE_CHECKING:
    from stage1_tokenizer.data.image_sources import ImageSource


def is_imported(folder: Path) -> bool:
    """Whether the shards were made of tokens from elsewhere, of which a run's data set knows nothing; a broken manifest does not tell."""
    for split_folder in (folder, *(folder / split for split in SPLITS)):
        if (split_folder / MANIFEST_NAME).is_file():
            try:
                return "imported" in TokenShardManifest.load(split_folder).encoding
            except InputError:
                continue
    return False


def recipe_of(folder: Path) -> Recipe | None:
    """The recipe of the run that a tokens folder or one of its splits lies in."""
    root = run_root(folder)
    return None if root is None else load_recipe(str(root))


def run_root(folder: Path) -> Path | None:
    """The run that a tokens folder or one of its splits lies in."""
    return next((parent for parent in folder.resolve().parents[:2] if (parent / "recipe.yaml").is_file()), None)


def readable_now(source: "ImageSource", skipped: Sequence[dict]) -> list[dict]:
    """Those of the records of skipped images (of a manifest or a sidecar) whose image can be read now."""
    from stage1_tokenizer.image_files.images import UnreadableImage

    found = []
    for record in skipped:
        if record["index"] >= len(source) or source.source_name(record["index"]) != record["source"]:
            continue  # of another data set, which the comparison of names reports
        with suppress(UnreadableImage):
            source.read(record["index"])
            found.append(record)
    return found
