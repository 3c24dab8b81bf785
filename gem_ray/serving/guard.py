"""What stands before the API: who may ask, how large a body may be, and what happens when anything goes wrong."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute, Match

from gem_ray.config import ServingConfig
from gem_ray.serving.keys import ApiKeys
from gem_ray.serving.problems import ProblemError, problem_of
from gem_ray.serving.uploads import Uploads

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_PROTECTED = ("/v1/", "/metrics")
# Somebody stands between, and asks for others.
_PROXIED = re.compile(r".*forwarded.*|via|x-(original|amzn|envoy)-.*|(.*-)?((client)?ip|addr)|cf-.*|cdn-loop")
_SAFE = ("GET", "HEAD", "OPTIONS")
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # or a browser would join files of the page of before and after an upgrade
}


class Caller(NamedTuple):
    """Who asks.

    Attributes:
        host: address of the peer.
        key: name of the API key; None where the server has none.
    """

    host: str
    key: str | None


class Guard:
    """ASGI middleware, outermost.

    Without keys only this machine is served, whatever address the proxy listens on. `HEAD` is answered as `GET` without
    the body, and a path with a slash at its end as the one without.

    Args:
        app: the API.
        keys: of those who may annotate.
        limits: of a request's body, and what clients are asked to wait.
        routes: of the API, by whose paths requests are counted that do not get there.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, limits: ServingConfig, routes: Sequence[BaseRoute] = ()) -> None:
        self._app = app
        self._routes = routes
        self._keys = keys
        self._uploads = Uploads(limits)
        self._retry_after_s = limits.retry_after_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request; never raises once the answer has begun."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_head = scope["method"] == "HEAD"
        has_begun = False

        async def send_guarded(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                MutableHeaders(raw=message.setdefault("headers", [])).update(_HEADERS)
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        asked: Scope = {"state": {}, **scope, "path": _path(scope), "method": "GET" if is_head else scope["method"]}
        try:
            caller = asked["state"]["caller"] = self._caller(asked)
            with self._uploads.limited(receive, caller.key or caller.host, _length(asked)) as limited:
                await self._app(asked, limited, send_guarded)
        except Exception as error:
            if has_begun:
                raise
            await problem_of(error, self._retry_after_s).response()(scope, receive, send_guarded)
        finally:
            asked["state"]["endpoint"] = self._endpoint(asked)

    def _endpoint(self, scope: Scope) -> str | None:
        """The path of the route that a request has reached, or would have reached."""
        reached = scope.get("route")
        route = reached or next((each for each in self._routes if each.matches(scope)[0] != Match.NONE), None)
        return getattr(route, "path", None)

    def _caller(self, scope: Scope) -> Caller:
        is_protected = scope["path"].removeprefix(scope.get("root_path", "")).startswith(_PROTECTED)
        return Caller(_host(scope), self._key(scope, Headers(scope=scope)) if is_protected else None)

    def _key(self, scope: Scope, headers: Headers) -> str | None:
        """The name of the key that a request brings, if the server has any."""
        if not self._keys:
            self._check_is_local(scope, headers)
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        name = self._keys.name_of(key.strip()) if scheme.lower() == "bearer" else None
        if name is None:
            raise ProblemError(401, "send a valid API key: Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"})
        return name

    def _check_is_local(self, scope: Scope, headers: Headers) -> None:
        # The name too: another site's may resolve to this machine, and its scripts would be let in.
        is_local = _is_loopback(_host(scope)) and _names_loopback(headers.get("host", ""))
        if not is_local or any(_PROXIED.fullmatch(name) for name in headers):
            raise ProblemError(403, "this server has no API keys, so it serves its own machine only")
        if scope["method"] not in _SAFE and not _is_same_origin(headers):
            raise ProblemError(403, "a page of another site sent this; a server without API keys serves its own only")


def _path(scope: Scope) -> str:
    """The path without slashes at its end; that of the page, which is one, may stand behind a prefix of the route."""
    path: str = scope["path"]
    route = path.removeprefix(scope.get("root_path", ""))
    return path.removesuffix(route) + (route.rstrip("/") or "/")


def _length(scope: Scope) -> int:
    length = Headers(scope=scope).get("content-length", "0")
    if not length.isdecimal():
        raise ProblemError(400, "Content-Length is no number")
    return int(length)


def _host(scope: Scope) -> str:
    client = scope.get("client")
    return client[0] if client else ""


def _is_same_origin(headers: Headers) -> bool:
    """Whether no browser says that another site's page sends this; programs that are no browsers say nothing."""
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    return origin is None or origin.partition("://")[2].lower() == headers.get("host", "").lower()


def _names_loopback(host: str) -> bool:
    """Whether a `Host` header names this machine as itself."""
    name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
    return name.lower() == "localhost" or _is_loopback(name.strip("[]"))


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
