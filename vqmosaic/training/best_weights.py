"""Saves and restores the weights of the best validation so far.

The file is beside the checkpoints. Each checkpoint links to the best weights at that time, so that a resumed training continues with them.
"""

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vqmosaic.files.durable_files import publish, removed_on_failure, temporary_sibling
from vqmosaic.files.full_disks import explain_full_disk
from vqmosaic.training.trainer_state import TrainerState

FILE_NAME = "best.safetensors"


class BestWeights:
    """The file with the best weights of one training. Only the main process reads and writes it."""

    def __init__(self, checkpoints: Path, state: TrainerState, is_main: bool):
        self.path, self.state, self.is_main = checkpoints / FILE_NAME, state, is_main

    def restore(self, resumed_from: Path | None) -> None:
        """Delete the best weights, which may be from a later step, and restore those of the resumed checkpoint if there is one."""
        if not self.is_main:
            return
        self.path.unlink(missing_ok=True)
        if resumed_from is not None:
            link_or_copy(resumed_from / FILE_NAME, self.path)

    def save_if_best(self, error: float, model: nn.Module | None) -> bool:
        """If a validation error is the lowest so far, record it and save the validated model on the main process. Returns whether it is."""
        is_best = error < self.state.best_validation
        if is_best:
            self.state.best_validation, self.state.best_step = error, self.state.step
            if self.is_main:
                assert model is not None  # the other processes may have None
                save_weights(model, self.path)
        return is_best

    def link_in(self, checkpoint: Path) -> None:
        """Add the best weights so far to a checkpoint."""
        link_or_copy(self.path, checkpoint / FILE_NAME)

    def load_into(self, model: nn.Module) -> bool:
        """Load the best weights into a model. Returns False, and changes nothing, if there are none."""
        if not self.path.exists():
            return False
        model.load_state_dict(load_file(self.path))
        return True


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the state of a model as safetensors, completely or not at all."""
    # cloned because safetensors accepts neither tied nor channels_last tensors
    weights = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in model.state_dict().items()}
    with explain_full_disk(path.parent, sum(tensor.nbytes for tensor in weights.values())), removed_on_failure(temporary_sibling(path)) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, partial)
        publish(partial, path)


def link_or_copy(source: Path, target: Path) -> None:
    """Create `target` as a hard link to a finished file, or as a copy if the file system has no hard links. Does nothing without a source."""
    if not source.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        with explain_full_disk(target.parent, source.stat().st_size):
            shutil.copyfile(source, target)
