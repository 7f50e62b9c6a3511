"""Checks requests to the demo: the fields of the page and their bounds, and the format and size of uploaded images."""

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
from dataclasses import dataclass, fields
from pathlib import Path

from PIL import Image, ImageFile

from pipelines.demo import avif_decoder as demo_avif
from pipelines.generate import ImageGenerationPipeline
from stage1_tokenizer.image_files.float_images import FloatImage
from stage1_tokenizer.image_files.images import ImageTransform, UnreadableImage, read_image
from vqmosaic.errors import InputError, check_range, did_you_mean
from vqmosaic.recipes.image_sizes import ImageSize, height_and_width
from vqmosaic.recipes.recipe_sections import SamplingConfig

MAX_IMAGES = 64
MAX_PIXELS = MAX_IMAGES * 256**2  # in all images of a request
MAX_SEED = 2**53 - 1  # the largest integer that JavaScript represents exactly
MAX_UPLOAD_PIXELS = 16_000_000  # after decoding; the conversion of 16-bit images to 8 bits needs 24 bytes per pixel
MAX_JPEG_PIXELS = 64_000_000  # in the file; JPEGs with more than MAX_UPLOAD_PIXELS are decoded at a reduced size
# Formats that browsers display. Others are rejected: some take minutes to decode, or more memory than the image size suggests.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "AVIF")
DECODING_SECONDS = 20.0
TOO_SLOW = "it takes longer than {:g} s to decode"
STOP_SECONDS = 0.05  # between checks of the stop flag
JPEG_BLOCK_BYTES = 512  # per read of the JPEG decoder; a progressive JPEG can encode a pass over all pixels in under 100 bytes
_DECODER = ThreadPoolExecutor(1, "decoder")


def image_limit(pipe: ImageGenerationPipeline) -> int:
    """The largest number of images in a request: 64, or fewer if they are large."""
    return max(1, min(MAX_IMAGES, MAX_PIXELS // math.prod(pipe.tokenizer.transform.sides)))


@dataclass(frozen=True)
class Control:
    """A slider of the page for one field of SamplingConfig."""

    name: str
    """The field."""
    minimum: float
    maximum: float
    step: float

    @property
    def label(self) -> str:
        """The label on the page, such as "Guidance scale"."""
        return self.name.replace("_", "-" if len(self.name) <= 5 else " ").capitalize()


def sampling_controls(pipe: ImageGenerationPipeline) -> list[Control]:
    """The sliders of the page: fields of SamplingConfig with a slider, then guidance, then the number of passes if the prior predicts in any order.

    They reach at least to the recommended settings.
    """
    controls = []
    for field in sorted(fields(SamplingConfig), key=lambda field: field.name.startswith("guidance_")):
        if "slider" in field.metadata:
            minimum, maximum, step = field.metadata["slider"]
            largest = pipe.vocabulary.most_codes if maximum is None else max(maximum, getattr(pipe.sampling, field.name))
            controls.append(Control(field.name, minimum, largest, step))
    if pipe.chain.any_order:
        controls.append(Control("steps", 1, pipe.vocabulary.most_steps, 1))
    return controls


def checked_request(pipe: ImageGenerationPipeline, classes: object, number: object, seed: object,
                    *settings: object) -> tuple[list[str], int, int, dict[str, float]]:
    """Check the fields of the page and return classes, number, seed and sampling settings. A random seed replaces a seed of None.

    `settings` are the values of sampling_controls. Raises InputError for values that the fields do not allow.
    """
    names = pipe.vocabulary.learned_class_names or []
    classes = classes or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise InputError(f"Classes is {shown_value(classes)}; it must be a list of class names.")
    for name in classes:
        if name not in names:
            raise InputError(f"There is no class {shown_value(name)}.{did_you_mean(name, names)}")
    sampling: dict[str, float] = {}
    for control, value in zip(sampling_controls(pipe), settings, strict=True):
        check = checked_integer if control.step == 1 else checked_number
        sampling[control.name] = check(control.label, value, control.minimum, control.maximum)
    if sampling["guidance_scale"] != 1 and pipe.vocabulary.why_unguided():
        raise InputError(f"Guidance scale is {sampling['guidance_scale']}; it must be 1, because this prior does not support guidance.")
    count = checked_integer(number_label(pipe), number, 1, image_limit(pipe))
    checked_seed = secrets.randbelow(2**31) if seed is None else checked_integer("Seed", seed, 0, MAX_SEED)
    return classes, count, checked_seed, sampling


def checked_number(label: str, given: object, at_least: float, at_most: float) -> float:
    """The number in a field of the page. Raises InputError if it is not a number, or out of bounds."""
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise InputError(f"{label} is {shown_value(given)}; it must be a number.")
    check_range(label, given, at_least=at_least, at_most=at_most)
    return given


def checked_integer(label: str, given: object, at_least: float, at_most: float) -> int:
    """The whole number in a field of the page, as int. Raises InputError as `checked_number` does, and for fractions."""
    number = checked_number(label, given, at_least, at_most)
    if number != int(number):
        raise InputError(f"{label} is {number}; it must be a whole number.")
    return int(number)


def number_label(pipe: ImageGenerationPipeline) -> str:
    """The label of the field for the number of images."""
    return "Images of each class" if pipe.vocabulary.learned_class_names else "Images"


def shown_value(given: object) -> str:
    """Format a value for an error message, with at most 60 characters."""
    return text if len(text := repr(given)) <= 60 else f"{text[:57]}..."


def read_upload(path: str | os.PathLike, stop: threading.Event, transform: ImageTransform) -> Image.Image | FloatImage | None:
    """Read an uploaded image for a transform. Returns None once `stop` is set. Raises UnreadableImage for files that the page does not accept.

    A second thread decodes the image, because decoders written in C cannot be interrupted. After a stop, the worker is free immediately, while
    that thread finishes the image, which takes seconds at most. The next upload waits for it.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError("This upload is no longer stored. Upload the image again.") from None
    is_avif = Image.OPEN["AVIF"][1] if "AVIF" in Image.OPEN else None  # None if Pillow cannot read AVIF
    if is_avif is not None and is_avif(content[:16]) is True:
        with contextlib.suppress(OSError, Image.DecompressionBombError), Image.open(io.BytesIO(content), formats=("AVIF",)) as header:
            limit_decoded_size(header, transform.image_size)
        content = avif_as_png(path, stop)
    with StoppableFile(content, stop) as file:
        decoding = _DECODER.submit(read_image, file, channels=transform.channels, value_range=transform.value_range, formats=FORMATS,
                                   before_decoding=lambda image: limit_decoded_size(image, transform.image_size))
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
    """Convert an AVIF file to the bytes of a PNG in another process. Returns empty bytes once `stop` is set.

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


def limit_decoded_size(image: Image.Image, image_size: ImageSize) -> None:
    """Reduce the decoded size of a large JPEG, to at least four times `image_size` per side. Raises UnreadableImage if an image is too large."""
    width, height = image.size
    if isinstance(image, ImageFile.ImageFile) and image.format in ("JPEG", "MPO"):
        image.decodermaxblock = JPEG_BLOCK_BYTES
    if MAX_UPLOAD_PIXELS < width * height <= MAX_JPEG_PIXELS:
        needed_height, needed_width = height_and_width(image_size)
        image.draft(None, (4 * needed_width, 4 * needed_height))  # does nothing for other formats
    if image.width * image.height > MAX_UPLOAD_PIXELS:
        raise UnreadableImage(f"{width} x {height} pixels, more than the {MAX_UPLOAD_PIXELS // 10**6} million that this page accepts "
                              f"({MAX_JPEG_PIXELS // 10**6} million as JPEG); reduce its size")


class StoppableFile(io.BytesIO):
    """An in-memory file whose reads fail once `stop` is set, or after DECODING_SECONDS.

    This ends decoders that read a file in pieces. They include the slow ones, which are written in Python.
    """

    def __init__(self, content: bytes, stop: threading.Event):
        super().__init__(content)
        self._stop, self._end = stop, math.inf

    def read(self, size: int | None = -1) -> bytes:
        """The next bytes. Raises UnreadableImage after a stop or a timeout."""
        if self._stop.is_set():
            raise UnreadableImage("stopped")
        self._end = min(self._end, time.monotonic() + DECODING_SECONDS)  # from the first read, because the decoder may be busy before
        if time.monotonic() > self._end:
            raise UnreadableImage(TOO_SLOW.format(DECODING_SECONDS))
        return super().read(size)
