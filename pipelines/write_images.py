"""What `generate` and `reconstruct` write: one PNG an image, plus a grid."""

import hashlib
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from pipelines.bundle import usable_device
from pipelines.generate import ImageGenerationPipeline
from stage1_tokenizer.image_grid import image_grid, save_picture, to_picture, viewing_scale
from stage1_tokenizer.images import UnreadableImage, read_image, to_uint8
from stage1_tokenizer.tokenizer import ImageTokenizer
from vqmosaic.errors import InputError
from vqmosaic.tracking import progress_bar

GRID_COLUMNS = 8
NAME_BYTES = 220
"""Longest name of an image without number and suffix; file systems allow 255 bytes, some of which the temporary name takes."""
COMPARED_IMAGES = 8
"""Images whose logits are compared with those in float32, where another number format is asked for."""


def write_generated(folder: Path, labels: list[int] | None, num: int, seed: int, out: Path, device: str | None, dtype: str,
                    sampling: dict[str, Any]) -> int:
    """Exit code 0 after writing `num` images of each label to `out`, named by class and number."""
    make_folder(out)
    pipe = ImageGenerationPipeline.from_pretrained(folder, device, getattr(torch, dtype))
    with progress_bar(None, 0, "sampling", "token") as bar:
        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = pipe(labels, num, seed=seed, output_type="np", callback=show, **sampling)
    classes = result.class_indices or [None] * len(result.images)
    names = ["sample" if index is None else file_name(pipe.class_names[index]) for index in classes]
    width, written = len(str(max(Counter(names).values()) - 1)), Counter()
    for name, pixels_HWC in zip(names, result.images, strict=True):
        save_picture(to_picture(pixels_HWC), out / f"{name}-{written[name]:0{width}d}.png")
        written[name] += 1
    columns = num if labels is not None else min(num, GRID_COLUMNS)
    rows = [result.images[start:start + columns] for start in range(0, len(result.images), columns)]
    save_picture(image_grid(rows, viewing_scale(result.images.shape[1])), out / "grid.png")
    print(f"wrote {len(result.images)} images and grid.png to {out}")
    if dtype != "float32":
        first = min(len(result.images), COMPARED_IMAGES)
        try:
            difference = pipe.logit_difference(result.token_ids[:first], result.class_indices and result.class_indices[:first])
            print(f"logits of the prior in {dtype} differ from those in float32 by up to {difference:.2g} (of {first} of the images)")
        except torch.OutOfMemoryError:
            print(f"how far logits in {dtype} are from those in float32 was not measured: there is no room for both priors")
    return 0


def write_reconstructions(tokenizer_folder: Path, paths: list[Path], out: Path, device: str | None, dtype: str) -> int:
    """Exit code 0 after writing the reconstruction of each image to `out` under its name, and originals over reconstructions as grid.png."""
    make_folder(out)
    tokenizer = ImageTokenizer.from_pretrained(tokenizer_folder, usable_device(device), getattr(torch, dtype))
    transform = tokenizer.transform
    originals = []
    for path in paths:
        try:
            originals.append(transform(read_image(path, channels=transform.channels)))
        except UnreadableImage as error:
            raise InputError(f"image {str(path)!r} cannot be read: {error}") from None
    images_BCHW = torch.stack(originals)
    restored_BCHW = tokenizer.reconstruct(images_BCHW.to(tokenizer.device)).cpu()
    before, after = to_uint8(images_BCHW), to_uint8(restored_BCHW)
    taken: set[str] = set()
    for path, pixels_HWC in zip(paths, after, strict=True):
        name = shortened(path.stem)
        while name in taken or name == "grid":
            name += "_"
        taken.add(name)
        save_picture(to_picture(pixels_HWC), out / f"{name}.png")
    rows = [part for start in range(0, len(before), GRID_COLUMNS) for part in (before[start:start + GRID_COLUMNS], after[start:start + GRID_COLUMNS])]
    save_picture(image_grid(rows, viewing_scale(before.shape[1])), out / "grid.png")
    print(f"wrote {len(after)} reconstructions and grid.png (originals over reconstructions) to {out}")
    return 0


def make_folder(out: Path) -> None:
    """Make the output folder; InputError where that is not possible."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be made: {error.strerror}.") from None


def file_name(class_name: str) -> str:
    """A class name as part of a file name."""
    return shortened(re.sub(r"[^\w-]+", "_", class_name)) or "class"


def shortened(name: str) -> str:
    """The name, cut where a file system could not take it; a digest of the whole keeps two that were cut apart."""
    encoded = os.fsencode(name)
    if len(encoded) <= NAME_BYTES:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    return f"{encoded[:NAME_BYTES - 9].decode(errors='ignore')}~{digest}"
