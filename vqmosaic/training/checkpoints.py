"""Writes, finds and checks training checkpoints: complete or absent, with checksums, only the newest few kept.

Loads no torch until a checkpoint is written or read.

checkpoints/<stage>/step-00000500/
    model.safetensors, optimizer.bin, ...   Accelerate's state
    weights_ema.safetensors                 the averaged weights, if weights are averaged
    trainer_state.json                      the fields of TrainerState
    checksums.json                          size and sha256 of all files above
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqmosaic import __version__
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import TEMPORARY_PREFIX, publish, removed_on_failure, sha256_of_file, temporary_sibling, write_json
from vqmosaic.files.full_disks import explain_full_disk, size_of
from vqmosaic.files.json_files import VERSION_FIELD, Dataclass, from_fields, read_object, written_by
from vqmosaic.files.permissions import check_readable


def checkpoint_problems(checkpoint: Path) -> list[str]:
    """The problems of a checkpoint folder in words; empty if it is complete. Raises PermissionDenied if it cannot be read."""
    check_readable(checkpoint)
    try:
        checksums = json.loads((checkpoint / "checksums.json").read_text())
    except (OSError, ValueError):
        return ["checksums.json is missing or unreadable"]
    if not isinstance(checksums, dict) or any(not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys() for entry in checksums.values()):
        return ["checksums.json contains something other than sizes and digests"]
    problems = []
    for name, entry in checksums.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != entry["size"]:
            problems.append(f"{name} is missing or cut short")
        elif sha256_of_file(path) != entry["sha256"]:
            problems.append(f"{name} has changed")
    return problems


@dataclass(frozen=True)
class CheckpointFolder:
    """The checkpoints of one stage. Only the newest `keep` are kept."""

    root: Path
    keep: int = 2

    def all(self) -> list[Path]:
        """Checkpoint folders, oldest first. Raises PermissionDenied if they cannot be listed, because training would otherwise restart at step 0."""
        check_readable(self.root)
        return sorted(path for path in self.root.glob("step-*") if path.is_dir())

    def choose(self, resume: str, report: Callable[[str], None] = print) -> Path | None:
        """The checkpoint to resume from: the newest complete one for "auto", none for "never", or the given path.

        Raises:
            InputError: `resume` is "never" and a checkpoint exists, or the given path is not a complete checkpoint.
        """
        if resume == "never":
            if self.all():
                raise InputError(f"resume is 'never', but {self.all()[-1]} exists; set resume to auto, delete it, or use --redo.")
            return None
        if resume != "auto":
            problems = checkpoint_problems(Path(resume))
            if problems:
                raise InputError(f"resume is {resume!r}, which is not a complete checkpoint: {'; '.join(problems)}. "
                                 f"Complete checkpoints here: {[str(path) for path in self.all() if not checkpoint_problems(path)] or 'none'}.")
            return Path(resume)
        for checkpoint in reversed(self.all()):
            problems = checkpoint_problems(checkpoint)
            if not problems:
                return checkpoint
            report(f"warning: {checkpoint} is not complete ({'; '.join(problems)}); trying the one before it")
        return None

    def check_can_continue(self, stage: str, export: Path, finished: bool, verify_files: bool = True) -> None:
        """Raise InputError if a stage has written its export, which may be gone, but no checkpoint is left to continue from.

        A training from step 0 would replace the export. `verify_files` requires a complete checkpoint; without it, any checkpoint is enough.
        """
        written = str(export) if export.exists() else f"an export in {export}, which is gone" if finished else None
        checkpoints = self.all()
        if written is None or (checkpoints and not verify_files) or any(not checkpoint_problems(checkpoint) for checkpoint in reversed(checkpoints)):
            return
        reason = f"none of the checkpoints in {self.root} is complete" if checkpoints else f"there is no checkpoint left in {self.root}"
        raise InputError(f"stage {stage} has written {written}, but {reason}, so the training cannot continue: it would restart at step 0 and "
                         f"replace this export. Put the checkpoints back, or repeat the stage with --redo {stage} "
                         "(which also repeats the stages after it).")

    def write(self, accelerator, state: dict[str, Any], save_more: Callable[[Path], None]) -> Path:
        """Write the checkpoint of state["step"]. All ranks call this; `save_more(folder)` adds files on rank 0.

        Checkpoints of later steps are deleted. They are left over from before training was resumed from an older checkpoint.
        """
        final = self.root / f"step-{state['step']:08d}"
        partial = temporary_sibling(final)
        with explain_full_disk(self.root, lambda: self._expected_bytes(accelerator)), removed_on_failure(partial):
            self._write(accelerator, state, save_more, partial, final)
        return final

    def _expected_bytes(self, accelerator) -> int:
        """Approximate size of a checkpoint: that of the newest one, or four values for each weight (itself, two moments, the average)."""
        existing = self.all()
        if existing:
            return size_of(existing[-1])
        return sum(4 * parameter.numel() * parameter.element_size() for model in accelerator._models for parameter in model.parameters())

    def _write(self, accelerator, state: dict[str, Any], save_more: Callable[[Path], None], partial: Path, final: Path) -> None:
        if accelerator.is_main_process:
            self.root.mkdir(parents=True, exist_ok=True)
            for leftover in self.root.glob(f"{TEMPORARY_PREFIX}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir()
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial), safe_serialization=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            save_more(partial)
            write_json(partial / "trainer_state.json", {VERSION_FIELD: __version__, **state})
            files = sorted(path for path in partial.rglob("*") if path.is_file())
            write_json(partial / "checksums.json",
                       {str(path.relative_to(partial)): {"size": path.stat().st_size, "sha256": sha256_of_file(path)} for path in files})
            for later in reversed(self.all()):
                if later.name > final.name:
                    shutil.rmtree(later)
            publish(partial, final)
            for old in self.all()[:-self.keep]:
                shutil.rmtree(old, ignore_errors=True)
        accelerator.wait_for_everyone()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer state of a checkpoint, by field name."""
    return _read_state(checkpoint)[0]


def restore_state(checkpoint: Path, cls: type[Dataclass]) -> Dataclass:
    """The trainer state of a checkpoint as an object of the dataclass `cls`. Fields that the checkpoint does not have keep their defaults."""
    state, version = _read_state(checkpoint)
    return from_fields(cls, state, str(checkpoint / "trainer_state.json"), version)


def version_of(checkpoint: Path) -> str | None:
    """The version of vqmosaic that wrote a checkpoint; None if unknown."""
    return _read_state(checkpoint)[1]


def _read_state(checkpoint: Path) -> tuple[dict[str, Any], str | None]:
    """The trainer state, and the version of vqmosaic that wrote it (None if unknown)."""
    content = read_object(checkpoint / "trainer_state.json", "give another checkpoint")
    return {name: value for name, value in content.items() if name != VERSION_FIELD}, written_by(content)
