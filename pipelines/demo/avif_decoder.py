"""Decodes one AVIF file, given by its path, and writes it to stdout as PNG. Runs in its own process.

libavif decodes all data in the frames of a file, regardless of the size in the header, and Pillow holds the GIL meanwhile. In the demo's own
process, a file of 2 KB could block all responses for many seconds. This process can be killed, and its memory is limited. It imports Pillow
and nothing from vqmosaic, so it starts in a tenth of a second.
"""

import contextlib
import sys

from PIL import AvifImagePlugin, Image

MAX_MEMORY_BYTES = 2**31
MAX_EXIF_BYTES = 2**16
ORIENTATION_TAG = 0x0112


def main() -> None:
    """Write the pixels and the orientation of the image. Exits with an error if the image cannot be decoded."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # some systems do not have this limit
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    AvifImagePlugin.DEFAULT_MAX_THREADS = 2  # each thread reserves memory
    load_exif = Image.Exif.load
    Image.Exif.load = lambda self, data: load_exif(self, data[:MAX_EXIF_BYTES])  # type: ignore[method-assign]  # replaced as in metadata_limits.py
    with Image.open(sys.argv[1], formats=["AVIF"]) as image:
        image.load()
        exif = Image.Exif()
        with contextlib.suppress(Exception):  # broken metadata can raise any error, but the pixels may still be valid
            exif[ORIENTATION_TAG] = int(image.getexif()[ORIENTATION_TAG])
        image.info = {}
        image.save(sys.stdout.buffer, "PNG", compress_level=0, exif=exif)


if __name__ == "__main__":
    main()
