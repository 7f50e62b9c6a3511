"""Digests of some bytes of each image, by which a data set is known again wherever it lies. They cost a fraction of reading it whole."""

import errno
import hashlib
import os
import stat
from pathlib import Path

from vqmosaic.errors import InputError

WHOLE_BYTES = 16 * 1024
"""A content of at most this many bytes is digested whole."""
PIECE_BYTES = 4 * 1024
"""Of a longer content, this many bytes are digested at the start, in the middle and at the end."""
_LASTING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM})


def content_digest(content: bytes | memoryview) -> bytes:
    """Digest of some bytes of a content. A change of other bytes goes unnoticed unless it changes the size."""
    view, digest = memoryview(content), hashlib.blake2b(digest_size=16)
    for start, count in _pieces(len(view)):
        digest.update(view[start:start + count])
    return digest.digest()


def file_digest(path: Path) -> tuple[int | None, bytes | None]:
    """(bytes, content_digest) of a file; None for what cannot be known because the file is missing, forbidden or no regular file.

    Raises InputError where reading fails in another way: the failure may pass, and then the data set would seem to have changed.
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
        if error.errno in _LASTING:
            return size, None
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror}. Run the same command again if the file system was out of reach, "
                         "or take the file out of the data set.") from error


def _pieces(size: int) -> list[tuple[int, int]]:
    """(first byte, number of bytes) of each part that is digested."""
    if size <= WHOLE_BYTES:
        return [(0, size)]
    return [(0, PIECE_BYTES), ((size - PIECE_BYTES) // 2, PIECE_BYTES), (size - PIECE_BYTES, PIECE_BYTES)]
