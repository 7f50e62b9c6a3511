"""Writes files and folders atomically: to a temporary name, flushed to disk, then renamed."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vqmosaic.files.full_disks import explain_full_disk, size_of
from vqmosaic.files.permissions import explain_permission_errors, give_usual_permissions

TEMPORARY_PREFIX = ".partial-"


def temporary_sibling(path: Path) -> Path:
    """The hidden temporary path beside `path` that is written first and then renamed."""
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}")


@contextmanager
def removed_on_failure(partial: Path) -> Iterator[Path]:
    """Remove a temporary file or folder if the block raises, so that a full disk is not filled with unusable files."""
    try:
        yield partial
    except BaseException:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        raise


def flush_to_disk(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@explain_permission_errors()
def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader sees either all of it or the previous file."""
    with explain_full_disk(path.parent, len(content)), removed_on_failure(temporary_sibling(path)) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        publish(partial, path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON (ASCII, keys in the given order) atomically."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


@explain_permission_errors()
def publish(partial: Path, path: Path) -> None:
    """Give a finished temporary file or folder the usual permissions, flush it, and rename it to `path`, which it replaces."""
    give_usual_permissions(partial)
    with explain_full_disk(path.parent):  # some file systems report a full disk only at the flush
        _publish(partial, path)


def _publish(partial: Path, path: Path) -> None:
    if partial.is_dir():
        for inner in sorted(partial.rglob("*")):
            flush_to_disk(inner)
        if path.exists():  # a folder cannot be replaced in one step, so the old one is removed only when the new one is on disk
            discarded = path.with_name(f"{TEMPORARY_PREFIX}old-{path.name}")
            shutil.rmtree(discarded, ignore_errors=True)
            flush_to_disk(partial)
            os.replace(path, discarded)
            os.replace(partial, path)
            shutil.rmtree(discarded, ignore_errors=True)
            flush_to_disk(path.parent)
            return
    flush_to_disk(partial)
    os.replace(partial, path)
    flush_to_disk(path.parent)


@explain_permission_errors()
def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder recursively. The copies get the usual permissions of new files, not those of the source."""
    with explain_full_disk(target.parent, lambda: size_of(source)):
        target.mkdir(parents=True)
        for path in sorted(source.iterdir()):
            if path.is_dir():
                copy_folder(path, target / path.name)
            else:
                shutil.copyfile(path, target / path.name)


@explain_permission_errors()
def sha256_of_file(path: Path) -> str:
    """SHA-256 of the contents of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
