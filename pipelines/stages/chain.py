"""The whole chain of a recipe: every stage in turn, finished ones skipped, interrupted ones resumed. Loads torch only when there is work."""

import dataclasses
import shlex
import time
from pathlib import Path

from pipelines.stages.stage_checks import check_chain
from pipelines.stages.stage_inputs import inputs_of, read_vocabulary, tokenizer_folder
from vqmosaic.files.durable_files import write_json
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.recipe_files import save_recipe
from vqmosaic.runs.launch import processes_to_start, run_stage
from vqmosaic.runs.run_folder import STAGES, RunFolder
from vqmosaic.runs.stage_records import judge, redo, write_record
from vqmosaic.training.budget import duration

MODULES = {"tokenizer": "stage1_tokenizer.train", "tokens": "pipelines.stages.preprocess", "prior": "pipelines.stages.train_prior"}


def run_chain(recipe: Recipe, processes: int | None = None, accelerate_config: str | None = None, redo_stage: str | None = None) -> int:
    """Exit code of the chain: 0 when every stage is finished, else that of the stage that stopped."""
    run, processes = RunFolder(Path(recipe.run_dir)), processes_to_start(processes, accelerate_config)
    check_chain(recipe, processes, redo_stage)
    redo_from(recipe, redo_stage)
    record_recipe(recipe)
    seconds: dict[str, float] = {}
    for stage in STAGES:
        if judge(run, recipe, stage, inputs_of(recipe, stage)) == "skip":
            print(f"{stage}: finished already, {run.export(stage)}")
            continue
        started = time.monotonic()
        if stage == "pipeline":
            bundle_run(recipe)
        else:
            code = run_stage(MODULES[stage], [str(run.recipe)], processes, accelerate_config)
            if code:
                return code
        seconds[stage] = time.monotonic() - started
    if seconds or not run.summary.exists():
        finish(recipe, run, seconds)
    else:
        print(f"nothing to do: {run.root} is finished, its numbers are in {run.summary}{hint_at_budgets(recipe)}")
    return 0


def hint_at_budgets(recipe: Recipe) -> str:
    """How to train longer, for a run whose time ended the training."""
    minutes = recipe.tokenizer_training.max_minutes, recipe.prior_training.max_minutes
    if None in minutes:
        return ""
    option = f"--minutes {sum(minutes) * 2:g}" if recipe.minutes is not None else f"--tokenizer_training.max_minutes {minutes[0] * 2:g}"
    return f". Its budget: {minutes[0]:g} minutes for the tokenizer and {minutes[1]:g} for the prior; to train longer, add {option} --redo tokens"


def record_recipe(recipe: Recipe) -> Path:
    """The run's recipe.yaml, written; refused while another process is at work in the run folder, since that one goes on with its own."""
    run = RunFolder(Path(recipe.run_dir))
    with run.lock():
        save_recipe(recipe, run.recipe)
    return run.recipe


def redo_from(recipe: Recipe, stage: str | None) -> None:
    """Delete what a stage and those after it have made, where that was asked for."""
    if stage is None:
        return
    run = RunFolder(Path(recipe.run_dir))
    with run.lock():
        print(f"--redo {stage}: removed {', '.join(redo(run, stage)) or 'nothing'}")
        run.summary.unlink(missing_ok=True)


def bundle_run(recipe: Recipe) -> Path:
    """Bundle the tokenizer and the prior of a run into its pipeline/."""
    from pipelines.bundle import make_bundle

    run = RunFolder(Path(recipe.run_dir))
    with run.lock():
        inputs = inputs_of(recipe, "pipeline")
        judge(run, recipe, "pipeline", inputs)
        started, sampling = time.monotonic(), recipe.sampling
        if sampling.guidance_scale != 1 and read_vocabulary(run.export("prior"))["class_names"] is None:
            print(f"sampling.guidance_scale {sampling.guidance_scale:g} is left out of the bundle: the images have no classes to guide to")
            sampling = dataclasses.replace(sampling, guidance_scale=1.0)
        folder = make_bundle(tokenizer_folder(recipe), run.export("prior"), run.export("pipeline"), sampling)
        write_record(run, recipe, "pipeline", inputs, finished=True, seconds=time.monotonic() - started)
    print(f"bundled {folder}")
    return folder


def finish(recipe: Recipe, run: RunFolder, seconds: dict[str, float]) -> None:
    """Measure the finished run, print what was measured and how long each part took, and say what to try next."""
    from pipelines.bundle import read_bundle
    from pipelines.stages.summary import summarize, summary_table

    started = time.monotonic()
    summary = summarize(recipe)
    seconds["pictures and measures"] = time.monotonic() - started
    summary["seconds_of_this_call"] = {name: round(value, 1) for name, value in seconds.items()}
    write_json(run.summary, summary)
    print(f"\nmeasured ({run.summary}):\n{summary_table(summary)}")
    print("\ntime:\n" + "\n".join(f"    {name:<24} {duration(value)}" for name, value in seconds.items()))
    print(f"    {'all together':<24} {duration(sum(seconds.values()))}")
    names = example_classes(read_bundle(run.export("pipeline"))["class_names"] or [])
    classes = f"--classes {shlex.quote(names)} " if names else ""
    print(f"\npictures: {run.root / 'samples.png'}, {run.root / 'reconstructions.png'}\nnext, try:\n"
          f"    vqmosaic generate {run.root} {classes}--num 8 --seed 7 --out {run.root}/samples/\n    vqmosaic demo {run.root}")


def example_classes(names: list[str]) -> str:
    """Two class names (or the only one) in the format of --classes; empty without classes. Of ten classes, the fourth and the eighth."""
    return ",".join(names[index] for index in sorted({len(names) * 3 // 10, len(names) * 7 // 10})) if names else ""
