"""Writes the output of `vqmosaic generate` and `vqmosaic reconstruct`: one PNG per image, and a grid of the first images.

The PNG files are for viewing. They have 8 bits per channel, with data.value_range mapped to 0..255, and no alpha (to_picture).

Both commands keep at most one batch in memory and continue after an interruption.
"""

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipelines.bundle import usable_device
from pipelines.decoded_images import tokenizer_batch_size
from pipelines.generate import GenerationOutput, ImageGenerationPipeline
from pipelines.image_folders.output_folder import (
    GRID_NAME,
    RECONSTRUCTIONS_RECORD,
    OutputFolder,
    SampledFolder,
    check_no_other_images,
    check_no_unrecorded_files,
    digest_of_files,
    files_in,
    make_folder,
    report_damaged,
)
from pipelines.image_folders.png_files import is_whole_png, png_header
from pipelines.image_folders.sample_folder import SampleFolder, reconstruction_names
from pipelines.larger_images.sliding_windows import ids_of_first_window
from stage1_tokenizer.image_files.images import ImageTransform, UnreadableImage, read_image, to_uint8
from stage1_tokenizer.pictures import save_picture, tile_images, to_picture, viewing_scale
from stage1_tokenizer.tokenizer_protocol import Tokenizer, first_ids, load_tokenizer
from stage2_prior.generation.sampling import SamplingStopped
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import write_json
from vqmosaic.recipes.image_sizes import ImageSize, height_and_width
from vqmosaic.runs.interruption import Interrupted, StopFlag
from vqmosaic.runs.run_folder import locked
from vqmosaic.training.tracking import progress_bar
from vqmosaic.wording import counted, is_or_are

GRID_COLUMNS = 8
"""Images per row of the grid, unless each row is a class."""
GRID_SIDE, GRID_PIXELS = 16, 16 * 256
"""Largest number of images along a side of a grid, and of their pixels along that side."""
FEW_IMAGES = 10
"""Below this number of images, progress is shown with one decimal."""
SampleBatches = Callable[[StopFlag, Callable[[int, int], bool], Callable[[range], bool]], Iterator[GenerationOutput]]
"""Starts the sampling of a request; see `write_batches`."""
COMPARED_IMAGES = 8
"""Number of images whose logits are compared with float32 if another dtype is requested."""


def write_generated(samples: SampleFolder, device: str | None) -> int:
    """Write the missing and damaged images of a request to its folder, named by class and number. Returns exit code 0.

    Raises:
        ValueError: the folder contains images of another request, or another process is writing to it.
        Interrupted: a signal stopped it. Written images are kept, and the same request continues from there.
    """
    with locked(samples.out, "--out"):
        return write_missing(samples, device)


def write_missing(samples: SampleFolder, device: str | None) -> int:
    """The part of `write_generated` that runs while this process holds the lock of the folder."""
    if samples.is_finished():  # another process finished it before releasing the lock
        return 0
    complete, total = samples.usable_files(), len(samples.names)
    kept = len(complete - {GRID_NAME})
    pipe, written, first_batch = None, 0, None
    if kept < total:  # before the record is written, so that a pipeline that fails to load leaves no record
        pipe = load_pipeline(samples, device)
    samples.begin()
    if kept:
        print(f"continuing: {kept:,} of {counted(total, 'image')} {is_or_are(kept)} already in {samples.out}", flush=True)
    if pipe is not None:
        for message in pipe.inputs.describe_cut(samples.prompt):
            print(f"warning: {message}", flush=True)
        given_ids = pipe.inputs.ids(samples.prompt)
        written, first_batch = write_batches(samples, complete, lambda _, callback, skip: pipe.batches(
            samples.labels, samples.num, samples.seed, given_ids=given_ids, size=samples.size,
            window_overlap=samples.window_overlap if samples.size else None, output_type="np", callback=callback, skip=skip))
    has_rows = samples.labels is not None and (len(samples.labels) > 1 or samples.num <= GRID_SIDE)  # one row per class
    rows = grid_rows(total, samples.num if has_rows else GRID_COLUMNS, image_size(samples.out / samples.names[0]))
    shown = sum(map(len, rows))
    save_grid([[samples.out / samples.names[position] for position in row] for row in rows], samples.out / GRID_NAME)
    print(f"wrote {counted(written, 'image')} and {GRID_NAME}{f' ({shown} of the images)' if shown < total else ''} to {samples.out}"
          + (f", which now contains all {total:,}" if kept else ""))
    if samples.dtype != "float32" and pipe is not None and first_batch is not None and first_batch.token_ids is not None:
        count = min(len(first_batch.images), COMPARED_IMAGES)
        try:
            classes = first_batch.class_indices and first_batch.class_indices[:count]
            given_ids = {name: ids_Bn[:count] for name, ids_Bn in first_batch.given_ids.items()}
            first_window = ids_of_first_window(first_ids(first_batch.token_ids, count), pipe.tokenizer.grids)
            difference = pipe.logit_difference(first_window, classes, given_ids)
            print(f"logits of the prior in {samples.dtype} differ from those in float32 by up to {difference:.2g} (measured on {count} images)")
        except torch.OutOfMemoryError:
            print(f"the logits in {samples.dtype} were not compared with those in float32: both priors together do not fit in memory")
    return 0


def load_pipeline(folder: SampledFolder, device: str | None) -> ImageGenerationPipeline:
    """The pipeline of a request, with its sampling settings."""
    pipe = ImageGenerationPipeline.from_pretrained(folder.pipeline, device, folder.dtype)
    pipe.sampling = folder.sampling
    return pipe


def write_batches(folder: OutputFolder, complete: set[str], sample: SampleBatches) -> tuple[int, GenerationOutput | None]:
    """Write the sampled images that are not in `complete`. Returns the number of written images and the first sampled batch.

    Args:
        sample: starts the sampling. Its arguments are a StopFlag, and the callback and skip of pipe.batches. Its images are of type pil, which
            are written as they are, or np, which are written without alpha.

    Raises:
        Interrupted: a signal stopped it. Written images are kept.
    """
    names, kept, written, first_batch, sampled = folder.names, len(complete - {GRID_NAME}), 0, None, 0
    with StopFlag() as stop, progress_bar(None, 0, "sampling", "image") as bar:
        def on_token(done: int, tokens: int) -> bool:
            # a share of the images: those of a batch are sampled together. Of few images with one decimal, so that it moves
            images = sampled * done / tokens
            bar.total, bar.n = sampled, round(images, 1) if sampled < FEW_IMAGES else int(images)
            bar.update(0)
            return not stop.signal

        def is_complete(positions: range) -> bool:
            nonlocal sampled
            is_skipped = complete.issuperset(names[position] for position in positions)
            sampled += 0 if is_skipped else len(positions)
            return is_skipped

        try:
            # batches are skipped or sampled as a whole, so that each image is computed in the same batch as without an interruption
            for batch in sample(stop, on_token, is_complete):
                first_batch = first_batch or batch
                for position, image in zip(batch.places, batch.images, strict=True):
                    if names[position] not in complete:
                        save_picture(image if isinstance(image, Image.Image) else to_picture(image), folder.out / names[position])
                        written += 1
                if stop.signal:
                    break
        except SamplingStopped:
            pass
        if stop.signal:
            raise Interrupted(stop.signal, folder.describe_progress(kept + written))
    return written, first_batch


def write_reconstructions(tokenizer_folder: Path, paths: list[Path], out: Path, device: str | None, dtype: str) -> int:
    """Write the reconstruction of each image to `out` under its name, and originals over reconstructions to grid.png. Returns exit code 0.

    Existing files with these names are kept if they are complete and, according to the record, this tokenizer made them from these images.
    Otherwise they are replaced.

    Raises:
        ValueError: an image cannot be read or would be replaced by its reconstruction, the folder contains images and no record, or another
            process is writing to the folder.
        Interrupted: a signal stopped it. Written images are kept, and the same call continues from there.
    """
    names = reconstruction_names(paths)
    originals = {path.resolve() for path in paths}
    for name in (*names, GRID_NAME):
        if (out / name).resolve() in originals:
            raise InputError(f"--out {out} would replace the original image {out / name}. Give another folder.")
    if not (out / RECONSTRUCTIONS_RECORD).exists():
        check_no_unrecorded_files(out, files_in(out) & {*names, GRID_NAME}, RECONSTRUCTIONS_RECORD)
        check_no_other_images(out)
    make_folder(out)
    tokenizer = load_tokenizer(tokenizer_folder, usable_device(device), dtype)
    with locked(out, "--out"):
        return write_missing_reconstructions(tokenizer, paths, names, out, dtype)


def write_missing_reconstructions(tokenizer: Tokenizer, paths: list[Path], names: list[str], out: Path, dtype: str) -> int:
    """The part of `write_reconstructions` that runs while this process holds the lock of the folder."""
    remove_outdated_reconstructions(out, names, {"tokenizer": tokenizer.full_fingerprint, "dtype": dtype, "images": len(paths),
                                              "sources": digest_of_files(paths)})
    batch_size = tokenizer_batch_size(tokenizer.transform.image_size)
    header = png_header(tokenizer.transform.image_size, tokenizer.transform.channels)
    damaged = {name for name in files_in(out) & {*names, GRID_NAME} if not is_whole_png(out / name, None if name == GRID_NAME else header)}
    report_damaged(out, damaged)
    missing = [index for index, name in enumerate(names) if name in damaged or not (out / name).exists()]
    if not missing and GRID_NAME not in damaged and (out / GRID_NAME).exists():
        print(f"nothing to do: {out} already contains {'the' if len(names) == 1 else 'all'} {counted(len(names), 'reconstruction')} of this request")
        return 0
    kept = len(names) - len(missing)
    with StopFlag() as stop, progress_bar(len(missing), 0, "reconstructing", "image") as bar:
        for start in range(0, len(missing), batch_size):
            batch = missing[start:start + batch_size]
            images_BCHW = stop.wait_or_raise(
                functools.partial(load_images, [paths[index] for index in batch], tokenizer.transform),
                f"{kept + start:,} of {counted(len(names), 'reconstruction')} {is_or_are(kept + start)} written to {out}")
            restored = to_uint8(tokenizer.reconstruct(images_BCHW.to(tokenizer.device)))
            for index, pixels_HWC in zip(batch, restored, strict=True):
                save_picture(to_picture(pixels_HWC), out / names[index])
            bar.update(len(batch))
    rows = grid_rows(len(names), GRID_COLUMNS, tokenizer.transform.image_size, rows_each=2)
    pairs = [row for indices in rows for row in ([to_uint8(load_image(paths[index], tokenizer.transform)[None])[0] for index in indices],
                                                 [out / names[index] for index in indices])]
    save_grid(pairs, out / GRID_NAME)
    print(f"wrote {counted(len(missing), 'reconstruction')} and {GRID_NAME} (originals over reconstructions) to {out}"
          + (f", which now contains all {len(names):,}" if kept else ""))
    return 0


def load_images(paths: list[Path], transform: ImageTransform) -> torch.Tensor:
    """Read image files as float32 (B, C, H, W) in [-1, 1]. Raises InputError with the path of an unreadable one."""
    return torch.stack([load_image(path, transform) for path in paths])


def load_image(path: Path, transform: ImageTransform) -> torch.Tensor:
    """Read an image file as float32 (C, H, W) in [-1, 1]. Raises InputError with the path if it is unreadable."""
    try:
        return transform(read_image(path, channels=transform.channels, value_range=transform.value_range))
    except UnreadableImage as error:
        raise InputError(f"image {str(path)!r} cannot be read: {error}") from None


def remove_outdated_reconstructions(out: Path, names: Sequence[str], request: dict[str, str | int | None]) -> None:
    """Delete files of an earlier, different request: those that will be replaced and, if the tokenizer differs, all of them.

    Then record this request.

    Raises:
        ValueError: a file would be replaced that is not in the record, so its origin is unknown.
    """
    record, new_files = out / RECONSTRUCTIONS_RECORD, {*names, GRID_NAME}
    try:
        content = json.loads(record.read_text())
        old_files = {name for name in content["files"] if os.path.basename(name) == name}  # others would be deleted outside of the folder
        old_request = dict(content["request"])
    except (OSError, ValueError, KeyError, TypeError):
        old_files, old_request = set(), {}
    check_no_unrecorded_files(out, (files_in(out) & new_files) - old_files, RECONSTRUCTIONS_RECORD)
    if old_request == request:
        return
    is_same_tokenizer = all(old_request.get(name) == request[name] for name in ("tokenizer", "dtype"))
    for name in new_files if is_same_tokenizer else old_files | new_files:
        (out / name).unlink(missing_ok=True)
    write_json(record, {"request": request, "files": sorted(new_files | old_files if is_same_tokenizer else new_files)})


def grid_rows(count: int, columns: int, size: ImageSize, rows_each: int = 1) -> list[range]:
    """The positions of the images in each row of a grid of `count` images, with `columns` images of this size per row.

    A large grid is cropped to its first rows and to the first images of each row. Each row takes `rows_each` rows in the picture.
    """
    most_rows, most_columns = (max(1, min(GRID_SIDE, GRID_PIXELS // side)) for side in height_and_width(size))
    starts = range(0, count, columns)[:max(1, most_rows // rows_each)]
    return [range(start, min(start + min(columns, most_columns), count)) for start in starts]


def save_grid(rows: Sequence[Sequence[Path | np.ndarray]], path: Path, channels: int | None = None) -> None:
    """Save rows of images, which are arrays (H, W, C) or files, as one picture. With `channels`, grey ones are repeated to this number."""
    def read_pixels(image: Path | np.ndarray) -> np.ndarray:
        if isinstance(image, np.ndarray):
            return image
        with Image.open(image) as picture:
            pixels_HWC = np.array(picture).reshape(picture.height, picture.width, -1)
        return np.repeat(pixels_HWC, channels, axis=-1) if channels is not None and pixels_HWC.shape[-1] == 1 else pixels_HWC

    arrays = [np.stack([read_pixels(image) for image in row]) for row in rows]
    save_picture(tile_images(arrays, viewing_scale(arrays[0].shape[1:3])), path)


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file in pixels."""
    with Image.open(path) as picture:
        return picture.height, picture.width
