"""The web page, served in this process and used over HTTP by gradio's client: results, limits, stopping, and what it does not serve."""

import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("gradio")

from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from pipelines.demo import page as demo
from pipelines.generate import ImageGenerationPipeline
from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage2_prior.prior import TokenPrior
from stage2_prior.vocabulary import Vocabulary
from token_shards import Grid
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import PriorConfig, SamplingConfig
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig

CLASSES = ["ant", "bee", "cat"]
TOKENS = 16


class SlowPipeline(ImageGenerationPipeline):
    """A pipeline that counts tokens, calls and concurrent calls, and takes `delay` seconds per token."""

    delay, tokens, calls, concurrent_calls, max_concurrent_calls = 0.0, 0, 0, 0, 0

    def __call__(self, *args, callback=None, **kwargs):
        def slow(done, total):
            time.sleep(self.delay)
            self.tokens = done
            return callback(done, total)

        self.tokens, self.calls, self.concurrent_calls = 0, self.calls + 1, self.concurrent_calls + 1
        self.max_concurrent_calls = max(self.max_concurrent_calls, self.concurrent_calls)
        try:
            return super().__call__(*args, callback=slow, **kwargs)
        finally:
            self.concurrent_calls -= 1


def tiny_pipeline(class_names=CLASSES, label_drop=0.1, folder=None) -> ImageGenerationPipeline:
    """Random weights: 16 x 16 grey pixels, 4 x 4 tokens of 16 codes."""
    config = TokenizerConfig(channels=32, channel_multipliers=[1, 1, 1], residual_blocks=1, codebook_size=16, code_dim=8, latent_channels=8,
                             middle_attention=False)
    tokenizer = ImageTokenizer(config, ImageTransform(16, 1), class_names).eval()
    if folder is None:
        tokenizer.token_fingerprint = "f" * 64
    else:
        tokenizer.save_pretrained(folder / "parts")
    vocabulary = Vocabulary(grids=[Grid("image", 16, 4, 4)], class_names=class_names, token_fingerprint=tokenizer.token_fingerprint,
                            label_drop=label_drop)
    prior = TokenPrior.from_config(PriorConfig(width=32, layers=1, heads=2), vocabulary, seed=0).eval()
    with torch.no_grad():  # fresh logits are near 0, so classes would hardly differ
        prior.model.lm_head.weight.mul_(20)
    return ImageGenerationPipeline(tokenizer, prior, SamplingConfig(temperature=0.9, top_k=8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    tiny_pipeline(folder=root).save_pretrained(root / "pipeline")
    return root / "pipeline"


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    """A pipeline, its page and the address of the page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        pipe = SlowPipeline.from_pretrained(folder, "cpu")
        page = demo.build(pipe, folder)
        yield pipe, page, demo.start(page)
        page.close(verbose=False)


@pytest.fixture
def pipe(served):
    served[0].delay, served[0].calls, served[0].max_concurrent_calls = 0.0, 0, 0
    yield served[0]
    served[0].delay = 0.0
    wait_until(lambda: not served[1].worker._jobs and not served[0].concurrent_calls)


@pytest.fixture
def page(served, pipe):
    return served[1]


@pytest.fixture
def address(served, pipe):
    return served[2]


@pytest.fixture(scope="module")
def clients(served, tmp_path_factory):
    """Three clients, like three open pages."""
    return [Client(served[2], verbose=False, download_files=tmp_path_factory.mktemp("downloads")) for _ in range(3)]


@pytest.fixture
def client(clients, pipe):
    return clients[0]


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


def pixels(path_or_image) -> np.ndarray:
    return np.array(path_or_image if isinstance(path_or_image, Image.Image) else Image.open(path_or_image))


# --- generating --------------------------------------------------------------------------------------------------------------


def test_generated_images_equal_those_of_the_pipeline_in_class_order(client, pipe):
    gallery, grid, seed, report, code = client.predict(classes=["cat", "ant"], number=3, seed=5, new_seed=False, api_name="/generate")
    expected = pipe(["cat", "ant"], 3, seed=5, callback=lambda done, total: True)
    assert [shown["caption"] for shown in gallery] == ["cat"] * 3 + ["ant"] * 3
    for shown, image in zip(gallery, expected.images, strict=True):
        assert (pixels(shown["image"]) == pixels(image)).all()
    assert len({pixels(image).tobytes() for image in expected.images}) == 6
    assert seed == 5 and report.startswith("6 images with seed 5 in ")
    assert pixels(grid).shape == ((2 * 18 + 2) * 4, (3 * 18 + 2) * 4)  # one row per class, each pixel enlarged to 4 x 4
    assert "class_labels=['cat', 'ant'], num_images_per_label=3, seed=5" in code


def test_the_python_code_gives_the_same_images(client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gallery, *_, code = client.predict(classes=["bee"], number=2, temperature=0.5, top_k=3, top_p=0.8, guidance_scale=2.5, api_name="/generate")
    namespace: dict = {}
    exec(code, namespace)
    assert [pixels(image).tolist() for image in namespace["out"].images] == [pixels(shown["image"]).tolist() for shown in gallery]
    assert (pixels("image.png") == pixels(gallery[0]["image"])).all()


def test_no_selected_class_means_all_classes_and_a_new_seed_gives_new_images(client):
    first, second = (client.predict(number=1, api_name="/generate") for _ in range(2))
    assert [shown["caption"] for shown in first[0]] == CLASSES
    assert first[2] != second[2]
    assert any((pixels(a["image"]) != pixels(b["image"])).any() for a, b in zip(first[0], second[0], strict=True))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"classes": ["ant", "bee"], "number": 64}, r"128 images are too many \(64 for each of 2 classes\); allowed: at most 64"),
    ({"number": 1000}, "Images of each class is 1000; it must be at least 1 and at most 64"),
    ({"number": 0}, "Images of each class is 0; it must be at least 1"),
    ({"classes": ["dog"]}, "There is no class 'dog'"),
    ({"top_p": 0}, "Top-p is 0; it must be at least 0.01"),
    ({"seed": -1, "new_seed": False}, "Seed is -1; it must be at least 0"),
])
def test_invalid_requests_are_refused_with_a_message(client, pipe, arguments, message):
    with pytest.raises(AppError, match=message):
        client.predict(**arguments, api_name="/generate")
    assert pipe.calls == 0


def test_input_errors_are_shown_escaped_and_other_errors_are_hidden(client, pipe, monkeypatch):
    def fail(error):
        def call(*_, **__):
            raise error
        monkeypatch.setattr(SlowPipeline, "__call__", call)

    fail(InputError("top_k is 99 <b>"))
    with pytest.raises(AppError, match=r"^top_k is 99 &lt;b&gt;$"):
        client.predict(number=1, api_name="/generate")
    fail(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(AppError, match="too little memory"):
        client.predict(number=1, api_name="/generate")
    fail(RuntimeError("/secret/path"))
    with pytest.raises(AppError) as error:
        client.predict(number=1, api_name="/generate")
    assert "secret" not in str(error.value)


def components(page) -> dict[str, dict]:
    return {component["props"].get("label"): component["props"] for component in page.get_config_file()["components"]}


def test_sliders_start_at_the_recommended_settings(page):
    components_by_label = components(page)
    assert [components_by_label[label]["value"] for label in ("Temperature", "Top-k", "Top-p", "Guidance scale")] == [0.9, 8, 1, 1]
    assert components_by_label["Guidance scale"]["interactive"] is True and components_by_label["Top-k"]["maximum"] == 16


@pytest.mark.parametrize(("class_names", "label_drop", "reason"), [(None, 0.1, "without classes"), (CLASSES, 0.0, "label_drop 0")])
def test_unsupported_guidance_is_disabled_with_the_reason(class_names, label_drop, reason):
    pipe = tiny_pipeline(class_names, label_drop)
    components_by_label = components(demo.build(pipe))
    guidance = components_by_label["Guidance scale"]
    assert guidance["interactive"] is False and guidance["value"] == 1 and reason in guidance["info"]
    assert components_by_label["Classes"]["visible"] is (class_names is not None)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance_scale": 1.0}
    gallery, grid, *_ = demo.generate(pipe, None, threading.Event(), lambda *_, **__: None, [], 9, 0, settings)
    assert [caption for _, caption in gallery] == ([None] * 9 if class_names is None else [name for name in CLASSES for _ in range(9)])
    assert grid.width == (8 if class_names is None else 9) * 18 * 4 + 2 * 4


def test_guidance_is_refused_for_a_page_without_classes():
    with pytest.raises(InputError, match=r"guidance_scale is 2\.0, but no class_labels are given, so guidance has no effect; leave it out"):
        demo.generate(tiny_pipeline(None), None, threading.Event(), lambda *_, **__: None, [], 1, 0, {"guidance_scale": 2.0})


def test_requests_are_limited_by_classes_and_pixels():
    pipe = tiny_pipeline([f"class {number}" for number in range(100)])
    components_by_label = components(demo.build(pipe))
    assert "first 64 of 100" in components_by_label["Classes"]["info"] and components_by_label["Images of each class"]["value"] == 1
    assert len(demo.generate(pipe, None, threading.Event(), lambda *_, **__: None, [], 1, 0, {})[0]) == 64
    pipe.tokenizer.transform = ImageTransform(1024, 3)
    assert demo.image_limit(pipe) == 4
    pipe.tokenizer.transform = ImageTransform(4096, 3)
    assert demo.image_limit(pipe) == 1


# --- reconstructing ----------------------------------------------------------------------------------------------------------


def test_reconstruct_returns_the_input_its_tokens_and_the_reconstruction(client, pipe, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    image.save(tmp_path / "upload.png")
    seen, tokens, restored, report = client.predict(handle_file(tmp_path / "upload.png"), api_name="/reconstruct")
    assert (pixels(seen) == pipe.tokenizer.transform.resize(image)[..., 0]).all()
    assert (pixels(restored) == pixels(pipe.reconstruct(image)[0])).all()
    assert [int(code) for code in re.findall(r">(\d+)</span>", tokens)] == pipe.encode(image).flatten().tolist()
    assert "4 x 4 tokens" in report and "2,048 bits became 64" in report and "dB" in report


def test_uploads_that_are_no_images_are_refused_with_a_message(client, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(AppError, match="cannot be read as an image: not an image of a known format"):
        client.predict(handle_file(tmp_path / "text.png"), api_name="/reconstruct")
    with pytest.raises(AppError, match="Upload an image first"):
        client.predict(None, api_name="/reconstruct")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_before_decoding(client, tmp_path):
    Image.new("1", (11_000, 11_000)).save(tmp_path / "bomb.png")
    with pytest.raises(AppError, match="11000 x 11000 pixels, more than"):
        client.predict(handle_file(tmp_path / "bomb.png"), api_name="/reconstruct")


# --- stopping and the queue --------------------------------------------------------------------------------------------------


def start_generation(client, pipe, delay=0.2):
    """Start a request for 16 tokens and wait until two of them are sampled."""
    pipe.delay = delay
    job = client.submit(classes=["ant"], number=2, api_name="/generate")
    wait_until(lambda: pipe.concurrent_calls and pipe.tokens >= 2)
    return job


def assert_generation_stopped(pipe):
    wait_until(lambda: not pipe.concurrent_calls)
    assert 2 <= pipe.tokens < TOKENS / 2


def test_stop_ends_generation_and_reports_the_progress(client, pipe):
    job = start_generation(client, pipe)
    client.predict(api_name="/stop")
    assert job.result(timeout=10)[3] == f"Stopped after {pipe.tokens} of {TOKENS} tokens."
    assert_generation_stopped(pipe)


def test_cancelling_a_request_ends_generation(client, pipe):
    start_generation(client, pipe).cancel()
    assert_generation_stopped(pipe)


def function_number(page, name):
    return next(function["id"] for function in page.get_config_file()["dependencies"] if function["api_name"] == name)


def test_closing_the_page_ends_generation(address, page, pipe):
    pipe.delay = 0.2
    body = {"data": [["ant"], 1, 0, True, 1, 0, 1, 1], "fn_index": function_number(page, "generate"), "session_hash": "closed"}
    with socket.create_connection(("127.0.0.1", page.server_port)) as heartbeat:  # a browser keeps this connection open while the page is open
        heartbeat.sendall(f"GET /gradio_api/heartbeat/closed HTTP/1.1\r\nHost: 127.0.0.1:{page.server_port}\r\n\r\n".encode())
        assert b"200 OK" in heartbeat.recv(1000)
        assert httpx.post(f"{address}gradio_api/queue/join", json=body).status_code == 200
        wait_until(lambda: pipe.concurrent_calls and pipe.tokens >= 2)
    assert_generation_stopped(pipe)


def test_stop_does_not_affect_other_pages(clients, pipe):
    job = start_generation(clients[0], pipe, delay=0.02)
    clients[1].predict(api_name="/stop")
    assert job.result(timeout=20)[3].startswith("2 images")


def test_requests_are_queued_and_leave_the_queue_when_stopped(clients, pipe, page, monkeypatch):
    monkeypatch.setattr(demo, "MAX_WAITING", 2)
    first = start_generation(clients[0], pipe, delay=0.05)
    waiting = []
    for client in clients[1:]:
        waiting.append(client.submit(classes=["bee"], number=1, api_name="/generate"))
        wait_until(lambda: len(page.worker._jobs) == 1 + len(waiting))
    with pytest.raises(AppError, match="2 requests are already waiting"):
        clients[0].predict(number=1, api_name="/generate")
    clients[1].predict(api_name="/stop")
    assert waiting[0].result(timeout=10)[3] == "Stopped before it started."
    pipe.delay, sampled = 0.5, pipe.tokens
    wait_until(lambda: pipe.tokens > sampled)
    first.cancel()  # gradio has finished it, but its current token still takes half a second
    wait_until(lambda: pipe.calls == 2)
    pipe.delay = 0.0
    assert waiting[1].result(timeout=20)[3].startswith("1 image ")
    assert pipe.calls == 2 and pipe.max_concurrent_calls == 1


def test_requests_that_bypass_the_queue_are_refused(address, page):
    body = {"data": [[], 1, 0, True, 1, 0, 1, 1], "fn_index": function_number(page, "generate"), "session_hash": "x"}
    assert httpx.post(f"{address}gradio_api/run/generate", json=body).status_code == 404


# --- serving -----------------------------------------------------------------------------------------------------------------


def test_the_server_listens_on_loopback_only(address, page):
    assert address == f"http://127.0.0.1:{page.server_port}/" and httpx.get(address).status_code == 200
    with socket.socket() as other, pytest.raises(OSError):
        other.settimeout(2)
        other.connect(("127.0.0.2", page.server_port))  # would connect if the server listened on all addresses


def test_files_of_the_server_are_not_served(address):
    for path in ("/etc/passwd", __file__, "pyproject.toml", "file:///etc/passwd", "https://a.example/", "HTTP://a.example/"):
        assert httpx.get(f"{address}gradio_api/file={path}").status_code in (403, 404), path
    assert httpx.get(f"{address}gradio_api/proxy=https://example.com/").status_code in (403, 404)


def test_a_foreign_host_name_is_refused(address):
    assert httpx.get(address, headers={"Host": "evil.example"}).status_code == 403
    assert httpx.get(address, headers={"Host": "localhost:1"}).status_code == 200


def test_the_page_loads_nothing_from_other_servers(address, page):
    config = page.get_config_file()
    assert config["analytics_enabled"] is False and not config.get("run_history") and page.share is False
    assert not config["stylesheets"]
    assert not re.search(r"""url\(["']?(https?:)?//|@import""", httpx.get(f"{address}theme.css").text)
    assert not re.search(r"""<(script|link|img)[^>]+(src|href)=["']?(https?:)?//""", httpx.get(address).text)


def test_a_port_that_cannot_be_used_is_refused(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match=r"--port \d+ cannot be used \(Address already in use\)"):
            demo.serve(folder, taken.getsockname()[1], "cpu", "float32")
    with pytest.raises(InputError, match="--port is 70000"):
        demo.serve(folder, 70000, "cpu", "float32")
    with pytest.raises(InputError, match="does not exist"):
        demo.serve(folder / "nothing", None, "cpu", "float32")


def test_serve_runs_until_a_signal_and_leaves_no_files(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    statuses = []

    def request_and_stop():
        for _ in range(300):
            time.sleep(0.05)
            try:
                statuses.append(httpx.get(f"http://127.0.0.1:{port}/").status_code)
                break
            except httpx.TransportError:
                continue
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=request_and_stop).start()
    previous = signal.getsignal(signal.SIGTERM)
    demo.serve(folder, port, "cpu", "float32")
    assert statuses == [200] and signal.getsignal(signal.SIGTERM) == previous
    assert f"http://127.0.0.1:{port}/" in capsys.readouterr().out
    assert not list(tmp_path.glob("vqmosaic-demo-*"))
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/")


def test_only_the_demo_imports_gradio():
    root = Path(demo.__file__).parents[2]
    packages = ("vqmosaic", "token_shards", "stage1_tokenizer", "stage2_prior", "pipelines")
    files = [path for package in packages for path in (root / package).rglob("*.py")]
    importers = {path.parent.name for path in files if re.search(r"^\s*(import|from) gradio", path.read_text(), re.MULTILINE)}
    assert importers == {"demo"}
