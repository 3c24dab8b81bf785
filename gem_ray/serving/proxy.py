"""What Serve's HTTP proxies add to uvicorn: limits for a request's head, and bodies in parts that are worth a call.

A proxy calls `middlewares` where `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names it.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from contextlib import suppress

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http import auto
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

IMPORT_PATH = f"{__name__}:middlewares"
HEAD_TIMEOUT_S = 10.0
MAX_HEAD_BYTES = 64 * 2**10
GATHER_BYTES = 64 * 2**10
GATHER_S = 2.0  # less than any body may pause
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which itself waits for ever for the end of a head, and keeps one of any size."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first head has its time from here."""
        super().connection_made(transport)
        self._head_bytes = 0
        self._is_in_body = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Another head has its time from its first byte; what still comes of a body that was refused, as well."""
        self._head_bytes += len(data)
        super().data_received(data)
        if self._is_in_body:
            self._head_bytes = 0
        if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_head()
        if self._head_bytes > MAX_HEAD_BYTES:
            self._close()

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._forget()
        self._is_in_body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is there, too."""
        self._is_in_body = False
        self._head_bytes = 0
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._forget()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._close)

    def _forget(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close(self) -> None:
        self._forget()
        self.transport.close()


class CleanRequestId:
    """Replaces an `X-Request-ID` that is no plain word: proxies decode it, and logs and answers repeat it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] == "http":
            scope["headers"][:] = [
                (name, value)
                if name != b"x-request-id" or _REQUEST_ID.fullmatch(value)
                else (name, str(uuid.uuid4()).encode())
                for name, value in scope["headers"]
            ]
        await self._app(scope, receive, send)


class GatherBody:
    """Passes a body on in parts of some size, or what has come in some time: the ingress fetches each by a call of Ray,
    which costs both processes milliseconds, and who sends slowly would cause one with every byte.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        await self._app(scope, _gathered(receive) if scope["type"] == "http" else receive, send)


def _gathered(receive: Receive) -> Receive:
    after: list[Message] = []  # what came behind a part that was cut off

    async def gathered() -> Message:
        if after:
            return after.pop()
        first = message = await receive()
        parts = [first.get("body", b"")]
        with suppress(TimeoutError):
            async with asyncio.timeout(GATHER_S):
                while message.get("more_body", False) and sum(map(len, parts)) < GATHER_BYTES:
                    message = await receive()
                    if message["type"] != first["type"]:
                        after.append(message)
                        break
                    parts.append(message.get("body", b""))
        more = bool(after) or message.get("more_body", False)
        return {**first, "body": b"".join(parts), "more_body": more} if first["type"] == "http.request" else first

    return gathered


def middlewares() -> list[Middleware]:
    """Put the protocol in the place of uvicorn's own, for which Serve has no option, before a proxy starts."""
    auto.AutoHTTPProtocol = LimitedProtocol
    return [Middleware(CleanRequestId), Middleware(GatherBody)]
