"""HTTP functions of the demo's guard: size and time limits of bodies, strict JSON, error messages, and limits on idle connections."""

import asyncio
import contextlib
import json
import math
import re
import struct
import sys
import traceback
from collections.abc import AsyncGenerator, Callable, Iterable
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers

IDLE_SECONDS = 10.0  # without a byte of an incomplete request
BODY_SECONDS = 120.0  # for a complete body
CHECK_SECONDS = 1.0  # between checks of the open connections
REPORT_SECONDS = 60.0  # between messages that no further connection can be accepted
MIN_DESCRIPTORS = 4096

# The page must not load anything from other servers, and other pages must not show it in a frame.
_ADDED_HEADERS = [
    (b"content-security-policy", b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'self'; "
     b"base-uri 'self'; frame-ancestors 'none'"),
    (b"x-frame-options", b"DENY"), (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"), (b"cross-origin-opener-policy", b"same-origin")]


class Refusal(Exception):
    """A request that the guard rejects, with the HTTP status and the message for the sender."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class ClientDisconnected(Exception):
    """The sender closed the connection before the request was complete."""


def report(kind: str, where: str, message: object) -> None:
    """Print one line to stderr. Line breaks and control characters from the sender are escaped."""
    print(f"{kind}: {ascii(where)[1:-1][:200]}: {ascii(str(message))[1:-1][:400]}", file=sys.stderr, flush=True)


def format_error(error: BaseException) -> str:
    """Format an error in one line: its type, its text, and the file and line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    location = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{location}"


class Answer:
    """Sends the response to one request, with the guard's headers, and with a message instead of gradio's errors."""

    def __init__(self, send: Callable):
        self._send, self._has_started, self._is_complete = send, False, False
        self.error = 0
        self.before_body: Callable[[bytes], None] | None = None

    async def pass_on(self, message: dict) -> None:
        """Send a part of gradio's response, or store the status in `error` if it is an error."""
        if message["type"] == "http.response.start":
            if message["status"] >= 400:
                self.error = message["status"]
                return
            self._has_started = True
            message = {**message, "headers": [*message.get("headers", ()), *_ADDED_HEADERS]}
        elif self.error:
            return
        elif message["type"] == "http.response.body":
            self._is_complete = not message.get("more_body")
            if self.before_body:  # before the sender can use an id in the response
                self.before_body(message.get("body", b""))
        await self._send(message)

    async def send_all(self, status: int, content_type: bytes, body: bytes, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Send a complete response."""
        self._has_started = self._is_complete = True
        headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode()), *headers, *_ADDED_HEADERS]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def refuse(self, status: int, message: str) -> None:
        """Send an error and close the connection, which may still carry the rest of the request. End a response that has already started."""
        if not self._has_started:
            text = json.dumps({"error": message, "detail": message}).encode()  # gradio's page reads one of the two fields
            await self.send_all(status, b"application/json", text, [(b"connection", b"close")])
        elif not self._is_complete:
            self._is_complete = True
            await self._send({"type": "http.response.body", "body": b""})


async def read_body(headers: Headers, receive: Callable, limit: int) -> AsyncGenerator[bytes, None]:
    """Yield the chunks of a request body. Raises Refusal if it is larger than `limit` bytes or takes too long."""
    too_large = Refusal(413, f"The body is larger than {limit:,} bytes.")
    content_length = headers.get("content-length", "")
    if re.fullmatch(r"[0-9]+", content_length) and (len(content_length) > 15 or int(content_length) > limit):
        raise too_large
    loop, size = asyncio.get_running_loop(), 0
    end = loop.time() + BODY_SECONDS
    while True:
        try:
            message = await asyncio.wait_for(receive(), min(IDLE_SECONDS, max(0.0, end - loop.time())))
        except TimeoutError:
            raise Refusal(408, "The rest of the request did not arrive in time.") from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        size += len(message.get("body", b""))
        if size > limit:
            raise too_large
        yield message.get("body", b"")
        if not message.get("more_body"):
            return


def replay_body(body: bytes, receive: Callable) -> Callable:
    """An ASGI receive function that returns `body` first, and then the messages of `receive`: the end of the connection."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> dict:
        return messages.pop() if messages else await receive()

    return replay


def strict_json(body: bytes) -> dict[str, Any]:
    """Parse the JSON object in a body. Raises Refusal if parsers may disagree: repeated names, NaN, or an encoding other than UTF-8."""
    def unique(pairs: list[tuple[str, Any]]) -> dict:
        names = dict(pairs)
        if len(names) != len(pairs):
            raise ValueError
        return names

    def refuse(_: str) -> None:
        raise ValueError

    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise Refusal(400, "The body is not valid JSON in UTF-8 with unique names.") from None
    if not isinstance(value, dict):
        raise Refusal(400, "The body must be a JSON object.")
    return value


async def close_idle_connections(connections: Callable[[], Iterable]) -> None:
    """Close connections of uvicorn on which nothing happens for IDLE_SECONDS: no complete request head arrives, or the client does not read the
    response. Runs until cancelled.

    uvicorn limits only the time between two requests. It waits without limit for the first request, for the rest of a head, for the rest of an
    unread body, and for a client that does not read. Open event streams that send nothing are kept.
    """
    loop = asyncio.get_running_loop()
    idle_since: dict[object, tuple[float, object]] = {}  # connection -> start of its idle time, (last request, bytes that the client has not read)
    while True:
        await asyncio.sleep(CHECK_SECONDS)
        now = loop.time()
        idle: dict[object, tuple[float, object]] = {}
        for connection in list(connections()):
            cycle, unread_bytes = getattr(connection, "cycle", None), _unread_bytes(connection.transport)
            if cycle is not None and not cycle.response_complete and not unread_bytes:
                continue
            state = (cycle, unread_bytes)
            since, before = idle_since.get(connection, (now, state))
            since = since if before == state else now
            idle[connection] = since, state
            if now - since > IDLE_SECONDS:
                if unread_bytes:
                    connection.transport.abort()  # close() would wait until the client reads them
                else:
                    connection.transport.close()
        idle_since = idle


class AcceptErrors:
    """An exception handler for the server's event loop: one line per minute while the server has no descriptors for further connections.

    By itself, asyncio prints a traceback for each attempt to accept one, thousands per second. Other errors are printed as usual.
    """

    def __init__(self) -> None:
        self._last_report = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Handle an error of the event loop."""
        error = context.get("exception")
        if not (isinstance(error, OSError) and context.get("message", "").startswith("socket.accept()")):
            loop.default_exception_handler(context)
        elif loop.time() - self._last_report >= REPORT_SECONDS:
            self._last_report = loop.time()
            report("error", "connections", f"no further connection can be accepted: {error.strerror}")


def allow_many_connections() -> None:
    """Raise this process's limit of open files to MIN_DESCRIPTORS, if the system allows it. The usual limit on macOS is 256."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MIN_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(MIN_DESCRIPTORS, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _unread_bytes(transport: asyncio.Transport) -> int:
    """The bytes that the client of a connection has not read. 0 if the buffer of the transport is empty, because the system sends the rest."""
    size = transport.get_write_buffer_size()
    if size:
        # The buffer of the transport shrinks in steps of up to megabytes. The system knows how much of its own buffer a client has not read.
        with contextlib.suppress(ImportError, OSError, ValueError):  # not on all systems, or the connection is closed
            import fcntl
            import termios
            size += struct.unpack("i", fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4)))[0]
    return size
