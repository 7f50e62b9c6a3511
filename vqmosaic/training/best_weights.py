"""Saves, restores and exports the weights of the best validation so far.

They are one file beside the checkpoints. Each checkpoint has a link to the file of its time, so that a resumed training continues with it.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vqmosaic.files.durable_files import publish, removed_on_failure, temporary_sibling
from vqmosaic.files.full_disks import explain_full_disk
from vqmosaic.training.training_run import TrainingRun


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the state of a model as safetensors, completely or not at all."""
    # cloned because safetensors accepts neither tied nor channels_last tensors
    weights = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in model.state_dict().items()}
    with explain_full_disk(path.parent, sum(tensor.nbytes for tensor in weights.values())), removed_on_failure(temporary_sibling(path)) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, partial)
        publish(partial, path)


def save_if_best(run: TrainingRun, error: float, model: nn.Module | None, path: Path) -> bool:
    """Whether a validation error is the lowest so far. If it is, record it, and save the validated model on the main process."""
    is_best = error < run.state.best_validation
    if is_best:
        run.state.best_validation, run.state.best_step = error, run.state.step
        if run.is_main:
            assert model is not None  # the other processes may have None
            save_weights(model, path)
    return is_best


def link_or_copy(source: Path, target: Path) -> None:
    """Create `target` as a hard link to a finished file, or as a copy if the file system has no hard links. Does nothing without a source."""
    if not source.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        with explain_full_disk(target.parent, source.stat().st_size):
            shutil.copyfile(source, target)


def restore_best(resumed_from: Path | None, best_weights: Path) -> None:
    """Delete the best weights, which may be from a later step, and restore those of the resumed checkpoint if there is one."""
    best_weights.unlink(missing_ok=True)
    if resumed_from is not None:
        link_or_copy(resumed_from / best_weights.name, best_weights)


def export_best_and_last(run: TrainingRun, best_weights: Path, measure: str) -> int:
    """Write the best or the last weights to the stage's export, as its `export` field says, and the others to a folder beside the checkpoints.

    Returns the step of the exported weights. `measure` names the metric of the best weights, for the warning if it was never finite.
    """
    model = run.validated_model
    save_pretrained = cast(Callable[[Path], None], model.save_pretrained)  # the models of both stages have this method
    targets = {"best": run.checkpoints.root / "best", "last": run.checkpoints.root / "last"}
    targets[run.training.export] = run.folder.export(run.stage)
    save_pretrained(targets["last"])
    has_best = best_weights.exists()
    if has_best:
        model.load_state_dict(load_file(best_weights))
    else:
        run.report(f"warning: no validation had a finite {measure}, so there are no best weights; {targets['best']} holds the last ones")
    save_pretrained(targets["best"])
    return run.state.best_step if has_best and run.training.export == "best" else run.state.step
