"""CIFAR-10 from a local folder of its parquet files, decoded once into memory: what the benchmarks on real images share."""

import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

FOLDERS = ("../shared/data/cifar10", "data/cifar10")


def folder() -> Path:
    """The folder with train/test parquet files, from $CIFAR10 or one of the usual places."""
    for candidate in filter(None, (os.environ.get("CIFAR10"), *FOLDERS)):
        if any(Path(candidate).rglob("*.parquet")):
            return Path(candidate)
    raise SystemExit(f"CIFAR-10 is not in any of {', '.join(FOLDERS)}: set CIFAR10 to a folder of the data set's parquet files "
                     "(on the Hugging Face hub: uoft-cs/cifar10).")


def load(split: str, limit: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(images_NHWC uint8, labels_N int64) of a split, train or test."""
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


def to_float(images_NHWC: torch.Tensor) -> torch.Tensor:
    """images_NCHW float32 in [-1, 1]."""
    return images_NHWC.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def psnr(restored_NCHW: torch.Tensor, images_NCHW: torch.Tensor) -> float:
    """PSNR in dB over all pixels of images in [-1, 1], clamped before."""
    return float(10 * torch.log10(4 / (restored_NCHW.float().clamp(-1, 1) - images_NCHW).square().mean()))
