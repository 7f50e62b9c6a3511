"""Full disks: code that writes names its folder, and the error for a full disk names the folder and the bytes. Loads no torch."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vqmosaic.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT)
# safetensors gives the operating system's words and no number; torch.save names neither, only what its writer noticed
WORDS_OF_FULL = re.compile(r"No space left on device|os error (28|122)\b|Disk quota exceeded|unexpected pos \d+ vs \d+|PytorchStreamWriter failed")


class DiskFull(InputError):
    """There is no room left where something is to be written."""


@contextmanager
def naming_full_disks(folder: Path, needed: int | Callable[[], int] | None = None) -> Iterator[None]:
    """Turn the error of a full disk into DiskFull, which says which folder is full, how much is free there and how much is needed.

    Args:
        folder: where the block writes.
        needed: bytes that the block writes altogether, or a function that returns them. It is called only when there is no room.
    """
    try:
        yield
    except Exception as error:
        if not is_full(error) or (isinstance(error, DiskFull) and needed is None):
            raise
        raise disk_full(folder, needed() if callable(needed) else needed, is_quota(error)) from error


@contextmanager
def naming_any_full_disk() -> Iterator[None]:
    """Turn the error of a full disk that no writer has explained into DiskFull. It names the file's folder where the error does."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        path = error.filename2 or error.filename
        if isinstance(path, str | bytes | os.PathLike):
            raise disk_full(Path(os.fsdecode(path)).parent, quota=is_quota(error)) from error
        places = [f"{size_text(free_bytes(place))} in {place}" for place in (Path.cwd(), Path(tempfile.gettempdir()))]
        raise DiskFull(f"no space left on a disk: {error.strerror}. Free are {' and '.join(places)}. {REMEDY}") from error


REMEDY = "What was finished before is whole. Free some space, and run the same command again: it continues."


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that a disk is full or a quota used up."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if not isinstance(error, InputError) and WORDS_OF_FULL.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_quota(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that a quota is used up."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno == errno.EDQUOT) or re.search(r"os error 122\b|Disk quota exceeded", str(error)):
            return True
        error = error.__cause__
    return False


def disk_full(folder: Path, needed: int | None = None, quota: bool = False) -> DiskFull:
    """The error for a folder without room, with the bytes that are free and that are needed, where that is known."""
    folder = folder.absolute()
    about = f", about {size_text(needed)} needed" if needed else ""
    if quota:
        return DiskFull(f"no space left in {folder}: the disk quota of this user is used up{about}. {REMEDY}")
    return DiskFull(f"no space left in {folder}: {size_text(free_bytes(folder))} free{about}. {REMEDY}")


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk that a folder lies on, or will lie on."""
    for place in (folder, *folder.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return 0


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(found.stat().st_size for found in (path, *path.rglob("*")) if found.is_file())


def size_text(count: int) -> str:
    """A number of bytes in the unit that suits it, such as 1.5 MiB."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
