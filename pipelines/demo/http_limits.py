"""The parts of HTTP that the demo's guard needs: bodies within limits, strict JSON, answers that always carry a message, idle connections."""

import asyncio
import json
import re
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers

IDLE_SECONDS = 10.0  # without a byte of a request that is not complete
BODY_SECONDS = 120.0  # for a whole body
CHECK_SECONDS = 1.0  # between two looks at the open connections

# The page may load nothing from elsewhere, and no other page may show it in a frame.
_ADDED_HEADERS = [
    (b"content-security-policy", b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'self'; "
     b"base-uri 'self'; frame-ancestors 'none'"),
    (b"x-frame-options", b"DENY"), (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"), (b"cross-origin-opener-policy", b"same-origin")]


class Refusal(Exception):
    """A request that the guard does not pass on; carries the HTTP status and the message for the sender."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Gone(Exception):
    """The sender closed the connection before the request was complete."""


def report(kind: str, where: str, message: object) -> None:
    """Print one line on stderr; what a sender chose cannot add lines or control codes to it."""
    print(f"{kind}: {ascii(where)[1:-1][:200]}: {ascii(str(message))[1:-1][:400]}", file=sys.stderr, flush=True)


def in_one_line(error: BaseException) -> str:
    """Type and text of an error, and the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


class Answer:
    """Sends the answer to one request: with the guard's headers, and with a message in place of gradio's own errors."""

    def __init__(self, send: Callable):
        self._send, self._has_started, self._is_complete = send, False, False
        self.error = 0
        self.before_body: Callable[[bytes], None] | None = None

    async def pass_on(self, message: dict) -> None:
        """Send a part of gradio's answer, or keep an error of it back."""
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
            if self.before_body:  # before the sender can ask for what the answer names
                self.before_body(message.get("body", b""))
        await self._send(message)

    async def send_all(self, status: int, content_type: bytes, body: bytes, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Send a whole answer."""
        self._has_started = self._is_complete = True
        headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode()), *headers, *_ADDED_HEADERS]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def refuse(self, status: int, message: str) -> None:
        """Send a refusal and close the connection, which may still bring the rest of the request; a started answer just ends."""
        if not self._has_started:
            text = json.dumps({"error": message, "detail": message}).encode()  # gradio's page reads one of the two
            await self.send_all(status, b"application/json", text, [(b"connection", b"close")])
        elif not self._is_complete:
            self._is_complete = True
            await self._send({"type": "http.response.body", "body": b""})


async def body_of(headers: Headers, receive: Callable, limit: int) -> AsyncIterator[bytes]:
    """The chunks of a request body; raises Refusal when it is too large or takes too long."""
    too_large = Refusal(413, f"The body is larger than {limit:,} bytes.")
    announced = headers.get("content-length", "")
    if re.fullmatch(r"[0-9]+", announced) and (len(announced) > 15 or int(announced) > limit):
        raise too_large
    loop, size = asyncio.get_running_loop(), 0
    end = loop.time() + BODY_SECONDS
    while True:
        try:
            message = await asyncio.wait_for(receive(), min(IDLE_SECONDS, max(0.0, end - loop.time())))
        except TimeoutError:
            raise Refusal(408, "The rest of the request did not come in time.") from None
        if message["type"] == "http.disconnect":
            raise Gone
        size += len(message.get("body", b""))
        if size > limit:
            raise too_large
        yield message.get("body", b"")
        if not message.get("more_body"):
            return


def replayed(body: bytes, receive: Callable) -> Callable:
    """A receive function that brings `body`, and afterwards what `receive` brings: the end of the connection."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> dict:
        return waiting.pop() if waiting else await receive()

    return replay


def strict_json(body: bytes) -> dict[str, Any]:
    """The JSON object in a body; raises Refusal where parsers differ: for repeated names, NaN, and encodings other than UTF-8."""
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
        raise Refusal(400, "The body is not valid JSON in UTF-8 with each name once.") from None
    if not isinstance(value, dict):
        raise Refusal(400, "The body must be a JSON object.")
    return value


async def close_idle_connections(connections: Callable[[], Iterable]) -> None:
    """Close connections of uvicorn that bring no complete request head for IDLE_SECONDS; runs until it is cancelled.

    uvicorn limits only the time between two requests. It waits without a limit for the first request, for the rest of a head, and for
    the rest of a body that nobody reads.
    """
    loop, idle_since = asyncio.get_running_loop(), {}
    while True:
        await asyncio.sleep(CHECK_SECONDS)
        now, idle = loop.time(), {}
        for connection in list(connections()):
            cycle = getattr(connection, "cycle", None)
            if cycle is not None and not cycle.response_complete:
                continue
            since, answered = idle_since.get(connection, (now, cycle))
            idle[connection] = since, answered = (since, answered) if answered is cycle else (now, cycle)
            if now - since > IDLE_SECONDS:
                connection.transport.close()
        idle_since = idle
