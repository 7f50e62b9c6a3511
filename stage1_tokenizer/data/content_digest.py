"""Digests of a few bytes of each image. They identify a data set wherever it is stored, at a fraction of the cost of reading all of it."""

import errno
import hashlib
import os
import stat
from pathlib import Path

from vqmosaic.errors import InputError

FULL_DIGEST_BYTES = 16 * 1024
"""Contents of up to this many bytes are digested completely."""
PIECE_BYTES = 4 * 1024
"""For longer contents, this many bytes are digested at the start, in the middle and at the end."""
_PERMANENT_ERRORS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM})


def content_digest(content: bytes | memoryview) -> bytes:
    """Digest of some bytes of a content. Changes to other bytes go unnoticed unless the size changes."""
    view, digest = memoryview(content), hashlib.blake2b(digest_size=16)
    for start, count in _pieces(len(view)):
        digest.update(view[start:start + count])
    return digest.digest()


def file_digest(path: Path) -> tuple[int | None, bytes | None]:
    """(size in bytes, content_digest) of a file; None for values that are unknown: the file is missing, forbidden or not a regular file.

    Raises InputError if reading fails in another way: the failure may be temporary, and the data set would seem to have changed.
    """
    size = None
    try:
        status = os.stat(path)
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            return size, None
        with open(path, "rb", buffering=0) as file:
            digest = hashlib.blake2b(digest_size=16)
            for start, count in _pieces(size):
                digest.update(os.pread(file.fileno(), count, start))
        return size, digest.digest()
    except ValueError:  # no file can have this path: it contains a null character
        return None, None
    except OSError as error:
        if error.errno in _PERMANENT_ERRORS:
            return size, None
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror}. Run the same command again if the file system was unavailable, "
                         "or remove the file from the data set.") from error


def _pieces(size: int) -> list[tuple[int, int]]:
    """(first byte, number of bytes) of each part that is digested."""
    if size <= FULL_DIGEST_BYTES:
        return [(0, size)]
    return [(0, PIECE_BYTES), ((size - PIECE_BYTES) // 2, PIECE_BYTES), (size - PIECE_BYTES, PIECE_BYTES)]
