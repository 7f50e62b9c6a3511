"""What a request to the demo may ask for: the fields of the page within their bounds, and images of a size that the demo can decode."""

import contextlib
import io
import math
import os
import secrets
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from pipelines.demo import avif_decoder as demo_avif
from pipelines.generate import ImageGenerationPipeline
from stage1_tokenizer.image_files.images import UnreadableImage, read_image
from vqmosaic.errors import InputError, check_range, nearest_name

MAX_IMAGES = 64
MAX_PIXELS = MAX_IMAGES * 256**2  # of all images of one request
MAX_SEED = 2**53 - 1  # the largest whole number that a page counts exactly
MAX_UPLOAD_PIXELS = 16_000_000  # decoded: 16-bit ones take 24 bytes each on the way to 8 bits
MAX_JPEG_PIXELS = 64_000_000  # in the file; those of more than MAX_UPLOAD_PIXELS are decoded at a fraction of their size
# The formats that browsers show. Others are not opened: some take minutes to decode, or more memory than the image size suggests.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "AVIF")
DECODING_SECONDS = 20.0
TOO_SLOW = "it takes longer than {:g} s to decode"
STOP_SECONDS = 0.05  # between two checks of the stop flag
JPEG_BLOCK_BYTES = 512  # read by the JPEG decoder at a time; a progressive JPEG can encode a pass over all pixels in under 100 bytes
_DECODER = ThreadPoolExecutor(1, "decoder")


def image_limit(pipe: ImageGenerationPipeline) -> int:
    """Images that one request may ask for: 64, fewer where they are large."""
    return max(1, min(MAX_IMAGES, MAX_PIXELS // pipe.tokenizer.transform.image_size**2))


def checked_request(pipe: ImageGenerationPipeline, classes: object, number: object, seed: object, temperature: object, top_k: object,
                    top_p: object, guidance: object) -> tuple[list[str], int, int, dict[str, float]]:
    """Classes, number, seed and sampling as `generate` takes them; a seed of None is a new one.

    Raises InputError for what the fields of the page cannot hold.
    """
    names = pipe.class_names or []
    if not isinstance(classes or [], list) or not all(isinstance(name, str) for name in classes or []):
        raise InputError(f"Classes is {shown_value(classes)}; it must be a list of class names.")
    for name in classes or []:
        if name not in names:
            nearest = nearest_name(name, names)
            raise InputError(f"There is no class {shown_value(name)}.{f' Did you mean {nearest!r}?' if nearest else ''}")
    sampling = {"temperature": checked_number("Temperature", temperature, 0, largest_temperature(pipe)),
                "top_k": checked_number("Top-k", top_k, 0, pipe.tokenizer.config.codebook_size, is_whole=True),
                "top_p": checked_number("Top-p", top_p, 0.01, 1),
                "guidance_scale": checked_number("Guidance scale", guidance, 0, largest_guidance(pipe))}
    if sampling["guidance_scale"] != 1 and not (names and pipe.prior.vocabulary.label_drop):
        raise InputError(f"Guidance scale is {guidance}; this prior cannot be guided, so it must be 1.")
    count = checked_number(number_label(pipe), number, 1, image_limit(pipe), is_whole=True)
    seed = secrets.randbelow(2**31) if seed is None else checked_number("Seed", seed, 0, MAX_SEED, is_whole=True)
    return classes or [], count, seed, sampling


def checked_number(label: str, given: object, at_least: float, at_most: float, is_whole: bool = False) -> float:
    """The number that a field of the page holds; raises InputError for anything else, and outside of the bounds."""
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise InputError(f"{label} is {shown_value(given)}; it must be a number.")
    check_range(label, given, at_least=at_least, at_most=at_most)
    if is_whole and given != int(given):
        raise InputError(f"{label} is {given}; it must be a whole number.")
    return int(given) if is_whole else given


def number_label(pipe: ImageGenerationPipeline) -> str:
    """What the field for the number of images is called."""
    return "Images of each class" if pipe.class_names else "Images"


def largest_temperature(pipe: ImageGenerationPipeline) -> float:
    """The largest temperature that the page offers."""
    return max(2, pipe.sampling.temperature)


def largest_guidance(pipe: ImageGenerationPipeline) -> float:
    """The largest guidance scale that the page offers."""
    return max(10, pipe.sampling.guidance_scale)


def shown_value(given: object) -> str:
    """A value as an error message shows it, at most 60 characters."""
    return text if len(text := repr(given)) <= 60 else f"{text[:57]}..."


def read_upload(path: str | os.PathLike, stop: threading.Event, *, channels: int, side: int) -> Image.Image | None:
    """The image in an uploaded file, or None once `stop` is set. Raises UnreadableImage for files that this page does not accept.

    A second thread decodes the image, because decoders written in C cannot be interrupted. After a stop, that thread still finishes the image,
    which takes seconds at most. The worker is free immediately. The next upload waits for the thread.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError("This upload is no longer stored. Upload the image again.") from None
    if "AVIF" in Image.OPEN and Image.OPEN["AVIF"][1](content[:16]) is True:
        with contextlib.suppress(OSError, Image.DecompressionBombError), Image.open(io.BytesIO(content), formats=("AVIF",)) as header:
            bound_size(header, side)
        content = avif_as_png(path, stop)
    with StoppableFile(content, stop) as file:
        decoding = _DECODER.submit(read_image, file, channels=channels, formats=FORMATS, before_decoding=lambda image: bound_size(image, side))
        while not stop.is_set():
            try:
                return decoding.result(timeout=STOP_SECONDS)
            except TimeoutError:
                continue
            except UnreadableImage:
                if not stop.is_set():
                    raise
    return None


def avif_as_png(path: str | os.PathLike, stop: threading.Event) -> bytes:
    """The bytes of an AVIF file as PNG, decoded by another process; empty once `stop` is set.

    Raises UnreadableImage if the file cannot be decoded or takes longer than DECODING_SECONDS.
    """
    end = time.monotonic() + DECODING_SECONDS
    with subprocess.Popen([sys.executable, "-P", demo_avif.__file__, os.path.abspath(path)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as process:
        try:
            while not stop.is_set():
                try:
                    png, _ = process.communicate(timeout=STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    if time.monotonic() > end:
                        raise UnreadableImage(TOO_SLOW.format(DECODING_SECONDS)) from None
                    continue
                if process.returncode:
                    raise UnreadableImage("truncated, corrupt, or decoding it takes too much memory")
                return png
        finally:
            process.kill()
    return b""


def bound_size(image: Image.Image, side: int) -> None:
    """Ask the decoder of a large JPEG for fewer pixels, still four for each of `side`; raise UnreadableImage for images that stay too large."""
    width, height = image.size
    if image.format in ("JPEG", "MPO"):
        image.decodermaxblock = JPEG_BLOCK_BYTES
    if MAX_UPLOAD_PIXELS < width * height <= MAX_JPEG_PIXELS:
        image.draft(None, (4 * side, 4 * side))  # does nothing for other formats
    if image.width * image.height > MAX_UPLOAD_PIXELS:
        raise UnreadableImage(f"{width} x {height} pixels, more than the {MAX_UPLOAD_PIXELS // 10**6} million that this page takes "
                              f"({MAX_JPEG_PIXELS // 10**6} million as JPEG); save it smaller")


class StoppableFile(io.BytesIO):
    """A file with the given content that refuses further reads once `stop` is set, or after DECODING_SECONDS.

    That ends the decoders that work through a file piece by piece, among them the slow ones, which are written in Python.
    """

    def __init__(self, content: bytes, stop: threading.Event):
        super().__init__(content)
        self._stop, self._end = stop, math.inf

    def read(self, size: int | None = -1) -> bytes:
        """The next bytes; raises UnreadableImage when there is no more time for them."""
        if self._stop.is_set():
            raise UnreadableImage("stopped")
        self._end = min(self._end, time.monotonic() + DECODING_SECONDS)  # counted from the first read: the decoder may be busy before that
        if time.monotonic() > self._end:
            raise UnreadableImage(TOO_SLOW.format(DECODING_SECONDS))
        return super().read(size)
