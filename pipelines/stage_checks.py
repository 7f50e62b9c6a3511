"""What is checked before a stage starts anything slow: all of it without torch, in well under a second."""

from pathlib import Path

from pipelines.stage_inputs import inputs_of
from stage1_tokenizer.data_location import check_data_path
from vqmosaic.errors import InputError, check_range
from vqmosaic.recipe import Recipe, check_batch_split
from vqmosaic.run_folder import RunFolder
from vqmosaic.stage_records import judge
from vqmosaic.tracking import check_trackers

TRAINING_SECTIONS = {"tokenizer": "tokenizer_training", "prior": "prior_training"}


def check_before_start(recipe: Recipe, stage: str, processes: int = 1, alone: bool = True) -> None:
    """Raise InputError where a stage could not start or its recipe differs from what its folder was made with.

    `alone` also looks for what the stage reads from other stages; in a chain those are made first.
    """
    check_range("--processes", processes, at_least=1)
    run = RunFolder(Path(recipe.run_dir))
    if run.root.exists() and not run.root.is_dir():
        raise InputError(f"run_dir is {recipe.run_dir!r}, which is a file; set run_dir to a folder.")
    if stage in ("tokenizer", "tokens"):
        check_data_path(recipe.data)
    section = TRAINING_SECTIONS.get(stage)
    if section is not None:
        check_batch_split(recipe, section, processes)
        check_trackers(section, getattr(recipe, section).trackers)
    judge(run, recipe, stage, inputs_of(recipe, stage) if alone else None)
