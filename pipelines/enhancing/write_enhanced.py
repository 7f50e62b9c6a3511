"""Writes the output of `vqmosaic enhance`: one PNG per given image, and a grid of given images over results."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pipelines.decoded_images import tokenizer_batch_size
from pipelines.editing.write_results import MAX_LISTED_REASONS, classes_of, load_readable
from pipelines.enhancing.enhance_folder import EnhanceFolder
from pipelines.generate import ImageGenerationPipeline
from pipelines.generation_request import GUIDANCE_SETTINGS
from pipelines.image_folders.output_folder import GRID_NAME
from pipelines.image_folders.write_images import GRID_COLUMNS, grid_rows, load_image, load_pipeline, save_grid
from stage1_tokenizer.image_files.images import ImageTransform, to_uint8
from stage1_tokenizer.pictures import save_picture
from vqmosaic.errors import InputError
from vqmosaic.runs.interruption import Interrupted, StopFlag
from vqmosaic.runs.run_folder import locked
from vqmosaic.training.tracking import progress_bar
from vqmosaic.wording import counted, is_or_are

RASTER_NOTE = ("note: the prior of this pipeline was trained in raster order, so it judges a token only by those before it (above and to the left). "
               "Priors trained with prior_training.order annealed see tokens on all sides.")


def write_enhanced(folder: EnhanceFolder, device: str | None) -> int:
    """Write the missing and damaged results of a request to its folder, and a grid of them. Returns exit code 0.

    Raises:
        InputError: the folder contains images of another request, or another process is writing to it. Or images cannot be read; the results of all
            others are written.
        Interrupted: a signal stopped it. Written results are kept, and the same request continues from there.
    """
    with locked(folder.out, "--out"):
        return write_missing(folder, device)


def write_missing(folder: EnhanceFolder, device: str | None) -> int:
    """The part of `write_enhanced` that runs while this process holds the lock of the folder."""
    if folder.is_finished():  # another process finished it before releasing the lock
        return 0
    complete, total = folder.usable_files(), len(folder.names)
    kept = len(complete - {GRID_NAME})
    pipe = load_pipeline(folder, device)
    if not pipe.chain.any_order:
        print(RASTER_NOTE, flush=True)
    if folder.strength == 1:
        pipe.check_has_evidence()
    folder.begin()  # the request is valid
    written = 0
    reasons: list[str] = []
    with StopFlag() as stop, progress_bar(total - kept, 0, "enhancing", "image") as bar:
        size = tokenizer_batch_size(pipe.tokenizer.transform.image_size)
        for batch in (range(start, min(start + size, total)) for start in range(0, total, size)):
            missing = {number for number in batch if folder.names[number] not in complete}
            if missing:  # batches are computed as a whole, so that each image is computed in the same batch as without an interruption
                done = kept + written
                message = f"{done:,} of {counted(total, 'image')} {is_or_are(done)} written to {folder.out}"
                new, unreadable = write_batch(folder, pipe, batch, missing, stop, message)
                written, reasons = written + new, reasons + unreadable
                bar.update(len(missing))
    if kept + written:
        save_grid_of_pairs(folder, pipe.tokenizer.transform)
        print(f"wrote {counted(written, 'image')} and {GRID_NAME} (given images over results) to {folder.out}"
              + (f", which now contains {kept + written:,}" if kept else ""))
    if reasons:
        more = [f"... and {len(reasons) - MAX_LISTED_REASONS:,} more"] if len(reasons) > MAX_LISTED_REASONS else []
        first = f"{len(reasons):,} of {counted(total, 'image')} cannot be read, so they have no result:"
        raise InputError("\n  ".join([first, *reasons[:MAX_LISTED_REASONS], *more]))
    return 0


def write_batch(folder: EnhanceFolder, pipe: ImageGenerationPipeline, batch: Sequence[int], missing: set[int], stop: StopFlag,
                message: str) -> tuple[int, list[str]]:
    """Enhance the images with the numbers of a batch, and write the missing results. Returns their number, and why other images cannot be read.

    Raises Interrupted, with the message, after a signal.
    """
    paths = {number: folder.images[folder.names[number]] for number in batch}
    images, unreadable = stop.wait_or_raise(functools.partial(load_readable, paths, pipe.tokenizer.transform), message)
    if not missing & images.keys():
        return 0, unreadable
    guidance = {name: getattr(folder.sampling, name) for name in GUIDANCE_SETTINGS} if folder.sampling.is_guided else {}
    out = pipe.enhance_part(torch.stack(list(images.values())), list(images), folder.seed, folder.noise, folder.strength,
                            classes_of(folder.labels, list(images)), folder.average, folder.num_tries, callback=lambda *_: not stop.signal,
                            **guidance)
    if out.stopped:
        raise Interrupted(stop.signal, message)
    for number, image in zip(images, out.images, strict=True):
        if number in missing:
            save_picture(image, folder.out / folder.names[number])
    return len(missing & images.keys()), unreadable


def save_grid_of_pairs(folder: EnhanceFolder, transform: ImageTransform) -> None:
    """Save the first given images that have a result over their results."""
    names = [name for name in folder.names if (folder.out / name).exists()]
    rows: list[list[np.ndarray | Path]] = []
    for positions in grid_rows(len(names), GRID_COLUMNS, transform.image_size, rows_each=2):
        row = [names[position] for position in positions]
        rows += [[to_uint8(load_image(folder.images[name], transform)[None])[0] for name in row], [folder.out / name for name in row]]
    if rows:
        save_grid(rows, folder.out / GRID_NAME)
