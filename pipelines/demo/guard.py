"""What stands in front of gradio in the demo: each request is checked here before any code of gradio sees it.

gradio is built for pages of the whole internet. It opens files and addresses that a request names, answers pages of any origin,
keeps uploads without a limit and waits without a limit. The demo serves one machine, so the guard

- lets through the few addresses that the page uses, and nothing else;
- answers programs of this machine and the demo's own page, and no page of another origin;
- writes each JSON body anew from the fields that it knows. A file in it must be one that was uploaded here;
- stores uploads by itself, within a limit on each, on all together and on the time they take;
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

from pipelines.demo.http_limits import Answer, Gone, Refusal, body_of, in_one_line, replayed, report, strict_json
from pipelines.demo.uploads import Uploads

HOSTS = ("127.0.0.1", "localhost")
MAX_JSON_BYTES = 2**18
MAX_TEXT = 1000  # characters of a text, items of a list
MAX_SESSIONS = 20_000
MAX_OPEN_REQUESTS = 400  # each page keeps up to two streams open

_SESSION = r"[A-Za-z0-9_-]{1,64}"
_NAME = r"[A-Za-z0-9_-]{1,64}"
_PAGE_PARTS = re.compile(
    r"/|/theme\.css|/manifest\.json|/favicon\.ico|/robots\.txt|/config/?|/gradio_api/(info|startup-events|theme\.css)|"
    rf"/(assets|static)/([A-Za-z0-9_-]+/)*[A-Za-z0-9_-][A-Za-z0-9_.-]*|/gradio_api/heartbeat/{_SESSION}")
_DROPPED_HEADERS = re.compile(rb"x-forwarded-.*|forwarded|x-gradio-.*|range|content-length|content-encoding|transfer-encoding")
_MESSAGES = {404: "There is nothing at this address.", 405: "This address does not take this method.",
             503: "Too many requests are waiting; try again in a while."}


@dataclass(frozen=True)
class Endpoint:
    """A function of the page that a request may call."""

    name: str
    number: int
    arguments: int
    is_queued: bool
    takes_upload: bool
    """Its arguments are uploads; those of other endpoints are numbers, texts and lists of them."""


class Guard:
    """ASGI app in front of `app`, for calls of `endpoints` and the files of `uploads`."""

    def __init__(self, app: Callable, uploads: Uploads, endpoints: Iterable[Endpoint]):
        self._app, self._uploads, self._open_requests = app, uploads, 0
        endpoints = list(endpoints)
        self._by_name = {endpoint.name: endpoint for endpoint in endpoints}
        self._by_number = {endpoint.number: endpoint for endpoint in endpoints}
        self._sessions: OrderedDict[str, None] = OrderedDict()  # sessions and events that have results to wait for

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Answer one request, by gradio or with a refusal."""
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        answer, where = Answer(send), f"{scope['method']} {scope['path']}"
        self._open_requests += 1
        try:
            if self._open_requests > MAX_OPEN_REQUESTS:
                raise Refusal(503, "Too many requests are open; close some pages, or try again in a while.")
            await self._answer(scope, receive, answer)
        except Refusal as refusal:
            report("refused", where, refusal)
            await answer.refuse(refusal.status, str(refusal))
        except Gone:
            pass
        except Exception as error:
            report("error", where, in_one_line(error))
            await answer.refuse(500, "The server met an unexpected error; its terminal says more.")
        else:
            if answer.error:
                report("refused", where, f"status {answer.error}")
                await answer.refuse(answer.error, _MESSAGES.get(answer.error, "The server cannot answer this request."))
        finally:
            self._open_requests -= 1

    async def _answer(self, scope: dict, receive: Callable, answer: Answer) -> None:
        path, headers = scope["path"], Headers(scope=scope)
        check_sender(scope["method"], path, headers)
        if scope["method"] in ("GET", "HEAD"):
            query = self._checked_query(path, scope["query_string"])
            if path == "/gradio_api/upload_progress":  # gradio's own would wait for uploads that gradio does not see
                return await answer.send_all(200, b"text/event-stream", b'data: {"msg": "done"}\n\n')
            return await self._app(self._cleaned(scope, query), receive, answer.pass_on)
        if scope["method"] != "POST":
            raise Refusal(405, _MESSAGES[405])
        if path == "/gradio_api/upload":
            stored = await self._uploads.store(headers, receive)
            return await answer.send_all(200, b"application/json", json.dumps([stored]).encode())
        check = self._check_of(path)
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "The body must be JSON, with Content-Type: application/json.")
        chunks = [chunk async for chunk in body_of(headers, receive, MAX_JSON_BYTES)]
        body = check(strict_json(b"".join(chunks)))
        self._remember(body.get("session_hash"))
        answer.before_body = self._remember_event
        await self._app(self._cleaned(scope, {}), replayed(json.dumps(body).encode(), receive), answer.pass_on)

    def _checked_query(self, path: str, query: bytes) -> dict[str, str]:
        """The query of a GET request as gradio may see it; raises Refusal for addresses that the page does not use."""
        if _PAGE_PARTS.fullmatch(path) or path == "/gradio_api/upload_progress":
            return {}
        if path.startswith("/gradio_api/file="):
            if not self._uploads.is_served(path.partition("=")[2]):
                raise Refusal(403, "Only uploads and results of this page are served.")
            return {}
        session = ""
        if path == "/gradio_api/queue/data":
            session = parse_qs(query.decode("latin-1")).get("session_hash", [""])[0]
        elif found := re.fullmatch(rf"/gradio_api/call/({_NAME})/({_SESSION})", path):
            self._endpoint(found[1])
            session = found[2]
        else:
            raise Refusal(404, _MESSAGES[404])
        if session not in self._sessions:
            raise Refusal(404, "Nothing was asked for under this session.")
        return {"session_hash": session} if path == "/gradio_api/queue/data" else {}

    def _check_of(self, path: str) -> Callable[[dict], dict]:
        """What turns the body of a POST request into the one that gradio may see."""
        if path == "/gradio_api/queue/join":
            return lambda body: self._call(body, self._endpoint(body.get("fn_index")), needs_session=True)
        if found := re.fullmatch(rf"/gradio_api/call/({_NAME})/?", path):
            endpoint = self._endpoint(found[1])
            return lambda body: {key: value for key, value in self._call(body, endpoint).items() if key in ("data", "session_hash")}
        if found := re.fullmatch(rf"/gradio_api/run/({_NAME})/?", path):
            return lambda body: self._direct_call(body, found[1])
        if path == "/gradio_api/cancel":
            return lambda body: {"session_hash": _session(body), "fn_index": self._endpoint(body.get("fn_index")).number,
                                 "event_id": _session(body, "event_id")}
        if path == "/gradio_api/reset":
            return lambda body: {"event_id": _session(body, "event_id")}
        raise Refusal(404, _MESSAGES[404])

    def _endpoint(self, key: object) -> Endpoint:
        endpoint = self._by_name.get(key) if isinstance(key, str) else self._by_number.get(key) if type(key) is int else None
        if endpoint is None:
            raise Refusal(404, f"There is no such endpoint; there are {', '.join(sorted(self._by_name))}.")
        return endpoint

    def _direct_call(self, body: dict, name: str) -> dict:
        endpoint = self._endpoint(name if body.get("fn_index") is None else body["fn_index"])
        if endpoint.is_queued:
            raise Refusal(404, f"The endpoint {endpoint.name} is called through /gradio_api/call/{endpoint.name}.")
        return self._call(body, endpoint)

    def _call(self, body: dict, endpoint: Endpoint, needs_session: bool = False) -> dict:
        data = body.get("data")
        if not isinstance(data, list) or len(data) != endpoint.arguments:
            raise Refusal(400, f"The body must hold a list `data` of the {endpoint.arguments} arguments of {endpoint.name}.")
        checked = {"data": [self._upload(value) if endpoint.takes_upload else _plain(value) for value in data], "fn_index": endpoint.number}
        if needs_session or body.get("session_hash") is not None:
            checked["session_hash"] = _session(body)
        return checked

    def _upload(self, value: object) -> dict | None:
        if value is None:
            return None
        path = value.get("path") if isinstance(value, dict) else None
        if path not in self._uploads:
            raise Refusal(400, "Only images that were uploaded to this page are read. Upload the image, then try again.")
        return {"path": path, "meta": {"_type": "gradio.FileData"}}

    def _remember(self, session: object) -> None:
        if isinstance(session, str):
            self._sessions[session] = None
            self._sessions.move_to_end(session)
            while len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)

    def _remember_event(self, answer: bytes) -> None:
        with contextlib.suppress(ValueError, AttributeError):
            self._remember(json.loads(answer).get("event_id"))

    @staticmethod
    def _cleaned(scope: dict, query: dict[str, str]) -> dict:
        """The request without headers that gradio believes or that no longer fit, and with a query of known fields only."""
        headers = [(name, value) for name, value in scope["headers"] if not _DROPPED_HEADERS.fullmatch(name.lower())]
        return {**scope, "headers": headers, "query_string": urlencode(query).encode(), "raw_path": scope["path"].encode()}

def check_sender(method: str, path: str, headers: Headers) -> None:
    """Raise Refusal unless the request comes from the demo's own page or from a program of this machine.

    To listen on 127.0.0.1 is not enough: the user's browser carries requests of foreign pages there. Such a page gives itself away by
    Host, when its name resolves to this machine (DNS rebinding), by Origin or by Sec-Fetch-Site. Links from elsewhere to the page work.
    """
    hosts = headers.getlist("host")
    if len(hosts) != 1 or not re.fullmatch(rf"({'|'.join(map(re.escape, HOSTS))})(:\d{{1,5}})?", hosts[0]):
        raise Refusal(403, f"This page is served as {' and as '.join(HOSTS)} only.")
    if any(origin != f"http://{hosts[0]}" for origin in headers.getlist("origin")):
        raise Refusal(403, "Pages of other origins are not answered.")
    is_link = (method == "GET" and path == "/" and headers.get("sec-fetch-mode") == "navigate"
               and headers.get("sec-fetch-dest") == "document")
    if not is_link and any(site not in ("same-origin", "none") for site in headers.getlist("sec-fetch-site")):
        raise Refusal(403, "Pages of other origins are not answered.")


def _plain(value: object, in_list: bool = False) -> object:
    """The argument itself, when it is null, true, false, a number, a text or a list of these."""
    if isinstance(value, list) and not in_list and len(value) <= MAX_TEXT:
        return [_plain(item, in_list=True) for item in value]
    is_number = isinstance(value, (int, float)) and abs(value) < 2**63 and math.isfinite(value)
    is_text = isinstance(value, str) and len(value) <= MAX_TEXT and not re.search("[\ud800-\udfff]", value)
    if value is None or is_number or is_text:
        return value
    raise Refusal(400, "The arguments must be numbers, texts, true, false, null, or lists of these; files are taken by reconstruct only.")


def _session(body: dict, field: str = "session_hash") -> str:
    value = body.get(field)
    if not isinstance(value, str) or not re.fullmatch(_SESSION, value):
        raise Refusal(400, f"The body needs a {field} of letters, digits, - and _, at most 64 of them.")
    return value


