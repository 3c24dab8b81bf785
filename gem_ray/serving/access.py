"""What becomes of each request: counted for Prometheus, and a line of JSON in the access log."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from contextvars import Context, ContextVar
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.util.metrics import Counter, Gauge, Histogram
from starlette.datastructures import Headers

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from gem_ray.serving.flow import Flow

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the request that is handled: `X-Request-ID`, which Serve's proxy makes up where a client sends none."""

_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30]
_CLIENT_LEFT = 499  # no status of HTTP; nginx has it in its logs
_GAUGES_S = 1.0
_UNKNOWN = "other"  # so that whoever scans for paths, or tries methods, makes no series of each
_METHODS = ("GET", "HEAD", "OPTIONS", "POST")


class Access:
    """ASGI middleware around the guard.

    Args:
        app: the guard.
        flow: whose posts are told beside the requests.
        log: a file to which a line for each request is added; `None` means no access log. It may be renamed meanwhile.
        max_in_flight: of the configuration.
    """

    def __init__(self, app: ASGIApp, flow: Flow, log: Path | None, max_in_flight: int) -> None:
        self._app = app
        self._flow = flow
        self._log = _logger(log)
        kinds = ("endpoint", "method", "status", "key")
        self._requests = Counter("gem_ray_http_requests", "Requests that were answered.", kinds)
        self._seconds = Histogram("gem_ray_http_seconds", "Time of a request.", _SECONDS, ("endpoint",))
        self._in_flight = Gauge("gem_ray_posts_in_flight", "Posts that have a place in an ingress.")
        self._waiting = Gauge("gem_ray_posts_waiting", "Of these, posts that wait for a call of a pool.")
        self._limit = Gauge("gem_ray_posts_limit", "Places of an ingress.")
        self._max_in_flight = max_in_flight
        self._watching: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._watching is None:  # in no request's context
            self._watching = asyncio.get_running_loop().create_task(self._watch_posts(), context=Context())
        started = time.perf_counter()
        status: int | None = None
        size = 0
        REQUEST_ID.set(Headers(scope=scope).get("x-request-id") or uuid.uuid4().hex)
        asked: Scope = {**scope, "state": dict(scope.get("state", {}))}

        async def receive_seen() -> Message:
            nonlocal status
            message = await receive()
            if message["type"] == "http.disconnect" and status is None:
                status = _CLIENT_LEFT
            return message

        async def send_seen(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start" and status is None:
                status = message["status"]
            size += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(asked, receive_seen, send_seen)
        except asyncio.CancelledError:  # by Serve, when the client leaves
            status = status or _CLIENT_LEFT
            raise
        finally:
            self._tell(asked, status or 500, size, time.perf_counter() - started)

    async def _watch_posts(self) -> None:
        """Tell how many posts there are, also while no request ends."""
        while True:
            self._in_flight.set(self._flow.in_flight)
            self._waiting.set(self._flow.waiting)
            self._limit.set(self._max_in_flight)  # again: what is set once is exported once
            await asyncio.sleep(_GAUGES_S)

    def _tell(self, scope: Scope, status: int, size: int, seconds: float) -> None:
        state = scope["state"]
        caller, endpoint = state.get("caller"), state.get("endpoint") or _UNKNOWN
        key = (caller and caller.key) or ""
        method = scope["method"]
        known = method if method in _METHODS else _UNKNOWN
        self._requests.inc(1, {"endpoint": endpoint, "method": known, "status": str(status), "key": key})
        self._seconds.observe(seconds, {"endpoint": endpoint})
        if self._log is not None:
            peer = scope.get("client")
            line: dict[str, Any] = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "request_id": REQUEST_ID.get(),
                "peer": peer[0] if peer else None,
                "key": key or None,
                "method": method,
                "path": scope["path"],  # without its query, which may hold anything
                "status": status,
                "bytes": size,
                "seconds": round(seconds, 4),
            }
            self._log.info(json.dumps(line))


class _LogFile(WatchedFileHandler):
    """A file that cannot be opened again, or holds no more, costs its lines alone; they go on when it can."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)


def _logger(file: Path | None) -> logging.Logger | None:
    if file is None:
        return None
    handler = _LogFile(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.Logger("gem_ray.access", logging.INFO)  # not of the tree: no other handler gets its lines
    logger.addHandler(handler)
    return logger
