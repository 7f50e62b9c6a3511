"""Writes the output of `vqmosaic edit` and `vqmosaic score`."""

import csv
import functools
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pipelines.decoded_images import tokenizer_batch_size
from pipelines.editing.given_images import images_of_size
from pipelines.editing.masked_images import masks_from
from pipelines.editing.result_folder import TABLE_NAME, ResultFolder
from pipelines.editing.scores import Scores
from pipelines.generate import ImageGenerationPipeline
from pipelines.image_folders.output_folder import GRID_NAME
from pipelines.image_folders.write_images import GRID_COLUMNS, grid_rows, load_images, save_grid
from stage1_tokenizer.image_files.channels import visible_pixels
from stage1_tokenizer.image_files.images import ImageTransform, read_image, to_uint8
from stage1_tokenizer.image_files.stored_values import UnreadableImage
from stage1_tokenizer.pictures import save_picture, tile_images, viewing_scale
from stage1_tokenizer.tokenizer_config import read_tokenizer_config
from token_shards.manifest import Grid
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import write_bytes
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.runs.interruption import Interrupted, StopFlag
from vqmosaic.runs.run_folder import locked
from vqmosaic.training.tracking import progress_bar
from vqmosaic.wording import counted, is_or_are

RASTER_NOTE = ("note: the prior of this pipeline was trained in raster order, so it draws each token without seeing what is kept below it. "
               "--num_tries selects the best of several. Priors trained with prior_training.order annealed see all that is kept.")
COLUMNS = ("image", "bits", "bits_per_token", "most_bits", "left", "top", "right", "bottom")
"""Columns of the table of scores. The last five are about the most unusual place: its bits, and its box in pixels of the resized image."""


# --- edit ----------------------------------------------------------------------------------------------------------------------


def write_edits(output: ResultFolder, pipeline: Path, image: Path, mask: Path, sampling: SamplingConfig, device: str | None) -> int:
    """Draw the masked part of an image again, and write the results and a grid of them. Returns exit code 0.

    Raises:
        InputError: an image cannot be read or has another size, or another process is writing to the folder.
        Interrupted: a signal stopped it. Nothing is written.
    """
    # 1. Check image and mask before the pipeline is loaded
    transform, request = ImageTransform.from_dict(read_tokenizer_config(pipeline / "tokenizer")["transform"]), output.request
    image_1CHW = images_of_size(read_file(image, transform.channels, transform.value_range), transform, transform.sides, "this pipeline edits images")
    mask_1HW = masks_from(read_mask(mask), 1, transform.sides)

    # 2. Draw the results
    with locked(output.out, "--out"), StopFlag() as stop, progress_bar(None, 0, "sampling", "token") as bar:
        pipe = ImageGenerationPipeline.from_pretrained(pipeline, device, request["dtype"])
        pipe.sampling = sampling
        if not pipe.chain.any_order:
            print(RASTER_NOTE, flush=True)

        def on_token(done: int, tokens: int) -> bool:
            bar.total = tokens
            bar.update(done - bar.n)
            return not stop.signal

        out = pipe.inpaint(image_1CHW, mask_1HW, request["classes"], request["num_tries"], num_images_per_label=request["num"], seed=request["seed"],
                           prompt=request["prompt"], callback=on_token)
        if out.stopped:
            raise Interrupted(stop.signal, f"no result was written to {output.out}")

        # 3. Write them, and a grid: the image and its masked pixels in grey, above the results
        output.begin()
        results = [name for name in output.names if name != GRID_NAME]
        for name, picture in zip(results, out.images, strict=True):
            save_picture(picture, output.out / name)
        given = [visible_pixels(to_uint8(images_1CHW))[0] for images_1CHW in (image_1CHW, image_1CHW.masked_fill(mask_1HW[:, None], 0.0))]
        rows: list[list[np.ndarray]] = [given]
        for positions in grid_rows(len(results), GRID_COLUMNS, transform.image_size):
            rows.append([visible_pixels(as_array(out.images[position])) for position in positions])
        save_grid(rows, output.out / GRID_NAME)
    print(f"wrote {counted(len(results), 'result')} and {GRID_NAME} (image and mask over results) to {output.out}")
    return 0


def read_file(path: Path, channels: int, value_range: Sequence[float] | None = None) -> Any:
    """An image file as `read_image` returns it. Raises InputError with the path if it cannot be read."""
    try:
        return read_image(path, channels=channels, value_range=value_range)
    except UnreadableImage as error:
        raise InputError(f"image {str(path)!r} cannot be read: {error}.") from None


def read_mask(path: Path) -> Image.Image:
    """A mask file as a PIL image with its alpha, so that transparent ones can be refused."""
    return read_file(path, channels=2)


def as_array(picture: Image.Image) -> np.ndarray:
    """The pixels (H, W, C) of a PIL image."""
    return np.asarray(picture).reshape(picture.height, picture.width, -1)


# --- score ---------------------------------------------------------------------------------------------------------------------


def write_scores(output: ResultFolder, pipeline: Path, images: Mapping[str, Path], device: str | None) -> int:
    """Write a table of the scores of images, and a picture of each with its heat maps. Returns exit code 0.

    Raises:
        InputError: an image cannot be read, or another process is writing to the folder.
        Interrupted: a signal stopped it. Only pictures are written.
    """
    with locked(output.out, "--out"), StopFlag() as stop, progress_bar(len(images), 0, "scoring", "image") as bar:
        pipe = ImageGenerationPipeline.from_pretrained(pipeline, device, output.request["dtype"])
        transform, classes = pipe.tokenizer.transform, output.request["classes"]
        output.begin()
        table: list[dict[str, Any]] = []
        all_names, batch_size = list(images), tokenizer_batch_size(transform.image_size)
        for names in (all_names[start:start + batch_size] for start in range(0, len(all_names), batch_size)):
            message = f"{len(table):,} of {counted(len(images), 'image')} {is_or_are(len(table))} scored, and no {TABLE_NAME} was written"
            images_BCHW = stop.wait_or_raise(functools.partial(load_images, [images[name] for name in names], transform), message)
            own_classes = classes[len(table):len(table) + len(names)] if classes is not None and len(classes) > 1 else classes
            scores = pipe.score(images_BCHW, own_classes)
            for number, name in enumerate(names):
                table.append({"image": images[name], **score_record(pipe.tokenizer.grids, scores, number, transform.sides)})
                save_picture(picture_of_scores(pipe.tokenizer.grids, scores, number, images_BCHW[number]), output.out / name)
            bar.update(len(names))
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        write_bytes(output.out / TABLE_NAME, text.getvalue().encode(errors="surrogateescape"))
    most = max(table, key=lambda record: record["bits"])
    print(f"wrote {TABLE_NAME} and {counted(len(table), 'picture')} (image and heat map) to {output.out}. The most unusual image is {most['image']} "
          f"with {most['bits']} bits")
    return 0


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
