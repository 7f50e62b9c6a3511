"""`vqmosaic audit`: token shards proved whole, and held against the data set they were made from."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.tokens.origin import is_imported, readable_now, recipe_of, run_root
from token_shards.audit import LISTED_AT_MOST, audit_tokens
from token_shards.manifest import SPLITS, TokenShardManifest
from vqmosaic.errors import InputError, listed_names, printable
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.wording import counted

if TYPE_CHECKING:
    from stage1_tokenizer.data.image_sources import ImageSource


def audit_run(folder: Path, recipe: Recipe | None = None, repair: bool = False) -> int:
    """Exit code 0 when nothing is wrong, 1 when something is; prints every problem.

    The data set of `recipe`, or of the run that the folder lies in, tells which sources and labels there should be, and whether images that were
    skipped can be read now. With `repair` the broken shards, and those that lack such images, are encoded again first. That needs the recipe, its
    tokenizer and its data set; InputError says why where it cannot be.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist; give a tokens folder, such as runs/digits/tokens.")
    if (folder / "tokens").is_dir():
        folder = folder / "tokens"
    if repair:
        repair_run(folder, recipe)
    compared, splits = "nothing: no recipe is known for this folder, give --recipe", {}
    try:
        recipe = recipe or recipe_of(folder)
        if is_imported(folder):
            compared = "nothing: these tokens were imported"
        elif recipe is not None:
            splits, compared = sources_of(recipe, folder), f"the data set of {recipe.run_dir}"
    except InputError as error:
        compared = f"nothing: {error}"
    reports = audit_tokens(folder, expected_sources(splits))
    print(f"compared with {compared}")
    for split, report in reports.items():
        if split in splits:
            report.problems.extend([*changed_images(folder, split, splits[split]), *skipped_but_readable(folder, split, splits[split])])
        verdict = "whole" if report.passed else counted(len(report.problems), "problem")
        print(f"{split}: {counted(report.samples, 'sample')} in {counted(report.shards, 'shard')}, {report.skipped} skipped: {verdict}")
        for problem in report.problems:
            print(f"    {problem}")
    return 0 if all(report.passed for report in reports.values()) else 1


def repair_run(folder: Path, recipe: Recipe | None) -> None:
    """Repair a tokens folder or one of its splits by its run's recipe, or by the one that was given."""
    if is_imported(folder):
        raise InputError(f"{folder} holds imported tokens, which cannot be encoded again; run `import-tokens` again, which rewrites what is damaged.")
    if recipe is None:
        recipe = recipe_of(folder)
        if recipe is None:
            raise InputError(f"{folder} lies in no run folder, so nothing says what to repair it from; give --recipe.")
        recipe.run_dir = str(run_root(folder))  # as it lies now, which the recipe need not say: from another directory, or after a move
    from pipelines.tokens.repair import repair_tokens

    repaired = repair_tokens(folder, recipe)
    count = sum(map(len, repaired.values()))
    print(f"repaired: {counted(count, 'shard')} {'was' if count == 1 else 'were'} encoded again")


def sources_of(recipe: Recipe, folder: Path) -> dict[str, "ImageSource"]:
    """The images of both splits, with classes in the order of the shards in `folder` (a tokens folder, or the folder of one split)."""
    from stage1_tokenizer.data.open_data import open_splits

    splits = open_splits(recipe.data)
    for path in (folder, *(folder / split for split in SPLITS)):
        with suppress(InputError):  # the audit reports what is wrong with this manifest
            splits = splits.in_order_of(TokenShardManifest.load(path).class_names)
    sources = {"train": splits.train, "validation": splits.validation}
    for source in sources.values():
        source.identity  # noqa: B018  (kept by the source; InputError here, where the caller expects one, if an image cannot be read)
    return sources


def expected_sources(splits: Mapping[str, "ImageSource"]) -> dict[str, Iterable[tuple[str, int | None]]]:
    """(source name, label) of every image of both splits, in order."""
    return {name: [(source.source_name(index), source.label(index)) for index in range(len(source))] for name, source in splits.items()}


def changed_images(folder: Path, split: str, source: "ImageSource") -> list[str]:
    """What is wrong where the images of a split are others than those that were encoded, whatever their names."""
    from stage1_tokenizer.data.image_sources import identity_like

    try:
        manifest = TokenShardManifest.load(folder / split if (folder / split).is_dir() else folder)
    except InputError:
        return []  # the audit has said so
    recorded, names = manifest.dataset, source.class_names
    if manifest.class_names != names and sorted(manifest.class_names or ()) == sorted(names or ()):
        return [f"the tokens have their classes in the order {listed_names(manifest.class_names)}, but the data set has them in the order "
                f"{listed_names(names)}."]
    now = identity_like(source, recorded)
    if all(recorded.get(key) == value for key, value in now.items() if key != "path"):
        return []
    return [f"the images are not those that were encoded: names, labels, sizes or contents differ (sha256 {recorded.get('sha256')} then, "
            f"{now['sha256']} now)."]


def skipped_but_readable(folder: Path, split: str, source: "ImageSource") -> list[str]:
    """A text for each image of a split that its shards leave out as unreadable although it can be read now.

    A read error of a network file system may have passed. Without this, such an image would be left out of every training.
    """
    folder = folder / split if (folder / split).is_dir() else folder
    try:
        manifest = TokenShardManifest.load(folder)
    except InputError:  # the audit has said so
        return []
    found = readable_now(source, manifest.skipped)
    texts = [f"{printable(record['source'])}: it was skipped as unreadable ({record['reason']}), and can be read now; --repair encodes it."
             for record in found]
    return texts if len(texts) <= LISTED_AT_MOST else [*texts[:LISTED_AT_MOST], f"... and {len(texts) - LISTED_AT_MOST} more like the last."]
