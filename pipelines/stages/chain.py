"""Runs all stages of a recipe. Skips finished stages and resumes interrupted ones. Imports torch only if there is work to do."""

import dataclasses
import shlex
import time
from pathlib import Path

from pipelines.stages.condition_tokenizers import delete_condition_tokenizers, train_condition_tokenizers
from pipelines.stages.stage_checks import check_chain
from pipelines.stages.stage_inputs import condition_folders, input_fingerprints, predicts_in_any_order, tokenizer_folder, vocabulary_of_prior
from vqmosaic.files.durable_files import write_json
from vqmosaic.recipes.fields_from_data import conditions_in_budget
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.recipe_files import save_recipe
from vqmosaic.runs.launch import processes_to_start, run_stage
from vqmosaic.runs.run_folder import STAGES, RunFolder, main_stage
from vqmosaic.runs.stage_records import decide_action, redo, write_record
from vqmosaic.training.budget import format_duration

MODULES = {"tokenizer": "stage1_tokenizer.train", "tokens": "pipelines.stages.preprocess", "prior": "pipelines.stages.train_prior"}


def run_chain(recipe: Recipe, processes: int | None = None, accelerate_config: str | None = None, redo_stage: str | None = None) -> int:
    """Run all stages. Returns exit code 0 when all are finished, otherwise the exit code of the stage that stopped."""
    run, processes = RunFolder(Path(recipe.run_dir)), processes_to_start(processes, accelerate_config)
    check_chain(recipe, processes, redo_stage)
    delete_stages_from(recipe, redo_stage)
    record_recipe(recipe)
    seconds: dict[str, float] = {}
    for stage in STAGES:
        if stage == "tokens":
            code, of_conditions = train_condition_tokenizers(
                recipe, lambda each: run_stage(MODULES["tokenizer"], [str(record_recipe(each))], processes, accelerate_config))
            seconds |= of_conditions
            if code:
                return code
        if decide_action(run, recipe, stage, input_fingerprints(recipe, stage)) == "skip":
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
        print(f"nothing to do: {run.root} is finished; results in {run.summary}{longer_training_hint(recipe)}")
    return 0


def longer_training_hint(recipe: Recipe) -> str:
    """A sentence that says how to train longer, or "" if the recipe has no time budgets."""
    tokenizer, prior = recipe.tokenizer_training.max_minutes, recipe.prior_training.max_minutes
    if tokenizer is None or prior is None:
        return ""
    tokenizers = 1 + conditions_in_budget(recipe.data.conditions)
    longer = (tokenizer * tokenizers + prior) * 2
    option = f"--minutes {longer:g}" if recipe.minutes is not None else f"--tokenizer_training.max_minutes {tokenizer * 2:g}"
    which = "the" if tokenizers == 1 else "each"
    return f". The budget was {tokenizer:g} min for {which} tokenizer and {prior:g} min for the prior. To train longer, add {option} --redo tokens"


def record_recipe(recipe: Recipe) -> Path:
    """Write the run's recipe.yaml and return its path. Raises InputError while another process, which has its own recipe, uses the run folder."""
    run = RunFolder(Path(recipe.run_dir))
    with run.lock():
        save_recipe(recipe, run.recipe)
    return run.recipe


def delete_stages_from(recipe: Recipe, stage: str | None) -> None:
    """Delete the results of a stage and of all later stages. Does nothing if `stage` is None."""
    if stage is None:
        return
    run = RunFolder(Path(recipe.run_dir))
    with run.lock():
        removed = redo(run, main_stage(stage) or stage)
        if stage in ("tokenizer", "conditions"):
            removed += delete_condition_tokenizers(run)
        print(f"--redo {stage}: removed {', '.join(removed) or 'nothing'}")
        run.summary.unlink(missing_ok=True)


def bundle_run(recipe: Recipe) -> Path:
    """Bundle the tokenizer and the prior of a run into <run_dir>/pipeline, and return that path."""
    from pipelines.bundle import make_bundle

    run = RunFolder(Path(recipe.run_dir))
    with run.lock():
        inputs = input_fingerprints(recipe, "pipeline")
        decide_action(run, recipe, "pipeline", inputs)
        started, sampling = time.monotonic(), recipe.sampling
        vocabulary = vocabulary_of_prior(run.export("prior"))
        why = "the images have no classes" if vocabulary.class_names is None else "the prior was trained without its classes"
        if sampling.guidance_scale != 1 and not vocabulary.learned_segments:
            print(f"the bundle does not use sampling.guidance_scale {sampling.guidance_scale:g}, because {why}")
            sampling = dataclasses.replace(sampling, guidance_scale=1.0)
        if "class" in sampling.guidance and vocabulary.class_names is None:
            print(f"the bundle does not use sampling.guidance of the class, because {why}")
            sampling = sampling.without_class()
        folder = make_bundle(tokenizer_folder(recipe), run.export("prior"), run.export("pipeline"), sampling, condition_folders(recipe))
        write_record(run, recipe, "pipeline", inputs, finished=True, seconds=time.monotonic() - started)
    print(f"bundled {folder}")
    return folder


def finish(recipe: Recipe, run: RunFolder, seconds: dict[str, float]) -> None:
    """Measure a finished run, and print the results, the seconds of each stage and the next commands to try."""
    from pipelines.stages.summary import summarize, summary_table

    started = time.monotonic()
    summary = summarize(recipe)
    seconds["pictures and measures"] = time.monotonic() - started
    summary["seconds_of_this_call"] = {name: round(value, 1) for name, value in seconds.items()}
    write_json(run.summary, summary)
    print(f"\nmeasured ({run.summary}):\n{summary_table(summary)}")
    print("\ntime:\n" + "\n".join(f"    {name:<24} {format_duration(value)}" for name, value in seconds.items()))
    print(f"    {'total':<24} {format_duration(sum(seconds.values()))}")
    steps = "\n".join(f"    {command}" for command in next_steps(run))
    # samples.txt has the captions of samples.png
    pictures = [run.root / name for name in ("samples.png", "samples.txt", "reconstructions.png") if (run.root / name).exists()]
    pictures += [run.root / summary["edited"]["picture"]] if "edited" in summary else []
    print(f"\npictures: {', '.join(map(str, pictures))}\nnext steps:\n{steps}")


def next_steps(run: RunFolder) -> list[str]:
    """Commands to try with a finished run. Those for images depend on what the prior is given."""
    from pipelines.bundle import read_bundle
    from pipelines.pipeline_parts import PipelineParts

    folder = run.export("pipeline")
    content = read_bundle(folder)
    parts = PipelineParts.in_folder(folder, content)
    vocabulary, commands = parts.vocabulary(), list[str]()
    class_names = vocabulary.learned_class_names or []
    names = example_classes(class_names)
    classes, out = f"--classes {shlex.quote(names)} " if names else "", f"--out {run.root}/samples/"
    if vocabulary.why_not_sampled(bool(names), []) is None:
        commands.append(f"vqmosaic generate {run.root} {classes}--num 8 --seed 7 {out}")
        if all(predicts_in_any_order(prior) for prior in parts.priors):
            commands.append(f"vqmosaic edit {run.root} IMAGE --mask MASK {classes}--out {run.root}/edited/")
    learned = [condition.name for condition in vocabulary.learned_conditions]
    for record in content.get("conditions", []):
        name, kind, needed = record["name"], record["kind"], ""
        if name not in learned:
            continue
        if vocabulary.why_not_sampled(False, [name]) is not None:  # not without a class, or not with this condition alone
            needed = f"--classes {shlex.quote(example_classes(class_names[:1]))} " if class_names else ""
            if vocabulary.why_not_sampled(True, [name]) is not None:
                continue
        if kind == "caption":
            commands.append(f'vqmosaic generate {run.root} {needed}--prompt "TEXT" --num 8 --seed 7 --out {run.root}/prompted/')
        else:
            command, out_name = ("upscale", "upscaled") if kind == "low_resolution" else ("translate", "translated")
            commands.append(f"vqmosaic {command} {run.root} IMAGES {needed}--out {run.root}/{out_name}/")
    return [*commands, f"vqmosaic demo {run.root}"]


def example_classes(names: list[str]) -> str:
    """Two class names (or the only one) in the format of --classes, or "" without classes. Of ten classes: the fourth and the eighth.

    Names that cannot be printed on a line are left out.
    """
    names = [name for name in names if name.isprintable()]
    return ",".join(names[index] for index in sorted({len(names) * 3 // 10, len(names) * 7 // 10})) if names else ""
