"""Attacks on the demo's server over HTTP: file access, connections, foreign origins, storage, timeouts, malicious images and error messages."""

import asyncio
import contextlib
import io
import json
import os
import re
import socket
import struct
import sys
import threading
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image, ImageFile, TiffImagePlugin

from tests.image_bytes import encoded, exif_bomb, jpeg_segment

pytest.importorskip("gradio")

from pipelines.demo import guard as demo_guard
from pipelines.demo import http_limits as demo_http
from pipelines.demo import page as demo
from pipelines.demo import reconstruction as demo_reconstruction
from pipelines.demo import request_checks as demo_requests
from pipelines.demo import uploads as demo_uploads
from pipelines.demo.http_limits import Refusal, strict_json
from stage1_tokenizer.image_files import metadata_limits
from stage1_tokenizer.image_files.images import ImageTransform, UnreadableImage, read_image
from tests.test_demo import SlowPipeline, tiny_pipeline, wait_until

GENERATE = [["ant"], 1, 0, False, 1, 0, 1, 1]
META = {"_type": "gradio.FileData"}
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "multipart/form-data; boundary=b"}
AUDIT_EVENTS: list[tuple] | None = None  # audit events, if a test records them


def record_audit_event(event: str, arguments: tuple) -> None:
    """Audit hook that records opened files and connections of this process, which runs the server. Audit hooks cannot be removed."""
    if AUDIT_EVENTS is not None and event in ("open", "os.listdir", "os.scandir", "socket.connect", "socket.sendto", "socket.getaddrinfo"):
        AUDIT_EVENTS.append((event, *map(str, arguments[-1:] if event == "socket.connect" else arguments[:2])))


sys.addaudithook(record_audit_event)


class Server:
    """A served pipeline and methods that send it requests."""

    def __init__(self, folder: Path):
        self.pipe = SlowPipeline.from_pretrained(folder, "cpu")
        self.page = demo.build(self.pipe, folder)
        self.address = demo.start(self.page).rstrip("/")
        self.port, self.files = self.page.server_port, Path(self.page.app.uploaded_file_dir)
        self.http = httpx.Client(base_url=self.address, timeout=30)

    def upload(self, content: bytes, name: str = "image.png", **headers: str) -> httpx.Response:
        return self.http.post("/gradio_api/upload", files={"files": (name, content)}, headers=headers)

    def call(self, name: str, data: list) -> httpx.Response:
        return self.http.post(f"/gradio_api/call/{name}", json={"data": data})

    def result(self, name: str, data: list) -> tuple[str, object]:
        """The last event of a call and its data."""
        text = self.http.get(f"/gradio_api/call/{name}/{self.call(name, data).json()['event_id']}").text
        event, line = re.findall(r"event: (\w+)\ndata: (.*)\n", text)[-1]
        return event, json.loads(line)

    def connect(self, sent: bytes) -> socket.socket:
        opened = socket.create_connection(("127.0.0.1", self.port))
        opened.sendall(sent.replace(b"HOST", f"127.0.0.1:{self.port}".encode()))
        return opened

    def stored(self) -> list[Path]:
        return [path for path in self.files.rglob("*") if path.is_file()]


@contextlib.contextmanager
def served_pipeline(tmp_path_factory):
    """A Server with a tiny pipeline and its own folder for uploads."""
    root = tmp_path_factory.mktemp("guard")
    tiny_pipeline(folder=root).save_pretrained(root / "pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        served = Server(root / "pipeline")
        yield served
        served.http.close()
        served.page.close(verbose=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served_pipeline(tmp_path_factory) as served:
        yield served


def picture(width: int = 20, height: int = 20, kind: str = "PNG", **options) -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)), kind, **options)


def all_routes(routes) -> list[tuple[str, str]]:
    """Method and path of each route of an app and of its included routers."""
    found = []
    for route in routes:
        if hasattr(route, "original_router"):
            found += all_routes(route.original_router.routes)
        else:
            found += [(method, route.path) for method in sorted(getattr(route, "methods", None) or ["GET", "POST"])]
    return found


# --- file access and connections -----------------------------------------------------------------------------------------------


def forged_files(target: str, upload: str) -> list:
    """A file outside of the uploads, or an address, in the forms in which gradio accepts files, and in malformed ones."""
    return [
        {"path": target}, {"path": target, "meta": META}, {"path": target, "url": target, "meta": META}, {"url": target, "meta": META},
        {"path": upload, "url": target, "meta": META}, {"path": target, "meta": META, "is_stream": True}, {"path": target, "meta": {}},
        {"path": f"{upload}/../../{target}", "meta": META}, {"path": f"{Path(upload).parent}/../{target}"}, {"path": f"file://{target}"},
        {"path": [target], "meta": META}, {"path": {"path": target, "meta": META}, "meta": META}, {"path": target, "_type": "gradio.FileData"},
        {"value": {"path": target, "meta": META}}, {"image": {"path": target, "meta": META}, "points": []}, [{"path": target, "meta": META}],
        [[{"path": target, "meta": META}]], [{"image": {"path": target, "meta": META}, "caption": None}],
        {"background": {"path": target, "meta": META}, "layers": [], "composite": None}, target, [target], {"name": target, "is_file": True},
        {"name": target, "data": None, "is_file": True}, {"path": os.path.relpath(target) if target.startswith("/") else f"//{target}"},
        {"PATH": target, "Meta": META}, {"path": f"{target}\x00.png", "meta": META}, 5, True, {}, [], "",
    ]


class Chunked:
    """A body that httpx sends in chunks, without Content-Length."""

    def __init__(self, body: bytes):
        self._body = body

    def __iter__(self):
        yield from (self._body[start:start + 50] for start in range(0, len(self._body), 50))


@pytest.fixture
def targets(server, tmp_path):
    """Targets that the server must not access: a readable image, a listening address and an unknown host. The test fails if it accesses one."""
    global AUDIT_EVENTS
    canary = tmp_path / "canary-7f3a.png"
    canary.write_bytes(picture())
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        AUDIT_EVENTS = []
        yield [str(canary), f"http://127.0.0.1:{listener.getsockname()[1]}/a.png", "http://outside.invalid/a.png"]
        wait_until(lambda: not server.page.worker._jobs)
        time.sleep(0.2)
        events, AUDIT_EVENTS = AUDIT_EVENTS, None
        with pytest.raises(BlockingIOError):
            listener.accept()
    own = f"('127.0.0.1', {server.port})"
    assert not [event for event in events if "canary" in str(event) or "outside" in str(event)]
    assert not [event for event in events if event[0] in ("socket.connect", "socket.sendto") and event[-1] != own]


def test_call_arguments_cannot_access_files_or_addresses(server, targets):
    upload = server.upload(picture()).json()[0]
    numbers = {function.api_name: number for number, function in server.page.fns.items()}
    for target in targets:
        for forged in forged_files(target, upload):
            for name, arguments in (("reconstruct", [None]), ("generate", GENERATE), ("stop", [])):
                for position in sorted({0, min(2, len(arguments)), len(arguments)}):
                    data = arguments[:position] + [forged] + arguments[position + 1:]
                    body = {"data": data, "fn_index": numbers[name], "session_hash": "attack"}
                    for path, json_body in ((f"call/{name}", {"data": data}), ("queue/join", body), (f"run/{name}", body)):
                        response = server.http.post(f"/gradio_api/{path}", json=json_body)
                        assert response.status_code < 500 and (response.status_code == 200 or response.json()["error"])
        wait_until(lambda: not server.page.worker._jobs)


def test_no_endpoint_accesses_files_or_addresses(server, targets):
    upload = server.upload(picture()).json()[0]
    routes = all_routes(server.page.app.routes)
    assert ("POST", "/gradio_api/queue/join") in routes and len(routes) > 60
    for target in targets:
        forged = {"path": target, "url": target, "meta": META}
        body = {"data": [forged], "fn_index": 3, "trigger_id": 26, "session_hash": "attack", "event_data": forged, "event_id": "x", "batched": True,
                "simple_format": True, "path": target, "url": target, "fn_name": "read", "component_id": 26, "upload": forged, "hash": target}
        bodies = [
            {"json": body}, {"json": [body]}, {"json": {**body, "data": {"upload": forged}}}, {"json": {**body, "data": [[forged]], "fn_index": 0}},
            {"content": json.dumps({"data": [None]})[:-1] + ', "data": [' + json.dumps(forged) + "]}", "headers": JSON},
            {"content": json.dumps(body).replace("path", "\\u0070ath"), "headers": JSON},
            {"content": json.dumps(body).encode("utf-16"), "headers": JSON},
            {"content": Chunked(json.dumps(body).encode()), "headers": JSON},
            {"content": json.dumps(body), "headers": {"Content-Type": "text/plain"}}, {"data": {"data": json.dumps([forged]), "path": target}},
            {"files": {"data": ("x", json.dumps([forged])), "files": ("y", b"z"), "video": ("y.mp4", b"z")}, "data": {"path": target}},
        ]
        for method, path in routes:
            for name in ("reconstruct", "generate") if "{api_name}" in path else ("x",):
                filled = re.sub(r"\{[^}]*:path\}", target, path.replace("{api_name}", name))
                filled = re.sub(r"\{[^}]+\}", "x", filled)
                if filled.startswith(("/gradio_api/heartbeat", "/gradio_api/startup")) or filled.endswith("/reload"):
                    continue  # endless streams
                for sent in bodies if method == "POST" else [{}]:
                    query = {"url": target, "path": target, "data": json.dumps([forged]), "deep_link": target, "session_hash": "nobody"}
                    response = server.http.request(method, filled, params=query, **sent)
                    assert response.status_code < 500, (method, filled)
    assert Path(upload).exists()


def test_responses_do_not_reveal_whether_a_file_exists(server, targets):
    for path in ("/gradio_api/file=", "/gradio_api/file/", "/static/", "/assets/", "/gradio_api/proxy="):
        existing, missing = (server.http.get(path + target) for target in (targets[0], targets[0] + "x"))
        assert (existing.status_code, existing.text) == (missing.status_code, missing.text) and existing.status_code in (403, 404)
    existing, missing = (server.call("reconstruct", [{"path": target, "meta": META}]) for target in (targets[0], targets[0] + "x"))
    assert (existing.status_code, existing.text) == (missing.status_code, missing.text)
    assert existing.status_code == 400 and "was not uploaded to this page" in existing.json()["error"]


def test_only_uploads_and_results_are_served(server):
    (server.files / "tmp1234").write_text("a half upload")
    (server.files / "notes").mkdir(exist_ok=True)
    (server.files / "notes" / "a.png").write_bytes(picture())
    upload = Path(server.upload(picture()).json()[0])
    assert server.http.get(f"/gradio_api/file={upload}").content == picture()
    event, (gallery, *_) = server.result("generate", GENERATE)
    assert event == "complete" and server.http.get(f"/gradio_api/file={gallery[0]['image']['path']}").status_code == 200
    (upload.parent / "link.png").symlink_to(server.files / "notes" / "a.png")
    for path in (server.files / "tmp1234", server.files / "notes" / "a.png", upload.parent, f"{upload.parent}/../notes/a.png",
                 upload.parent / "link.png", f"{upload.parent}//{upload.name}", f"./{upload}", upload.name):
        assert server.http.get(f"/gradio_api/file={path}").status_code == 403, path
    (server.files / "tmp1234").unlink()


def test_uploads_get_unguessable_names(server):
    one, two = (server.upload(picture(), "../../../etc/pass wd\n.png").json()[0] for _ in range(2))
    assert one != two and re.fullmatch(rf"{re.escape(str(server.files))}/[0-9a-f]{{64}}/pass_wd_(0A)?\.png", one)
    assert Path(server.upload(b"", "..").json()[0]).name == "image"
    assert len(Path(server.upload(b"", "a" * 300).json()[0]).name) <= 80


# --- origins and hosts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [
    {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:1"}, {"Origin": "http://127.0.0.1"}, {"Origin": "http://["},
    {"Origin": ""}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Host": "evil.example"}, {"Host": "127.0.0.1.evil.example"},
    {"Host": "localhost@evil.example"}, {"Host": ""},
], ids=str)
def test_foreign_origins_and_hosts_are_refused(server, headers):
    before = server.stored()
    assert server.upload(picture(), **headers).status_code in (400, 403)
    assert server.stored() == before
    for response in (server.http.post("/gradio_api/call/generate", json={"data": GENERATE}, headers=headers),
                   server.http.get("/config", headers=headers), server.http.get("/gradio_api/heartbeat/x", headers=headers)):
        assert response.status_code == 403 and response.json()["error"]


def test_two_host_headers_are_refused(server):
    with server.connect(b"GET / HTTP/1.1\r\nHost: HOST\r\nHost: evil.example\r\n\r\n") as opened:
        assert opened.recv(100).split()[1] in (b"400", b"403")


def test_requests_of_the_page_and_links_to_it_are_allowed(server):
    own = {"Origin": server.address, "Sec-Fetch-Site": "same-origin"}
    assert server.upload(picture(), **own).status_code == 200
    assert server.http.get("/config", headers=own).status_code == 200
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert server.http.get("/", headers=link).status_code == 200
    assert server.http.get("/", headers={**link, "Sec-Fetch-Dest": "iframe"}).status_code == 403
    assert server.http.get("/config", headers=link).status_code == 403
    forwarded = {"Host": "localhost:9000", "Origin": "http://localhost:9000"}  # a tunnel with another port
    assert server.http.get("/config", headers=forwarded).status_code == 200


def test_the_page_cannot_be_framed(server):
    for response in (server.http.get("/"), server.http.get("/config"), server.http.get("/nothing"), server.upload(picture())):
        assert "frame-ancestors 'none'" in response.headers["Content-Security-Policy"] and response.headers["X-Frame-Options"] == "DENY"


def test_other_pages_cannot_embed_the_demo_or_access_its_window(server):
    for response in (server.http.get("/"), server.http.get("/config"), server.http.get("/nothing"), server.upload(picture())):
        assert response.headers["Cross-Origin-Resource-Policy"] == response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert "base-uri 'self'" in response.headers["Content-Security-Policy"]


def test_a_websocket_is_refused_with_one_log_line(server, capsys, caplog):
    with server.connect(b"GET /gradio_api/queue/join HTTP/1.1\r\nHost: HOST\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n") as opened:
        assert opened.recv(100).split()[1] in (b"403", b"404")
    assert len(capsys.readouterr().err.splitlines()) == 1 and not [record for record in caplog.records if record.name.startswith("uvicorn")]


def test_request_headers_are_limited_with_any_installed_parser(server, monkeypatch):
    monkeypatch.setattr("uvicorn.protocols.http.auto.AutoHTTPProtocol", object)
    monkeypatch.setattr("uvicorn.protocols.websockets.auto.AutoWebSocketsProtocol", object)
    config = uvicorn.Config(server.page.app, log_config=None)
    config.load()
    assert config.http_protocol_class.__name__ == "H11Protocol" and config.ws_protocol_class is None
    with server.connect(b"GET /config HTTP/1.1\r\nHost: HOST\r\n") as opened:
        opened.settimeout(5)
        with pytest.raises(OSError):
            for _ in range(1000):
                opened.sendall(b"X: " + b"a" * 10_000 + b"\r\n")
                time.sleep(0.001)


# --- storage and timeouts --------------------------------------------------------------------------------------------------------


def test_uploads_and_results_together_stay_within_a_limit(server, monkeypatch):
    monkeypatch.setattr(demo_uploads, "MAX_STORED_BYTES", 300_000)
    monkeypatch.setattr(demo_uploads, "MAX_UPLOAD_BYTES", 60_000)
    paths = [server.upload(os.urandom(50_000)).json()[0] for _ in range(12)]
    assert sum(path.stat().st_size for path in server.files.glob("*/*")) <= 300_000
    assert not Path(paths[0]).exists() and not Path(paths[0]).parent.exists() and Path(paths[-1]).exists()
    assert server.call("reconstruct", [{"path": paths[0]}]).status_code == 400
    assert server.http.get(f"/gradio_api/file={paths[0]}").status_code == 403
    start = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
    for content in (bytes(61_000), Chunked(start + bytes(61_000))):
        response = server.http.post("/gradio_api/upload", content=content, headers=FORM)
        assert response.status_code == 413 and response.json()["error"]
    assert not list(server.files.glob("tmp*")), "parts of refused uploads remain"


def uploads_in(folder: Path) -> demo_uploads.Uploads:
    return demo_uploads.Uploads(folder, set())


def store(uploads: demo_uploads.Uploads, size: int) -> Path:
    path = uploads._folder / os.urandom(32).hex() / "image"
    uploads._write(io.BytesIO(bytes(size)), path)
    return path


def test_concurrent_uploads_stay_within_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_uploads, "MAX_STORED_BYTES", 1_000_000)
    monkeypatch.setattr(demo_uploads, "MAX_UPLOAD_BYTES", 100_000)
    uploads, largest = uploads_in(tmp_path), 0
    copy = demo_uploads.shutil.copyfileobj

    def slow_copy(*files):
        nonlocal largest
        time.sleep(0.002)
        copy(*files)
        largest = max(largest, sum(path.stat().st_size for path in tmp_path.glob("*/*") if path.exists()))

    monkeypatch.setattr(demo_uploads.shutil, "copyfileobj", slow_copy)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: store(uploads, 90_000), range(60)))
    assert 500_000 < largest <= 1_000_000


def test_small_uploads_do_not_scan_the_folder_each_time(tmp_path, monkeypatch):
    scans = []
    make_room = demo_uploads.make_room
    monkeypatch.setattr(demo_uploads, "make_room", lambda *arguments: (scans.append(1), make_room(*arguments))[1])
    monkeypatch.setattr(demo_uploads, "MAX_STORED_BYTES", 100 * demo_uploads.BYTES_PER_FILE)
    monkeypatch.setattr(demo_uploads, "MAX_UPLOAD_BYTES", 10 * demo_uploads.BYTES_PER_FILE)
    uploads = uploads_in(tmp_path)
    for _ in range(300):
        store(uploads, 1)
    assert len(scans) <= 15 and len(list(tmp_path.iterdir())) <= 100


def test_make_room_tolerates_concurrently_deleted_folders(tmp_path, monkeypatch):
    paths = [store(uploads_in(tmp_path), 10) for _ in range(5)]
    scandir = os.scandir

    def vanishing(folder):
        if str(folder) == str(paths[0].parent):
            demo_uploads.shutil.rmtree(folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", vanishing)
    removed, stored = demo_uploads.make_room(tmp_path, 0)
    assert set(removed) == set(paths[1:]) and stored == 0 and not list(tmp_path.iterdir())


def test_errors_do_not_end_the_sweep_of_stored_files(tmp_path, monkeypatch, capsys):
    calls = []

    def fail(*_):
        calls.append(1)
        raise OSError("a disk error")

    monkeypatch.setattr(demo_uploads, "make_room", fail)
    monkeypatch.setattr(demo_uploads, "SWEEP_SECONDS", 0.01)

    async def sweep():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(uploads_in(tmp_path).keep_room(), 0.3)

    asyncio.run(sweep())
    assert len(calls) > 1 and capsys.readouterr().err.startswith("error: stored files: OSError: a disk error")


def test_cancelling_does_not_make_a_session_known(server, capsys):
    body = {"session_hash": "never-seen", "fn_index": 0, "event_id": "x"}
    assert server.http.post("/gradio_api/cancel", json=body).status_code == 200
    assert server.http.get("/gradio_api/queue/data", params={"session_hash": "never-seen"}).status_code == 404
    assert "error: " not in capsys.readouterr().err


def test_a_file_name_that_is_too_long_is_refused(server):
    upload = Path(server.upload(picture()).json()[0])
    assert server.http.get(f"/gradio_api/file={upload.with_name('a' * 300)}").status_code == 403


def test_invalid_upload_forms_are_refused_and_store_nothing(server):
    before = server.stored()
    for sent in ({"files": {"other": ("a.png", picture())}}, {"data": {"files": "a.png"}},
                 {"files": [("files", ("a", b"a")), ("files", ("b", b"b"))]},
                 {"json": {}}, {"content": b"x", "headers": FORM}, {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}},
                 {"data": {f"field{number}": "x" for number in range(9)}}):
        response = server.http.post("/gradio_api/upload", **sent)
        assert response.status_code in (400, 415) and response.json()["error"], sent
    assert server.stored() == before


def test_incomplete_requests_are_closed(server, monkeypatch):
    monkeypatch.setattr(demo_http, "IDLE_SECONDS", 0.3)
    monkeypatch.setattr(demo_http, "CHECK_SECONDS", 0.1)
    head = b"POST /gradio_api/%s HTTP/1.1\r\nHost: HOST\r\nContent-Type: %s\r\nContent-Length: 1000\r\n\r\n"
    half_file = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nxyz'
    sent = [head % (b"upload", b"multipart/form-data; boundary=b") + half_file] * 20
    sent += [head % (b"queue/join", b"application/json") + b'{"data": '] * 10 + [head % (b"unknown", b"text/plain")]
    sent += [b"", b"POST /gra", b"GET / HTTP/1.1\r\nHost: HOST\r\n", b"GET /config HTTP/1.1\r\nHost: HOST\r\nContent-Length: 9\r\n\r\nx"]
    opened, before = [server.connect(text) for text in sent], server.stored()
    try:
        for connection in opened:
            connection.settimeout(8)
            while connection.recv(100_000):
                pass
    finally:
        for connection in opened:
            connection.close()
    assert server.stored() == before
    monkeypatch.undo()
    assert server.upload(picture()).status_code == 200


def test_the_number_of_open_requests_is_limited(server, monkeypatch):
    monkeypatch.setattr(demo_guard, "MAX_OPEN_REQUESTS", 5)
    opened = [server.connect(b"GET /gradio_api/heartbeat/x HTTP/1.1\r\nHost: HOST\r\n\r\n") for _ in range(8)]
    statuses = sorted(connection.recv(1000).split()[1] for connection in opened)
    for connection in opened:
        connection.close()
    assert statuses == [b"200"] * 5 + [b"503"] * 3
    wait_until(lambda: server.http.get("/config").status_code == 200)


def test_slow_request_bodies_time_out(server, monkeypatch):
    monkeypatch.setattr(demo_http, "BODY_SECONDS", 0.5)
    with server.connect(b"POST /gradio_api/upload HTTP/1.1\r\nHost: HOST\r\nContent-Type: multipart/form-data; boundary=b\r\n"
                        b"Content-Length: 1000\r\n\r\n--b\r\nContent-Disposition: form-data; name=\"files\"; filename=\"a\"\r\n\r\n") as opened:
        opened.settimeout(0.05)
        response, end = b"", time.monotonic() + 8
        while not response and time.monotonic() < end:
            opened.sendall(b"x")
            try:
                response = opened.recv(1000)
            except TimeoutError:
                continue
    assert response.startswith(b"HTTP/1.1 408")


# --- malicious and large images ------------------------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A 16-bit grey PNG of zeros: a few hundred kilobytes for 100 million pixels."""
    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    packer, row = zlib.compressobj(9), bytes(1 + 2 * width)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_before_decoding(server, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("pixels were decoded"))
    upload = server.upload(bomb(10_000, 9_999)).json()[0]
    event, response = server.result("reconstruct", [{"path": upload}])
    assert event == "error" and "10000 x 9999 pixels, more than the 16 million" in response["error"]
    assert "data." not in response["error"] and "_" not in response["error"]


def test_a_tiff_with_tiles_larger_than_the_image_is_refused_before_decoding(server, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("pixels were decoded"))
    strip = zlib.compress(bytes(100))
    entries = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: 30_000, 323: 30_000, 324: 8, 325: len(strip)}
    body = b"".join(tag.to_bytes(2, "little") + (4).to_bytes(2, "little") + (1).to_bytes(4, "little") + value.to_bytes(4, "little")
                    for tag, value in entries.items())
    content = b"II*\0" + (8 + len(strip)).to_bytes(4, "little") + strip + len(entries).to_bytes(2, "little") + body + bytes(4)
    with pytest.raises(UnreadableImage, match="30000 x 30000 pixels, more than"):
        read_image(content)
    event, response = server.result("reconstruct", [{"path": server.upload(content).json()[0]}])
    assert event == "error" and "it is TIFF, but only AVIF, BMP, GIF, JPEG, MPO, PNG, WEBP are accepted here" in response["error"]


@pytest.mark.parametrize("kind", sorted(set(demo_requests.FORMATS) - {"MPO"}))
def test_formats_of_browsers_are_accepted(tmp_path, kind):
    Image.new("L", (30, 20), 80).save(tmp_path / "image", kind)
    assert "PSNR" in demo.reconstruct(tiny_pipeline(), threading.Event(), tmp_path / "image")[3]


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "TGA", "JPEG2000"])
def test_other_formats_are_not_opened(tmp_path, monkeypatch, kind):
    Image.new("L", (30, 20)).save(tmp_path / "image", kind)
    monkeypatch.setitem(Image.OPEN, kind, (lambda *_: pytest.fail("it was opened"), Image.OPEN[kind][1]))
    with pytest.raises(UnreadableImage, match=f"it is {kind}, but only AVIF, .* are accepted here" if kind != "TGA" else "not an image of a known"):
        demo.reconstruct(tiny_pipeline(), threading.Event(), tmp_path / "image")


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_metadata_bombs_use_little_memory(tmp_path, kind):
    if kind == "AVIF" and "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow writes no AVIF")
    exif, path = exif_bomb(500_000, 2000), tmp_path / "image"
    image = Image.new("L", (16, 16))
    if kind == "TIFF":
        path.write_bytes(exif)
    elif kind == "JPEG":
        image.save(path, "JPEG")
        content = path.read_bytes()
        start = content.index(b"\xff\xdb")  # without the JFIF segment, Pillow reads the EXIF data when it opens the file
        segments = [jpeg_segment(0xE1, b"Exif\0\0" + exif[at:at + 60_000]) for at in range(0, len(exif), 60_000)]
        path.write_bytes(content[:2] + b"".join(segments) + content[start:])
    else:
        with pytest.MonkeyPatch.context() as patch:  # Pillow reads the EXIF data of an AVIF that it writes
            patch.setattr(TiffImagePlugin.ImageFileDirectory_v2, "load", metadata_limits._load_directory)
            image.save(path, kind, exif=exif)
    tracemalloc.start()
    try:
        demo.reconstruct(tiny_pipeline(), threading.Event(), path)
    except UnreadableImage:
        assert kind == "TIFF"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2e8, f"{peak / 1e6:.0f} MB"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_long_exif_data_still_rotates_the_image(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112], exif[0x9286] = 6, b"x" * 60_000
    exif = exif.tobytes() + bytes(0 if kind == "JPEG" else 200_000)
    Image.new("L", (30, 20)).save(tmp_path / "image", kind, exif=exif)
    assert read_image(tmp_path / "image").size == (20, 30)


def progressive_jpeg(scans: int) -> bytes:
    """A JPEG of 16 million pixels with many progressive scans of 30 bytes each."""
    content = encoded(Image.new("L", (4000, 3992), 128), "JPEG", progressive=True)
    start = content.rindex(b"\xff\xda")
    return content[:-2] + content[start:-2] * scans + content[-2:]


@pytest.mark.parametrize("ending", ["stop", "time"])
def test_decoding_a_jpeg_with_thousands_of_scans_ends_on_stop_and_timeout(tmp_path, monkeypatch, ending):
    (tmp_path / "image.jpg").write_bytes(progressive_jpeg(5000))
    stop, pipe = threading.Event(), tiny_pipeline()
    monkeypatch.setattr(demo_requests, "DECODING_SECONDS", 0.3 if ending == "time" else 60)
    timer = threading.Timer(0.3, stop.set if ending == "stop" else int)
    timer.start()
    started = time.monotonic()
    if ending == "stop":
        assert demo.reconstruct(pipe, stop, tmp_path / "image.jpg")[3] == "Stopped."
    else:
        with pytest.raises(UnreadableImage, match=r"longer than 0\.3 s"):
            demo.reconstruct(pipe, stop, tmp_path / "image.jpg")
    assert time.monotonic() - started < 2
    timer.join()


def test_stop_frees_the_worker_while_a_decoder_cannot_be_interrupted(tmp_path, monkeypatch):
    Image.new("L", (30, 30)).save(tmp_path / "image.png")
    stop, pipe, finish = threading.Event(), tiny_pipeline(), threading.Event()
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: (finish.wait(20), load(image))[1])
    timer = threading.Timer(0.2, stop.set)
    timer.start()
    started = time.monotonic()
    assert demo.reconstruct(pipe, stop, tmp_path / "image.png")[3] == "Stopped."
    assert time.monotonic() - started < 0.2 + 0.3
    finish.set()
    assert "PSNR" in demo.reconstruct(pipe, threading.Event(), tmp_path / "image.png")[3]


def avif(width: int, height: int, **options) -> bytes:
    if "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow writes no AVIF")
    return picture(width, height, "AVIF", speed=10, **options)


def test_an_avif_with_frames_larger_than_its_header_is_decoded_in_another_process(tmp_path, monkeypatch):
    content, load = avif(400, 400), ImageFile.ImageFile.load
    size = content.index(b"ispe") + 8
    (tmp_path / "image.avif").write_bytes(content[:size] + struct.pack(">II", 8, 8) + content[size + 8:])

    decoded = []  # formats that are decoded in the server's process
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: (decoded.append(image.format), load(image))[1])
    monkeypatch.setattr(demo_requests, "MAX_UPLOAD_PIXELS", 10_000)
    with contextlib.suppress(UnreadableImage):  # only some versions of Pillow decode it
        demo.reconstruct(tiny_pipeline(), threading.Event(), tmp_path / "image.avif")
    (tmp_path / "large.avif").write_bytes(content)
    with pytest.raises(UnreadableImage, match="400 x 400 pixels, more than"):
        demo.reconstruct(tiny_pipeline(), threading.Event(), tmp_path / "large.avif")
    assert "AVIF" not in decoded


@pytest.mark.parametrize("ending", ["stop", "time"])
def test_the_avif_process_ends_on_stop_and_timeout(tmp_path, monkeypatch, ending):
    (tmp_path / "image.avif").write_bytes(avif(20, 20))
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setattr(demo_requests.demo_avif, "__file__", str(tmp_path / "slow.py"))
    monkeypatch.setattr(demo_requests, "DECODING_SECONDS", 0.3 if ending == "time" else 60)
    stop = threading.Event()
    timer = threading.Timer(0.3, stop.set if ending == "stop" else int)
    timer.start()
    started = time.monotonic()
    if ending == "stop":
        assert demo.reconstruct(tiny_pipeline(), stop, tmp_path / "image.avif")[3] == "Stopped."
    else:
        with pytest.raises(UnreadableImage, match=r"longer than 0\.3 s"):
            demo.reconstruct(tiny_pipeline(), stop, tmp_path / "image.avif")
    assert time.monotonic() - started < 2
    timer.join()


def test_an_avif_is_rotated_and_a_damaged_one_is_refused(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "image.avif").write_bytes(avif(30, 20, exif=exif, quality=100, subsampling="4:4:4"))
    seen = demo_requests.read_upload(tmp_path / "image.avif", threading.Event(), ImageTransform(16))
    expected = read_image(tmp_path / "image.avif")
    assert seen.size == expected.size == (20, 30) and np.array_equal(np.asarray(seen), np.asarray(expected))
    (tmp_path / "cut.avif").write_bytes(avif(30, 20)[:-20])
    with pytest.raises(UnreadableImage, match="truncated, corrupt"):
        demo.reconstruct(tiny_pipeline(), threading.Event(), tmp_path / "cut.avif")


def test_a_deleted_upload_gives_a_clear_error(tmp_path):
    with pytest.raises(demo.InputError, match=r"no longer stored\. Upload the image again"):
        demo.reconstruct(tiny_pipeline(), threading.Event(), tmp_path / "gone.png")


def test_messages_of_decoders_are_only_logged(server, capsys):
    event, response = server.result("reconstruct", [{"path": server.upload(picture()[:200]).json()[0]}])
    assert event == "error" and response["error"] == "This file cannot be read as an image: truncated, corrupt or not accessible."
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and re.search(r"not accessible: \w", err)


def test_large_jpegs_are_decoded_at_reduced_size(tmp_path):
    decoded = []
    for kind, width in (("JPEG", 4500), ("JPEG", 9000), ("PNG", 4500)):
        Image.new("L", (width, 4000)).save(tmp_path / "large", kind)
        with Image.open(tmp_path / "large") as image:
            try:
                demo_requests.limit_decoded_size(image, 16)
                decoded.append(image.size)
            except UnreadableImage as error:
                decoded.append(str(error))
    assert decoded[0] == (563, 500) and decoded[1] == (1125, 500)
    assert decoded[2].startswith("4500 x 4000 pixels, more than the 16 million")
    Image.new("L", (65_000, 300)).save(tmp_path / "strip", "JPEG")
    with Image.open(tmp_path / "strip") as image, pytest.raises(UnreadableImage):
        demo_requests.limit_decoded_size(image, 256)  # an eighth of it would be smaller than the tokenizer's input


def test_a_jpeg_decoded_at_reduced_size_has_similar_pixels(tmp_path, monkeypatch):
    rows, columns = np.mgrid[0:600, 0:800]
    smooth = (127 + 60 * np.sin(rows / 90)[..., None] + 60 * np.cos(columns / 70)[..., None] * np.ones(3)).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "image.jpg", quality=95)
    pipe, stop = tiny_pipeline(), threading.Event()
    exact = np.asarray(demo.reconstruct(pipe, stop, tmp_path / "image.jpg")[0], dtype=float)
    monkeypatch.setattr(demo_requests, "MAX_UPLOAD_PIXELS", 200_000)
    drafted = np.asarray(demo.reconstruct(pipe, stop, tmp_path / "image.jpg")[0], dtype=float)
    assert 0 < np.abs(exact - drafted).max() <= 6


@pytest.mark.parametrize("ending", ["stop", "time"])
def test_a_slow_decoder_ends_on_stop_and_timeout(tmp_path, monkeypatch, ending):
    header = b"BM" + bytes(8) + (1078).to_bytes(4, "little") + struct.pack("<IiiHHIIiiII", 40, 4000, 3999, 1, 8, 1, 0, 0, 0, 256, 0)
    (tmp_path / "slow.bmp").write_bytes(header + bytes(1024) + b"\x01\x05" * 15_990_000)  # Pillow decodes run-length encoding in Python
    stop = threading.Event()
    monkeypatch.setattr(demo_requests, "DECODING_SECONDS", 0.3 if ending == "time" else 60)
    timer = threading.Timer(0.3, stop.set if ending == "stop" else int)
    timer.start()
    started = time.monotonic()
    if ending == "stop":
        assert demo.reconstruct(tiny_pipeline(), stop, tmp_path / "slow.bmp")[3] == "Stopped."
    else:
        with pytest.raises(UnreadableImage, match=r"longer than 0\.3 s"):
            demo.reconstruct(tiny_pipeline(), stop, tmp_path / "slow.bmp")
    assert time.monotonic() - started < 2
    timer.join()


@pytest.mark.parametrize("stage", ["read_image", "encode", "decode"])
def test_stop_works_between_the_stages_of_a_reconstruction(tmp_path, monkeypatch, stage):
    Image.new("L", (30, 30)).save(tmp_path / "image.png")
    pipe, stop, called = tiny_pipeline(), threading.Event(), []

    def stopping(name, function):
        def call(*arguments, **options):
            called.append(name)
            if name == stage:
                stop.set()
            return function(*arguments, **options)
        return call

    monkeypatch.setattr(demo_reconstruction, "read_upload", stopping("read_image", demo_reconstruction.read_upload))
    monkeypatch.setattr(pipe, "encode", stopping("encode", pipe.encode))
    monkeypatch.setattr(pipe.tokenizer, "decode", stopping("decode", pipe.tokenizer.decode))
    report = demo.reconstruct(pipe, stop, tmp_path / "image.png")[3]
    assert called[-1] == stage and (report == "Stopped.") == (stage != "decode")


# --- error messages -------------------------------------------------------------------------------------------------------------


def invalid_requests() -> list[tuple[str, str, dict]]:
    """Method, path and body of requests that must be refused."""
    join = "/gradio_api/queue/join"
    bodies = [{}, {"data": None}, {"data": {}}, {"data": "x"}, {"data": []}, {"data": GENERATE[:-1]}, {"data": [*GENERATE, 1]}, {"data": [GENERATE]}]
    posts = [(f"/gradio_api/call/{name}", body) for name in ("generate", "reconstruct") for body in bodies]
    posts += [(join, {"data": GENERATE, "fn_index": number, "session_hash": "x"}) for number in (None, -1, 99, "0", 0.5, True, [0], {})]
    sessions = (None, "", 5, "a b", "../x", "x" * 65, ["x"], {"a": 1})
    posts += [(join, {"data": GENERATE, "fn_index": 0, "session_hash": session}) for session in sessions]
    posts += [("/gradio_api/call/nothing", {"data": []}), ("/gradio_api/run/nothing", {"data": []}), ("/gradio_api/api/generate", {"data": GENERATE}),
              ("/gradio_api/call/v2/generate", {"classes": ["ant"]}), ("/gradio_api/run/generate", {"data": GENERATE}), ("/login", {}),
              ("/gradio_api/cancel", {}), ("/gradio_api/cancel", {"session_hash": "x", "fn_index": 0, "event_id": []}), ("/gradio_api/reset", {}),
              ("/gradio_api/component_server", {}), ("/gradio_api/vibe-code", {"code": "x"}), ("/gradio_api/stream/x", {"data": []}), ("/", {})]
    gets = ["/monitoring", "/monitoring/summary", "/monitoring/x", "/nothing", "/gradio_api/call/generate/x", "/gradio_api/call/nothing/x",
            "/gradio_api/queue/data", "/gradio_api/queue/data?session_hash=nobody", "/gradio_api/file=", "/gradio_api/file=x", "/assets/nothing.js",
            "/static/../../x", "/gradio_api/dev/reload", "/gradio_api/app_id", "/gradio_api/token", "/pwa_icon/99999", "/openapi.json", "/logout"]
    others = [(method, path, {}) for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE") for path in ("/", join)]
    return [("POST", path, {"json": body}) for path, body in posts] + [("GET", path, {}) for path in gets] + others


def test_each_refusal_has_a_message_and_one_log_line(server, capsys):
    for method, path, body in invalid_requests():
        capsys.readouterr()
        response = server.http.request(method, path, **body)
        assert 400 <= response.status_code < 500, (method, path, body)
        message = response.json()["error"]
        assert isinstance(message, str) and len(message) > 10 and response.json()["detail"] == message
        out, err = capsys.readouterr()
        assert not out and len(err.splitlines()) == 1 and err.startswith("refused: "), (method, path, err)


@pytest.mark.parametrize(("position", "value", "message"), [
    (0, ["dog"], "There is no class 'dog'"), (0, ["an"], "Did you mean 'ant'"), (0, [3], "must be a list of class names"),
    (0, "ant", "must be a list of class names"), (1, None, "Images of each class is None; it must be a number"), (1, 1.5, "must be a whole number"),
    (1, 65, "at most 64"), (2, -5, "Seed is -5; it must be at least 0"), (2, "7", "Seed is '7'; it must be a number"), (2, 2**60, "Seed is"),
    (2, [], "Seed is \\[\\]"), (4, True, "Temperature is True; it must be a number"), (4, -1, "Temperature"), (5, 99, "Top-k"), (6, 0, "Top-p"),
    (7, 11, "Guidance scale"), (7, "x" * 500, "Guidance scale is 'x{56}\\.\\.\\.; it"),
])
def test_invalid_fields_are_refused_with_the_labels_of_the_page(server, capsys, position, value, message):
    calls = server.pipe.calls
    event, response = server.result("generate", GENERATE[:position] + [value] + GENERATE[position + 1:])
    assert event == "error" and re.search(message, response["error"]) and server.pipe.calls == calls
    assert not re.search(r"_|[a-z]\.[a-z]", response["error"]), "the message contains the name of an internal field"
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and err.startswith("refused: generate: ")


def test_looking_up_a_wrong_class_name_does_not_block_other_requests(server, monkeypatch):
    lookup_started, proceed = threading.Event(), threading.Event()
    monkeypatch.setattr(demo_requests, "did_you_mean", lambda *_: (lookup_started.set(), proceed.wait(5), "")[2])
    server.call("generate", [["dog"], *GENERATE[1:]])
    assert lookup_started.wait(5)
    started = time.monotonic()
    assert server.http.get("/nothing").status_code == 404 and time.monotonic() - started < 2
    proceed.set()


@pytest.mark.parametrize(("class_names", "label_drop"), [(None, 0.1), (["ant"], 0.0)])
def test_unsupported_guidance_is_refused(class_names, label_drop):
    pipe = tiny_pipeline(class_names, label_drop)
    with pytest.raises(demo.InputError, match=r"^Guidance scale is 2; it must be 1, because this prior does not support guidance"):
        demo_requests.checked_request(pipe, None, 1, 0, 1, 0, 1, 2)
    assert demo_requests.checked_request(pipe, None, 1, 0, 1, 0, 1, 1)[2] == 0


def test_unexpected_errors_give_one_log_line_and_a_message_without_details(server, capsys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("/secret/path\nerror: forged line")

    monkeypatch.setattr(SlowPipeline, "__call__", fail)
    event, response = server.result("generate", GENERATE)
    assert event == "error" and "Unexpected server error" in response["error"] and "secret" not in str(response)
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and "RuntimeError: /secret/path" in err and "test_demo_guard.py, line" in err


@pytest.mark.parametrize("body", [
    b"", b"[]", b"1", b"null", b'{"a": 1, "a": 1}', b'{"a": {"b": 1, "\\u0062": 2}}', b'{"a": NaN}', b'{"a": -Infinity}',
    b"[" * 100_000, b'{"a":' * 100_000,
    b'{"a": ' + b"9" * 5000 + b"}", b'{"a": "\xff"}', '{"a": 1}'.encode("utf-16"), b'{"a": 1} x', b"\xef\xbb\xbf{}",
])
def test_ambiguous_json_is_refused(body):
    with pytest.raises(Refusal):
        strict_json(body)


@pytest.mark.parametrize("value", [2**63, -2**70, "\ud800", "x" * 1001, [0] * 1001, [[0]], {"a": 0}], ids=repr)
def test_argument_values_that_no_field_accepts_are_refused(server, value):
    body = json.dumps({"data": [*GENERATE[:2], value, *GENERATE[3:]]})
    response = server.http.post("/gradio_api/call/generate", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and response.json()["error"].startswith("The arguments must be numbers, texts")
