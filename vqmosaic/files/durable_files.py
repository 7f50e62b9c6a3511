"""Files and folders that are whole or absent: temporary name, flush to disk, rename."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vqmosaic.files.full_disks import naming_full_disks, size_of
from vqmosaic.files.permissions import give_usual_permissions, naming_denied_permissions

TEMPORARY_PREFIX = ".partial-"


def temporary_sibling(path: Path) -> Path:
    """The hidden name beside `path` under which it is written before the rename."""
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}")


@contextmanager
def removed_on_failure(partial: Path) -> Iterator[Path]:
    """Gives a temporary file or folder, and removes it where the block raises, so that a full disk is not full of what cannot be used."""
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
    """Force a file's or a folder entry's bytes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@naming_denied_permissions()
def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees all of it or the one before."""
    with naming_full_disks(path.parent, len(content)), removed_on_failure(temporary_sibling(path)) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        publish(partial, path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON (ASCII, in the order given) whole or not at all."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


@naming_denied_permissions()
def publish(partial: Path, path: Path) -> None:
    """Give a finished temporary file or folder the usual permissions, flush it and rename it to its real name, replacing an older one."""
    give_usual_permissions(partial)
    with naming_full_disks(path.parent):  # some file systems notice only when they flush
        _publish(partial, path)


def _publish(partial: Path, path: Path) -> None:
    if partial.is_dir():
        for inner in sorted(partial.rglob("*")):
            flush_to_disk(inner)
        if path.exists():  # a folder cannot be replaced in one step: the old one goes only when the new one is on disk
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


@naming_denied_permissions()
def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder and everything in it. The copies get the usual permissions of new files, whatever permissions the source has."""
    with naming_full_disks(target.parent, lambda: size_of(source)):
        target.mkdir(parents=True)
        for path in sorted(source.iterdir()):
            if path.is_dir():
                copy_folder(path, target / path.name)
            else:
                shutil.copyfile(path, target / path.name)


@naming_denied_permissions()
def sha256_of_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
