"""Checks each request to the demo before gradio sees it.

gradio is designed for pages on the internet. It opens files and URLs named in a request, answers pages of any origin, and limits neither
uploads nor waiting times. The demo serves one machine, so the guard

- allows only the few paths that the page uses;
- answers programs on this machine and the demo's own page, but no pages of other origins;
- builds each JSON body again from known fields, in which files must be uploads of this page;
- stores uploads itself, with limits on their size, their total size and their duration;
- answers each error with a message, and prints one line about it.
"""

import contextlib
import json
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from urllib.parse import parse_qs, urlencode

from starlette.datastructures import Headers
from starlette.types import Scope

from pipelines.demo.http_limits import Answer, ClientDisconnected, Refusal, format_error, read_body, replay_body, report, strict_json
from pipelines.demo.uploads import Uploads

HOSTS = ("127.0.0.1", "localhost")
MAX_JSON_BYTES = 2**18
MAX_ARGUMENT_LENGTH = 1000  # characters in a text, items in a list
MAX_KNOWN_IDS = 20_000
MAX_OPEN_REQUESTS = 400  # each page keeps up to two streams open

_ID = r"[A-Za-z0-9_-]{1,64}"  # of a session or an event
_NAME = r"[A-Za-z0-9_-]{1,64}"
_PAGE_PATHS = re.compile("|".join([
    r"/",
    r"/theme\.css",
    r"/manifest\.json",
    r"/favicon\.ico",
    r"/robots\.txt",
    r"/config/?",
    r"/gradio_api/(info|startup-events|theme\.css)",
    rf"/gradio_api/heartbeat/{_ID}",
    # folder names have no dots, and a file name does not start with one, so that no part of a path is ".." or a hidden file
    r"/(assets|static)/([A-Za-z0-9_-]+/)*[A-Za-z0-9_-][A-Za-z0-9_.-]*",
]))
_DROPPED_HEADERS = re.compile(rb"x-forwarded-.*|forwarded|x-gradio-.*|range|content-length|content-encoding|transfer-encoding")
_MESSAGES = {404: "This path does not exist.", 405: "This path does not support this method.",
             503: "Too many requests are waiting. Try again later."}


@dataclass(frozen=True)
class Endpoint:
    """A function of the page that requests may call."""

    name: str
    number: int
    arguments: int
    is_queued: bool
    uploads: frozenset[int] = frozenset()
    """Positions of the arguments that are uploads. All others are numbers, texts and lists of them."""


class Guard:
    """ASGI app in front of `app`. Allows calls of `endpoints` and access to the files of `uploads`."""

    def __init__(self, app: Callable, uploads: Uploads, endpoints: Iterable[Endpoint]):
        self._app, self._uploads, self._open_requests = app, uploads, 0
        endpoints = list(endpoints)
        self._by_name = {endpoint.name: endpoint for endpoint in endpoints}
        self._by_number = {endpoint.number: endpoint for endpoint in endpoints}
        self._known_ids: OrderedDict[str, None] = OrderedDict()  # of sessions and events, whose results may be read; the newest last

    async def __call__(self, scope: Scope, receive: Callable, send: Callable) -> None:
        """Pass a valid request to gradio, or answer with an error."""
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        answer, request = Answer(send), f"{scope['method']} {scope['path']}"
        self._open_requests += 1
        try:
            if self._open_requests > MAX_OPEN_REQUESTS:
                raise Refusal(503, "Too many requests are open. Close some pages, or try again later.")
            await self._check_and_pass_on(scope, receive, answer)
        except Refusal as refusal:
            report("refused", request, refusal)
            await answer.refuse(refusal.status, str(refusal))
        except ClientDisconnected:
            pass
        except Exception as error:
            report("error", request, format_error(error))
            await answer.refuse(500, "Unexpected server error. See the terminal of the server.")
        else:
            if answer.error:  # gradio answered with this error status; its response was not sent
                report("refused", request, f"status {answer.error}")
                await answer.refuse(answer.error, _MESSAGES.get(answer.error, "The server cannot answer this request."))
        finally:
            self._open_requests -= 1

    async def _check_and_pass_on(self, scope: Scope, receive: Callable, answer: Answer) -> None:
        """Check a request and pass it to gradio, or answer it here. Raises Refusal if the request is not allowed."""
        path, headers = scope["path"], Headers(scope=scope)
        check_sender(scope["method"], path, headers)
        if scope["method"] in ("GET", "HEAD"):
            query = self._checked_query(path, scope["query_string"])
            if path == "/gradio_api/upload_progress":  # gradio would wait for uploads that it does not see
                return await answer.send_all(200, b"text/event-stream", b'data: {"msg": "done"}\n\n')
            return await self._app(self._cleaned(scope, query), receive, answer.pass_on)
        if scope["method"] != "POST":
            raise Refusal(405, _MESSAGES[405])
        if path == "/gradio_api/upload":
            stored = await self._uploads.store(headers, receive)
            return await answer.send_all(200, b"application/json", json.dumps([stored]).encode())
        check = self._body_check(path)
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "The body must be JSON, with Content-Type: application/json.")
        chunks = [chunk async for chunk in read_body(headers, receive, MAX_JSON_BYTES)]
        body = check(strict_json(b"".join(chunks)))
        if "data" in body:  # a call, after which the session may read its results
            self._remember_id(body.get("session_hash"))
        answer.before_body = self._remember_event  # gets the response before the page does, which may ask for the event at once
        await self._app(self._cleaned(scope, {}), replay_body(json.dumps(body).encode(), receive), answer.pass_on)

    def _checked_query(self, path: str, query: bytes) -> dict[str, str]:
        """The allowed part of the query of a GET request. Raises Refusal for paths that the page does not use."""
        if _PAGE_PATHS.fullmatch(path) or path == "/gradio_api/upload_progress":
            return {}
        if path.startswith("/gradio_api/file="):
            if not self._uploads.is_served(path.partition("=")[2]):
                raise Refusal(403, "Only uploads and results of this page are served.")
            return {}
        if path == "/gradio_api/queue/data":
            known_id = parse_qs(query.decode("latin-1")).get("session_hash", [""])[0]
        elif found := re.fullmatch(rf"/gradio_api/call/({_NAME})/({_ID})", path):
            self._find_endpoint(found[1])
            known_id = found[2]
        else:
            raise Refusal(404, _MESSAGES[404])
        if known_id not in self._known_ids:
            raise Refusal(404, "This session has no requests.")
        return {"session_hash": known_id} if path == "/gradio_api/queue/data" else {}

    def _body_check(self, path: str) -> Callable[[dict], dict]:
        """The function that checks the body of a POST request to this path and returns the body for gradio."""
        if path == "/gradio_api/queue/join":
            return lambda body: self._checked_call(body, self._find_endpoint(body.get("fn_index")), needs_session=True)
        if found := re.fullmatch(rf"/gradio_api/call/({_NAME})/?", path):
            endpoint = self._find_endpoint(found[1])
            return lambda body: {key: value for key, value in self._checked_call(body, endpoint).items() if key in ("data", "session_hash")}
        if found := re.fullmatch(rf"/gradio_api/run/({_NAME})/?", path):
            return lambda body: self._checked_direct_call(body, found[1])
        if path == "/gradio_api/cancel":
            return lambda body: {"session_hash": _checked_id(body), "fn_index": self._find_endpoint(body.get("fn_index")).number,
                                 "event_id": _checked_id(body, "event_id")}
        if path == "/gradio_api/reset":
            return lambda body: {"event_id": _checked_id(body, "event_id")}
        raise Refusal(404, _MESSAGES[404])

    def _find_endpoint(self, key: object) -> Endpoint:
        """The endpoint with this name or number. Raises Refusal if there is none."""
        # `type(key) is int` excludes true and false, which isinstance accepts as integers
        endpoint = self._by_name.get(key) if isinstance(key, str) else self._by_number.get(key) if type(key) is int else None
        if endpoint is None:
            raise Refusal(404, f"Unknown endpoint; allowed: {', '.join(sorted(self._by_name))}.")
        return endpoint

    def _checked_direct_call(self, body: dict, name: str) -> dict:
        """The body for gradio of a call outside the queue. Raises Refusal unless the endpoint allows it and the arguments are valid."""
        endpoint = self._find_endpoint(name if body.get("fn_index") is None else body["fn_index"])
        if endpoint.is_queued:
            raise Refusal(404, f"Call the endpoint {endpoint.name} through /gradio_api/call/{endpoint.name}.")
        return self._checked_call(body, endpoint)

    def _checked_call(self, body: dict, endpoint: Endpoint, needs_session: bool = False) -> dict:
        """The body for gradio of a call of this endpoint. Raises Refusal unless the arguments and the session are valid."""
        data = body.get("data")
        if not isinstance(data, list) or len(data) != endpoint.arguments:
            raise Refusal(400, f"The body must have a list `data` with the {endpoint.arguments} arguments of {endpoint.name}.")
        values = [self._checked_upload(value) if position in endpoint.uploads else _checked_value(value) for position, value in enumerate(data)]
        checked: dict[str, object] = {"data": values, "fn_index": endpoint.number}
        if needs_session or body.get("session_hash") is not None:
            checked["session_hash"] = _checked_id(body)
        return checked

    def _checked_upload(self, value: object) -> dict | None:
        """The argument for gradio of an uploaded file, or None if none is given. Raises Refusal unless it is an upload of this page."""
        if value is None:
            return None
        path = value.get("path") if isinstance(value, dict) else None
        if path not in self._uploads:
            raise Refusal(400, "The image was not uploaded to this page. Upload it, then try again.")
        return {"path": path, "meta": {"_type": "gradio.FileData"}}

    def _remember_id(self, known_id: object) -> None:
        """Add the id of a session or an event, if it is a string. The oldest ids are forgotten."""
        if isinstance(known_id, str):
            self._known_ids[known_id] = None
            self._known_ids.move_to_end(known_id)
            while len(self._known_ids) > MAX_KNOWN_IDS:
                self._known_ids.popitem(last=False)

    def _remember_event(self, response_body: bytes) -> None:
        """Add the id of the event that a response of gradio names. Other responses are ignored."""
        with contextlib.suppress(ValueError, AttributeError):
            self._remember_id(json.loads(response_body).get("event_id"))

    @staticmethod
    def _cleaned(scope: Scope, query: dict[str, str]) -> dict:
        """The request without headers that gradio trusts or that no longer apply, and with only this query."""
        headers = [(name, value) for name, value in scope["headers"] if not _DROPPED_HEADERS.fullmatch(name.lower())]
        return {**scope, "headers": headers, "query_string": urlencode(query).encode(), "raw_path": scope["path"].encode()}


def check_sender(method: str, path: str, headers: Headers) -> None:
    """Raise Refusal unless the request comes from the demo's own page or from a program on this machine.

    Listening on 127.0.0.1 is not enough, because the user's browser also sends requests of other pages there. Such requests are detected by
    Host if the page's name resolves to this machine (DNS rebinding), by Origin or by Sec-Fetch-Site. Links from other pages are allowed.
    """
    hosts = headers.getlist("host")
    if len(hosts) != 1 or not re.fullmatch(rf"({'|'.join(map(re.escape, HOSTS))})(:\d{{1,5}})?", hosts[0]):
        raise Refusal(403, f"This page is served only as {' and '.join(HOSTS)}.")
    if any(origin != f"http://{hosts[0]}" for origin in headers.getlist("origin")):
        raise Refusal(403, "Requests from pages of other origins are not allowed.")
    is_link = (method == "GET" and path == "/" and headers.get("sec-fetch-mode") == "navigate"
               and headers.get("sec-fetch-dest") == "document")
    if not is_link and any(site not in ("same-origin", "none") for site in headers.getlist("sec-fetch-site")):
        raise Refusal(403, "Requests from pages of other origins are not allowed.")


def _checked_value(value: object, in_list: bool = False) -> object:
    """The value if it is null, true, false, a number, a text or a list of these. Raises Refusal otherwise."""
    if isinstance(value, list) and not in_list and len(value) <= MAX_ARGUMENT_LENGTH:
        return [_checked_value(item, in_list=True) for item in value]
    is_number = isinstance(value, (int, float)) and abs(value) < 2**63 and math.isfinite(value)  # true and false are integers in Python
    is_text = isinstance(value, str) and len(value) <= MAX_ARGUMENT_LENGTH and not re.search("[\ud800-\udfff]", value)
    if value is None or is_number or is_text:
        return value
    raise Refusal(400, "The arguments must be numbers, texts, true, false, null, or lists of these. Only images are files.")


def _checked_id(body: dict, field: str = "session_hash") -> str:
    """The id in this field of a body. Raises Refusal unless it is a valid id."""
    value = body.get(field)
    if not isinstance(value, str) or not re.fullmatch(_ID, value):
        raise Refusal(400, f"The body needs a {field} of at most 64 letters, digits, - and _.")
    return value
