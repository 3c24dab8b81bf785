"""What Serve's HTTP proxies add to uvicorn: limits for a request's head, clean headers, bodies in parts worth a call.

A proxy calls `middlewares` where `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names it.
"""

from __future__ import annotations

import asyncio
import random
import re
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from httptools import HttpParserUpgrade, HttpRequestParser
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http import auto
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gem_ray.ray_private.serve import hand_over_bodies_in_parts
from gem_ray.serving.access import REQUEST_ID
from gem_ray.serving.heap import give_freed_memory_back
from gem_ray.serving.problems import ProblemError

HEAD_TIMEOUT_S = 10.0
MAX_HEAD_BYTES = 64 * 2**10
MAX_PIPELINED = 16  # requests of a connection that wait for the answer to the one before
MAX_CHUNKS = 4096  # of a body in one read: 256 KiB of single bytes would hold everybody up for a tenth of a second
FIRST_PART_S = 10.0  # for the end of a body, or for its first `GATHER_BYTES`
MAX_HELD = 1024  # requests whose first part is not there; each holds less than `GATHER_BYTES`
GATHER_BYTES = 64 * 2**10
GATHER_S = 2.0  # less than any body may pause
CALL_BYTES = 256 * 2**10  # of a body in one call: while megabytes are handed over, nobody else is answered
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
# What Serve reads from any client: how long a request may take, whether it goes on without its client, which replica
# gets it.
_OF_SERVE = re.compile(
    rb"serve_multiplexed_model_id|x_session_id|x_request_timeout_seconds|x_request_disconnect_disabled"
    rb"|x_serve_router_.*"
)
_OF_TRACES = {  # W3C Trace Context; Serve decodes them
    b"traceparent": re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}"),
    b"tracestate": re.compile(rb"[ -~]{1,512}"),
}


class _Parser(HttpRequestParser):
    """Tells a protocol of requests, but of no upgrade: behind one, httptools takes a body for the next request.

    A server may ignore upgrades, and clients ask for HTTP/2 by them with any request (Java's does unless told not to).
    """

    def __init__(self, protocol: LimitedProtocol) -> None:
        super().__init__(protocol)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._protocol = protocol

    @property
    def is_upgrade(self) -> bool:
        """Whether the head that has just ended asks for another protocol."""
        return self.should_upgrade() and self.get_method() != b"CONNECT"

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]
        """Parse more of what a connection brings."""
        try:
            super().feed_data(data)
        except HttpParserUpgrade as upgrade:
            if not self.is_upgrade:
                raise
            self._protocol.begin_again(data[upgrade.args[0] :])


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which itself waits for ever for the end of a head, and keeps any size and number of them."""

    parser: _Parser

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.parser = _Parser(self)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first head has its time from here."""
        super().connection_made(transport)
        self._head_bytes = 0
        self._is_in_body = False
        self._chunks = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Another head has its time from its first byte; what still comes of a body that was refused, as well."""
        self._head_bytes += len(data)
        self._chunks = 0
        super().data_received(data)
        if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_head()
        if self._head_bytes > MAX_HEAD_BYTES:
            self._close()

    def on_headers_complete(self) -> None:
        """The head is there. If too many are, the connection ends with 400, as uvicorn does on any error from here."""
        if self.parser.is_upgrade:
            return
        self._forget()
        self._is_in_body = True
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            raise ValueError(f"more than {MAX_PIPELINED} requests wait for their turn")

    def on_header(self, name: bytes, value: bytes) -> None:
        """What comes behind the body (a trailer) is no header: uvicorn would add it to those of the request."""
        if not self._is_in_body:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """What comes between two pieces of a body is limited as a head is, and so is what comes behind the last."""
        self._head_bytes = 0
        self._chunks += 1
        if self._chunks > MAX_CHUNKS:
            raise ValueError(f"more than {MAX_CHUNKS} chunks come at once")
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is there, too."""
        if self.parser.is_upgrade:
            return
        self._is_in_body = False
        self._head_bytes = 0
        super().on_message_complete()

    def begin_again(self, rest: bytes) -> None:
        """Take the request that was begun as if it asked for no upgrade.

        Args:
            rest: what has come behind its head.
        """
        version = self.parser.get_http_version().encode()
        kept = [b"%s: %s" % (name, value) for name, value in self.headers if name != b"upgrade"]
        head = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version), *kept, b"", b""]
        self.parser = _Parser(self)
        self.parser.feed_data(b"\r\n".join(head) + rest)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._forget()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(_scattered(HEAD_TIMEOUT_S), self._close)

    def _forget(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close(self) -> None:
        self._forget()
        self.transport.close()


class CleanHeaders:
    """Passes on only headers that Serve can read and that no client may use to tell Serve what to do.

    An `X-Request-ID` that is no plain word is replaced: logs and answers repeat it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if "headers" in scope:
            asked = Headers(scope=scope).get("x-request-id", "").encode("latin-1")
            request_id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex.encode()
            kept = [(name, value) for name, value in scope["headers"] if _is_for_the_ingress(name, value)]
            scope = {**scope, "headers": [*kept, (b"x-request-id", request_id)]}
        await self._app(scope, receive, send)


def _is_for_the_ingress(name: bytes, value: bytes) -> bool:
    form = _OF_TRACES.get(name)
    if form is not None:
        return form.fullmatch(value) is not None
    return name != b"x-request-id" and not _OF_SERVE.fullmatch(name.lower().replace(b"-", b"_"))


class GatherBody:
    """Keeps a request until the first part of its body is there, and passes the body on in parts of some size.

    The ingress takes each request and each part by a call of Ray, which costs both processes milliseconds: who sends
    slowly would cause one with every byte. A body whose first part does not come is refused here. So is the one that
    has waited longest if there are too many: those of honest clients wait for a moment.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._held: dict[asyncio.Timeout, None] = {}  # the one that has waited longest first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Parts(receive)
        try:
            async with self._place():
                await body.gather()
        except TimeoutError:
            await _refuse(scope, receive, send)
        else:
            if not body.is_abandoned:
                await self._app(scope, body, send)

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        if len(self._held) >= MAX_HELD:
            eldest = next(iter(self._held))
            del self._held[eldest]
            if not eldest.expired():
                eldest.reschedule(0)
        async with asyncio.timeout(_scattered(FIRST_PART_S)) as held:
            self._held[held] = None
            try:
                yield
            finally:
                self._held.pop(held, None)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    request_id = Headers(scope=scope).get("x-request-id")
    REQUEST_ID.set(request_id)
    headers = {"Connection": "close"} | ({"X-Request-ID": request_id} if request_id else {})
    refusal = ProblemError(408, "the body, or the first part of it, did not come in time", headers)
    await refusal.response()(scope, receive, send)


class _Parts:
    """A `receive` that gives a body in parts: of `GATHER_BYTES`, or what has come in `GATHER_S`."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._gathered = bytearray()
        self._last: Message = {"type": "http.request", "more_body": True}
        self._is_passed_on = False

    @property
    def is_abandoned(self) -> bool:
        """Whether the client has left."""
        return self._last["type"] != "http.request"

    async def gather(self) -> None:
        """Until there is a part, the body ends, or the client leaves."""
        while self._has_more and len(self._gathered) < GATHER_BYTES:
            await self._take()

    async def __call__(self) -> Message:
        """The next part; after the last one, or if the client leaves, what the server says then."""
        if self._is_passed_on:
            return await self._receive()
        if not self._gathered and self._has_more:
            await self._take()
        with suppress(TimeoutError):
            async with asyncio.timeout(_scattered(GATHER_S)):
                await self.gather()
        if self.is_abandoned:
            return self._last
        body, self._gathered = bytes(self._gathered), bytearray()
        self._is_passed_on = not self._has_more
        return {"type": "http.request", "body": body, "more_body": self._has_more}

    @property
    def _has_more(self) -> bool:
        return bool(self._last.get("more_body", False))

    async def _take(self) -> None:
        self._last = await self._receive()
        self._gathered += self._last.get("body", b"")


def _scattered(seconds: float) -> float:
    """A little less, at random: who began at the same moment does not end at the same moment."""
    return seconds * random.uniform(0.75, 1)


def middlewares() -> list[Middleware]:
    """Prepare the process of a proxy before it starts: its heap, and what Serve has no option for."""
    give_freed_memory_back()
    hand_over_bodies_in_parts(CALL_BYTES)
    auto.AutoHTTPProtocol = LimitedProtocol
    return [Middleware(GatherBody), Middleware(CleanHeaders)]  # the last one is outermost
