"""The paths in a run folder, and the lock that keeps two processes from writing to the same folder. Loads no torch."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vqmosaic.errors import InputError
from vqmosaic.files.full_disks import DISK_FULL_ERRNOS, disk_full, explain_full_disk, is_quota

STAGES = ("tokenizer", "tokens", "prior", "pipeline")
REDO_STAGES = ("tokenizer", "conditions", "tokens", "prior", "pipeline")
"""Values of --redo. `conditions` are the tokenizers of all conditions, each a run of its own in conditions/<name>."""
LOCK_WAIT_SECONDS = 10.0


def main_stage(redo_stage: str | None) -> str | None:
    """The first stage of the run itself that --redo repeats."""
    return "tokens" if redo_stage == "conditions" else redo_stage


@dataclass(frozen=True)
class RunFolder:
    """Paths inside runs/<name>/; each stage's export has the stage's name."""

    root: Path

    def export(self, stage: str) -> Path:
        """The result of a stage, which later stages read: tokenizer/, tokens/, prior/ or pipeline/."""
        return self.root / stage

    def checkpoints(self, stage: str) -> Path:
        """Training state of a stage, needed only to continue training."""
        return self.root / "checkpoints" / stage

    def logs(self, stage: str) -> Path:
        """metrics.jsonl and sample images of a stage."""
        return self.root / "logs" / stage

    def record(self, stage: str) -> Path:
        """The recipe fields and inputs of a stage's last run (vqmosaic/runs/stage_records.py)."""
        return self.root / "stages" / f"{stage}.json"

    @property
    def recipe(self) -> Path:
        """The complete recipe of the last command, so that a run folder can be given in place of a recipe."""
        return self.root / "recipe.yaml"

    @property
    def summary(self) -> Path:
        """The metrics of all stages together."""
        return self.root / "summary.json"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run for this process. Waits up to LOCK_WAIT_SECONDS, for a killed process to end, then raises InputError."""
        with locked(self.root, "run_dir"):
            yield


@contextmanager
def locked(path: Path, given_as: str, lock: Path | None = None) -> Iterator[None]:
    """Lock a folder or a file for this process. The system releases the lock when the process ends, so a killed process does not block others.

    Args:
        path: the folder or file to lock.
        given_as: the field or option that gives `path`, for errors.
        lock: the lock file, by default .lock in the folder `path`. It is not deleted, and contains the ID of the last process.

    Raises:
        InputError: another process holds the lock for longer than LOCK_WAIT_SECONDS, or the lock file cannot be written or locked.
    """
    lock = path / ".lock" if lock is None else lock
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "a+")  # noqa: SIM115, closed by the block below
    except OSError as error:
        if error.errno in DISK_FULL_ERRNOS:
            raise disk_full(lock.parent, quota=is_quota(error)) from error
        raise InputError(f"{given_as} {path} cannot be written: {error.strerror}. Set {given_as} to a writable path.") from None
    with file:
        deadline = time.monotonic() + LOCK_WAIT_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise InputError(f"{given_as} {path} is in use by process {file.read().strip() or '?'}; wait for it, stop it, "
                                     f"or set another {given_as}.") from None
                time.sleep(0.2)
            except OSError as error:  # for example a network file system without locks
                raise InputError(f"{given_as} {path} cannot be locked: {error.strerror}. Set {given_as} to a path on another "
                                 "file system.") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        with explain_full_disk(lock.parent):
            file.flush()
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process currently holds the lock of the folder."""
    try:
        with open(folder / ".lock", "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False  # `locked` reports the error
