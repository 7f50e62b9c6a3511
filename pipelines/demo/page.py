"""The web page of a pipeline: one tab generates images, the other encodes an uploaded image to tokens and decodes it again.

    vqmosaic demo runs/quickstart

The page is served to this machine only, makes no requests to other servers, reads no files except uploads, and processes one request at a time.
pipelines/demo/guard.py checks each request before gradio sees it. No other module imports gradio.
"""

import asyncio
import contextlib
import contextvars
import functools
import html
import inspect
import logging
import os
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio as gr
import torch
from gradio.routes import App
from uvicorn.config import HTTP_PROTOCOLS, WS_PROTOCOLS

from pipelines.demo.generation import UPDATE_SECONDS, generate
from pipelines.demo.guard import Endpoint, Guard
from pipelines.demo.http_limits import AcceptErrors, allow_many_connections, close_idle_connections, format_error, report
from pipelines.demo.reconstruction import reconstruct
from pipelines.demo.request_checks import MAX_SEED, Control, checked_request, image_limit, number_label, sampling_controls
from pipelines.demo.request_fields import MAX_PROMPT_LENGTH, GivenField, checked_given, given_fields
from pipelines.demo.token_map import format_grids, format_shape
from pipelines.demo.unread_messages import UnreadMessages
from pipelines.demo.uploads import MAX_UPLOAD_BYTES, Uploads
from pipelines.generate import ImageGenerationPipeline
from stage1_tokenizer.image_files.images import UnreadableImage
from vqmosaic.errors import InputError, check_range
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.runs.interruption import StopFlag
from vqmosaic.runs.out_of_memory import TooLittleMemory

HOST = "127.0.0.1"
MAX_WAITING = 8
MAX_OPEN_PAGES = 500  # number of pages whose state gradio keeps
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
    """The single thread that computes, and a bounded queue of requests.

    gradio's own queue does not suffice. It starts the next request while the thread of a cancelled one still runs, the page shows an error for
    a cancelled request, and the message about a full queue only says that the server is busy.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "pipeline")
        self._jobs: list[tuple[str | None, threading.Event]] = []  # page and stop flag; the first job is running

    async def run(self, session: str | None, work: Callable[[threading.Event], tuple], waiting: Callable[[int], None]) -> tuple | None:
        """Run work(stop) and return its result, or None if it is stopped before it starts. While n jobs are ahead of it, calls waiting(n).

        Raises InputError if the queue is full. If the request is cancelled, sets `stop`, which `work` must poll.
        """
        if len(self._jobs) > MAX_WAITING:
            raise InputError(f"{MAX_WAITING} requests are already waiting. Try again later.")
        job = session, (stop := threading.Event())
        self._jobs.append(job)
        try:
            while before := self._jobs.index(job):
                waiting(before)
                await asyncio.sleep(UPDATE_SECONDS)
                if stop.is_set():
                    return None
            context = contextvars.copy_context()  # gr.Progress finds its page through the context
            return await asyncio.get_running_loop().run_in_executor(self._thread, context.run, work, stop)
        finally:
            stop.set()
            self._jobs.remove(job)

    def stop(self, session: str | None, everyone: bool = False) -> None:
        """Set the stop flags of the jobs of one page, or of all pages."""
        for owner, stop in list(self._jobs):
            if everyone or owner == session:
                stop.set()


@contextlib.contextmanager
def show_errors_on_page(endpoint: str) -> Iterator[None]:
    """Show errors as a message on the page, escaped because the page renders HTML, and print one line on the terminal."""
    log = ""
    kind = "refused"
    try:
        yield
        return
    except UnreadableImage as error:
        log = str(error)
        message = f"This file cannot be read as an image: {log.partition(': ')[0]}."  # the rest comes from the decoder
    except (torch.OutOfMemoryError, TooLittleMemory):
        message = "The device has too little memory. Choose fewer images, or try again later."
    except InputError as error:
        message = str(error)
    except Exception as error:
        kind, message, log = "error", "Unexpected server error. See the terminal of the server.", format_error(error)
    report(kind, endpoint, log or message)
    raise gr.Error(html.escape(message, quote=False), duration=20, print_exception=False)


def sampling_slider(control: Control, recommended: SamplingConfig, unguided: str | None) -> gr.Slider:
    """The slider of a sampling setting. `unguided` says why guidance is off, if it is."""
    is_off = unguided is not None and control.name.startswith("guidance_")
    default = getattr(SamplingConfig(), control.name)
    value = default if is_off else getattr(recommended, control.name)
    if control.name == "steps":
        value, default = value or control.maximum, control.maximum
    infos = {"temperature": "0 selects the most likely token.", "steps": "Fewer passes are faster. Each draws several tokens."}
    info = unguided if is_off else infos.get(control.name, f"{default:g} is off.")
    return gr.Slider(control.minimum, control.maximum, value=value, step=control.step, label=control.label, info=info, interactive=not is_off)


def generate_signature(fields: list[GivenField], controls: list[Control]) -> inspect.Signature:
    """The signature of the Generate handler. From it, gradio takes the argument names of the API, and which arguments are request and progress."""
    names = ["classes", "number", "seed", "new_seed", *(f"given_{field.name}" for field in fields), *(control.name for control in controls)]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    parameters.append(inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=gr.Request))
    parameters.append(inspect.Parameter("progress", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=gr.Progress()))
    return inspect.Signature(parameters)


def given_input(field: GivenField) -> gr.Textbox | gr.Image:
    """The input of the page for a condition: a prompt box, or an image. No URL and no file on the server can be given."""
    if field.is_text:
        return gr.Textbox("", label=field.label, max_length=MAX_PROMPT_LENGTH, lines=2, info=field.info)
    image = gr.Image(label=field.label, type="filepath", sources=["upload", "clipboard"], buttons=["fullscreen"], height=220)
    vars(image).update(async_move_resource_to_block_cache=keep_upload_path)
    return image


class Page(gr.Blocks):
    """A page, and the worker that runs its computations."""

    worker: Worker


def build(pipe: ImageGenerationPipeline, folder: Path | None = None) -> Page:
    """Build the page of a pipeline without serving it. The Python code on the page loads the pipeline from `folder`."""
    worker, limit, names, settings = Worker(), image_limit(pipe), pipe.vocabulary.learned_class_names, pipe.sampling
    image_sides, grids, fields = pipe.tokenizer.transform.sides, pipe.tokenizer.grids, given_fields(pipe)
    why = pipe.vocabulary.why_unguided()
    unguided = why and f"Off, because the prior {why}."
    style = ["pixels", "below-label"]

    with Page(title="vqmosaic", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"## vqmosaic\n{f'{len(names)} classes, ' if names else ''}{format_shape(image_sides)} pixels, "
                    f"{format_grids(grids)} tokens of {' and '.join(str(grid.codebook_size) for grid in grids)} codes, "
                    f"a prior of {sum(prior.num_parameters for prior in pipe.chain.priors):,} parameters, on {pipe.device}.")
        with gr.Tab("Generate"), gr.Row():
            with gr.Column(scale=2, min_width=300):
                default = "all classes" if len(names or []) <= limit else f"the first {limit} of {len(names or [])}"
                if fields and pipe.vocabulary.why_not_sampled(False, [field.name for field in fields]) is None:
                    default = f"no class if something else is given, otherwise {default}"
                classes = gr.Dropdown(names or [], value=[], multiselect=True, label="Classes", visible=bool(names), info=f"Default: {default}.")
                given = [given_input(field) for field in fields]
                number = gr.Slider(1, limit, value=max(1, min(4, limit // len(names or [None]))), step=1,
                                   label=number_label(pipe), info=f"At most {limit} images in total.")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
                new_seed = gr.Checkbox(True, label="Use a new seed each time")
                sliders = [sampling_slider(control, settings, unguided) for control in sampling_controls(pipe)]
            with gr.Column(scale=5, min_width=320):
                with gr.Row():
                    generate_button = gr.Button("Generate", variant="primary")
                    stop_button = gr.Button("Stop", variant="stop")
                report = gr.Markdown()
                gallery = gr.Gallery(show_label=False, format="png", object_fit="contain", interactive=False, height="auto",
                                     buttons=["download", "fullscreen"], elem_classes="pixels")
                with gr.Accordion("All images in one picture", open=False):
                    grid = gr.Image(show_label=False, format="png", interactive=False, buttons=["download", "fullscreen"])
                with gr.Accordion("Python code", open=False):
                    code = gr.Code(language="python", interactive=False, show_label=False, wrap_lines=True)
        with gr.Tab("Reconstruct"):
            with gr.Row():
                upload = gr.Image(label="Your image", type="filepath", sources=["upload", "clipboard"], buttons=["fullscreen"], height=320)
                seen = gr.Image(label="As the tokenizer sees it", format="png", interactive=False, buttons=["download"], height=320,
                                elem_classes=style)
                tokens = gr.HTML(label="Tokens", show_label=True, container=True, min_height=320, elem_classes="below-label")
                restored = gr.Image(label="Reconstruction", format="png", interactive=False, buttons=["download"], height=320, elem_classes=style)
            reconstruct_button = gr.Button("Reconstruct", variant="primary")
            measures = gr.Markdown()

        async def run(request: gr.Request, progress: gr.Progress, work: Callable[[threading.Event], tuple]) -> tuple | None:
            return await worker.run(request.session_hash, work, lambda ahead: progress(0, desc=f"waiting for {ahead} earlier requests"))

        async def on_generate(classes, number, seed, new_seed, *given_settings_request_progress):
            *values, request, progress = given_settings_request_progress
            with show_errors_on_page("generate"):
                # In a thread, because finding the nearest of a thousand class names takes most of a second and would block other requests.
                checked = await asyncio.to_thread(checked_request, pipe, classes, number, None if new_seed else seed, *values[len(fields):])
                found = checked_given(pipe, values[:len(fields)])
                outputs = await run(request, progress, lambda stop: generate(pipe, folder, stop, progress, *checked, found))
                return outputs or (*[gr.skip()] * 3, "Stopped before it started.", gr.skip())

        vars(on_generate).update(__signature__=generate_signature(fields, sampling_controls(pipe)))
        on_generate.__annotations__ = {"request": gr.Request}

        async def on_upload(upload, request: gr.Request, progress=gr.Progress()):  # noqa: B008
            with show_errors_on_page("reconstruct"):
                if not upload:
                    raise InputError("Upload an image first.")
                outputs = await run(request, progress, lambda stop: reconstruct(pipe, stop, upload["path"]))
                return outputs or (*[gr.skip()] * 3, "Stopped before it started.")

        def on_stop(request: gr.Request):
            worker.stop(request.session_hash)

        generate_button.click(
            on_generate, [classes, number, seed, new_seed, *given, *sliders], [gallery, grid, seed, report, code],
            preprocess=False,  # its error messages do not name the field, and it prints a traceback
            api_name="generate", concurrency_limit=None, show_progress_on=gallery)
        stop_button.click(on_stop, api_name="stop", queue=False)
        page.unload(on_stop)  # called when the page is closed
        results = [seen, tokens, restored, measures]
        gr.on([upload.upload, reconstruct_button.click], on_upload, upload, results, api_name="reconstruct", concurrency_limit=None,
              preprocess=False,  # it would open the file before read_upload checks it
              show_progress_on=restored).failure(lambda: [None] * 4, None, results, queue=False, api_name="clear",
                                                    api_visibility="private")
    vars(upload).update(async_move_resource_to_block_cache=keep_upload_path)
    page.worker = worker
    return page.queue(max_size=2 * MAX_WAITING, default_concurrency_limit=1, api_open=False)


async def keep_upload_path(path: str) -> str:
    """The unchanged path of an upload. Replaces gradio's method, which copies the file and downloads URLs."""
    return path


@contextlib.asynccontextmanager
async def guard_lifespan(page: gr.Blocks, app: App) -> AsyncIterator[None]:
    """Lifespan of the app. Puts the guard in front of all gradio middleware before the first request, and runs the cleanup tasks."""
    assert app.middleware_stack is not None  # the app makes it before it starts its lifespan
    uploads = Uploads(Path(app.uploaded_file_dir), page.upload_file_set)
    page._queue.pending_messages_per_session = UnreadMessages(page._queue)  # type: ignore[assignment]  # replaced on purpose
    app.middleware_stack = Guard(app.middleware_stack, uploads, [
        Endpoint(function.api_name, number, len(function.inputs), function.queue, frozenset(
            position for position, field in enumerate(function.inputs) if isinstance(field, gr.Image)))
        for number, function in page.fns.items() if function.api_name is not None and "unload" not in dict(function.targets).values()])
    asyncio.get_running_loop().set_exception_handler(AcceptErrors())
    tasks = [asyncio.create_task(uploads.keep_room()), asyncio.create_task(close_idle_connections(
        lambda: page.server.server_state.connections if getattr(page, "server", None) else ()))]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()


def check_port(port: int) -> None:
    """Raise InputError unless the demo can listen on this port."""
    check_range("--port", port, at_least=1, at_most=65535)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise InputError(f"--port {port} cannot be used ({error.strerror}). Give another port, or leave it out to use a free one.") from None


def limit_uvicorn() -> None:
    """Make uvicorn parse HTTP with h11, which rejects request headers over 64 KB, and disable WebSockets.

    gradio lets uvicorn choose the parser, and uvicorn prefers httptools if it is installed. httptools has no limit: endless headers take 1 GB of
    memory within seconds.
    """
    HTTP_PROTOCOLS["auto"], WS_PROTOCOLS["auto"] = HTTP_PROTOCOLS["h11"], WS_PROTOCOLS["none"]
    log = logging.getLogger("uvicorn.error")
    if _is_not_upgrade_warning not in log.filters:
        log.addFilter(_is_not_upgrade_warning)


def _is_not_upgrade_warning(record: logging.LogRecord) -> bool:
    """False for uvicorn's hint to install a WebSocket library. The guard already reports such requests."""
    return not record.getMessage().startswith(("Unsupported upgrade", "No supported WebSocket"))


def start(page: gr.Blocks, port: int | None = None) -> str:
    """Serve a page in the background and return its URL. page.close() stops it."""
    # gradio would prefer an existing value of GRADIO_ALLOWED_PATHS to the empty argument below
    os.environ |= {"GRADIO_RUN_HISTORY": "False", "GRADIO_ALLOWED_PATHS": ""}
    limit_uvicorn()
    address = page.launch(
        server_name=HOST, server_port=port, share=False, prevent_thread_lock=True, quiet=True, ssr_mode=False, mcp_server=False,
        enable_monitoring=False, state_session_capacity=MAX_OPEN_PAGES,
        allowed_paths=[], max_file_size=MAX_UPLOAD_BYTES, footer_links=[], css=CSS,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        app_kwargs={"lifespan": functools.partial(guard_lifespan, page)})[1]
    if not isinstance(page.app.middleware_stack, Guard):
        page.close(verbose=False)
        raise RuntimeError("This version of gradio does not run the lifespan of an app, so the demo cannot be served safely.")
    return address


def serve(folder: Path, port: int | None, device: str | None, dtype: str) -> None:
    """Serve a pipeline folder to this machine until SIGINT or SIGTERM. Without a port, uses the first free port from 7860.

    Raises InputError if the port cannot be used or the folder contains no pipeline.
    """
    if port is not None:
        check_port(port)
    with tempfile.TemporaryDirectory(prefix="vqmosaic-demo-") as files, StopFlag() as interrupted:
        allow_many_connections()
        warnings.filterwarnings("ignore", module="PIL")  # Pillow warns about damaged metadata in uploads
        os.environ["GRADIO_TEMP_DIR"] = files  # gradio's default folder is shared by, and served by, all gradio pages of a machine
        page = build(ImageGenerationPipeline.from_pretrained(folder, device, getattr(torch, dtype)), folder)
        print(f"vqmosaic demo of {folder} on {start(page, port)}, for this machine only. Press Ctrl-C to stop.", flush=True)
        while not interrupted.signal:
            time.sleep(UPDATE_SECONDS)
        page.worker.stop(None, everyone=True)
        page.close(verbose=False)
