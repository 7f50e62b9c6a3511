"""Writes the output of `vqmosaic edit` and `vqmosaic score`."""

import csv
import functools
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pipelines.decoded_images import tokenizer_batch_size
from pipelines.editing.edit_inputs import read_mask
from pipelines.editing.given_images import images_and_masks
from pipelines.editing.result_folder import TABLE_NAME, EditFolder, ScoreFolder
from pipelines.editing.scores import Scores
from pipelines.generate import GenerationOutput, ImageGenerationPipeline
from pipelines.generation_output import Images
from pipelines.image_folders.output_folder import GRID_NAME
from pipelines.image_folders.write_images import GRID_COLUMNS, grid_rows, load_image, load_pipeline, save_grid, write_batches
from stage1_tokenizer.image_files.channels import visible_pixels
from stage1_tokenizer.image_files.float_images import FloatImage
from stage1_tokenizer.image_files.images import ImageTransform, read_image, to_uint8
from stage1_tokenizer.image_files.stored_values import UnreadableImage
from stage1_tokenizer.pictures import save_picture, tile_images, viewing_scale
from token_shards.manifest import Grid
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import write_bytes
from vqmosaic.runs.interruption import StopFlag
from vqmosaic.runs.run_folder import locked
from vqmosaic.training.tracking import progress_bar
from vqmosaic.wording import counted, is_or_are

RASTER_NOTE = ("note: the prior of this pipeline was trained in raster order, so it draws each token without seeing what is kept after it "
               "(to the right and below). --num_tries selects the best of several. Priors trained with prior_training.order annealed see all that is "
               "kept.")
COLUMNS = ("image", "bits", "bits_per_token", "most_bits", "left", "top", "right", "bottom")
"""Columns of the table of scores. The last five are about the most unusual place: its bits, and its box in pixels of the resized image."""
MAX_LISTED_REASONS = 12
"""Largest number of unreadable images listed in an error."""


# --- edit ----------------------------------------------------------------------------------------------------------------------


def write_edits(folder: EditFolder, device: str | None) -> int:
    """Draw a part of an image again, and write the missing and damaged results and a grid of them. Returns exit code 0.

    Raises:
        InputError: an image cannot be read or has another size, the folder contains images of another request, or another process is writing to it.
        Interrupted: a signal stopped it. Written results are kept, and the same request continues from there.
    """
    with locked(folder.out, "--out"):
        return write_missing_edits(folder, device)


def write_missing_edits(folder: EditFolder, device: str | None) -> int:
    """The part of `write_edits` that runs while this process holds the lock of the folder."""
    if folder.is_finished():  # another process finished it before releasing the lock
        return 0
    complete, pipe, total = folder.usable_files(), load_pipeline(folder, device), len(folder.names)
    kept, transform = len(complete - {GRID_NAME}), pipe.tokenizer.transform
    image: Any = read_file(folder.image, transform)  # with more than 8 bits, it is no PIL image
    value: Any = read_mask(folder.value) if folder.drawn_by == "mask" else folder.value
    if not pipe.chain.any_order:
        print(RASTER_NOTE, flush=True)
    for message in pipe.inputs.describe_cut(folder.prompt):
        print(f"warning: {message}", flush=True)

    def sample(_: StopFlag, callback: Callable[[int, int], bool], skip: Callable[[range], bool]) -> Iterator[GenerationOutput]:
        given_ids = {**pipe.inputs.ids(folder.prompt), **encode_conditions(pipe, folder.condition_images)}
        batches = pipe.edit_batches(cast(Images, image), folder.labels, folder.num_tries, **{folder.drawn_by: value}, num_images_per_label=folder.num,
                                    seed=folder.seed, given_ids=given_ids, callback=callback, skip=skip)
        folder.begin()  # the request is valid
        return batches

    written, _ = write_batches(folder, complete, sample)
    title, given = given_pictures(pipe, folder.drawn_by, *images_and_masks(image, folder.drawn_by, value, transform))
    rows: list[list[np.ndarray | Path]] = [[to_uint8(image_1CHW)[0] for image_1CHW in given]]
    for positions in grid_rows(total, GRID_COLUMNS, transform.image_size):
        rows.append([folder.out / folder.names[position] for position in positions])
    save_grid(rows, folder.out / GRID_NAME)
    print(f"wrote {counted(written, 'result')} and {GRID_NAME} ({title} over results) to {folder.out}"
          + (f", which now contains all {total:,}" if kept else ""))
    return 0


def given_pictures(pipe: ImageGenerationPipeline, drawn_by: str, image_1CHW: torch.Tensor,
                   mask_1HW: torch.Tensor | None) -> tuple[str, list[torch.Tensor]]:
    """What the first row of an edit's grid shows, as a text and as pictures (1, C, H, W)."""
    if mask_1HW is None:  # all pixels of variations are decoded from tokens, as those of the reconstruction
        return "image and reconstruction", [image_1CHW, pipe.tokenizer.reconstruct(image_1CHW.to(pipe.device)).cpu()]
    kept_1CHW = image_1CHW.masked_fill(mask_1HW[:, None], 0.0)
    return ("image in its box", [kept_1CHW]) if drawn_by == "box" else ("image and kept part", [image_1CHW, kept_1CHW])


def encode_conditions(pipe: ImageGenerationPipeline, files: Mapping[str, Path]) -> dict[str, torch.Tensor]:
    """The ids (1, n) of one image of each condition, by its name. Raises InputError with the path of an unreadable one."""
    return {name: pipe.inputs.encode_images(name, load_image(path, pipe.inputs.tokenizers[name].transform.without_derivation)[None])
            for name, path in files.items()}


def read_file(path: Path, transform: ImageTransform) -> Image.Image | FloatImage:
    """An image file with the channels of the transform, in its own size. Raises InputError with the path if it cannot be read."""
    try:
        return read_image(path, channels=transform.channels, value_range=transform.value_range)
    except UnreadableImage as error:
        raise InputError(f"image {str(path)!r} cannot be read: {error}.") from None


# --- score ---------------------------------------------------------------------------------------------------------------------


def write_scores(folder: ScoreFolder, device: str | None) -> int:
    """Write a table of the scores of images, and a picture of each with its heat maps. Returns exit code 0.

    Raises:
        InputError: the folder contains images of another request, or another process is writing to it. Or images cannot be read; all others are
            written, and the cells of these are empty.
        Interrupted: a signal stopped it. Scores so far are in the table, and the same request continues from there.
    """
    with locked(folder.out, "--out"):
        return write_missing_scores(folder, device)


def write_missing_scores(folder: ScoreFolder, device: str | None) -> int:
    """The part of `write_scores` that runs while this process holds the lock of the folder."""
    if folder.is_finished():  # another process finished it before releasing the lock
        return 0
    complete, names, total = folder.usable_files(), folder.names, len(folder.names)
    table = finished_rows(folder, complete)
    missing = [number for number, row in enumerate(table) if not row["bits"]]
    pipe = ImageGenerationPipeline.from_pretrained(folder.pipeline, device, folder.dtype)
    transform, written, reasons = pipe.tokenizer.transform, 0, []
    batch_size = tokenizer_batch_size(transform.image_size)
    for cut in pipe.inputs.describe_cut(folder.prompt):
        print(f"warning: {cut}", flush=True)
    single = {name: files[0] for name, files in folder.condition_images.items() if len(files) == 1}
    several = {name: files for name, files in folder.condition_images.items() if len(files) > 1}
    common_ids = {**pipe.inputs.ids(folder.prompt), **encode_conditions(pipe, single)}
    folder.begin()
    with StopFlag() as stop, progress_bar(len(missing), 0, "scoring", "image") as bar:
        for batch in (missing[start:start + batch_size] for start in range(0, len(missing), batch_size)):
            done = total - len(missing) + written
            message = f"{done:,} of {counted(total, 'image')} {is_or_are(done)} scored"
            paths = {number: folder.images[names[number]] for number in batch}
            images, unreadable = stop.wait_or_raise(functools.partial(load_readable, paths, transform), message)
            given = {}
            for name, files in several.items():
                own = pipe.inputs.tokenizers[name].transform.without_derivation
                given[name], more = stop.wait_or_raise(functools.partial(load_readable, {number: files[number] for number in images}, own), message)
                images, unreadable = {number: images[number] for number in given[name]}, unreadable + more
            reasons += unreadable
            if images:
                images_BCHW = torch.stack(list(images.values()))
                ids = {name: pipe.inputs.encode_images(name, torch.stack([each[number] for number in images])) for name, each in given.items()}
                scores = pipe.score(images_BCHW, classes_of(folder.labels, list(images)), given_ids={**common_ids, **ids})
                for place, number in enumerate(images):
                    table[number] |= score_record(pipe.tokenizer.grids, scores, place, transform.sides)
                write_table(folder.out / TABLE_NAME, table)  # before the pictures, so that each picture has its row
                for place, number in enumerate(images):
                    save_picture(picture_of_scores(pipe.tokenizer.grids, scores, place, images_BCHW[place]), folder.out / names[number])
                written += len(images)
            bar.update(len(batch))
    write_table(folder.out / TABLE_NAME, table)
    if written:
        most = max((row for row in table if row["bits"]), key=lambda row: float(row["bits"]))
        print(f"wrote {TABLE_NAME} and {counted(written, 'picture')} (image and heat map) to {folder.out}. The most unusual image is {most['image']} "
              f"with {most['bits']} bits")
    if reasons:
        more = [f"... and {len(reasons) - MAX_LISTED_REASONS:,} more"] if len(reasons) > MAX_LISTED_REASONS else []
        first = f"{len(reasons):,} of {counted(total, 'image')} cannot be read, so their cells in {TABLE_NAME} are empty:"
        raise InputError("\n  ".join([first, *reasons[:MAX_LISTED_REASONS], *more]))
    return 0


def finished_rows(folder: ScoreFolder, complete: set[str]) -> list[dict[str, Any]]:
    """The row of each image in the table: that of an earlier, interrupted call if its picture is in `complete`. Otherwise, its cells are empty."""
    table: list[dict[str, Any]] = [dict.fromkeys(COLUMNS, "") | {"image": path} for path in folder.images.values()]
    if TABLE_NAME in complete:
        with open(folder.out / TABLE_NAME, newline="", encoding="utf-8", errors="surrogateescape") as file:
            # not strict: if somebody has removed rows, those after them do not match, and their images are scored again
            for row, name, recorded in zip(table, folder.names, csv.DictReader(file), strict=False):
                if name in complete and recorded.get("image") == str(row["image"]):
                    row |= {column: recorded.get(column) or "" for column in COLUMNS}
    return table


def write_table(path: Path, table: Sequence[Mapping[str, Any]]) -> None:
    """Write the table atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_bytes(path, text.getvalue().encode(errors="surrogateescape"))


def load_readable(paths: Mapping[int, Path], transform: ImageTransform) -> tuple[dict[int, torch.Tensor], list[str]]:
    """The images (C, H, W) that can be read, by number, and why each of the others cannot."""
    images, reasons = {}, []
    for number, path in paths.items():
        try:
            images[number] = load_image(path, transform)
        except InputError as error:
            reasons.append(str(error))
    return images, reasons


def classes_of(labels: Sequence[int] | None, numbers: Sequence[int]) -> list[int] | None:
    """The class indices of the images with these numbers, for labels of one class for all images or one for each."""
    return None if labels is None else [labels[0 if len(labels) == 1 else number] for number in numbers]


def maps_by_grid(grids: Sequence[Grid], scores: Scores) -> dict[str, torch.Tensor]:
    """The maps of bits (B, h, w) by name of the grid."""
    return scores.bits_map if isinstance(scores.bits_map, dict) else {grids[0].name: scores.bits_map}


def score_record(grids: Sequence[Grid], scores: Scores, number: int, sides: tuple[int, int]) -> dict[str, Any]:
    """The scores of one image for the table. `sides` are the height and width of the image in pixels."""
    bits, tokens = scores.bits[number].item(), sum(grid.num_tokens for grid in grids)
    maps = [bits_map[number] for bits_map in maps_by_grid(grids, scores).values()]
    bits_hw = max(maps, key=lambda bits_hw: bits_hw.max().item())
    (height, width), (row, column) = bits_hw.shape, divmod(int(bits_hw.argmax()), bits_hw.shape[1])
    return {"bits": round(bits, 3), "bits_per_token": round(bits / tokens, 4), "most_bits": round(bits_hw.max().item(), 3),
            "left": column * sides[1] // width, "top": row * sides[0] // height,
            "right": (column + 1) * sides[1] // width, "bottom": (row + 1) * sides[0] // height}


def picture_of_scores(grids: Sequence[Grid], scores: Scores, number: int, image_CHW: torch.Tensor) -> Image.Image:
    """An image and, beside it, its heat map for each grid: black for 0 bits, white for twice the bits of codes that are all equally likely."""
    pixels_HWC = visible_pixels(to_uint8(image_CHW[None]))[0]
    parts = [np.broadcast_to(pixels_HWC, (*pixels_HWC.shape[:2], 3))]
    for grid, bits_Bhw in zip(grids, maps_by_grid(grids, scores).values(), strict=True):
        most = 2 * grid.depth * max(1.0, math.log2(grid.codebook_size))
        heat_HW = F.interpolate((bits_Bhw[number] / most).clamp(0, 1)[None, None], size=image_CHW.shape[1:], mode="nearest")[0, 0]
        parts.append(heat_colours(heat_HW))
    return tile_images([np.stack(parts)], viewing_scale(image_CHW.shape[1:]))


def heat_colours(heat_HW: torch.Tensor) -> np.ndarray:
    """uint8 (H, W, 3) for values in [0, 1]: black, red, yellow, white."""
    colours_HWC = torch.stack([heat_HW * 3 - number for number in range(3)], dim=-1)
    return (colours_HWC.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
