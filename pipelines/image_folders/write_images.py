"""The output of `generate` and `reconstruct`: one PNG per image, written batch by batch, and a grid of the first images.

Both hold at most one batch in memory and continue where an earlier call with the same request was interrupted.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipelines.bundle import usable_device
from pipelines.generate import ImageGenerationPipeline, images_together
from pipelines.image_folders.png_files import is_whole_png, png_header
from pipelines.image_folders.sample_folder import (
    GRID_NAME,
    SampleFolder,
    files_in,
    make_folder,
    names_of_copies,
    refuse_files_in_the_way,
    report_damaged,
)
from stage1_tokenizer.image_files.images import ImageTransform, UnreadableImage, read_image, to_uint8
from stage1_tokenizer.pictures import image_grid, save_picture, to_picture, viewing_scale
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage2_prior.generation.sampling import SamplingStopped
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import write_json
from vqmosaic.runs.interruption import Interrupted, StopFlag
from vqmosaic.runs.run_folder import locked
from vqmosaic.training.tracking import progress_bar
from vqmosaic.wording import counted, is_or_are

GRID_COLUMNS = 8
"""Images in a row of the grid, unless each row is a class."""
GRID_SIDE, GRID_PIXELS = 16, 16 * 256
"""Largest number of images along a side of a grid, and largest number of their pixels along that side."""
COMPARED_IMAGES = 8
"""Images whose logits are compared with those in float32, where another number format is asked for."""
RECONSTRUCTIONS_RECORD = "reconstructions.json"


def write_generated(samples: SampleFolder, device: str | None) -> int:
    """Exit code 0 after writing the missing and the damaged images of a request to its folder, named by class and number.

    Raises:
        ValueError: the folder holds images of another request, or another process is writing to it.
        Interrupted: a signal stopped it. Written images are kept, and the same request continues from there.
    """
    with locked(samples.out, "--out"):
        return write_missing(samples, device)


def write_missing(samples: SampleFolder, device: str | None) -> int:
    """The part of `write_generated` that runs while this process holds the lock of the folder."""
    if samples.is_finished():  # the process that held the lock before has finished it
        return 0
    there, total = samples.whole(), len(samples.names)
    report_damaged(samples.out, samples.found() - there)
    kept = len(there - {GRID_NAME})
    pipe, written, compared = None, 0, None
    if kept < total:  # before the record: a pipeline that cannot be loaded leaves nothing behind
        pipe = ImageGenerationPipeline.from_pretrained(samples.pipeline, device, samples.dtype)
        pipe.sampling = samples.sampling
    samples.begin()
    if kept:
        print(f"continuing: {kept:,} of {counted(total, 'image')} {is_or_are(kept)} already in {samples.out}", flush=True)
    with StopFlag() as stop, progress_bar(None, 0, "sampling", "token") as bar:
        def show(done: int, tokens: int) -> bool:
            bar.total = tokens
            bar.update(done - bar.n)
            return not stop.signal

        if pipe is not None:
            # batches are skipped or sampled again as a whole, so that each image is computed in the same batch as without an interruption
            batches = pipe.batches(samples.labels, samples.num, samples.seed, output_type="np", callback=show,
                                   skip=lambda places: there.issuperset(samples.names[place] for place in places))
            try:
                for batch in batches:
                    compared = compared or batch
                    for place, pixels_HWC in zip(batch.places, batch.images, strict=True):
                        if samples.names[place] not in there:
                            save_picture(to_picture(pixels_HWC), samples.out / samples.names[place])
                            written += 1
                    if stop.signal:
                        break
            except SamplingStopped:
                pass
        if stop.signal:
            raise Interrupted(stop.signal, f"{kept + written:,} of {counted(total, 'image')} {is_or_are(kept + written)} written to {samples.out}")
    has_rows = samples.labels is not None and (len(samples.labels) > 1 or samples.num <= GRID_SIDE)  # a row for each class
    rows = grid_rows(total, samples.num if has_rows else GRID_COLUMNS, image_size(samples.out / samples.names[0]))
    shown = sum(map(len, rows))
    save_grid([[samples.out / samples.names[place] for place in row] for row in rows], samples.out / GRID_NAME)
    print(f"wrote {counted(written, 'image')} and {GRID_NAME}{f' ({shown} of the images)' if shown < total else ''} to {samples.out}"
          + (f", which now holds all {total:,}" if kept else ""))
    if samples.dtype != "float32" and compared is not None:
        first = min(len(compared.images), COMPARED_IMAGES)
        try:
            difference = pipe.logit_difference(compared.token_ids[:first], compared.class_indices and compared.class_indices[:first])
            print(f"logits of the prior in {samples.dtype} differ from those in float32 by up to {difference:.2g} (of {first} of the images)")
        except torch.OutOfMemoryError:
            print(f"the difference of the logits in {samples.dtype} and float32 was not measured: both priors together do not fit in memory")
    return 0


def write_reconstructions(tokenizer_folder: Path, paths: list[Path], out: Path, device: str | None, dtype: str) -> int:
    """Exit code 0 after writing the reconstruction of each image to `out` under its name, and originals over reconstructions as grid.png.

    Existing files of these names are kept if they are complete and the record says that this tokenizer made them from these images. Otherwise they
    are replaced.

    Raises:
        ValueError: an image cannot be read or would be replaced by its reconstruction, there are files of these names but no record, or another
            process is writing to the folder.
        Interrupted: a signal stopped it. Written images are kept, and the same call continues from there.
    """
    names = names_of_copies(paths)
    originals = {path.resolve() for path in paths}
    for name in (*names, GRID_NAME):
        if (out / name).resolve() in originals:
            raise InputError(f"--out {out} would replace the image {out / name} itself; give another folder.")
    make_folder(out)
    tokenizer = ImageTokenizer.from_pretrained(tokenizer_folder, usable_device(device), dtype)
    with locked(out, "--out"):
        return write_missing_reconstructions(tokenizer, paths, names, out, dtype)


def write_missing_reconstructions(tokenizer: ImageTokenizer, paths: list[Path], names: list[str], out: Path, dtype: str) -> int:
    """The part of `write_reconstructions` that runs while this process holds the lock of the folder."""
    forget_other_reconstructions(out, names, {"tokenizer": tokenizer.full_fingerprint, "dtype": dtype, "images": len(paths),
                                              "sources": digest_of_files(paths)})
    together = images_together(tokenizer.transform.image_size)
    header = png_header(tokenizer.transform.image_size, tokenizer.transform.channels)
    damaged = {name for name in files_in(out) & {*names, GRID_NAME} if not is_whole_png(out / name, None if name == GRID_NAME else header)}
    report_damaged(out, damaged)
    missing = [index for index, name in enumerate(names) if name in damaged or not (out / name).exists()]
    if not missing and GRID_NAME not in damaged and (out / GRID_NAME).exists():
        print(f"nothing to do: {out} already holds {'the' if len(names) == 1 else 'all'} {counted(len(names), 'reconstruction')} of this request")
        return 0
    kept = len(names) - len(missing)
    with StopFlag() as stop, progress_bar(len(missing), 0, "reconstructing", "image") as bar:
        for start in range(0, len(missing), together):
            if stop.signal:
                raise Interrupted(stop.signal, f"{kept + start:,} of {counted(len(names), 'reconstruction')} {is_or_are(kept + start)} written "
                                               f"to {out}")
            batch = missing[start:start + together]
            images_BCHW = torch.stack([read(paths[index], tokenizer.transform) for index in batch])
            restored = to_uint8(tokenizer.reconstruct(images_BCHW.to(tokenizer.device)))
            for index, pixels_HWC in zip(batch, restored, strict=True):
                save_picture(to_picture(pixels_HWC), out / names[index])
            bar.update(len(batch))
    rows = grid_rows(len(names), GRID_COLUMNS, tokenizer.transform.image_size, rows_each=2)
    pairs = [row for places in rows for row in ([to_uint8(read(paths[place], tokenizer.transform)[None])[0] for place in places],
                                                [out / names[place] for place in places])]
    save_grid(pairs, out / GRID_NAME)
    print(f"wrote {counted(len(missing), 'reconstruction')} and {GRID_NAME} (originals over reconstructions) to {out}"
          + (f", which now holds all {len(names):,}" if kept else ""))
    return 0


def read(path: Path, transform: ImageTransform) -> torch.Tensor:
    """An image file as float32 (C, H, W) in [-1, 1]. Raises InputError, which names the file, if it cannot be read."""
    try:
        return transform(read_image(path, channels=transform.channels))
    except UnreadableImage as error:
        raise InputError(f"image {str(path)!r} cannot be read: {error}") from None


def forget_other_reconstructions(out: Path, names: Sequence[str], request: dict[str, str | int]) -> None:
    """Remove files of an earlier call, unless it was the same request: those that will be replaced, and all those of another tokenizer.

    Then record this request.

    Raises:
        ValueError: the record does not name such a file, so its origin is unknown.
    """
    record, written = out / RECONSTRUCTIONS_RECORD, {*names, GRID_NAME}
    try:
        content = json.loads(record.read_text())
        earlier, before = set(content["files"]), dict(content["request"])
    except (OSError, ValueError, KeyError, TypeError):
        earlier, before = set(), {}
    refuse_files_in_the_way(out, (files_in(out) & written) - earlier, RECONSTRUCTIONS_RECORD)
    if before == request:
        return
    is_same_tokenizer = all(before.get(name) == request[name] for name in ("tokenizer", "dtype"))
    for name in written if is_same_tokenizer else earlier | written:
        (out / name).unlink(missing_ok=True)
    write_json(record, {"request": request, "files": sorted(written | earlier if is_same_tokenizer else written)})


def digest_of_files(paths: Sequence[Path]) -> str:
    """Hex sha256 over path, size and modification time of files. It shows whether they have changed without reading them."""
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        digest.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def grid_rows(count: int, columns: int, size: int, rows_each: int = 1) -> list[range]:
    """The places of the images in each row of a grid of `count` images, with `columns` images in a row.

    A large grid is cut to its first rows, and each row to its first images. Each row takes `rows_each` rows in the picture.
    """
    side = max(1, min(GRID_SIDE, GRID_PIXELS // size))
    starts = range(0, count, columns)[:max(1, side // rows_each)]
    return [range(start, min(start + min(columns, side), count)) for start in starts]


def save_grid(rows: Sequence[Sequence[Path | np.ndarray]], path: Path) -> None:
    """Write a picture with rows of images. An image is an array (H, W, C) or a file."""
    def pixels(image: Path | np.ndarray) -> np.ndarray:
        if isinstance(image, np.ndarray):
            return image
        with Image.open(image) as picture:
            return np.array(picture).reshape(picture.height, picture.width, -1)

    arrays = [np.stack([pixels(image) for image in row]) for row in rows]
    save_picture(image_grid(arrays, viewing_scale(arrays[0].shape[1])), path)


def image_size(path: Path) -> int:
    """Height of an image file in pixels."""
    with Image.open(path) as picture:
        return picture.height
