"""`vqmosaic audit`: checks token shards, compares them with the data set they were made from, and repairs them on request."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.tokens.origin import find_readable, find_run, is_imported, load_run_recipe
from pipelines.tokens.other_grids import other_grids
from token_shards.audit import MAX_LISTED_PROBLEMS, audit_tokens
from token_shards.manifest import SPLITS, TokenShardManifest
from vqmosaic.errors import InputError, listed_names, printable
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.wording import counted

if TYPE_CHECKING:
    from stage1_tokenizer.conditions.condition_data import ConditionData
    from stage1_tokenizer.data.image_sources import ImageSource


def audit_run(folder: Path, recipe: Recipe | None = None, repair: bool = False) -> int:
    """Print every problem. Returns the exit code: 0 without problems, else 1.

    Sources, labels and skipped images are compared with the data set of `recipe` or, by default, of the run that contains the folder. `repair` first
    re-encodes damaged shards, and shards with skipped images that can be read now. It needs the recipe, its tokenizer and its data set, and raises
    InputError if the repair is not possible.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist; give a tokens folder, such as runs/digits/tokens.")
    if (folder / "tokens").is_dir():
        folder = folder / "tokens"
    if repair:
        repair_run(folder, recipe)
    reference = "no data set: the recipe of this folder is not known; give --recipe"
    splits: dict[str, ImageSource] = {}
    conditions: dict[str, list[ConditionData]] = {}
    try:
        recipe = recipe or load_run_recipe(folder)
        if is_imported(folder):
            reference = "no data set: these tokens were imported"
        elif recipe is not None:
            opened = open_sources(recipe, folder)
            conditions = open_conditions_of(recipe, opened)
            splits, reference = opened, f"the data set of {recipe.run_dir}"
    except InputError as error:
        reference = f"no data set: {error}"
    reports = audit_tokens(folder, expected_sources(splits))
    print(f"compared with {reference}")
    for split, report in reports.items():
        if split in splits:
            given = conditions.get(split, [])
            report.problems.extend([*changed_images(folder, split, splits[split]), *changed_conditions(folder, split, given),
                                    *skipped_but_readable(folder, split, splits[split], given)])
        verdict = "no problems" if report.passed else counted(len(report.problems), "problem")
        print(f"{split}: {counted(report.samples, 'sample')} in {counted(report.shards, 'shard')}, {report.skipped} skipped: {verdict}")
        for problem in report.problems:
            print(f"    {problem}")
    return 0 if all(report.passed for report in reports.values()) else 1


def repair_run(folder: Path, recipe: Recipe | None) -> None:
    """Repair a tokens folder or the folder of one split with the given recipe or, by default, with the recipe of its run."""
    if is_imported(folder):
        raise InputError(f"{folder} contains imported tokens, which cannot be encoded again. Run `import-tokens` again to rewrite damaged shards.")
    if recipe is None:
        recipe = load_run_recipe(folder)
        if recipe is None:
            raise InputError(f"{folder} is not in a run folder, so its recipe is not known; give --recipe.")
        recipe.run_dir = str(find_run(folder))  # the recipe's own run_dir is wrong after a move, or relative to another directory
    from pipelines.tokens.repair import repair_tokens

    repaired = repair_tokens(folder, recipe)
    count = sum(map(len, repaired.values()))
    print(f"repaired: {counted(count, 'shard')} {'was' if count == 1 else 'were'} encoded again")


def open_sources(recipe: Recipe, folder: Path) -> dict[str, "ImageSource"]:
    """The images of both splits, with the class order of the shards in `folder` (a tokens folder, or the folder of one split)."""
    from stage1_tokenizer.data.open_data import open_splits

    splits = open_splits(recipe.data)
    for path in (folder, *(folder / split for split in SPLITS)):
        with suppress(InputError):  # the audit reports what is wrong with this manifest
            splits = splits.in_class_order_of(TokenShardManifest.load(path).class_names)
    sources = {"train": splits.train, "validation": splits.validation}
    for source in sources.values():
        source.identity  # noqa: B018  (computed and cached here, where the caller handles the InputError of an unreadable image)
    return sources


def open_conditions_of(recipe: Recipe, splits: "Mapping[str, ImageSource]") -> "dict[str, list[ConditionData]]":
    """Split -> the pairs and captions of its images."""
    from stage1_tokenizer.conditions.condition_data import identities, open_condition_data

    opened = {split: open_condition_data(recipe.data, source, split) for split, source in splits.items()}
    for conditions in opened.values():
        identities(conditions)  # computed and cached here, where the caller handles the InputError of an unreadable file
    return opened


def expected_sources(splits: Mapping[str, "ImageSource"]) -> dict[str, Iterable[tuple[str, int | None]]]:
    """(source name, label) of every image of both splits, in order."""
    return {name: [(source.source_name(index), source.label(index)) for index in range(len(source))] for name, source in splits.items()}


def changed_images(folder: Path, split: str, source: "ImageSource") -> list[str]:
    """A problem if the images of a split have changed since they were encoded, even if their names have not."""
    from stage1_tokenizer.data.image_sources import comparable_identity

    try:
        manifest = TokenShardManifest.load(folder / split if (folder / split).is_dir() else folder)
    except InputError:
        return []  # the audit has reported it
    recorded, stored, names = manifest.dataset, manifest.class_names, source.class_names
    if stored and names and stored != names and sorted(stored) == sorted(names):
        return [f"the class order of the tokens is {listed_names(stored)}, but the data set has {listed_names(names)}."]
    current = comparable_identity(source, {key: value for key, value in recorded.items() if key != "conditions"})
    if all(recorded.get(key) == value for key, value in current.items() if key != "path"):
        return []
    return [f"the images have changed since they were encoded: names, labels, sizes or contents differ (sha256 was {recorded.get('sha256')}, "
            f"is now {current['sha256']})."]


def changed_conditions(folder: Path, split: str, conditions: "Sequence[ConditionData]") -> list[str]:
    """A problem for each condition whose pairs or captions have changed since the images were encoded."""
    from stage1_tokenizer.conditions.condition_data import identities

    try:
        manifest = TokenShardManifest.load(folder / split if (folder / split).is_dir() else folder)
    except InputError:
        return []  # the audit has reported it
    recorded = manifest.dataset.get("conditions", {})
    current = identities([condition.as_recorded(recorded.get(condition.config.name, {})) for condition in conditions])
    return [f"the {'captions' if identity['kind'] == 'captions' else 'pairs'} of condition {name!r} have changed since they were encoded: sha256 was "
            f"{recorded[name].get('sha256')}, is now {identity['sha256']}."
            for name, identity in current.items() if name in recorded and recorded[name] != identity]


def skipped_but_readable(folder: Path, split: str, source: "ImageSource", conditions: "Sequence[ConditionData]" = ()) -> list[str]:
    """A message for each image of a split that was skipped as unreadable but can be read now, with its pairs and captions.

    The cause may have been a temporary read error of a network file system. Such an image would otherwise be missing from all later training.
    """
    folder = folder / split if (folder / split).is_dir() else folder
    try:
        manifest = TokenShardManifest.load(folder)
    except InputError:  # the audit has reported it
        return []
    from stage1_tokenizer.conditions.condition_data import check_readable

    found = find_readable(source, manifest.skipped, lambda index: check_readable(conditions, index))
    remedy = "write all shards again to store it" if other_grids(manifest) else "--repair encodes it"
    problems = [f"{printable(record['source'])}: it was skipped as unreadable ({record['reason']}), but can be read now; {remedy}."
                for record in found]
    return problems if len(problems) <= MAX_LISTED_PROBLEMS else [
        *problems[:MAX_LISTED_PROBLEMS], f"... and {len(problems) - MAX_LISTED_PROBLEMS} more problems of this kind."]
