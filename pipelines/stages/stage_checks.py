"""Checks made before a stage starts slow work. They need no torch and well under a second, unless a docstring says otherwise."""

import os
from itertools import pairwise
from pathlib import Path

from pipelines.stages.stage_inputs import check_tokenizer_has_ids, inputs_of, token_fingerprint_of_tokenizer, tokenizer_folder
from stage1_tokenizer.data.data_location import check_data_path
from stage1_tokenizer.find_initial_weights import check_init_from
from stage1_tokenizer.perceptual_weights import resolve_perceptual_weights
from token_shards.manifest import Grid, TokenShardManifest
from vqmosaic.errors import InputError, check_range, nearest_name
from vqmosaic.files.permissions import check_readable
from vqmosaic.recipes.recipe import Recipe, check_batch_split
from vqmosaic.runs.run_folder import STAGES, RunFolder
from vqmosaic.runs.stage_records import decide_action, load_record
from vqmosaic.training.checkpoints import CheckpointFolder
from vqmosaic.training.tracking import check_trackers

TRAINING_SECTIONS = {"tokenizer": "tokenizer_training", "prior": "prior_training"}
USUAL_ARCHITECTURES = ("grid_transformer", "llama", "gpt2", "qwen3")
ROTARY_ARCHITECTURES = {"grid_transformer": 4, "llama": 2, "qwen3": 2}  # the head width must be a multiple of this


def check_before_start(recipe: Recipe, stage: str, processes: int = 1, alone: bool = True, redo: str | None = None) -> str:
    """The action for a stage ("start", "resume", "skip" or "compare", see decide_action). Raises InputError if the stage cannot start.

    The stage also cannot start if its folder was made with another recipe, unless `redo` names this stage or an earlier one. With `alone`, the
    inputs from other stages must exist; in a chain, they are made first.
    """
    check_range("--processes", processes, at_least=1)
    run = RunFolder(Path(recipe.run_dir))
    check_can_write("run_dir", run.root)
    if stage in ("tokenizer", "tokens"):
        check_data_path(recipe.data)
    if stage == "tokens":
        check_tokenizer_has_ids(recipe, tokenizer_folder(recipe) if alone else None)
    is_redone = redo is not None and STAGES.index(redo) <= STAGES.index(stage)
    inputs = inputs_of(recipe, stage) if alone else None
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
    actions = {stage: check_before_start(recipe, stage, processes, alone=False, redo=redo) for stage in STAGES}
    check_parts_fit(recipe, actions)
    check_no_stale_stage(recipe, actions)
    if actions["prior"] != "skip":
        check_prior(recipe)


def check_parts_fit(recipe: Recipe, actions: dict[str, str]) -> None:
    """Raise InputError for the first stage whose recorded inputs differ from the current results of the finished stages before it."""
    run = RunFolder(Path(recipe.run_dir))
    for stage, following in pairwise(STAGES):
        if actions[stage] not in ("skip", "compare"):
            return  # later stages are checked when this stage is finished
        if actions[following] != "start":
            decide_action(run, recipe, following, inputs_of(recipe, following))


def check_own_tokens(recipe: Recipe) -> None:
    """Raise InputError if the run's tokenizer was trained again after the run's tokens were made."""
    run = RunFolder(Path(recipe.run_dir))
    if recipe.prior_training.tokens is not None or recipe.tokens.tokenizer is not None or not (run.export("tokenizer") / "config.json").is_file():
        return
    tokens = TokenShardManifest.load(run.export("tokens") / "train").token_fingerprint
    if tokens != token_fingerprint_of_tokenizer(run.export("tokenizer")):
        raise InputError(f"{run.export('tokens')} was made with another tokenizer than the current {run.export('tokenizer')}, so a prior trained on "
                         "these tokens would not fit it. Encode the images again (`vqmosaic preprocess` with --redo tokens), or set "
                         "--tokens.tokenizer to the tokenizer of these tokens.")


def check_no_stale_stage(recipe: Recipe, actions: dict[str, str]) -> None:
    """Raise InputError if a finished stage would train further while the next stage was made from its earlier result."""
    run = RunFolder(Path(recipe.run_dir))
    for stage, following in pairwise(STAGES):
        record = load_record(run, stage)
        has_grown = actions[stage] == "resume" and record.finished and run.export(stage).exists()
        if has_grown and actions[following] != "start":
            raise InputError(f"{run.root}: the budget of stage {stage} has grown, but stage {following} was made from its earlier result. "
                             f"Add --redo {following}, which reruns {following} and all later stages, or choose another --run_dir.")


def check_can_write(field: str, folder: Path) -> None:
    """Raise InputError if a path is a file, or cannot be created because its parent is a file or not writable. Creates nothing."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{field} is {str(folder)!r}, which is a file. Set {field} to a folder.")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"{field} is {str(folder)!r}, but {existing} is a file. Set {field} to a folder that can be created.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{field} is {str(folder)!r}, but {existing} is not writable. Set {field} to a writable folder.")


def check_resume(recipe: Recipe, stage: str, section: str) -> None:
    """Raise InputError if training cannot continue from the checkpoint that `resume` names."""
    resume = getattr(recipe, section).resume
    checkpoints = CheckpointFolder(RunFolder(Path(recipe.run_dir)).checkpoints(stage))
    if resume == "never":
        checkpoints.choose(resume)
    elif resume == "auto":
        run = RunFolder(Path(recipe.run_dir))
        record = load_record(run, stage)
        if record is not None:  # training verifies the files of the checkpoints, because reading them takes time
            checkpoints.check_can_continue(stage, run.export(stage), record.finished, verify_files=False)
    elif not (Path(resume) / "checksums.json").is_file():
        nearest = nearest_name(resume, ("auto", "never"))
        hint = f" Did you mean {nearest!r}?" if nearest else ""
        known = ", ".join(map(str, checkpoints.all())) or "none"
        raise InputError(f"{section}.resume is {resume!r}, which is not a checkpoint (a folder with checksums.json); allowed: auto, never "
                         f"or a checkpoint. Checkpoints of this run: {known}.{hint}")


def check_architecture(recipe: Recipe) -> None:
    """Raise InputError for an unknown prior.architecture, or a head width that it does not support.

    Takes a second or two for architectures other than the usual ones.
    """
    given, (_, width, heads) = recipe.prior.architecture, recipe.prior.sizes
    divisor = ROTARY_ARCHITECTURES.get(given, 1)
    if "head_dim" not in recipe.prior.options and width // heads % divisor:
        raise InputError(f"prior.width is {width} and prior.heads is {heads}, so each head has {width // heads} dimensions. The rotary embedding of "
                         f"{given} needs a multiple of {divisor}. Set prior.width to a multiple of {divisor * heads}.")
    if given in USUAL_ARCHITECTURES:
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    if given not in known:
        nearest = nearest_name(given, known)
        hint = f" Did you mean {nearest!r}?" if nearest else ""
        raise InputError(f"prior.architecture is {given!r}; allowed: {', '.join(USUAL_ARCHITECTURES)} or another of the {len(known)} causal "
                         f"language models of transformers.{hint}")


def check_prior(recipe: Recipe) -> None:
    """Raise InputError if transformers cannot configure the prior of a recipe. Imports torch and transformers."""
    from stage2_prior.model.causal_lm import make_config
    from stage2_prior.vocabulary import Vocabulary

    side = recipe.data.image_size // recipe.tokenizer.downsampling
    grid = Grid(name="image", codebook_size=recipe.tokenizer.codebook_size, height=side, width=side, depth=recipe.tokenizer.depth)
    make_config(recipe.prior, Vocabulary(grids=[grid], class_names=None, token_fingerprint=""))


def check_image(path: Path) -> None:
    """Raise InputError unless the path is an image file. Reads only the header."""
    from PIL import Image

    check_readable(path)
    if not path.is_file():
        what = "is a folder. Give the images in it" if path.is_dir() else "does not exist"
        nearest = nearest_name(path.name, (found.name for found in path.parent.iterdir())) if path.parent.is_dir() and not path.exists() else None
        hint = f" Did you mean {str(path.parent / nearest)!r}?" if nearest else ""
        raise InputError(f"image {str(path)!r} {what}.{hint}")
    try:
        Image.open(path).close()
    except Image.DecompressionBombError as error:
        raise InputError(f"image {str(path)!r} has too many pixels: {error}") from None
    except OSError:
        raise InputError(f"image {str(path)!r} cannot be read: not an image of a known format, or its header is corrupt.") from None
