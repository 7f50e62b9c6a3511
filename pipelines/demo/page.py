"""The web page in front of a pipeline: one tab generates images, the other sends an upload through the tokens and back.

    vqmosaic demo runs/quickstart

It answers this machine only, calls nowhere outside, reads no files but uploads, and does one thing at a time: `demo_guard` checks each
request before gradio sees it. Nothing else imports gradio.
"""

import asyncio
import contextlib
import contextvars
import functools
import html
import logging
import math
import os
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from starlette.applications import Starlette
from uvicorn.config import HTTP_PROTOCOLS, WS_PROTOCOLS

from pipelines.demo.guard import Endpoint, Guard
from pipelines.demo.http_limits import close_idle_connections, in_one_line, report
from pipelines.demo.request_checks import (
    MAX_SEED,
    checked_request,
    image_limit,
    largest_guidance,
    largest_temperature,
    number_label,
    read_upload,
)
from pipelines.demo.uploads import MAX_UPLOAD_BYTES, Uploads
from pipelines.generate import ImageGenerationPipeline
from stage1_tokenizer.image_files.images import UnreadableImage, to_tensor
from stage1_tokenizer.pictures import image_grid, to_picture, viewing_scale
from vqmosaic.errors import InputError, check_range
from vqmosaic.runs.interruption import StopFlag

HOST = "127.0.0.1"
MAX_WAITING = 8
MAX_OPEN_PAGES = 500  # whose state gradio keeps
UPDATE_SECONDS = 0.2  # a progress bar that moves with every token would slow the work
GOLDEN_ANGLE = 137.508  # steps of it around the colour wheel keep ids apart
CSS = """
.pixels img { image-rendering: pixelated; object-fit: contain; width: 100%; height: 100%; }
.pixels .grid-wrap { max-height: none !important; }
.pixels .grid-container { grid-template: none / repeat(8, minmax(0, 1fr)) !important; }
.below-label .image-container, .below-label .tokens { padding-top: 2rem; }
.tokens { display: grid; max-width: 18rem; margin: auto; }
.below-label .tokens + .tokens { padding-top: 0.5rem; }
.tokens span { display: grid; place-items: center; aspect-ratio: 1; overflow: hidden; color: #222; }
@media (max-width: 640px) { .pixels .grid-container { grid-template: none / repeat(4, minmax(0, 1fr)) !important; } }
.pixels .grid-container:not(:has(> :nth-child(5))) { grid-template: none / repeat(4, minmax(0, 1fr)) !important; }
"""


class Worker:
    """The one thread that computes, and the bounded line in front of it.

    gradio's own queue would not do: it takes a cancelled request for over while its thread works on, so the next one runs beside
    it; the page shows an error for it; and of a full queue it only says that it is busy.
    """

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, "pipeline")
        self._jobs: list[tuple[str | None, threading.Event]] = []  # page and stop flag; the first one's turn it is

    async def run(self, session: str | None, work: Callable[[threading.Event], tuple], waiting: Callable[[int], None]) -> tuple | None:
        """What work(stop flag) returns, or None when stopped before its turn; while n others come first, waiting(n) is called.

        Raises InputError when the line is full. When cancelled, it sets the flag, which the work has to poll.
        """
        if len(self._jobs) > MAX_WAITING:
            raise InputError(f"{MAX_WAITING} requests are waiting already; try again in a while.")
        job = (session, stop) = session, threading.Event()
        self._jobs.append(job)
        try:
            while before := self._jobs.index(job):
                waiting(before)
                await asyncio.sleep(UPDATE_SECONDS)
                if stop.is_set():
                    return None
            context = contextvars.copy_context()  # by which gr.Progress finds its page
            return await asyncio.get_running_loop().run_in_executor(self._thread, context.run, work, stop)
        finally:
            stop.set()
            self._jobs.remove(job)

    def stop(self, session: str | None, everyone: bool = False) -> None:
        """Ask for an end of what one page, or every page, has asked for."""
        for owner, stop in list(self._jobs):
            if everyone or owner == session:
                stop.set()


@contextlib.contextmanager
def errors_in_words(endpoint: str) -> Iterator[None]:
    """Errors inside become a message on the page, escaped because the page takes it for HTML, and one line on the terminal."""
    log = ""
    kind = "refused"
    try:
        yield
        return
    except UnreadableImage as error:
        log = str(error)
        words = f"This file cannot be read as an image: {log.partition(': ')[0]}."  # what follows are words of the decoder
    except InputError as error:
        words = str(error)
    except torch.OutOfMemoryError:
        words = "The device has too little memory for this many images at a time; ask for fewer."
    except Exception as error:
        kind, words, log = "error", "The server met an unexpected error; its terminal says more.", in_one_line(error)
    report(kind, endpoint, log or words)
    raise gr.Error(html.escape(words, quote=False), duration=20, print_exception=False)


def generate(pipe: ImageGenerationPipeline, folder: Path | None, stop: threading.Event, progress: Callable, classes: list[str],
             number: int, seed: int, sampling: dict[str, float]) -> tuple:
    """What the Generate tab shows: gallery, grid, seed, report, Python code."""
    names, limit = pipe.class_names, image_limit(pipe)
    labels = (classes or names[:limit]) if names else None
    count = number * len(labels or [None])
    if count > limit:
        raise InputError(f"{count} images are too many at a time ({number} of each of {len(labels or [None])} classes); at most {limit}. "
                         "Choose fewer classes or a lower number.")
    started, shown, done, total = time.monotonic(), 0.0, 0, 0

    def after_each_token(*now: int) -> bool:
        nonlocal shown, done, total
        done, total = now
        if time.monotonic() > shown + UPDATE_SECONDS:
            shown = time.monotonic()
            progress(now, unit="tokens")
        return not stop.is_set()

    request = {"class_labels": labels, "num_images_per_label": number, "seed": seed, **sampling}
    result = pipe(**request, output_type="np", callback=after_each_token)
    if result.stopped:
        return *[gr.skip()] * 3, f"Stopped after {done} of {total} tokens.", gr.skip()
    captions = [names[index] for index in result.class_indices] if labels else [None] * count
    gallery = [(to_picture(pixels_HWC), caption) for pixels_HWC, caption in zip(result.images, captions, strict=True)]
    columns = number if labels and 1 < number <= 16 else min(count, 8)
    rows = [result.images[start:start + columns] for start in range(0, count, columns)]
    report = f"{count} image{'s' if count > 1 else ''} with seed {seed} in {time.monotonic() - started:.1f} s."
    grid = image_grid(rows, viewing_scale(result.images.shape[1]))
    return gallery, grid, seed, report, python_code(pipe, folder, request)


def python_code(pipe: ImageGenerationPipeline, folder: Path | None, request: dict) -> str:
    """The same request in Python."""
    source = f"{str(folder or 'runs/NAME')!r}, device={str(pipe.device)!r}, dtype={pipe.prior.model.dtype}"
    return ("import torch\nfrom pipelines import ImageGenerationPipeline\n\n"
            f"pipe = ImageGenerationPipeline.from_pretrained({source})\n"
            f'out = pipe({", ".join(f"{name}={value!r}" for name, value in request.items())})\nout.images[0].save("image.png")')


def reconstruct(pipe: ImageGenerationPipeline, stop: threading.Event, path: str) -> tuple:
    """What the Reconstruct tab shows: the upload as the tokenizer sees it, the token map, the reconstruction, a report."""
    transform, codes = pipe.tokenizer.transform, pipe.tokenizer.config.codebook_size
    stopped = *[gr.skip()] * 3, "Stopped."
    image = read_upload(path, stop, channels=transform.channels, side=transform.image_size)
    if image is None or stop.is_set():
        return stopped
    seen_HWC = transform.resize(image)
    if stop.is_set():
        return stopped
    ids = pipe.encode(to_tensor(seen_HWC)[None])[0]
    if stop.is_set():
        return stopped
    restored = pipe.decode(ids[None])[0]
    difference_HWC = np.asarray(restored, dtype=np.float64).reshape(seen_HWC.shape) - seen_HWC
    psnr = 10 * math.log10(255**2 / max(np.square(difference_HWC).mean(), 1e-9))
    report = (f"{seen_HWC.shape[0]} x {seen_HWC.shape[1]} pixels became {shape_in_words(ids.shape)} tokens, "
              f"{' + '.join(str(len(ids_hw.unique())) for ids_hw in grids_of(ids))} different ones out of {codes} codes: "
              f"{8 * seen_HWC.size:,} bits became {math.ceil(ids.numel() * math.log2(codes)):,}. The PSNR of the reconstruction is {psnr:.1f} dB.")
    return to_picture(seen_HWC), "".join(map(token_map, grids_of(ids))), restored, report


def grids_of(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Ids (h, w), or (h, w, depth), as grids (h, w), the coarse ones first."""
    return (ids,) if ids.ndim == 2 else ids.unbind(-1)


def shape_in_words(shape: Sequence[int]) -> str:
    """A shape such as 4 x 4."""
    return " x ".join(map(str, shape))


def token_map(ids_hw: torch.Tensor) -> str:
    """HTML of a token grid: equal ids have equal colours; up to 8 x 8 they can be read, in larger ones they show under the pointer."""
    cells, columns = "", ids_hw.shape[1]
    for code in ids_hw.flatten().tolist():
        colour = f"hsl({code * GOLDEN_ANGLE % 360:.0f} 60% 78%)"
        cells += f'<span style="background: {colour}" title="{code}">{code if columns <= 8 else ""}</span>'
    style = f"grid-template-columns: repeat({columns}, minmax(0, 1fr)); font-size: {min(0.8, 5 / columns):.2f}rem"
    return f'<div class="tokens" style="{style}">{cells}</div>'


def build(pipe: ImageGenerationPipeline, folder: Path | None = None) -> gr.Blocks:
    """The page of a pipeline, not yet served; the Python code on it names `folder`. Its `.worker` is what computes."""
    worker, limit, names, settings = Worker(), image_limit(pipe), pipe.class_names, pipe.sampling
    side, codes = pipe.tokenizer.transform.image_size, pipe.tokenizer.config.codebook_size
    unguided = ("Off: the prior was trained without classes, so there is nothing to guide to." if names is None else
                "Off: the prior was trained with label_drop 0, so it never learnt the null class that guidance compares with."
                if pipe.prior.vocabulary.label_drop == 0 else None)
    for_pixels = {"format": "png", "interactive": False, "elem_classes": ["pixels", "below-label"]}

    with gr.Blocks(title="vqmosaic", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"## vqmosaic\n{f'{len(names)} classes, ' if names else ''}{side} x {side} pixels, "
                    f"{shape_in_words(pipe.tokenizer.grid_shape)} tokens of {codes} codes, "
                    f"a prior of {pipe.prior.num_parameters:,} parameters, on {pipe.device}.")
        with gr.Tab("Generate"), gr.Row():
            with gr.Column(scale=2, min_width=300):
                classes = gr.Dropdown(names or [], value=[], multiselect=True, label="Classes", visible=bool(names), info=(
                    "None chosen: every class." if len(names or []) <= limit else f"None chosen: the first {limit} of {len(names)}."))
                number = gr.Slider(1, limit, value=max(1, min(4, limit // len(names or [None]))), step=1,
                                   label=number_label(pipe), info=f"At most {limit} images in all.")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
                new_seed = gr.Checkbox(True, label="A new seed each time")
                temperature = gr.Slider(0, largest_temperature(pipe), value=settings.temperature, step=0.01, label="Temperature",
                                        info="0 takes the likeliest token.")
                top_k = gr.Slider(0, codes, value=settings.top_k, step=1, label="Top-k", info="0 is off.")
                top_p = gr.Slider(0.01, 1, value=settings.top_p, step=0.01, label="Top-p", info="1 is off.")
                guidance = gr.Slider(0, largest_guidance(pipe), value=1 if unguided else settings.guidance_scale, step=0.1,
                                     label="Guidance scale", info=unguided or "1 is off.", interactive=not unguided)
            with gr.Column(scale=5, min_width=320):
                with gr.Row():
                    go = gr.Button("Generate", variant="primary")
                    halt = gr.Button("Stop", variant="stop")
                report = gr.Markdown()
                gallery = gr.Gallery(show_label=False, format="png", object_fit="contain", interactive=False, height="auto",
                                     buttons=["download", "fullscreen"], elem_classes="pixels")
                with gr.Accordion("All in one picture", open=False):
                    grid = gr.Image(show_label=False, format="png", interactive=False, buttons=["download", "fullscreen"])
                with gr.Accordion("The same in Python", open=False):
                    code = gr.Code(language="python", interactive=False, show_label=False, wrap_lines=True)
        with gr.Tab("Reconstruct"):
            with gr.Row():
                upload = gr.Image(label="Your image", type="filepath", sources=["upload", "clipboard"], buttons=["fullscreen"], height=320)
                seen = gr.Image(label="As the tokenizer sees it", buttons=["download"], height=320, **for_pixels)
                tokens = gr.HTML(label="Tokens", show_label=True, container=True, min_height=320, elem_classes="below-label")
                restored = gr.Image(label="Reconstruction", buttons=["download"], height=320, **for_pixels)
            again = gr.Button("Reconstruct", variant="primary")
            measures = gr.Markdown()

        async def run(request: gr.Request, progress: gr.Progress, work: Callable[[threading.Event], tuple]) -> tuple | None:
            return await worker.run(request.session_hash, work, lambda before: progress(0, desc=f"waiting for {before} before this"))

        async def on_generate(classes, number, seed, new_seed, temperature, top_k, top_p, guidance, request: gr.Request,
                              progress=gr.Progress()):  # noqa: B008 (gradio looks for it among the defaults)
            with errors_in_words("generate"):
                # In a thread: finding the nearest of a thousand class names takes most of a second, and other requests need answers meanwhile.
                checked = await asyncio.to_thread(checked_request, pipe, classes, number, None if new_seed else seed, temperature, top_k, top_p,
                                                  guidance)
                shown = await run(request, progress, lambda stop: generate(pipe, folder, stop, progress, *checked))
                return shown or (*[gr.skip()] * 3, "Stopped before it began.", gr.skip())

        async def on_upload(upload, request: gr.Request, progress=gr.Progress()):  # noqa: B008
            with errors_in_words("reconstruct"):
                if not upload:
                    raise InputError("Upload an image first.")
                shown = await run(request, progress, lambda stop: reconstruct(pipe, stop, upload["path"]))
                return shown or (*[gr.skip()] * 3, "Stopped before it began.")

        def on_stop(request: gr.Request):
            worker.stop(request.session_hash)

        go.click(on_generate, [classes, number, seed, new_seed, temperature, top_k, top_p, guidance], [gallery, grid, seed, report, code],
                 preprocess=False,  # its messages name no field, and a traceback comes with them
                 api_name="generate", concurrency_limit=None, show_progress_on=gallery)
        halt.click(on_stop, api_name="stop", queue=False)
        page.unload(on_stop)  # the page was closed
        results = [seen, tokens, restored, measures]
        gr.on([upload.upload, again.click], on_upload, upload, results, api_name="reconstruct", concurrency_limit=None,
              preprocess=False,  # it would open the file before read_image does
              show_progress_on=restored).failure(lambda: [None] * 4, None, results, queue=False, api_name="clear",
                                                    api_visibility="private")
    upload.async_move_resource_to_block_cache = uploaded_file
    page.worker = worker
    return page.queue(max_size=2 * MAX_WAITING, default_concurrency_limit=1, api_open=False)


async def uploaded_file(path: str) -> str:
    """The path of an upload; stands in for gradio's own method, which copies the file and downloads what an address names."""
    return path


@contextlib.asynccontextmanager
async def guarded(page: gr.Blocks, app: Starlette) -> AsyncIterator[None]:
    """What runs while a page is served: the guard goes in front of all of gradio's own middleware before the first request comes."""
    uploads = Uploads(Path(app.uploaded_file_dir), page.upload_file_set)
    app.middleware_stack = Guard(app.middleware_stack, uploads, [
        Endpoint(function.api_name, number, len(function.inputs), function.queue, any(isinstance(field, gr.Image) for field in function.inputs))
        for number, function in page.fns.items() if "unload" not in dict(function.targets).values()])

    def connections() -> Iterable:
        return page.server.server_state.connections if getattr(page, "server", None) else ()

    tasks = [asyncio.create_task(uploads.keep_room()), asyncio.create_task(close_idle_connections(connections))]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()


def check_port(port: int) -> None:
    """Raise InputError unless the port can be listened on."""
    check_range("--port", port, at_least=1, at_most=65535)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise InputError(f"--port {port} cannot be used ({error.strerror}); give another one, or none to take a free one.") from None


def limit_uvicorn() -> None:
    """Make uvicorn parse HTTP with h11, which refuses request headers over 64 KB, and disable WebSockets.

    gradio lets uvicorn choose the parser, and uvicorn prefers httptools if it is installed. httptools has no limit: headers that do not end
    take 1 GB of memory within seconds.
    """
    HTTP_PROTOCOLS["auto"], WS_PROTOCOLS["auto"] = HTTP_PROTOCOLS["h11"], WS_PROTOCOLS["none"]
    log = logging.getLogger("uvicorn.error")
    if _is_no_upgrade not in log.filters:
        log.addFilter(_is_no_upgrade)


def _is_no_upgrade(record: logging.LogRecord) -> bool:
    """False for uvicorn's advice to install a WebSocket library. The guard already reports such requests."""
    return not record.getMessage().startswith(("Unsupported upgrade", "No supported WebSocket"))


def start(page: gr.Blocks, port: int | None = None) -> str:
    """The address of a page, served from now on in the background; page.close() ends that."""
    os.environ |= {"GRADIO_RUN_HISTORY": "False", "GRADIO_ALLOWED_PATHS": ""}  # the second would win over an empty argument
    limit_uvicorn()
    address = page.launch(
        server_name=HOST, server_port=port, share=False, prevent_thread_lock=True, quiet=True, ssr_mode=False, mcp_server=False,
        enable_monitoring=False, state_session_capacity=MAX_OPEN_PAGES,
        allowed_paths=[], max_file_size=MAX_UPLOAD_BYTES, footer_links=[], css=CSS,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        app_kwargs={"lifespan": functools.partial(guarded, page)})[1]
    if not isinstance(page.app.middleware_stack, Guard):
        page.close(verbose=False)
        raise RuntimeError("This version of gradio does not run the lifespan of an app, so the demo cannot be served safely.")
    return address


def serve(folder: Path, port: int | None, device: str | None, dtype: str) -> None:
    """Serve a pipeline folder to this machine until SIGINT or SIGTERM; without a port, on the first free one from 7860.

    Raises InputError when the port cannot be used or the folder holds no pipeline.
    """
    if port is not None:
        check_port(port)
    with tempfile.TemporaryDirectory(prefix="vqmosaic-demo-") as files, StopFlag() as interrupted:
        warnings.filterwarnings("ignore", module="PIL")  # Pillow warns of damaged metadata in uploads
        os.environ["GRADIO_TEMP_DIR"] = files  # the default is one folder for all gradio pages of a machine, each of which serves it
        page = build(ImageGenerationPipeline.from_pretrained(folder, device, getattr(torch, dtype)), folder)
        print(f"vqmosaic demo of {folder} on {start(page, port)}, for this machine only; Ctrl-C ends it.", flush=True)
        while not interrupted.signal:
            time.sleep(UPDATE_SECONDS)
        page.worker.stop(None, everyone=True)
        page.close(verbose=False)
