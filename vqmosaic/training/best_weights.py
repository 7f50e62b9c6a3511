"""The weights of the best validation so far: one file beside the checkpoints, a link to it in each, so that a resumed training has its own."""

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vqmosaic.files.durable_files import publish, removed_on_failure, temporary_sibling
from vqmosaic.files.full_disks import naming_full_disks
from vqmosaic.training.training_run import TrainingRun


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the state of a model as safetensors, whole or not at all."""
    # cloned: safetensors takes neither tied nor channels_last tensors
    weights = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in model.state_dict().items()}
    with naming_full_disks(path.parent, sum(tensor.nbytes for tensor in weights.values())), removed_on_failure(temporary_sibling(path)) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, partial)
        publish(partial, path)


def link_or_copy(source: Path, target: Path) -> None:
    """Make a finished file appear a second time, without using space where the file system can do that."""
    if not source.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        with naming_full_disks(target.parent, source.stat().st_size):
            shutil.copyfile(source, target)


def restore_best(resumed_from: Path | None, best_weights: Path) -> None:
    """Take the best weights of the checkpoint that is resumed: those on disk may be of steps after it."""
    best_weights.unlink(missing_ok=True)
    if resumed_from is not None:
        link_or_copy(resumed_from / best_weights.name, best_weights)


def export_best_and_last(run: TrainingRun, best_weights: Path, measure: str) -> int:
    """Write the stage's export with the weights that its `export` field asks for, best or last, and the other ones beside the checkpoints.

    Returns the step of the exported weights. `measure` names the number that best refers to, for the warning if no validation had a finite one.
    """
    model = run.validated_model
    targets = {"best": run.checkpoints.root / "best", "last": run.checkpoints.root / "last"}
    targets[run.training.export] = run.folder.export(run.stage)
    model.save_pretrained(targets["last"])
    has_best = best_weights.exists()
    if has_best:
        model.load_state_dict(load_file(best_weights))
    else:
        run.report(f"warning: no validation had a finite {measure}, so there are no best weights; {targets['best']} holds the last ones")
    model.save_pretrained(targets["best"])
    return run.state.best_step if has_best and run.training.export == "best" else run.state.step
