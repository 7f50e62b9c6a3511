"""File permissions: gives new files the usual permissions, and explains permission errors. Loads no torch."""

import os
import pwd
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vqmosaic.errors import InputError


class PermissionDenied(InputError):
    """The user may not read or write a file. This is a separate class because some callers replace missing or damaged files."""


def current_umask() -> int:
    """The umask of this process."""
    with suppress(OSError):
        if match := re.search(r"^Umask:\s*([0-7]+)", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(match[1], 8)
    umask = os.umask(0o077)  # other systems only return it when it is set; 0077 keeps files private that another thread creates in between
    os.umask(umask)
    return umask


def give_usual_permissions(path: Path) -> None:
    """Give a file, or a folder and everything in it, at least the permissions of a newly created one: 0666 or 0777 minus the umask.

    safetensors creates its files with 0600, which other users of a machine cannot read. Permissions are added and never removed.
    """
    usual = 0o777 & ~current_umask()
    for found in (path, *path.rglob("*")):
        if found.is_symlink():
            continue
        status = found.stat()
        mode = stat.S_IMODE(status.st_mode)
        wanted = mode | (usual if stat.S_ISDIR(status.st_mode) else usual & 0o666)
        if wanted != mode:
            with suppress(OSError):  # a file system without permissions, or a linked file that belongs to somebody else
                found.chmod(wanted)


@contextmanager
def explain_permission_errors() -> Iterator[None]:
    """Turn a PermissionError about a file into PermissionDenied, which names the user, the action and the file. Also works as a decorator."""
    try:
        yield
    except PermissionError as error:
        path = error.filename2 or error.filename
        if not isinstance(path, str | bytes | os.PathLike):  # the error is about a signal, a socket or an open file
            raise
        raise permission_denied(path) from error


def check_readable(*paths: Path) -> None:
    """Raise PermissionDenied if the user may not read a file, list a folder, or read a file directly inside that folder.

    Paths that do not exist and hidden files in a folder are skipped. Call this before a library that would report the file as missing or damaged.
    """
    for path in paths:
        with explain_permission_errors(), suppress(FileNotFoundError, NotADirectoryError):
            is_folder = stat.S_ISDIR(path.stat().st_mode)
            for file in (found for found in sorted(path.iterdir()) if not found.name.startswith(".")) if is_folder else [path]:
                if file.is_file():
                    open(file, "rb").close()


def permission_denied(path: str | bytes | os.PathLike) -> PermissionDenied:
    """The error for a path that the user may not read or write. It names the file or folder that denies access, its owner and its mode."""
    path = Path(os.fsdecode(path)).absolute()
    locked = next((folder for folder in reversed(path.parents) if not _has_access(folder, os.X_OK)), None)
    if locked is not None:
        blocking, verb = locked, "enter the folder"
    elif not path.exists():
        blocking, verb = path.parent, "write into the folder"
    elif path.is_dir():
        blocking, verb = path, "write into the folder" if _has_access(path, os.R_OK | os.X_OK) else "list the folder"
    else:
        blocking, verb = path, "write" if _has_access(path, os.R_OK) else "read"
    about = f" for {path}" if blocking != path else ""
    status = blocking.stat()
    return PermissionDenied(f"permission denied{about}: the user {_user_name(os.geteuid())} may not {verb} {blocking} (owner "
                            f"{_user_name(status.st_uid)}, mode {stat.S_IMODE(status.st_mode):04o}). Ask the owner to change the mode with chmod, "
                            "or run as a user with access.")


def _has_access(path: Path, access: int) -> bool:
    return os.access(path, access, effective_ids=os.access in os.supports_effective_ids)


def _user_name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:  # containers may not know the users of the host
        return str(user)
