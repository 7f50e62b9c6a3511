"""Training checkpoints: complete or absent, checksummed, the last few kept. Loads no torch until one is written or read.

checkpoints/<stage>/step-00000500/
    model.safetensors, optimizer.bin, ...   Accelerate's state
    weights_ema.safetensors                 the averaged weights, where there are some
    trainer_state.json                      a few named numbers
    checksums.json                          size and sha256 of all of the above
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vqmosaic import __version__
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import TEMPORARY_PREFIX, publish, removed_on_failure, sha256_of_file, temporary_sibling, write_json
from vqmosaic.files.full_disks import naming_full_disks, size_of
from vqmosaic.files.json_files import VERSION_FIELD, from_fields, read_object, written_by
from vqmosaic.files.permissions import check_readable

T = TypeVar("T")


def broken_files(checkpoint: Path) -> list[str]:
    """The problems of a checkpoint folder in words; empty if it is whole. Raises PermissionDenied if it cannot be read."""
    check_readable(checkpoint)
    try:
        checksums = json.loads((checkpoint / "checksums.json").read_text())
    except (OSError, ValueError):
        return ["checksums.json is missing or unreadable"]
    if not isinstance(checksums, dict) or any(not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys() for entry in checksums.values()):
        return ["checksums.json holds something other than sizes and digests"]
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
    """The checkpoints of one stage, of which the newest `keep` are kept."""

    root: Path
    keep: int = 2

    def all(self) -> list[Path]:
        """Checkpoint folders, oldest first. Raises PermissionDenied if they cannot be listed, because training would otherwise start anew."""
        check_readable(self.root)
        return sorted(path for path in self.root.glob("step-*") if path.is_dir())

    def choose(self, resume: str, report: Callable[[str], None] = print) -> Path | None:
        """The checkpoint to go on from: the newest whole one for auto, none for never, or the given path.

        Raises:
            InputError: never was asked for while a checkpoint exists, or the given path is no whole checkpoint.
        """
        if resume == "never":
            if self.all():
                raise InputError(f"resume is 'never', but {self.all()[-1]} exists; set resume to auto, delete it, or use --redo.")
            return None
        if resume != "auto":
            problems = broken_files(Path(resume))
            if problems:
                raise InputError(f"resume is {resume!r}, which is no whole checkpoint: {'; '.join(problems)}. "
                                 f"Whole ones here: {[str(path) for path in self.all() if not broken_files(path)] or 'none'}.")
            return Path(resume)
        for checkpoint in reversed(self.all()):
            problems = broken_files(checkpoint)
            if not problems:
                return checkpoint
            report(f"warning: {checkpoint} is not whole ({'; '.join(problems)}); taking the one before it")
        return None

    def check_not_lost(self, stage: str, export: Path, finished: bool, look_inside: bool = True) -> None:
        """Raise InputError where a stage has made its export, or did so once, and no checkpoint is left to continue from.

        A training from step 0 would replace the export with another one. `look_inside` reads the checkpoints; without it any will do.
        """
        made = str(export) if export.exists() else f"an export in {export}, which is gone" if finished else None
        left = self.all()
        if made is None or (left and not look_inside) or any(not broken_files(checkpoint) for checkpoint in reversed(left)):
            return
        what = f"none of the checkpoints in {self.root} is whole" if left else f"{self.root} holds no checkpoint any more"
        raise InputError(f"stage {stage} has made {made}, and {what}, so the training cannot continue: it would begin at step 0, and "
                         f"another export would take the place of this one. Put the checkpoints back, or make the stage anew with --redo {stage} "
                         "(which redoes what follows it too).")

    def write(self, accelerator, state: dict[str, Any], save_more: Callable[[Path], None]) -> Path:
        """Write the checkpoint of state["step"] from all ranks; `save_more(folder)` adds files on rank 0.

        Checkpoints of later steps, left over where training went on from an older one, are removed: they are of another course.
        """
        final = self.root / f"step-{state['step']:08d}"
        partial = temporary_sibling(final)
        with naming_full_disks(self.root, lambda: self._expected_bytes(accelerator)), removed_on_failure(partial):
            self._write(accelerator, state, save_more, partial, final)
        return final

    def _expected_bytes(self, accelerator) -> int:
        """About how large a checkpoint is: as the newest one, or four numbers for each weight (itself, two moments, the average)."""
        found = self.all()
        if found:
            return size_of(found[-1])
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
    """The named numbers of a checkpoint."""
    return _read_state(checkpoint)[0]


def restore_state(checkpoint: Path, cls: type[T]) -> T:
    """The named numbers of a checkpoint as an object of the dataclass `cls`. Fields that the checkpoint does not have keep their defaults."""
    state, version = _read_state(checkpoint)
    return from_fields(cls, state, str(checkpoint / "trainer_state.json"), version)


def version_of(checkpoint: Path) -> str | None:
    """The version of vqmosaic that wrote a checkpoint, where it says so."""
    return _read_state(checkpoint)[1]


def _read_state(checkpoint: Path) -> tuple[dict[str, Any], str | None]:
    """The named numbers, and the version of vqmosaic that wrote them (None if unknown)."""
    content = read_object(checkpoint / "trainer_state.json", "give another checkpoint")
    return {name: value for name, value in content.items() if name != VERSION_FIELD}, written_by(content)
