"""Loads CIFAR-10 for the benchmarks from a local folder of its parquet files, decoded into memory."""

import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stage1_tokenizer.data.open_data import open_splits
from vqmosaic.recipes.recipe import Recipe

FOLDERS = ("../shared/data/cifar10", "data/cifar10")


def folder() -> Path:
    """The folder with the train and test parquet files: $CIFAR10 or one of FOLDERS."""
    for candidate in filter(None, (os.environ.get("CIFAR10"), *FOLDERS)):
        if any(Path(candidate).rglob("*.parquet")):
            return Path(candidate)
    raise SystemExit(f"CIFAR-10 was not found in {' or '.join(FOLDERS)}. Set CIFAR10 to a folder with the parquet files of the data set "
                     "(uoft-cs/cifar10 on the Hugging Face hub).")


def load(split: str, limit: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Load a split, train or test: images_NHWC uint8 and labels_N int64, at most `limit` images."""
    import pyarrow.parquet as pq

    pixels, labels = [], []
    for path in sorted(path for path in folder().rglob("*.parquet") if split in path.name):
        table = pq.read_table(path)
        for row in table.to_pylist():
            if limit is not None and len(pixels) == limit:
                break
            pixels.append(np.asarray(Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")))
            labels.append(row["label"])
    return torch.from_numpy(np.stack(pixels)), torch.tensor(labels)


def held_out_rows(recipe: Recipe) -> torch.Tensor:
    """The rows of `load("train")` that a recipe holds out from training as validation images."""
    validation = open_splits(recipe.data).validation
    return torch.tensor([int(validation.source_name(index)) for index in range(len(validation))])  # the name of a source is its row


def to_float(images_NHWC: torch.Tensor) -> torch.Tensor:
    """Convert uint8 images (N, H, W, C) to float32 (N, C, H, W) in [-1, 1]."""
    return images_NHWC.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def psnr(restored_NCHW: torch.Tensor, images_NCHW: torch.Tensor) -> float:
    """PSNR in dB over all pixels of images in [-1, 1]. Reconstructions are clamped first."""
    return float(10 * torch.log10(4 / (restored_NCHW.float().clamp(-1, 1) - images_NCHW).square().mean()))
