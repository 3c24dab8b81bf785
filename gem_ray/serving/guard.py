"""What stands before the API: who may ask, how large a body may be, and what happens when anything goes wrong."""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

from gem_ray.config import ServingConfig
from gem_ray.serving.keys import ApiKeys
from gem_ray.serving.problems import ProblemError, problem_of

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_PROTECTED = ("/v1/", "/metrics")
# Somebody stands between, and asks for others.
_PROXIED = {"forwarded", "x-forwarded-for"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """ASGI middleware, outermost.

    Without keys only this machine is served, whatever address the proxy listens on.

    Args:
        app: the API.
        keys: of those who may annotate.
        limits: of a request's body, and what clients are asked to wait.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, limits: ServingConfig) -> None:
        self._app = app
        self._keys = keys
        self._max_body_bytes = limits.max_body_bytes
        self._retry_after_s = limits.retry_after_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request; never raises once the answer has begun."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def send_guarded(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                MutableHeaders(raw=message.setdefault("headers", [])).update(_HEADERS)
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, self._counting(receive), send_guarded)
        except Exception as error:
            if has_begun:
                raise
            await problem_of(error, self._retry_after_s).response()(scope, receive, send_guarded)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if scope["path"].removeprefix(scope.get("root_path", "")).startswith(_PROTECTED):
            self._check_key(scope, headers)
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            raise ProblemError(400, "Content-Length is no number")
        if int(length) > self._max_body_bytes:
            raise self._too_large()

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        if not self._keys:
            # The name too: another site's may resolve to this machine, and its scripts would be let in.
            if not (_is_loopback(scope) and _names_loopback(headers.get("host", ""))) or _PROXIED & set(headers.keys()):
                raise ProblemError(403, "this server has no API keys, so it serves its own machine only")
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or key.strip() not in self._keys:
            raise ProblemError(401, "send a valid API key: Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"})

    def _counting(self, receive: Receive) -> Receive:
        """Bodies without a length, or of another one than they claim."""
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> ProblemError:
        return ProblemError(413, f"the body has more than {self._max_body_bytes:,} bytes", {"Connection": "close"})


def _names_loopback(host: str) -> bool:
    """Whether a `Host` header names this machine as itself."""
    name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_loopback(scope: Scope) -> bool:
    client = scope.get("client")
    try:
        return client is not None and ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False
