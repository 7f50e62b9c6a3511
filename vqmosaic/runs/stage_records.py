"""Decides whether a stage is skipped, resumed, extended or refused, by comparing its recipe fields and inputs with those of its last run.

Loads no torch: the command line checks all stages before anything slow starts.
"""

import dataclasses
import json
import shutil
import time
from dataclasses import dataclass
from typing import Any

from vqmosaic import __version__
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import write_json
from vqmosaic.files.json_files import VERSION_FIELD, from_fields, is_later, read_object, version_hint, written_by
from vqmosaic.files.permissions import check_readable
from vqmosaic.recipes.recipe import Recipe, RecipeField, recipe_fields
from vqmosaic.recipes.recipe_files import PATH_FIELDS, may_be_same_path, save_recipe
from vqmosaic.runs.run_folder import STAGES, RunFolder

SECTIONS_READ = {
    "tokenizer": ("seed", "data", "tokenizer", "tokenizer_training", "adversarial"),
    "tokens": ("data", "tokens"),
    "prior": ("seed", "prior", "prior_training"),
    "pipeline": ("sampling",),
}
# These fields only affect the training images of stage 1. Stored tokens do not depend on them.
FIELDS_NOT_READ = {"tokens": ("data.crop_scale", "data.flip", "data.shift")}
CONDITIONS = "data.conditions"
"""Recorded for the tokens, without the fields that do not affect them. Tokenizers of conditions are inputs, compared by fingerprint."""
DROP_RATES = "data.conditions.drop_rate"
"""Recorded for the prior: the drop rates above 0 by condition, without those that prior_training.drop_rates replaces."""


@dataclass(frozen=True)
class StageRecord:
    """The recipe fields and input fingerprints of a stage's last run, and whether it finished."""

    stage: str
    finished: bool
    fields: dict[str, Any]
    inputs: dict[str, str]
    seconds: float = 0.0
    exported_step: int | None = None
    """The step whose weights a finished training exported; None for other stages and in records of older versions."""


def fields_read(recipe: Recipe, stage: str) -> dict[str, RecipeField]:
    """The recipe fields that a stage's result depends on, by dotted name."""
    fields = {field.name: field for field in recipe_fields(recipe)
              if field.change_policy != "unrecorded" and field.name.partition(".")[0] in SECTIONS_READ[stage]
              and field.name not in (CONDITIONS, *FIELDS_NOT_READ.get(stage, ()))}
    if stage == "tokens":
        records = [condition.ids_record() for condition in recipe.data.given_conditions]
        fields[CONDITIONS] = RecipeField(CONDITIONS, records, [], "same", omit_if_default=True)
    if stage == "prior":
        rates = {condition.name: condition.drop_rate for condition in recipe.data.given_conditions
                 if condition.drop_rate and condition.name not in recipe.prior_training.drop_rates}
        fields[DROP_RATES] = RecipeField(DROP_RATES, rates, {}, "same", omit_if_default=True)
    return fields


def load_record(run: RunFolder, stage: str) -> StageRecord | None:
    """The record of a stage's last run; None if it never ran."""
    path = run.record(stage)
    check_readable(path)
    if not path.is_file():
        return None
    content = read_object(path, f"repeat the stage with --redo {stage}")
    version = written_by(content)
    unknown = sorted(content["fields"].keys() - {field.name for field in recipe_fields(Recipe())}) if isinstance(content.get("fields"), dict) else []
    if unknown and is_later(version):  # a field that an older version recorded may have been removed
        raise InputError(f"{path}: stage {stage} was started with the unknown fields {', '.join(unknown)}.{version_hint(version)}")
    return from_fields(StageRecord, {name: value for name, value in content.items() if name not in (VERSION_FIELD, "written")}, str(path), version)


def write_record(run: RunFolder, recipe: Recipe, stage: str, inputs: dict[str, str], *, finished: bool, seconds: float = 0.0,
                 exported_step: int | None = None) -> None:
    """Record that a stage starts or has finished with this recipe and these inputs."""
    save_recipe(recipe, run.recipe)  # here and not in the command line, so that it also happens under a user's own launcher
    fields = {name: field.value for name, field in fields_read(recipe, stage).items() if not field.is_omitted}
    write_json(run.record(stage), {"stage": stage, "finished": finished, VERSION_FIELD: __version__, "fields": fields, "inputs": inputs,
                                   "seconds": round(seconds, 2), "exported_step": exported_step,
                                   "written": time.strftime("%Y-%m-%dT%H:%M:%S%z")})


def decide_action(run: RunFolder, recipe: Recipe, stage: str, inputs: dict[str, str] | None) -> str:
    """What to do with a stage: "start", "resume", "skip" or "compare". With `inputs` None, only the recipe is compared.

    "compare" means that the stage is finished, but must compare its data set with the recorded one: the path of the data set has changed, and
    `inputs` does not contain its fingerprint.

    A finished stage whose export is gone is resumed. It writes the export again from its last checkpoint or its finished shards.

    Raises:
        InputError: a field or an input has changed, other than a budget that has grown. Names it and both values.
    """
    record = load_record(run, stage)
    if record is None:
        return "start"
    grown = moved = False
    for name, field in fields_read(recipe, stage).items():
        before = record.fields.get(name, field.default)  # the default of a field that was added later means the old behaviour
        if before in (field.value, dataclasses.MISSING):
            continue
        if field.change_policy == "budget" and has_grown(before, field.value):
            grown = True
            continue
        if (field.change_policy == "place" or differs_only_in_path(before, field.value)) and "data set" in record.inputs:
            moved = True
            continue
        if name in PATH_FIELDS and may_be_same_path(before, field.value):
            continue
        raise InputError(changed_message(run, recipe, stage, name, before, field.value, shrunk=field.change_policy == "budget"))
    for name, fingerprint in (inputs or {}).items():
        before = record.inputs.get(name)
        if before is not None and before != fingerprint:
            raise InputError(changed_message(run, recipe, stage, name, before, fingerprint))
    if record.finished and not grown and run.export(stage).exists():
        return "compare" if moved and "data set" not in (inputs or {}) else "skip"
    return "resume"


def differs_only_in_path(before: Any, now: Any) -> bool:
    """Whether two records, such as data.derived, are equal except for their path."""
    without_path = [{name: value for name, value in record.items() if name != "path"} for record in (before, now) if isinstance(record, dict)]
    return len(without_path) == 2 and without_path[0] == without_path[1]


def has_grown(before: float | None, now: float | None) -> bool:
    """Whether a budget has become larger. None is unlimited."""
    return before is not None and (now is None or now > before)


def changed_message(run: RunFolder, recipe: Recipe, stage: str, name: str, before: Any, now: Any, shrunk: bool = False) -> str:
    """The error message for a field or an input that has changed."""
    reason = "a budget can only grow" if shrunk else "the result would be different"
    remedy = f"repeat the stage with --redo {stage} (which also repeats the stages after it)"
    if recipe.data.derived is not None:  # the tokenizer of a condition; --redo tokenizer would also repeat that of the images
        remedy = "train the tokenizers of all conditions again with `vqmosaic run RECIPE --redo conditions`"
    return (f"{run.root}: stage {stage} was started with {name} = {as_yaml(before)}, now it is {as_yaml(now)}; {reason}. Set it back, "
            f"choose another --run_dir, or {remedy}.")


def as_yaml(value: Any) -> str:
    """A recorded value as it is written in a recipe: null, true and false, other values as in Python."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def redo(run: RunFolder, stage: str) -> list[str]:
    """Delete the results of a stage and of all stages after it. Returns the names of the stages that had any.

    The last stage is deleted first, and the record of a stage last, so that a call that is killed in between leaves nothing that looks finished.
    """
    cleared = []
    for name in reversed(STAGES[STAGES.index(stage):]):
        folders = (run.export(name), run.checkpoints(name), run.logs(name))
        if run.record(name).exists() or any(folder.exists() for folder in folders):
            cleared.append(name)
        for folder in folders:
            if folder.exists():
                shutil.rmtree(folder)
        run.record(name).unlink(missing_ok=True)
    return cleared[::-1]
