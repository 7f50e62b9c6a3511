"""Checks paths from users: strings that cannot be paths are refused before anything opens the file. Loads no torch."""

import argparse
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vqmosaic.errors import InputError, printable

_MAX_SHOWN_CHARACTERS = 80


def check_path(field: str, text: str) -> None:
    """Raise InputError for a string that cannot be a path: empty, with a null byte, too long, through a file, or in a loop of links.

    A path that does not exist is valid. `field` is the name of the field or option in the message.
    """
    reason = path_problem(text)
    if reason is not None:
        shown = printable(text if len(text) <= _MAX_SHOWN_CHARACTERS else f"{text[:_MAX_SHOWN_CHARACTERS]}...")
        raise InputError(f"{field} is {shown!r}, {reason}.")


def path_problem(text: str) -> str | None:
    """The reason why a string cannot be a path, as a clause; None if it can be one."""
    if not text:
        return "which is empty; give a path, such as . for the working directory"
    try:
        os.stat(os.path.expanduser(text))
    except ValueError:  # the string itself is invalid
        return "which cannot be a path: it contains a null byte or characters that no name can contain"
    except OSError as error:
        return impossible_path_reason(error)
    return None


def impossible_path_reason(error: OSError) -> str | None:
    """The reason as a clause, if an error reports that a path cannot exist; None for other errors."""
    if error.errno == errno.ENAMETOOLONG:
        return "which is too long for a path: most file systems allow 255 bytes for a name and 4,095 for the whole path"
    if error.errno == errno.ELOOP:
        return "which is in a loop of links"
    if error.errno == errno.ENOTDIR:
        path = Path(os.path.expanduser(os.fsdecode(error.filename)))
        return f"but {next((parent for parent in path.parents if parent.is_file()), path.parent)} is a file and not a folder"
    return None


def given_path(text: str) -> Path:
    """Convert an argument of a command to a Path. For use as an argparse type."""
    reason = path_problem(text)
    if reason is not None:
        raise argparse.ArgumentTypeError(f"{printable(text[:_MAX_SHOWN_CHARACTERS])!r} was given, {reason}")
    return Path(text)


@contextmanager
def explain_impossible_paths() -> Iterator[None]:
    """Turn an OSError for a path that cannot exist into an InputError that shows the path."""
    try:
        yield
    except OSError as error:
        reason = impossible_path_reason(error) if isinstance(error.filename, str | bytes) else None
        if reason is None:
            raise
        raise InputError(f"a path is {printable(os.fsdecode(error.filename)[:_MAX_SHOWN_CHARACTERS])!r}, {reason}.") from error
