"""The Generate tab of the demo: samples images and returns its outputs."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from pipelines.demo.request_checks import image_limit, read_upload
from pipelines.demo.request_fields import GivenValues
from pipelines.generate import ImageGenerationPipeline
from stage1_tokenizer.image_files.images import to_tensor
from stage1_tokenizer.pictures import tile_images, to_picture, viewing_scale
from vqmosaic.errors import InputError

UPDATE_SECONDS = 0.2  # between updates of the progress bar; an update per token would slow down sampling


def generate(pipe: ImageGenerationPipeline, folder: Path | None, stop: threading.Event, progress: Callable, classes: list[str],
             number: int, seed: int, sampling: dict[str, float], given: GivenValues | None = None) -> tuple:
    """Generate images and return the outputs of the Generate tab: gallery, grid, seed, report, Python code.

    `given` are the prompts and the paths of uploads for a prior that is given more than the class. Without classes, it draws images of no class if it
    has learned this, otherwise of all classes.
    """
    names, limit, given = pipe.vocabulary.learned_class_names, image_limit(pipe), given or GivenValues({}, {})
    labels = (classes or names[:limit]) if names else None
    if given.names and not classes and pipe.vocabulary.why_not_sampled(False, given.names) is None:
        labels = None
    count = number * len(labels or [None])
    if count > limit:
        raise InputError(f"{count} images are too many ({number} for each of {len(labels or [None])} classes); allowed: at most {limit}. "
                         "Choose fewer classes or fewer images.")
    started, updated, done, total = time.monotonic(), 0.0, 0, 0

    def on_token(tokens_done: int, tokens_in_total: int) -> bool:
        nonlocal updated, done, total
        done, total = tokens_done, tokens_in_total
        if time.monotonic() > updated + UPDATE_SECONDS:
            updated = time.monotonic()
            progress((done, total), unit="tokens")
        return not stop.is_set()

    request: dict[str, Any] = {"class_labels": labels, "num_images_per_label": number, "seed": seed, **sampling}
    if labels is None and not given.names and pipe.vocabulary.conditions:
        request["guidance_scale"] = 1.0  # the slider is for requests that give something
    images = {}
    for name, path in given.images.items():
        transform = pipe.inputs.tokenizers[name].transform.without_derivation
        image = read_upload(path, stop, transform)
        if image is None or stop.is_set():
            return *[gr.skip()] * 3, "Stopped.", gr.skip()
        images[name] = to_tensor(transform.resize(image))[None]
    result = pipe(**request, prompt=given.prompts or None, image=images or None, output_type="np", callback=on_token)
    if result.stopped:
        return *[gr.skip()] * 3, f"Stopped after {done} of {total} tokens.", gr.skip()
    captions = [names[index] for index in result.class_indices] if names and result.class_indices else [None] * count
    assert isinstance(result.images, np.ndarray)  # as output_type says
    gallery = [(to_picture(pixels_HWC), caption) for pixels_HWC, caption in zip(result.images, captions, strict=True)]
    columns = number if labels and 1 < number <= 16 else min(count, 8)
    rows = [result.images[start:start + columns] for start in range(0, count, columns)]
    report = f"{count} image{'s' if count > 1 else ''} with seed {seed} in {time.monotonic() - started:.1f} s."
    report += "".join(f" Warning: {message}." for message in pipe.inputs.describe_cut(given.prompts or None))
    grid = tile_images(rows, viewing_scale(result.images.shape[1:3]))
    return gallery, grid, seed, report, python_code(pipe, folder, request, given)


def python_code(pipe: ImageGenerationPipeline, folder: Path | None, request: dict, given: GivenValues) -> str:
    """Python code for the same request. Uploads are files that the user names."""
    arguments = [f"{name}={value!r}" for name, value in request.items()]
    if given.prompts:
        arguments.append(f"prompt={given.prompts!r}")
    if given.images:
        arguments.append("image={" + ", ".join(f'{name!r}: Image.open("{name}.png")' for name in given.images) + "}")
    pillow = "from PIL import Image\n" if given.images else ""
    source = f"{str(folder or 'runs/NAME')!r}, device={str(pipe.device)!r}, dtype={pipe.prior.model.dtype}"
    return (f"import torch\n{pillow}from pipelines import ImageGenerationPipeline\n\n"
            f"pipe = ImageGenerationPipeline.from_pretrained({source})\n"
            f'out = pipe({", ".join(arguments)})\nout.images[0].save("image.png")')
