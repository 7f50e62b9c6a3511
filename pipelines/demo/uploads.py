"""Stores the uploads of the demo under unguessable names, next to gradio's results, and limits the total size of both."""

import asyncio
import contextlib
import logging
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartParser

from pipelines.demo.http_limits import IDLE_SECONDS, ClientDisconnected, Refusal, format_error, read_body, report

MAX_UPLOAD_BYTES = 2**26
MAX_STORED_BYTES = 2**30  # uploads and results together; the oldest ones are deleted first
BYTES_PER_FILE = 2**13  # disk space of the smallest file and its folder
MAX_UPLOADS_AT_ONCE = 8
SWEEP_SECONDS = 60.0  # between checks of the stored files
# The guard reports invalid forms. The parser's own warnings would be further lines on the terminal.
logging.getLogger("python_multipart").setLevel(logging.ERROR)
_FOLDER = re.compile(r"[0-9a-f]{64}")
"""Name of the folder of an upload or result."""


class Uploads:
    """The uploads and results that are stored in a folder. `path in uploads` is true only for uploads."""

    def __init__(self, folder: Path, paths: set[str]):
        """Use gradio's folder and its set of uploads.

        Args:
            folder: uploads and results, each in its own sub-folder.
            paths: gradio's set of the paths of uploads, which is updated here. gradio deletes these files after a day.
        """
        self._folder, self._paths = folder, paths
        self._slots = asyncio.Semaphore(MAX_UPLOADS_AT_ONCE)
        self._lock = threading.Lock()  # one thread at a time checks for free space and reserves it
        self._stored = 0  # bytes found by the last scan of the folder, plus later uploads

    def __contains__(self, path: object) -> bool:
        return isinstance(path, str) and path in self._paths

    def is_served(self, path: str) -> bool:
        """Whether a path is an existing upload or result, so the server may send it. The path must be in normal form and not a link."""
        file = Path(path)
        try:
            return (file.parent.parent in (self._folder, self._folder.resolve()) and bool(_FOLDER.fullmatch(file.parent.name))
                    and str(file) == path and file.is_file() and not file.is_symlink())
        except (OSError, ValueError):  # not a valid file name
            return False

    async def store(self, headers: Headers, receive: Callable) -> str:
        """Store the file of an upload form under an unguessable name and return its path.

        Raises Refusal if the form is invalid, the disk is full, or too many uploads are in progress, and ClientDisconnected.
        """
        if not headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise Refusal(415, "An upload must be a form with one file, with Content-Type: multipart/form-data.")
        try:
            await asyncio.wait_for(self._slots.acquire(), IDLE_SECONDS)
        except TimeoutError:
            raise Refusal(503, "Too many uploads are in progress. Try again later.") from None
        try:
            chunks = read_body(headers, receive, MAX_UPLOAD_BYTES)
            form = await MultiPartParser(headers, chunks, max_files=1, max_fields=4, max_part_size=1000).parse()
            files = [value for value in form.getlist("files") if isinstance(value, UploadFile)]
            if not files:
                raise Refusal(400, "The form holds no file named `files`.")
            path = self._folder / secrets.token_hex(32) / safe_name(files[0].filename or "")
            await asyncio.to_thread(self._write, files[0].file, path)
            await form.close()
        except (Refusal, ClientDisconnected):
            raise
        except OSError as error:
            raise Refusal(507, f"The upload cannot be stored: {error.strerror}.") from None
        except Exception:  # for an invalid form, the parser raises errors of any type
            raise Refusal(400, "An upload must be a form with one file.") from None
        finally:
            self._slots.release()
        self._paths.add(str(path))
        return str(path)

    def _write(self, file: BinaryIO, path: Path) -> None:
        """Write an upload to `path`. Deletes the oldest files first if it would exceed the limit."""
        size = file.seek(0, os.SEEK_END) + BYTES_PER_FILE
        file.seek(0)
        with self._lock:
            if self._stored + size > MAX_STORED_BYTES:
                self._make_room()
            self._stored += size
            path.parent.mkdir(parents=True)
            with open(path, "xb") as stored:
                shutil.copyfileobj(file, stored)

    def _make_room(self) -> None:
        """Delete the oldest files, until there is room for two uploads of the largest size.

        With less room, each small upload near the limit would scan the whole folder. The caller holds the lock.
        """
        removed, self._stored = make_room(self._folder, MAX_STORED_BYTES - 2 * MAX_UPLOAD_BYTES)
        self._paths.difference_update(map(str, removed))

    def _sweep(self) -> None:
        with self._lock:
            self._make_room()

    async def keep_room(self) -> None:
        """Delete the oldest files regularly, because gradio stores results without calling store(). Runs until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                await asyncio.to_thread(self._sweep)
            except Exception as error:  # the next sweep may succeed; without sweeps the disk would fill up
                report("error", "stored files", format_error(error))


def safe_name(name: str) -> str:
    """Reduce a file name from a browser to its last 80 characters, which are letters, digits, dots, - and _. "image" if nothing is left."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", os.path.basename(name.replace("\\", "/")))[-80:].lstrip(".")
    return name or "image"


def make_room(folder: Path, limit: int) -> tuple[list[Path], int]:
    """Delete the oldest uploads and results until the folder holds no more than `limit` bytes.

    Returns the deleted paths and the number of remaining bytes. Other threads, including gradio's, may delete files and folders meanwhile.
    """
    files: list[tuple[float, Path, int]] = []  # time of the last change, path, bytes
    for parent in [entry.path for entry in os.scandir(folder) if _FOLDER.fullmatch(entry.name)]:
        with contextlib.suppress(OSError):
            for entry in os.scandir(parent):
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    files.append((status.st_mtime, Path(entry.path), status.st_size + BYTES_PER_FILE))
    total, removed = sum(size for *_, size in files), []
    for _, path, size in sorted(files):
        if total <= limit:
            break
        with contextlib.suppress(OSError):  # another request may have deleted the file, or stored a second file in the folder
            path.unlink()
            path.parent.rmdir()
        removed.append(path)
        total -= size
    return removed, total
