"""Many clients of the demo's server at once, and clients that do not read its responses."""

import contextlib
import io
import logging
import os
import resource
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")

from pipelines.demo import http_limits as demo_http
from pipelines.demo import page as demo
from pipelines.demo import unread_messages as demo_messages
from tests.test_demo import CLASSES, wait_until
from tests.test_demo_guard import FORM, GENERATE, Server, picture, served_pipeline


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served_pipeline(tmp_path_factory) as served:
        yield served


def connections(server: Server) -> int:
    return len(server.page.server.server_state.connections)


def connect_without_reading(server: Server, request: str) -> socket.socket:
    """Send a request over a connection with small buffers, so that the response does not fit in them."""
    opened = socket.socket()
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    opened.connect(("127.0.0.1", server.port))
    opened.sendall(request.replace("HOST", f"127.0.0.1:{server.port}").encode())
    return opened


def test_clients_that_do_not_read_are_disconnected(server, monkeypatch, capsys):
    large = server.upload(os.urandom(30_000_000)).json()[0]
    before = connections(server)
    requests = [f"GET /gradio_api/file={large} HTTP/1.1\r\nHost: HOST\r\n\r\n", "GET /theme.css HTTP/1.1\r\nHost: HOST\r\n\r\n" * 500]
    opened = [connect_without_reading(server, request) for request in requests for _ in range(3)]
    wait_until(lambda: connections(server) >= before + 6)
    monkeypatch.setattr(demo_http, "IDLE_SECONDS", 0.5)
    monkeypatch.setattr(demo_http, "CHECK_SECONDS", 0.1)
    wait_until(lambda: connections(server) <= before, seconds=30)
    with contextlib.closing(connect_without_reading(server, "GET /gradio_api/heartbeat/x HTTP/1.1\r\nHost: HOST\r\n\r\n")) as stream:
        assert stream.recv(100)
        time.sleep(2)
        stream.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                assert stream.recv(1000), "a stream that sends nothing stays open"
    for connection in opened:
        connection.close()
    assert "Traceback" not in capsys.readouterr().err


def test_a_slow_client_gets_the_whole_response(server, monkeypatch):
    monkeypatch.setattr(demo_http, "IDLE_SECONDS", 2.0)
    monkeypatch.setattr(demo_http, "CHECK_SECONDS", 0.1)
    content, received = os.urandom(3_000_000), b""
    large = server.upload(content).json()[0]
    with connect_without_reading(server, f"GET /gradio_api/file={large} HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n") as opened:
        while part := opened.recv(1 << 16):
            received += part
            time.sleep(0.005)
    assert received.partition(b"\r\n\r\n")[2] == content


def test_more_connections_than_descriptors_give_one_log_line(server, capsys, caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened: list[socket.socket] = []
    with socket.socket() as spare:  # so that the highest descriptor is known
        limit = spare.fileno() + 41
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                opened.append(socket.create_connection(("127.0.0.1", server.port)))
        time.sleep(2.5)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for connection in opened:
            connection.close()
    wait_until(lambda: server.http.get("/robots.txt").status_code == 200)
    err = capsys.readouterr().err
    assert err.startswith("error: connections: no further connection can be accepted: Too many open files") and len(err.splitlines()) == 1
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_running_requests_keep_their_messages(server, monkeypatch, capsys):
    monkeypatch.setattr(demo_messages, "MAX_SESSIONS", 20)
    monkeypatch.setattr(server.pipe, "delay", 1.0)
    queue = server.page._queue
    sent = {"data": GENERATE, "fn_index": next(number for number, function in server.page.fns.items() if function.api_name == "generate"),
            "session_hash": "page"}
    assert server.http.post("/gradio_api/queue/join", json=sent).status_code == 200
    unread = [server.call("generate", [["dog"], *GENERATE[1:]]) for _ in range(30)]
    assert {response.status_code for response in unread} == {200}
    monkeypatch.setattr(server.pipe, "delay", 0.0)
    text = server.http.get("/gradio_api/queue/data", params={"session_hash": "page"}).text
    assert '"msg":"process_completed"' in text and '"success":true' in text and '"msg":"progress"' in text
    wait_until(lambda: not queue.event_ids_to_events)
    assert len(queue.pending_messages_per_session) <= 21 and len(queue.pending_event_ids_session) <= 21
    assert "Traceback" not in capsys.readouterr().err
    assert server.result("generate", GENERATE)[0] == "complete"


def test_an_invalid_form_gives_one_log_line(server, capsys):
    start = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n'
    for body in (b"x", b"--bX", b"--b\rX", start + b"X\r\n\r\n", start + b": a\r\n\r\n", start + b"X: a\rb\r\n\r\n", start + b"A: " + b"a" * 9000,
                 start + b"A: b\r\n" * 20 + b"\r\n", start + b"\rX"):
        capsys.readouterr()
        response = server.http.post("/gradio_api/upload", content=body, headers=FORM)
        assert response.status_code == 400 and response.json()["error"], body
        out, err = capsys.readouterr()
        assert not out and len(err.splitlines()) == 1 and err.startswith("refused: "), (body, err)
    assert logging.getLogger("python_multipart.multipart").getEffectiveLevel() > logging.WARNING


@pytest.mark.slow
def test_parallel_clients_get_the_images_of_their_seeds(server, monkeypatch):
    monkeypatch.setattr(demo, "MAX_WAITING", 20)
    clients, rounds = 20, 5
    expected = {}
    for seed in range(clients * rounds):
        images = server.pipe(class_labels=[CLASSES[seed % 3]], num_images_per_label=5, seed=seed, temperature=1.0, top_k=0, top_p=1.0,
                             guidance_scale=1.0, output_type="np", callback=lambda done, total: True).images
        expected[seed] = [np.asarray(image) for image in images]

    def work(client: int) -> int:
        equal = 0
        for seed in range(client * rounds, (client + 1) * rounds):
            arguments = [[CLASSES[seed % 3]], 5, seed, False, *GENERATE[4:]]
            upload = server.upload(picture(16 + client, 16)).json()[0]
            event, (gallery, *_) = server.result("generate", arguments)
            assert event == "complete"
            for image, pixels_HWC in zip(gallery, expected[seed], strict=True):
                with httpx.stream("GET", f"{server.address}/gradio_api/file={image['image']['path']}") as response:
                    shown = np.asarray(Image.open(io.BytesIO(response.read())).convert("L"))
                equal += np.array_equal(shown, pixels_HWC.reshape(16, 16))
            event, (seen, *_) = server.result("reconstruct", [{"path": upload}])
            assert event == "complete" and seen["path"] != upload
        return equal

    with ThreadPoolExecutor(clients) as threads:
        assert sum(threads.map(work, range(clients))) == clients * rounds * 5
