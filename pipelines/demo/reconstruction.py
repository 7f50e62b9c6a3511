"""The Reconstruct tab of the demo: an upload, its tokens and its reconstruction."""

import math
import os
import threading

import gradio as gr
import torch

from pipelines.decoded_images import decode_in_batches
from pipelines.demo.request_checks import read_upload
from pipelines.demo.token_map import format_grids, format_used_codes, token_maps
from pipelines.generate import ImageGenerationPipeline
from stage1_tokenizer.image_files.images import ImageTransform, to_pil, to_tensor, to_uint8


def reconstruct(pipe: ImageGenerationPipeline, stop: threading.Event, path: str | os.PathLike) -> tuple:
    """Reconstruct an upload and return the outputs of the Reconstruct tab: the resized image, the token map, the reconstruction, a report."""
    transform, grids = pipe.tokenizer.transform, pipe.tokenizer.grids
    stopped = *[gr.skip()] * 3, "Stopped."
    image = read_upload(path, stop, transform)
    if image is None or stop.is_set():
        return stopped
    seen_BCHW = to_tensor(transform.resize(image))[None]
    if stop.is_set():
        return stopped
    ids = pipe.encode(seen_BCHW)
    if stop.is_set():
        return stopped
    restored_BCHW = next(decode_in_batches(pipe.tokenizer, ids)).cpu()
    height, width = seen_BCHW.shape[2:]
    values = f"{8 * seen_BCHW.numel():,} bits" if transform.value_range is None else f"{seen_BCHW.numel():,} values"
    bits = math.ceil(sum(grid.num_tokens * math.log2(grid.codebook_size) for grid in grids))
    report = (f"{height} x {width} pixels became {format_grids(grids)} tokens, {format_used_codes(ids, grids)} are used: "
              f"{values} became {bits:,}{'' if transform.value_range is None else ' bits'}. "
              f"The PSNR of the reconstruction is {psnr(seen_BCHW, restored_BCHW, transform):.1f} dB.")
    return to_pil(seen_BCHW)[0], token_maps(ids, grids), to_pil(restored_BCHW)[0], report


def psnr(images_BCHW: torch.Tensor, restored_BCHW: torch.Tensor, transform: ImageTransform) -> float:
    """The PSNR in dB over all channels, relative to the range of the data, of 8-bit images after rounding."""
    if transform.value_range is None:
        images_BCHW, restored_BCHW = (torch.from_numpy(to_uint8(images)) / 127.5 - 1 for images in (images_BCHW, restored_BCHW))
    error = (images_BCHW - restored_BCHW.clamp(-1, 1)).double().square().mean().item() / 4  # of values in [0, 1]
    return -10 * math.log10(max(error, 1e-14))
