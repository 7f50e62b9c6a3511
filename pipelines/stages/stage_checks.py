"""Checks made before a stage starts slow work. They import no torch and take well under a second, unless a docstring says otherwise."""

import contextlib
import os
from itertools import pairwise
from pathlib import Path

from pipelines.stages.condition_tokenizers import check_given_tokenizers, check_not_stale
from pipelines.stages.stage_inputs import check_tokenizer_has_ids, input_fingerprints, token_fingerprint_of_tokenizer, tokenizer_folder
from stage1_tokenizer.conditions.condition_checks import check_condition_data
from stage1_tokenizer.data.data_location import check_data_path, local_path
from stage1_tokenizer.find_initial_weights import check_init_from
from stage1_tokenizer.perceptual_weights import resolve_perceptual_weights
from stage1_tokenizer.tokenizer_grids import grids_of_config
from stage2_prior.generation.guidance_scales import segment_scales
from stage2_prior.recipe_vocabulary import drop_rates, vocabulary_of_recipe
from stage2_prior.segments import CLASS_NAME, GivenText
from stage2_prior.vocabulary import Vocabulary
from token_shards.manifest import Grid, TokenShardManifest
from vqmosaic.errors import InputError, check_range, did_you_mean, nearest_name
from vqmosaic.files.permissions import check_readable
from vqmosaic.recipes.recipe import Recipe, check_batch_split, condition_recipes
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.recipes.recipe_sections import DataConfig
from vqmosaic.runs.run_folder import STAGES, RunFolder, main_stage
from vqmosaic.runs.stage_records import decide_action, load_record
from vqmosaic.training.checkpoints import CheckpointFolder
from vqmosaic.training.tracking import check_trackers
from vqmosaic.wording import counted

TRAINING_SECTIONS = {"tokenizer": "tokenizer_training", "prior": "prior_training"}
USUAL_ARCHITECTURES = ("grid_transformer", "llama", "gpt2", "qwen3")
"""Architectures that are known without importing transformers."""
ROTARY_DIVISORS = {"grid_transformer": 4, "llama": 2, "qwen3": 2}
"""Architectures with rotary embeddings -> the number that must divide their head width."""


def check_before_start(recipe: Recipe, stage: str, processes: int = 1, alone: bool = True, redo: str | None = None) -> str:
    """The action for a stage ("start", "resume", "skip" or "compare", see decide_action). Raises InputError if the stage cannot start.

    Args:
        processes: number of training processes. They must divide the batch.
        alone: True if only this stage runs, so the inputs from other stages must exist. False in a chain, where the earlier stages make them.
        redo: first stage to run again from the start. Without it, the stage must have the recipe with which its folder was made.
    """
    check_range("--processes", processes, at_least=1)
    run = RunFolder(Path(recipe.run_dir))
    check_can_write("run_dir", run.root)
    if stage in ("tokenizer", "tokens"):
        if check_data_path(recipe.data) == "folder":
            check_outside_of_data(run.root, recipe.data)
        check_condition_data(recipe.data)
    if stage == "tokens":
        check_tokenizer_has_ids(recipe, tokenizer_folder(recipe) if alone else None)
    is_redone = redo is not None and STAGES.index(redo) <= STAGES.index(stage)
    inputs = input_fingerprints(recipe, stage) if alone else None
    action = "start" if is_redone else decide_action(run, recipe, stage, inputs)
    section = TRAINING_SECTIONS.get(stage)
    if section is not None:
        check_batch_split(recipe, section, processes)
        check_trackers(section, getattr(recipe, section).trackers)
        if action != "skip" and not is_redone:
            check_resume(recipe, stage, section)
    if stage == "tokenizer" and action != "skip":
        check_init_from(recipe, resumes=action in ("resume", "compare"))
        if recipe.tokenizer_training.perceptual_weight and recipe.tokenizer_training.perceptual_loss == "lpips":
            resolve_perceptual_weights(recipe.tokenizer_training.perceptual_weights)
    if stage == "prior" and action != "skip":
        check_architecture(recipe)
        if alone:
            check_own_tokens(recipe)
            check_sampling_fits_tokens(recipe)
    return action


def check_chain(recipe: Recipe, processes: int, redo: str | None) -> None:
    """Raise InputError before the first stage starts if a later part of the chain would fail.

    If the prior is not trained yet, this takes seconds, because transformers makes its configuration.
    """
    for field, value, commands in (("tokens.tokenizer", recipe.tokens.tokenizer, "preprocess, train-prior, bundle"),
                                   ("prior_training.tokens", recipe.prior_training.tokens, "train-prior, bundle")):
        if value is not None:
            raise InputError(f"{field} is {value!r}, but `vqmosaic run` makes every part of the run itself. "
                             f"Leave it out, or run the remaining stages one by one: {commands}.")
    for field, names in (("prior_training.drawn", recipe.prior_training.drawn), ("prior_training.given", recipe.prior_training.given)):
        if names is not None:
            raise InputError(f"{field} is {names}, but `vqmosaic run` trains one prior, which is given the conditions of the recipe and draws all "
                             "grids of the tokenizer. Leave it out, or run the stages one by one: train-tokenizer, preprocess, train-prior for each "
                             "prior, and bundle with several --prior.")
    check_guidance_of_chain(recipe)
    main_redo = main_stage(redo)
    actions = {stage: check_before_start(recipe, stage, processes, alone=False, redo=main_redo) for stage in STAGES}
    check_given_tokenizers(recipe)
    inner_redo = "tokenizer" if redo in ("tokenizer", "conditions") else None
    of_conditions = {name: check_before_start(each, "tokenizer", processes, alone=False, redo=inner_redo)
                     for name, each in condition_recipes(recipe).items()}
    check_stages_fit(recipe, actions, of_conditions)
    check_no_stale_stage(recipe, actions)
    check_not_stale(recipe, of_conditions, actions["tokens"])
    if actions["tokens"] == "start":
        check_pairs_and_captions(recipe)
    if actions["prior"] != "skip":
        check_prior_config(recipe)


def check_pairs_and_captions(recipe: Recipe) -> None:
    """Warn of captions that are cut. Raise InputError if preprocessing would stop because too many images lack a pair or a caption.

    Opens the data set and imports torch if the recipe has pairs or captions.
    """
    if not any(condition.kind in ("paired_folder", "caption") for condition in recipe.data.given_conditions):
        return
    from stage1_tokenizer.conditions.condition_data import check_coverage

    for warning in check_coverage(recipe.data):
        print(f"warning: {warning}", flush=True)


def check_stages_fit(recipe: Recipe, actions: dict[str, str], of_conditions: dict[str, str]) -> None:
    """Raise InputError if the result of a finished stage has changed since the next stage was made from it.

    Args:
        actions: the result of check_before_start for each stage.
        of_conditions: the result of check_before_start for the tokenizer of each condition that the run trains.
    """
    run = RunFolder(Path(recipe.run_dir))
    for stage, following in pairwise(STAGES):
        unfinished = {actions[stage], *(of_conditions.values() if stage == "tokenizer" else ())} - {"skip", "compare"}
        if unfinished:
            return  # later stages are checked when this stage is finished
        if actions[following] != "start":
            decide_action(run, recipe, following, input_fingerprints(recipe, following))  # raises InputError if the inputs differ


def check_own_tokens(recipe: Recipe) -> None:
    """Raise InputError if the run's tokenizer was trained again after the run's tokens were made."""
    run = RunFolder(Path(recipe.run_dir))
    uses_other_run = recipe.prior_training.tokens is not None or recipe.tokens.tokenizer is not None
    if uses_other_run or not (run.export("tokenizer") / "config.json").is_file():
        return
    fingerprint_in_tokens = TokenShardManifest.load(run.export("tokens") / "train").token_fingerprint
    if fingerprint_in_tokens != token_fingerprint_of_tokenizer(run.export("tokenizer")):
        raise InputError(f"{run.export('tokens')} was made with another tokenizer than the current {run.export('tokenizer')}, so a prior trained on "
                         "these tokens would not fit it. Encode the images again (`vqmosaic preprocess` with --redo tokens), or set "
                         "--tokens.tokenizer to the tokenizer of these tokens.")


def check_sampling_fits_tokens(recipe: Recipe) -> None:
    """Raise InputError if the sampling settings do not fit the tokens that the prior trains on.

    The tokens may have fewer codes than sampling.top_k, fewer drawn tokens than sampling.steps, or other conditions than sampling.guidance names.
    """
    folder, sampling = recipe.tokens_folder / "train", recipe.sampling
    manifest = TokenShardManifest.load(folder)
    vocabulary = vocabulary_of_recipe(recipe, manifest)
    check_guidance_is_learned(recipe, vocabulary)
    most_codes = vocabulary.most_codes
    if sampling.top_k > most_codes:
        raise InputError(f"sampling.top_k is {sampling.top_k}, but the tokens in {folder} have {counted(most_codes, 'code')}; set sampling.top_k to "
                         "at most this number, or to 0 to turn it off.")
    if sampling.steps is not None and sampling.steps > vocabulary.num_tokens:
        raise InputError(f"sampling.steps is {sampling.steps}, but an image in {folder} has {counted(vocabulary.num_tokens, 'token')}; set it to at "
                         "most this number, or to null for one token in each pass.")


def check_guidance_is_learned(recipe: Recipe, vocabulary: Vocabulary) -> None:
    """Raise InputError if a prior with conditions is not trained without segments in the way that the recipe's guidance needs."""
    sampling = recipe.sampling
    if not sampling.is_guided or not (vocabulary.conditions or sampling.guidance):
        return
    try:
        segment_scales(vocabulary, sampling.guidance_scale, sampling.guidance)
    except InputError as error:
        raise InputError(f"sampling.guidance_scale is {sampling.guidance_scale:g} and sampling.guidance {sampling.guidance}. {error} Drop rates are "
                         "those of data.conditions, prior_training.drop_rates and, for all segments together, prior_training.label_drop.") from None


def check_guidance_of_chain(recipe: Recipe) -> None:
    """Raise InputError if the prior that a chain will train does not learn the recipe's guidance. The sizes of its conditions do not matter here."""
    rates = drop_rates(recipe, [CLASS_NAME, *(condition.name for condition in recipe.data.given_conditions)])
    conditions = [GivenText(name=condition.name, text_ids=1, num_tokens=1, drop_rate=rates.get(condition.name, 0.0))
                  for condition in recipe.data.given_conditions]
    vocabulary = Vocabulary(grids=[Grid("image", 2, 1, 1)], class_names=["any"] if recipe.data.use_labels else None, token_fingerprint="none",
                            label_drop=recipe.prior_training.label_drop, class_drop=rates.get(CLASS_NAME, 0.0), conditions=conditions)
    check_guidance_is_learned(recipe, vocabulary)


def check_no_stale_stage(recipe: Recipe, actions: dict[str, str]) -> None:
    """Raise InputError if a finished stage would train further, although the next stage was already made from its result.

    Args:
        actions: the result of check_before_start for each stage.
    """
    run = RunFolder(Path(recipe.run_dir))
    for stage, following in pairwise(STAGES):
        record = load_record(run, stage)
        has_grown = actions[stage] == "resume" and record is not None and record.finished and run.export(stage).exists()
        if has_grown and actions[following] != "start":
            raise InputError(f"{run.root}: the budget of stage {stage} has grown, but stage {following} was made from its earlier result. "
                             f"Add --redo {following}, which reruns {following} and all later stages, or choose another --run_dir.")


def check_outside_of_data(root: Path, data: DataConfig) -> None:
    """Raise InputError if the run folder is inside the folder of images, whose pictures would then change the data set."""
    if root.resolve().is_relative_to(local_path(data).resolve()):
        raise InputError(f"run_dir is {str(root)!r}, inside data.path {data.path!r}, so the pictures of the run would become part of the data "
                         "set. Set --run_dir to a folder outside of it.")


def check_output_outside_of_data(source: Path, out: Path) -> None:
    """Raise InputError if --out is inside a folder of images that a run was trained on. The new images would become part of the data set.

    `source` is the run folder, or a folder directly inside it. Does nothing for folders without a run, or if the recipe cannot be read.
    """
    for run in (source.resolve(), source.resolve().parent):
        folders: list[Path] = []
        if (run / "recipe.yaml").is_file():
            with contextlib.suppress(InputError):  # such as of another version, which does not matter here
                folders = image_folders(load_recipe(str(run)).data)
        for folder in folders:
            if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
                raise InputError(f"--out {out} is inside {folder}, the images that {source} was trained on. The new images would become part of the "
                                 "data set. Give a folder outside of it as --out.")


def image_folders(data: DataConfig) -> list[Path]:
    """The folders with the images of a recipe: data.path, and those of paired images."""
    paired = [condition.path for condition in data.given_conditions] + [(data.derived or {}).get("path")]
    return [*([local_path(data)] if data.path else []), *(Path(os.path.expanduser(path)) for path in paired if path)]


def check_can_write(field: str, folder: Path) -> None:
    """Raise InputError if a folder cannot be written: it is a file, or a folder above it is a file or not writable. Creates nothing."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{field} is {str(folder)!r}, which is a file. Set {field} to a folder.")
    nearest_existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest_existing.is_dir():
        raise InputError(f"{field} is {str(folder)!r}, but {nearest_existing} is a file. Set {field} to a folder that can be created.")
    if not os.access(nearest_existing, os.W_OK | os.X_OK):
        raise InputError(f"{field} is {str(folder)!r}, but {nearest_existing} is not writable. Set {field} to a writable folder.")


def check_resume(recipe: Recipe, stage: str, section: str) -> None:
    """Raise InputError if training cannot start as the `resume` field of `section` says: never, auto or the path of a checkpoint."""
    resume = getattr(recipe, section).resume
    run = RunFolder(Path(recipe.run_dir))
    checkpoints = CheckpointFolder(run.checkpoints(stage))
    if resume == "never":
        checkpoints.choose(resume)  # raises InputError if there is a checkpoint
    elif resume == "auto":
        record = load_record(run, stage)
        if record is not None:  # verify_files=False because reading the checkpoints takes time; training verifies them
            checkpoints.check_can_continue(stage, run.export(stage), record.finished, verify_files=False)
    elif not (Path(resume) / "checksums.json").is_file():
        known = ", ".join(map(str, checkpoints.all())) or "none"
        raise InputError(f"{section}.resume is {resume!r}, which is not a checkpoint (a folder with checksums.json); allowed: auto, never "
                         f"or a checkpoint. Checkpoints of this run: {known}.{did_you_mean(resume, ('auto', 'never'))}")


def check_architecture(recipe: Recipe) -> None:
    """Raise InputError for an unknown prior.architecture, or a head width that it does not support.

    Takes a second or two for architectures other than the usual ones, because it imports a part of transformers.
    """
    architecture = recipe.prior.architecture
    _, width, heads = recipe.prior.sizes
    divisor = ROTARY_DIVISORS.get(architecture, 1)
    if "head_dim" not in recipe.prior.options and width // heads % divisor:
        raise InputError(f"prior.width is {width} and prior.heads is {heads}, so each head has {width // heads} dimensions. The rotary embedding of "
                         f"{architecture} needs a multiple of {divisor}. Set prior.width to a multiple of {divisor * heads}.")
    if architecture in USUAL_ARCHITECTURES:
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as causal_models

    if architecture not in causal_models:
        raise InputError(f"prior.architecture is {architecture!r}; allowed: {', '.join(USUAL_ARCHITECTURES)} or another of the "
                         f"{len(causal_models)} causal language models of transformers.{did_you_mean(architecture, causal_models)}")


def check_prior_config(recipe: Recipe) -> None:
    """Raise InputError if transformers cannot make the model configuration of the prior. Takes seconds, because it imports torch and transformers."""
    from stage2_prior.model.causal_lm import make_config

    grids = grids_of_config(recipe.tokenizer, recipe.data.image_size, "data.image_size")  # that the chain trains
    make_config(recipe.prior, Vocabulary(grids=grids, class_names=None, token_fingerprint=""), recipe.prior_training.order != "raster")


def check_image(path: Path) -> None:
    """Raise InputError unless the path is an image file that Pillow can open. Reads only the header."""
    from PIL import Image

    check_readable(path)
    if not path.is_file():
        problem = "is a folder. Give the images in it" if path.is_dir() else "does not exist"
        nearest = nearest_name(path.name, (found.name for found in path.parent.iterdir())) if path.parent.is_dir() and not path.exists() else None
        hint = f" Did you mean {str(path.parent / nearest)!r}?" if nearest else ""
        raise InputError(f"image {str(path)!r} {problem}.{hint}")
    try:
        Image.open(path).close()
    except Image.DecompressionBombError as error:
        raise InputError(f"image {str(path)!r} has too many pixels: {error}") from None
    except OSError:
        raise InputError(f"image {str(path)!r} cannot be read: not an image of a known format, or its header is corrupt.") from None
