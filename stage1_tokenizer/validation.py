"""Validation of a tokenizer: PSNR, SSIM, reconstruction error, use of the codebook, a picture of reconstructions."""

import math
from pathlib import Path

import numpy as np
import torch
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from stage1_tokenizer.data.image_batches import ValidationImages
from stage1_tokenizer.image_files.images import to_uint8
from stage1_tokenizer.pictures import image_grid, save_picture, viewing_scale
from stage1_tokenizer.quantizers.nearest_code import full_precision
from stage1_tokenizer.tokenizer import ImageTokenizer
from vqmosaic.runs.interruption import StopFlag
from vqmosaic.training.tracking import lines_in_training

GRID_IMAGES = 16


@torch.no_grad()  # not inference mode: without a weight average it is the model in training
def validate(tokenizer: ImageTokenizer, images: ValidationImages, batch_size: int, accelerator, picture: Path | None = None,
             stop: StopFlag | None = None) -> dict[str, float] | None:
    """Metrics over the fixed validation images, the same on all ranks; None where a signal to any rank's `stop` cut it short.

    Images are clamped to [-1, 1] before they are judged, and everything is computed in float32, as preprocessing and sampling do.

    psnr in dB over all pixels and ssim, both for images in [0, 1]; reconstruction_l1 and reconstruction_l2 per pixel in [-1, 1]; variance of
    the images' pixels, which is the reconstruction_l2 of the best flat grey image; and where the quantizer has ids,
    codebook_usage, the share of codes used at least once in this window of images; perplexity, exp of the entropy of their
    frequencies. With several ids a position, each level's codes are counted by themselves, and the perplexity is that of one level.
    """
    device = accelerator.device
    psnr = PeakSignalNoiseRatio(data_range=1.0).to(device)
    ssim = StructuralSimilarityIndexMeasure(data_range=1.0).to(device)
    codes, depth = tokenizer.config.codebook_size, tokenizer.config.depth
    counts_K = torch.zeros(codes * depth, device=device)  # the codes of each level are counted by themselves
    first_of_level = codes * torch.arange(depth, device=device)
    # sums of absolute errors, squared errors, pixels, squared pixels, elements, and ranks that were stopped
    sums = torch.zeros(6, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
    lines = lines_in_training(len(images), "validation", "image", accelerator.is_main_process)
    tokenizer.eval()
    shown: list[tuple[torch.Tensor, torch.Tensor]] = []  # the first images and their reconstructions, for the picture
    for images_BCHW, _ in images.batches(batch_size, accelerator.process_index, accelerator.num_processes):
        if stop is not None and stop.signal:
            sums[-1] = 1
            break
        lines.update(len(images_BCHW) * accelerator.num_processes)
        images_BCHW = images_BCHW.to(device)
        output = ImageTokenizer.forward(tokenizer, images_BCHW)  # that of the class: in training the instance's own is wrapped in autocast
        restored_BCHW = output.reconstructions.float().clamp(-1, 1)
        # the luminance term of SSIM compares mean values, so it is only defined for values >= 0 (Wang et al. 2004, equation 6)
        restored_01, images_01 = (restored_BCHW + 1) / 2, (images_BCHW + 1) / 2
        psnr.update(restored_01, images_01)
        with full_precision(device):  # a variance is a small difference of large means, and TF32 is too coarse for it
            ssim.update(restored_01, images_01)
        if output.quantizer.ids is not None:
            ids_Bhwd = output.quantizer.ids if depth > 1 else output.quantizer.ids[..., None]
            counts_K += torch.bincount((ids_Bhwd + first_of_level).flatten(), minlength=len(counts_K))
        difference = restored_BCHW - images_BCHW
        sums[:4] += torch.stack([difference.abs().sum(), difference.square().sum(), images_BCHW.sum(), images_BCHW.square().sum()])
        sums[4] += difference.numel()
        if sum(len(part) for part, _ in shown) < GRID_IMAGES:
            shown.append((images_BCHW, restored_BCHW))
    counts_K, sums = accelerator.reduce(counts_K, "sum"), accelerator.reduce(sums, "sum")
    if sums[-1]:
        return None
    if shown and picture is not None and accelerator.is_main_process:
        save_picture(reconstruction_picture(*(torch.cat(parts)[:GRID_IMAGES] for parts in zip(*shown, strict=True))), picture)
    l1, l2, mean, mean_square = (sums[:4] / sums[4]).tolist()
    return {"psnr": float(psnr.compute()), "ssim": float(ssim.compute()), "reconstruction_l1": l1, "reconstruction_l2": l2,
            "variance": mean_square - mean**2, **(codebook_use(counts_K, depth) if tokenizer.quantizer.has_ids else {})}


def codebook_use(counts_K: torch.Tensor, levels: int = 1) -> dict[str, float]:
    """codebook_usage and perplexity of code counts (K,), or (levels * K,), over a window of vectors."""
    shares_K = counts_K.double() / counts_K.sum().clamp_min(1)
    entropy = -(shares_K * shares_K.clamp_min(1e-12).log()).sum()
    return {"codebook_usage": float((counts_K > 0).double().mean()), "perplexity": math.exp(float(entropy)) / levels}


def reconstruction_picture(images_BCHW: torch.Tensor, restored_BCHW: torch.Tensor, columns: int = 8):
    """Originals over reconstructions, row by row."""
    originals, restored = to_uint8(images_BCHW), to_uint8(restored_BCHW)
    rows: list[np.ndarray] = []
    for start in range(0, len(originals), columns):
        rows += [originals[start:start + columns], restored[start:start + columns]]
    return image_grid(rows, viewing_scale(originals.shape[1]))
