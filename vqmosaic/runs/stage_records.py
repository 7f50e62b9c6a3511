"""Whether a stage is skipped, resumed, extended or refused: its recipe fields and inputs now against those it was run with.

Loads no torch: the command line judges all stages before anything slow starts.
"""

import dataclasses
import shutil
import time
from dataclasses import dataclass
from typing import Any

from vqmosaic import __version__
from vqmosaic.files.durable_files import write_json
from vqmosaic.errors import InputError
from vqmosaic.files.json_files import VERSION_FIELD, from_fields, is_later, read_object, version_hint, written_by
from vqmosaic.files.permissions import check_readable
from vqmosaic.recipes.recipe import Recipe, RecipeField, recipe_fields
from vqmosaic.recipes.recipe_files import PATH_FIELDS, only_became_absolute, save_recipe
from vqmosaic.runs.run_folder import STAGES, RunFolder

SECTIONS_READ = {
    "tokenizer": ("seed", "data", "tokenizer", "tokenizer_training", "adversarial"),
    "tokens": ("data", "tokens"),
    "prior": ("seed", "prior", "prior_training"),
    "pipeline": ("sampling",),
}
# What only shapes the training images of stage 1, so that stored tokens do not depend on it.
NOT_READ = {"tokens": ("data.crop_scale", "data.flip", "data.shift")}


@dataclass(frozen=True)
class StageRecord:
    """What a stage was run with: recipe fields, fingerprints of its inputs, and whether it finished."""

    stage: str
    finished: bool
    fields: dict[str, Any]
    inputs: dict[str, str]
    seconds: float = 0.0
    exported_step: int | None = None
    """The step whose weights a finished training exported; None for other stages and in records of older versions."""


def fields_read(recipe: Recipe, stage: str) -> dict[str, RecipeField]:
    """Every recipe field that decides what a stage makes, by its dotted name."""
    return {field.name: field for field in recipe_fields(recipe)
            if field.judged != "unrecorded" and field.name.partition(".")[0] in SECTIONS_READ[stage] and field.name not in NOT_READ.get(stage, ())}


def load_record(run: RunFolder, stage: str) -> StageRecord | None:
    """The record of a stage's last run, or None where it never ran."""
    path = run.record(stage)
    check_readable(path)
    if not path.is_file():
        return None
    content = read_object(path, f"make the stage anew with --redo {stage}")
    version = written_by(content)
    unknown = sorted(content["fields"].keys() - {field.name for field in recipe_fields(Recipe())}) if isinstance(content.get("fields"), dict) else []
    if unknown and is_later(version):  # a field that an older version recorded may have been removed
        raise InputError(f"{path}: stage {stage} was run with the unknown fields {', '.join(unknown)}.{version_hint(version)}")
    return from_fields(StageRecord, {name: value for name, value in content.items() if name not in (VERSION_FIELD, "written")}, str(path), version)


def write_record(run: RunFolder, recipe: Recipe, stage: str, inputs: dict[str, str], *, finished: bool, seconds: float = 0.0,
                 exported_step: int | None = None) -> None:
    """Record that a stage starts or has finished with this recipe and these inputs."""
    save_recipe(recipe, run.recipe)  # a stage under a launcher of the user's own leaves what the others need to know, too
    fields = {name: field.value for name, field in fields_read(recipe, stage).items()}
    write_json(run.record(stage), {"stage": stage, "finished": finished, VERSION_FIELD: __version__, "fields": fields, "inputs": inputs,
                                   "seconds": round(seconds, 2), "exported_step": exported_step,
                                   "written": time.strftime("%Y-%m-%dT%H:%M:%S%z")})


def judge(run: RunFolder, recipe: Recipe, stage: str, inputs: dict[str, str] | None) -> str:
    """What to do about a stage: "start", "resume", "skip" or "compare". `inputs` None judges the recipe alone.

    A finished stage is to compare its data set with the recorded one where that lies in another place now and `inputs` does not hold it.

    A finished stage whose export is gone is resumed: from its last checkpoint, or its finished shards, the export is written again.

    Raises:
        InputError: a field or an input other than a grown budget differs; names it and both values.
    """
    record = load_record(run, stage)
    if record is None:
        return "start"
    grown = moved = False
    for name, field in fields_read(recipe, stage).items():
        before = record.fields.get(name, field.default)  # a field that came later has a default that means what was done before
        if before in (field.value, dataclasses.MISSING):
            continue
        if field.judged == "budget" and has_grown(before, field.value):
            grown = True
            continue
        if field.judged == "place" and "data set" in record.inputs:
            moved = True
            continue
        if name in PATH_FIELDS and only_became_absolute(before, field.value):
            continue
        raise InputError(refusal(run, stage, name, before, field.value, shrunk=field.judged == "budget"))
    for name, fingerprint in (inputs or {}).items():
        before = record.inputs.get(name)
        if before is not None and before != fingerprint:
            raise InputError(refusal(run, stage, name, before, fingerprint))
    if record.finished and not grown and run.export(stage).exists():
        return "compare" if moved and "data set" not in (inputs or {}) else "skip"
    return "resume"


def has_grown(before: float | None, now: float | None) -> bool:
    """Whether a budget became larger; null is unlimited."""
    return before is not None and (now is None or now > before)


def refusal(run: RunFolder, stage: str, name: str, before: Any, now: Any, shrunk: bool = False) -> str:
    """The sentence that refuses a changed recipe."""
    why = "a budget can only grow" if shrunk else "the result would be another one"
    return (f"{run.root}: stage {stage} was run with {name} = {before!r}, now it is {now!r}; {why}. Set it back, "
            f"choose another --run_dir, or make the stage anew with --redo {stage} (which redoes what follows it too).")


def redo(run: RunFolder, stage: str) -> list[str]:
    """Delete everything a stage and the stages after it have made; returns the names of those that had made something.

    The last stage goes first and a stage's record last, so that a call that is killed in between leaves nothing that passes for finished.
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
