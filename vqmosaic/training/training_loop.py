"""The training loop of both stages, and what comes before and after it. Each stage computes the step in the body of the loop:

    with locked_run(recipe, "prior", recipe.prior_training) as run:
        ...                                                # open the data; return if finished_already(run, inputs)
        model = run.prepare(prior)
        for progress in training_steps(run, validate, run.save):
            ...                                            # forward, backward
            run.optimizer_step(loss, progress)
            run.end_step()
        exported_step = export_best_and_last(run, "NLL")   # on the main process
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.recipe_sections import PriorTrainingConfig
from vqmosaic.recipes.tokenizer_sections import TokenizerTrainingConfig
from vqmosaic.runs.accelerator import lock_run_folder
from vqmosaic.runs.interruption import Interrupted, StopFlag
from vqmosaic.runs.out_of_memory import describe_memory, is_out_of_memory
from vqmosaic.runs.stage_records import decide_action, load_record
from vqmosaic.training.training_run import TrainingRun
from vqmosaic.wording import counted


@contextmanager
def locked_run(recipe: Recipe, stage: str, training: TokenizerTrainingConfig | PriorTrainingConfig) -> Iterator[TrainingRun]:
    """Yield a TrainingRun that holds the lock of its run folder and handles signals. Calls its end() at the end of the block."""
    with StopFlag() as stop:
        run = TrainingRun(recipe, stage, training, stop)
        try:
            with explain_too_little_memory(run), lock_run_folder(run.folder):
                yield run
        finally:
            run.end()


@contextmanager
def explain_too_little_memory(run: TrainingRun) -> Iterator[None]:
    """Turn the error for too little memory into InputError, which names the fields to change."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError | MemoryError) or not is_out_of_memory(error):  # MemoryError comes from numpy: the data, not the step
            raise
        raise InputError(f"{describe_too_large_step(run)} ({' '.join(str(error).split())[:200]})") from error


def describe_too_large_step(run: TrainingRun) -> str:
    """A message for a training step that does not fit into memory."""
    training, section, steps = run.training, run.training.SECTION, run.training.accumulation_steps
    own_images, remedies = training.batch_size // run.world_size, []
    if parts := next((count for count in range(2 * steps, own_images + 1) if own_images % count == 0), None):
        remedies.append(f"{section}.accumulation_steps to {parts}, which computes the same step in smaller parts")
    remedies.append(f"{section}.batch_size to a smaller number")
    is_prior = isinstance(training, PriorTrainingConfig)
    if not isinstance(training, PriorTrainingConfig):
        remedies.append("tokenizer.patch_size to a larger number")
    elif not training.activation_checkpointing:
        remedies.append("prior_training.activation_checkpointing to true")
    started = (f" Training has already started, so add --redo {run.stage} to change fields"
               f"{' other than activation_checkpointing' if is_prior else ''}.")
    return (f"a training step of {training.batch_size} images ({section}.batch_size) in {counted(steps, 'part')} ({section}.accumulation_steps) on "
            f"{counted(run.world_size, 'process')} does not fit into the memory of {describe_memory(run.accelerator.device)}. Set "
            f"{', or '.join(remedies)}.{started if run.state.step else ''}")


def finished_already(run: TrainingRun, inputs: dict[str, str]) -> bool:
    """Whether the stage has finished with this recipe and these inputs. If so, prints where its export is.

    Call this before the stage record is overwritten.

    Raises:
        InputError: the recipe or the inputs have changed, or the stage has written its export, but no checkpoint is left to continue from.
    """
    export = run.folder.export(run.stage)
    if decide_action(run.folder, run.recipe, run.stage, inputs) == "skip":
        run.report(f"finished already: {export}")
        return True
    record = load_record(run.folder, run.stage)
    if record is not None and run.training.resume == "auto":
        run.checkpoints.check_can_continue(run.stage, export, record.finished)
    return False


def training_steps(run: TrainingRun, validate: Callable[[float], None] | None = None, save: Callable[[], None] | None = None,
                   wait: Callable[[StopFlag], None] | None = None) -> Iterator[float]:
    """Yield the progress in [0, 1) before each step, until the budget is used up. All processes run this loop together.

    After a signal, the loop saves a checkpoint and raises Interrupted. If `save` is None, it just ends.

    Args:
        run: the training, after prepare(). The caller ends each step with run.end_step().
        validate: validate(progress) runs a validation. It is called when one is due, and should return early after a signal.
        save: writes a checkpoint, such as run.save. It is called when a checkpoint is due and after a signal.
        wait: wait(stop) waits for what the next step needs, until a signal arrives.
    """
    while True:
        if wait is not None:
            wait(run.stop)  # before sync(): a signal ends the wait in one process, and sync() makes all processes save
        signal_number, progress = run.sync()
        finished = progress >= 1
        if validate is not None and not signal_number and run.validations.due(finished):
            validate(progress)
            signal_number, _ = run.sync()  # a signal ends a validation early; the resumed run repeats it
        if save is not None and (run.due(run.training.checkpoint_every, finished) or signal_number):
            save()
        if save is not None and signal_number:
            raise Interrupted(signal_number, f"{run.stage} saved at step {run.state.step:,} in {run.checkpoints.root}")
        if finished or signal_number:
            return
        yield progress


def export_best_and_last(run: TrainingRun, measure: str) -> int:
    """Save the best and the last weights. The recipe's `export` field selects which of them are the export; the others go beside the checkpoints.

    Returns the step of the exported weights. `measure` is the name of the validation metric, for the warning if it was never finite.
    """
    model = run.validated_model
    save_pretrained = cast(Callable[[Path], None], model.save_pretrained)  # the models of both stages have this method
    targets = {"best": run.checkpoints.root / "best", "last": run.checkpoints.root / "last"}
    targets[run.training.export] = run.folder.export(run.stage)
    save_pretrained(targets["last"])
    has_best = run.best_weights.load_into(model)
    if not has_best:
        run.report(f"warning: no validation had a finite {measure}, so there are no best weights; {targets['best']} holds the last ones")
    save_pretrained(targets["best"])
    return run.state.best_step if has_best and run.training.export == "best" else run.state.step
