"""Tokenizer validation: PSNR, SSIM, reconstruction error, codebook usage and a picture of reconstructions."""

from pathlib import Path

import numpy as np
import torch
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from stage1_tokenizer.data.image_batches import ValidationImages
from stage1_tokenizer.image_files.images import to_uint8
from stage1_tokenizer.pictures import save_picture, tile_images, viewing_scale
from stage1_tokenizer.quantizers.operations.nearest_code import full_precision
from stage1_tokenizer.trainable.codebook_usage import CodeCounts
from stage1_tokenizer.trainable.trainable_tokenizer import TrainableTokenizer
from vqmosaic.runs.interruption import StopFlag
from vqmosaic.training.tracking import progress_lines

PICTURE_IMAGES = 16


@torch.no_grad()  # not inference mode: without a weight average, this is the model being trained
def validate(tokenizer: TrainableTokenizer, images: ValidationImages, batch_size: int, accelerator, picture: Path | None = None,
             stop: StopFlag | None = None) -> dict[str, float] | None:
    """Compute metrics over the fixed validation images. Returns the same metrics on all ranks, or None if a signal stopped any rank.

    Clamps reconstructions to [-1, 1] and computes everything in float32, like preprocessing and sampling.

    - psnr, ssim: for images in [0, 1]. psnr is in dB, from the mean squared error over all images.
    - reconstruction_l1, reconstruction_l2: mean absolute and mean squared error, for images in [-1, 1].
    - variance: of the pixel values in [-1, 1]. It equals the reconstruction_l2 of the best flat grey image.
    - codebook_usage, if the quantizer has ids: the share of codes used at least once on these images.
    - perplexity, if the quantizer has ids: exp of the entropy of the code frequencies.

    With several ids per position, the codes are counted separately for each, and the perplexity is that of one. With several grids, there are also
    codebook_usage_<grid> and perplexity_<grid> (see CodeCounts.metrics).
    """
    device = accelerator.device
    psnr = PeakSignalNoiseRatio(data_range=1.0).to(device)
    ssim = StructuralSimilarityIndexMeasure(data_range=1.0).to(device)
    counts = CodeCounts(tokenizer.quantizers, device)
    # sums of absolute errors, squared errors, pixels and squared pixels; number of elements; number of stopped ranks
    sums = torch.zeros(6, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
    lines = progress_lines(len(images), "validation", "image", accelerator.is_main_process)
    tokenizer.eval()
    picture_parts: list[tuple[torch.Tensor, torch.Tensor]] = []  # the first images and their reconstructions
    batches = images.batches(batch_size, accelerator.process_index, accelerator.num_processes)
    for images_BCHW, _ in batches if stop is None else stop.until_signal(batches):
        lines.update(len(images_BCHW) * accelerator.num_processes)
        images_BCHW = images_BCHW.to(device)
        output = type(tokenizer).forward(tokenizer, images_BCHW)  # not tokenizer(...): Accelerate wraps the instance's forward in autocast
        restored_BCHW = output.reconstructions.float().clamp(-1, 1)
        # the luminance term of SSIM compares means, so it requires values >= 0 (Wang et al. 2004, equation 6)
        restored_01, images_01 = (restored_BCHW + 1) / 2, (images_BCHW + 1) / 2
        psnr.update(restored_01, images_01)
        with full_precision(device):  # a variance is a small difference of large means: TF32 is too coarse
            ssim.update(restored_01, images_01)
        counts.add(output.levels)
        difference = restored_BCHW - images_BCHW
        sums[:4] += torch.stack([difference.abs().sum(), difference.square().sum(), images_BCHW.sum(), images_BCHW.square().sum()])
        sums[4] += difference.numel()
        if sum(len(part) for part, _ in picture_parts) < PICTURE_IMAGES:
            picture_parts.append((images_BCHW, restored_BCHW))
    sums[-1] = stop is not None and stop.signal != 0
    counts.reduce(accelerator)
    sums = accelerator.reduce(sums, "sum")
    if sums[-1]:
        return None
    if picture_parts and picture is not None and accelerator.is_main_process:
        originals_BCHW, restored_BCHW = (torch.cat(parts)[:PICTURE_IMAGES] for parts in zip(*picture_parts, strict=True))
        save_picture(reconstruction_picture(originals_BCHW, restored_BCHW), picture)
    l1, l2, mean, mean_square = (sums[:4] / sums[4]).tolist()
    similarity = ssim.compute()
    assert isinstance(similarity, torch.Tensor)  # it is a tuple only if SSIM also returns the image of local similarities
    return {"psnr": float(psnr.compute()), "ssim": float(similarity), "reconstruction_l1": l1, "reconstruction_l2": l2,
            "variance": mean_square - mean**2, **counts.metrics()}


def reconstruction_picture(images_BCHW: torch.Tensor, restored_BCHW: torch.Tensor, columns: int = 8):
    """A PIL image with rows of originals, each followed by the row of their reconstructions."""
    originals, restored = to_uint8(images_BCHW), to_uint8(restored_BCHW)
    rows: list[np.ndarray] = []
    for start in range(0, len(originals), columns):
        rows += [originals[start:start + columns], restored[start:start + columns]]
    return tile_images(rows, viewing_scale(originals.shape[1:3]))
