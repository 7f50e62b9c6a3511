"""Writes the output of `vqmosaic upscale` and `vqmosaic translate`: one PNG per given image, and a grid of given images over results."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from pipelines.generate import GenerationOutput, ImageGenerationPipeline
from pipelines.image_folders.output_folder import GRID_NAME
from pipelines.image_folders.translation_folder import TranslationFolder
from pipelines.image_folders.write_images import GRID_COLUMNS, grid_rows, load_image, load_images, load_pipeline, save_grid, write_batches
from pipelines.stages.stored_conditions import as_channels
from stage1_tokenizer.image_files.channels import visible_pixels
from stage1_tokenizer.image_files.images import to_uint8
from vqmosaic.runs.interruption import StopFlag
from vqmosaic.runs.run_folder import locked
from vqmosaic.wording import counted

READ_IMAGES = 64
"""Number of images that are read and encoded at a time."""


def write_translations(folder: TranslationFolder, device: str | None) -> int:
    """Write the missing and damaged images of a request to its folder. Returns exit code 0.

    Raises:
        ValueError: an image cannot be read, the folder contains images of another request, or another process is writing to it.
        Interrupted: a signal stopped it. Written images are kept, and the same request continues from there.
    """
    with locked(folder.out, "--out"):
        return write_missing(folder, device)


def write_missing(folder: TranslationFolder, device: str | None) -> int:
    """The part of `write_translations` that runs while this process holds the lock of the folder."""
    if folder.is_finished():  # another process finished it before releasing the lock
        return 0
    complete, pipe, total = folder.usable_files(), load_pipeline(folder, device), len(folder.names)
    kept = len(complete - {GRID_NAME})
    paths, transform = list(folder.images.values()), pipe.inputs.tokenizers[folder.condition].transform.without_derivation

    def sample(stop: StopFlag, callback: Callable[[int, int], bool], skip: Callable[[range], bool]) -> Iterator[GenerationOutput]:
        chunks = (paths[start:start + READ_IMAGES] for start in range(0, total, READ_IMAGES))
        images = (stop.wait_or_raise(functools.partial(load_images, chunk, transform), folder.describe_progress(kept)) for chunk in chunks)
        ids_Nn = torch.cat([pipe.inputs.encode_images(folder.condition, images_BCHW) for images_BCHW in images])
        batches = pipe.batches(folder.labels, 1, folder.seed, given_ids={folder.condition: ids_Nn}, output_type="np", callback=callback, skip=skip)
        folder.begin()  # all given images are readable, and `batches` has checked the request
        return batches

    written, _ = write_batches(folder, complete, sample)
    save_grid_of_pairs(folder, pipe)
    print(f"wrote {counted(written, 'image')} and {GRID_NAME} (given images over results) to {folder.out}"
          + (f", which now contains all {total:,}" if kept else ""))
    return 0


def save_grid_of_pairs(folder: TranslationFolder, pipe: ImageGenerationPipeline) -> None:
    """Save the first given images, enlarged without smoothing, over their results."""
    transform, own = pipe.inputs.tokenizers[folder.condition].transform.without_derivation, pipe.tokenizer.transform
    channels = max(1 if each.channels <= 2 else 3 for each in (transform, own))

    def given(name: str) -> np.ndarray:
        enlarged_1CHW = F.interpolate(load_image(folder.images[name], transform)[None], size=own.sides, mode="nearest")
        return as_channels(visible_pixels(to_uint8(enlarged_1CHW)), channels)[0]

    rows: list[list[np.ndarray | Path]] = []
    for positions in grid_rows(len(folder.names), GRID_COLUMNS, own.image_size, rows_each=2):
        names = [folder.names[position] for position in positions]
        rows += [[given(name) for name in names], [folder.out / name for name in names]]
    save_grid(rows, folder.out / GRID_NAME, channels)
