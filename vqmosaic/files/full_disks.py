"""Turns errors for full disks into messages with the folder, the free space and the needed space. Loads no torch."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vqmosaic.errors import InputError

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
# safetensors gives the system's message without errno. torch.save gives neither, only the error of its own writer.
DISK_FULL_PATTERN = re.compile(r"No space left on device|os error (28|122)\b|Disk quota exceeded|unexpected pos \d+ vs \d+|"
                               r"PytorchStreamWriter failed")


class DiskFull(InputError):
    """There is not enough free space to write a file."""


@contextmanager
def explain_full_disk(folder: Path, needed: int | Callable[[], int] | None = None) -> Iterator[None]:
    """Turn the error for a full disk into DiskFull, which states the folder, the free space and the needed space.

    Args:
        folder: the folder that the block writes to.
        needed: total bytes that the block writes, or a function that returns them. It is called only if the disk is full.
    """
    try:
        yield
    except Exception as error:
        if not is_full(error) or (isinstance(error, DiskFull) and needed is None):
            raise
        raise disk_full(folder, needed() if callable(needed) else needed, is_quota(error)) from error


@contextmanager
def explain_any_full_disk() -> Iterator[None]:
    """Turn the error for a full disk that no writer has explained into DiskFull. It names the folder if the error has a path."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
        path = error.filename2 or error.filename
        if isinstance(path, str | bytes | os.PathLike):
            raise disk_full(Path(os.fsdecode(path)).parent, quota=is_quota(error)) from error
        free = [f"{size_text(free_bytes(folder))} in {folder}" for folder in (Path.cwd(), Path(tempfile.gettempdir()))]
        raise DiskFull(f"no space left on a disk: {error.strerror}. Free space: {' and '.join(free)}. {REMEDY}") from error


REMEDY = "All finished work is intact. Free some space, then run the same command again to continue."


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, reports a full disk or an exhausted quota."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
            return True
        if not isinstance(error, InputError) and DISK_FULL_PATTERN.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_quota(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, reports an exhausted quota."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno == errno.EDQUOT) or re.search(r"os error 122\b|Disk quota exceeded", str(error)):
            return True
        error = error.__cause__
    return False


def disk_full(folder: Path, needed: int | None = None, quota: bool = False) -> DiskFull:
    """The error for a folder on a full disk, with the free bytes and, if known, the needed bytes."""
    folder = folder.absolute()
    about = f", about {size_text(needed)} needed" if needed else ""
    if quota:
        return DiskFull(f"no space left in {folder}: the disk quota of this user is exhausted{about}. {REMEDY}")
    return DiskFull(f"no space left in {folder}: {size_text(free_bytes(folder))} free{about}. {REMEDY}")


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder that may not exist yet."""
    for existing in (folder, *folder.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(existing).free
    return 0


def size_of(path: Path) -> int:
    """Size in bytes of a file, or of all files in a folder."""
    return sum(found.stat().st_size for found in (path, *path.rglob("*")) if found.is_file())


def size_text(count: int) -> str:
    """A number of bytes in a readable unit, such as 1.5 MiB."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
