"""The tokenizers of image conditions as stages of a run. Each is a run of its own in <run_dir>/conditions/<name>. Imports no torch.

    runs/<name>/conditions/<condition>/tokenizer/
    runs/<name>/conditions/<condition>/recipe.yaml, checkpoints/, logs/, stages/
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pipelines.stages.stage_inputs import check_condition_tokenizer
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe import Recipe, condition_recipes
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.runs.stage_records import decide_action, load_record, redo


def check_given_tokenizers(recipe: Recipe) -> None:
    """Raise InputError unless the tokenizers that conditions name by path exist and fit them."""
    for condition in recipe.data.given_conditions:
        if condition.tokenizer is not None:
            check_condition_tokenizer(recipe, condition)


def check_not_stale(recipe: Recipe, actions: Mapping[str, str], tokens_action: str) -> None:
    """Raise InputError if the tokenizer of a condition would train further, although tokens were already made with it.

    Args:
        actions: name of the condition -> what its training does, as from decide_action.
        tokens_action: what preprocessing does.
    """
    for name, each in condition_recipes(recipe).items():
        run = RunFolder(Path(each.run_dir))
        record = load_record(run, "tokenizer")
        has_grown = actions[name] == "resume" and record is not None and record.finished and run.export("tokenizer").exists()
        if has_grown and tokens_action != "start":
            raise InputError(f"{run.root}: the budget of this tokenizer has grown, but the tokens were made from its earlier result. Add --redo "
                             "tokens, which reruns tokens and all later stages, or choose another --run_dir.")


def train_condition_tokenizers(recipe: Recipe, train: Callable[[Recipe], int]) -> tuple[int, dict[str, float]]:
    """Train the tokenizers that are not finished with `train`, which returns an exit code.

    Returns the first exit code that is not 0, else 0, and the seconds of each trained tokenizer.
    """
    seconds: dict[str, float] = {}
    for name, each in condition_recipes(recipe).items():
        run = RunFolder(Path(each.run_dir))
        if decide_action(run, each, "tokenizer", {}) == "skip":
            print(f"tokenizer of {name}: finished already, {run.export('tokenizer')}")
            continue
        print(f"tokenizer of {name}: trained in {run.root}", flush=True)
        started = time.monotonic()
        code = train(each)
        if code:
            return code, seconds
        seconds[f"tokenizer of {name}"] = time.monotonic() - started
    return 0, seconds


def delete_condition_tokenizers(run: RunFolder) -> list[str]:
    """Delete the trained tokenizers of all conditions of a run. Returns their names, for a message."""
    deleted = []
    for folder in sorted(path for path in (run.root / "conditions").glob("*") if path.is_dir()):
        inner = RunFolder(folder)
        with inner.lock():
            if redo(inner, "tokenizer"):
                deleted.append(f"the tokenizer of {folder.name}")
    return deleted
