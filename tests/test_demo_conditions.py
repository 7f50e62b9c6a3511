"""The demo of a pipeline whose prior is given an image and a text: its inputs, and what its guard refuses."""

import base64
import io
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")

from pipelines.demo import page as demo
from pipelines.demo.request_fields import GivenValues, checked_given, given_fields
from pipelines.generate import ImageGenerationPipeline
from tests.conditioned import make_parts
from tests.test_demo_guard import Server, forged_files, picture
from vqmosaic.errors import InputError

SETTINGS = [1, 0, 1, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    return make_parts(root, class_drop=0.1).bundle(root / "pipeline")


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        served = Server(folder)
        yield served
        served.http.close()
        served.page.close(verbose=False)


def request(image: object = None, prompt: object = "") -> list:
    return [["ant"], 1, 3, False, image, prompt, *SETTINGS]


def test_fields_of_the_page(server):
    fields = given_fields(server.pipe)
    assert [(field.name, field.is_text, field.label) for field in fields] == [("low", False, "Given image: low"), ("text", True, "Prompt")]
    function = next(each for each in server.page.fns.values() if each.api_name == "generate")
    assert [type(field).__name__ for field in function.inputs[4:6]] == ["Image", "Textbox"] and len(function.inputs) == len(request())
    endpoint = server.page.app.middleware_stack._by_name["generate"]
    assert endpoint.uploads == {4} and server.page.app.middleware_stack._by_name["reconstruct"].uploads == {0}


def test_image_and_prompt_are_used(server):
    content = picture(8, 8)
    path = server.upload(content).json()[0]
    event, data = server.result("generate", request({"path": path, "meta": {"_type": "gradio.FileData"}}, "sea"))
    assert event == "complete" and "1 image with seed 3" in data[3]
    assert "prompt={'text': 'sea'}" in data[4] and "Image.open(\"low.png\")" in data[4] and path not in data[4]
    direct = server.pipe("ant", image=Image.open(io.BytesIO(content)).convert("L"), prompt="sea", seed=3, callback=lambda *_: True)
    gallery, *_ = demo.generate(server.pipe, None, threading.Event(), lambda *_, **__: None, ["ant"], 1, 3, {}, GivenValues(
        {"text": "sea"}, {"low": path}))
    assert np.array_equal(np.array(gallery[0][0]), np.array(direct.images[0]))
    assert server.result("generate", request())[0] == "complete", "both may be left out, because they were dropped in training"


def test_files_and_addresses_are_refused_in_both_fields(server, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture())
    upload = server.upload(picture()).json()[0]
    for target in (str(secret), "/etc/passwd", f"http://127.0.0.1:{server.port}/config"):
        for forged in forged_files(target, upload):
            if forged == {"path": upload, "url": target, "meta": {"_type": "gradio.FileData"}}:
                continue  # the url is removed, the upload is used
            refused = server.call("generate", request(image=forged))
            assert refused.status_code == 400, forged
        assert server.call("generate", request(prompt={"path": target})).status_code == 400
        event, data = server.result("generate", request(prompt=target))
        assert event == "complete" and secret.name not in str(data[4]).replace(repr(target), ""), "a path in a prompt is only text"
    data_url = "data:image/png;base64," + base64.b64encode(picture()).decode()
    assert server.call("generate", request(image=data_url)).status_code == 400


def test_uploads_that_are_no_images_give_a_message(server, capsys):
    path = server.upload(b"no image").json()[0]
    event, message = server.result("generate", request({"path": path, "meta": {"_type": "gradio.FileData"}}))
    assert event == "error" and "cannot be read as an image" in str(message) and path not in str(message)


def test_prompts_are_limited(server):
    assert server.call("generate", request(prompt="x" * 1001)).status_code == 400
    assert server.result("generate", request(prompt="x" * 1000))[0] == "complete"
    for value in (3, ["x"]):
        with pytest.raises(InputError, match=r"Prompt is .*; it must be a text of at most 1000 characters"):
            checked_given(server.pipe, [None, value])
    with pytest.raises(InputError, match="Given image: low is 'x'; upload an image"):
        checked_given(server.pipe, ["x", ""])
    assert checked_given(server.pipe, [None, ""]) == GivenValues({}, {})


def test_without_classes_the_page_draws_no_class(folder):
    pipe = ImageGenerationPipeline.from_pretrained(folder, "cpu")
    gallery, *_ = demo.generate(pipe, None, threading.Event(), lambda *_, **__: None, [], 2, 0, {}, GivenValues({"text": "sea"}, {}))
    assert len(gallery) == 2 and gallery[0][1] is None
