"""The bytes behind an image URI, if it is allowed to be read: no path or URL from the data is trusted."""

from __future__ import annotations

import asyncio
import ipaddress
import random
import re
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import cached_property
from threading import Lock
from typing import Any, TypeVar
from urllib.parse import urljoin

import httpx
from anyio.from_thread import BlockingPortalProvider
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
)

from gem_ray import s3
from gem_ray.chat import retry_after
from gem_ray.config import ImageConfig
from gem_ray.records import ProblemKind

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_USERINFO = re.compile(r"//[^/]*@")
_MAX_REDIRECTS = 4
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052
# Which Python takes for public: NAT64 of one's own network (RFC 8215), and old ways to carry IPv4 addresses.
_INSIDE = tuple(map(ipaddress.IPv6Network, ("64:ff9b:1::/48", "::/96", "::ffff:0:0:0/96")))

# boto3 asks again when a request fails, until its budget for that is used up, and never for a body that breaks off.
_PAUSES_S = (1, 2, 4, 8, 16)
_BROKEN_OFF = (HTTPClientError, IncompleteReadError, FlexibleChecksumError, TimeoutError)
# Fewer for web servers: of many posts' images the server is gone for good, and each of them would be waited for.
_HTTPS_PAUSES_S = (1, 3)
_BUSY = frozenset({408, 425, 429})  # and every 5xx
_CHUNK = 1 << 16


class ImageError(Exception):
    """An image that cannot be used: its kind of problem, and a sentence for a person."""

    def __init__(self, kind: ProblemKind, message: str):
        super().__init__(message)
        self.kind = kind

    @classmethod
    def over_max_bytes(cls, size: int, config: ImageConfig) -> ImageError:
        """The encoded image holds `size` bytes or more."""
        message = f"the encoded image has {size:,} bytes or more; image.max_bytes allows {config.max_bytes:,}"
        return cls(ProblemKind.IMAGE_TOO_LARGE, message)


_NO_ROOT = "set image.root to the folder of the images to read local paths"


class _TransientError(ImageError):
    """A failure that may be over at the next try.

    Attributes:
        retry_after_s: what the server asks to wait before that.
    """

    retry_after_s = 0.0


_Kind = TypeVar("_Kind", bound=ImageError)


class Fetcher:
    """Reads image URIs: paths under `config.root`, `s3://`, and `https://` where the configuration allows it.

    Args:
        config: limits of images, and where they may come from.

    Attributes:
        trouble: what is asked for again at the moment, and why; None while images come.
        fetched: images that came over the network, their bytes, and requests to S3, those that failed counted in.
    """

    def __init__(self, config: ImageConfig):
        self.trouble: str | None = None
        self.fetched: Counter[str] = Counter()
        self._lock = Lock()
        self._config = config

    def fetch(self, uri: str) -> bytes:
        """The encoded image.

        Raises:
            ImageError: IMAGE_FORBIDDEN, IMAGE_MISSING, IMAGE_TOO_LARGE, or IMAGE_UNREADABLE where the transfer failed.
        """
        if reason := why_never_read(uri, self._config):
            raise _forbidden(uri, reason)
        scheme = _scheme(uri)
        if not scheme:
            return read_local(uri, self._config)
        return self._read_s3(uri) if scheme == "s3" else self._read_https(uri)

    def _persistently(self, attempt: Callable[[], bytes], pauses: Iterable[float]) -> bytes:
        """Try again after each of the pauses while the failure may be over by then."""
        for pause in pauses:
            try:
                return self._counted(attempt())
            except _TransientError as failure:
                self.trouble = str(failure)
                asked = min(failure.retry_after_s, self._config.timeout_s)
                time.sleep(max(asked, random.uniform(0, pause)))  # those who failed together do not return together
        return self._counted(attempt())

    def _counted(self, data: bytes) -> bytes:
        self.trouble = None
        with self._lock:
            self.fetched.update(fetched=1, bytes=len(data))
        return data

    def _count_request(self) -> None:
        with self._lock:
            self.fetched["s3_requests"] += 1

    def _read_https(self, uri: str) -> bytes:
        with self._event_loop as loop:
            return self._persistently(lambda: loop.call(self._follow, uri), _HTTPS_PAUSES_S)

    async def _follow(self, uri: str) -> bytes:
        # Asynchronously, because so one deadline holds for everything: handshake, header, body, and all redirects.
        try:
            async with asyncio.timeout(self._config.timeout_s), self._client() as client:
                for _ in range(_MAX_REDIRECTS + 1):
                    answer = await self._get(client, uri)
                    if not answer.has_redirect_location:
                        return await self._body(answer, uri)
                    await answer.aclose()
                    uri = urljoin(uri, answer.headers["location"])
        except TimeoutError as error:
            raise _unreadable(uri, f"not received within {self._config.timeout_s:g} s", _TransientError) from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            kind = _TransientError if _may_be_over_soon(error) else ImageError
            raise _unreadable(uri, str(error) or type(error).__name__, kind) from error
        raise _unreadable(uri, f"more than {_MAX_REDIRECTS} redirects")

    async def _get(self, client: httpx.AsyncClient, uri: str) -> httpx.Response:
        """Ask the very address that was checked: a name may resolve to another one the next time."""
        url = httpx.URL(uri)
        hosts = self._config.http_hosts
        if hosts is not None and url.netloc.decode("ascii").lower() not in map(str.lower, hosts):
            raise _forbidden(uri, "its host is not one of image.http_hosts")
        request = client.build_request(
            "GET",
            url.copy_with(host=await _public_address(url), userinfo=b""),
            headers={"host": url.netloc.decode("ascii")},
            extensions={"sni_hostname": url.raw_host.decode("ascii")},
        )
        return await client.send(request, stream=True)

    async def _body(self, answer: httpx.Response, uri: str) -> bytes:
        if answer.status_code in (404, 410):
            raise _missing(uri)
        if answer.status_code in _BUSY or answer.is_server_error:
            failure = _unreadable(uri, f"the server answered {answer.status_code}", _TransientError)
            failure.retry_after_s = retry_after(answer.headers.get("retry-after", ""))
            raise failure
        if answer.status_code != 200:
            raise _unreadable(uri, f"the server answered {answer.status_code}")
        data = bytearray()
        async for chunk in answer.aiter_raw():  # raw: a compressed body could be far larger than received
            self._extend(data, chunk)
        return bytes(data)

    def _extend(self, data: bytearray, chunk: bytes) -> None:
        data += chunk
        if len(data) > self._config.max_bytes:
            raise ImageError.over_max_bytes(len(data), self._config)

    def _read_s3(self, uri: str) -> bytes:
        place = _s3_object(uri)
        return self._persistently(lambda: self._get_object(place, uri), _PAUSES_S)

    def _get_object(self, place: s3.S3Uri, uri: str) -> bytes:
        client = self._anonymous_s3 if place.anonymous else self._s3
        deadline = time.monotonic() + self._config.timeout_s
        try:
            answer = client.get_object(Bucket=place.bucket, Key=place.key)
            with closing(answer["Body"]) as body:
                return self._collect(body.iter_chunks(_CHUNK), deadline)
        except ClientError as error:
            raise _refusal(uri, error) from error
        except _BROKEN_OFF as error:
            raise _unreadable(uri, str(error), _TransientError) from error
        except (BotoCoreError, ValueError) as error:  # no credentials, a key that is not text
            raise _unreadable(uri, str(error)) from error

    def _collect(self, chunks: Iterable[bytes], deadline: float) -> bytes:
        data = bytearray()
        for chunk in chunks:
            self._extend(data, chunk)
            if time.monotonic() > deadline:
                raise TimeoutError(f"not received within {self._config.timeout_s:g} s")
        return bytes(data)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._config,)  # connections stay in the process that made them

    @cached_property
    def _s3(self) -> Any:
        return s3.client(False, self._config.timeout_s, self._config.fetch_concurrency, self._count_request)

    @cached_property
    def _anonymous_s3(self) -> Any:
        return s3.client(True, self._config.timeout_s, self._config.fetch_concurrency, self._count_request)

    @cached_property
    def _event_loop(self) -> BlockingPortalProvider:
        """A loop in a thread of its own, for as long as anybody fetches: callers may have a loop of theirs."""
        return BlockingPortalProvider()

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return httpx.create_ssl_context()

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            verify=self._tls,
            timeout=None,  # see the deadline in `_follow`
            # No proxy from the environment: it would resolve the host again, after our check.
            trust_env=False,
            # No reuse: connections are made to addresses, and two hosts may share one.
            limits=httpx.Limits(max_keepalive_connections=0),
            headers={"accept-encoding": "identity"},
        )


def why_never_read(uri: str, config: ImageConfig) -> str | None:
    """Why a configuration lets no address of this kind be read, and what to set; None if it does."""
    scheme = _scheme(uri)
    if not scheme and config.root is None:
        return _NO_ROOT
    if scheme == "https" and not config.allow_http:
        return "set image.allow_http to fetch https:// addresses"
    return None if scheme in ("", "s3", "https") else f"{scheme}: addresses are not read"


def _scheme(uri: str) -> str:
    match = _SCHEME.match(uri)
    return match.group(1).lower() if match else ""


def read_local(uri: str, config: ImageConfig) -> bytes:
    """The file at a path that, links and `..` resolved, lies in `config.root`.

    Raises:
        ImageError: as `Fetcher.fetch`.
    """
    if config.root is None:
        raise _forbidden(uri, _NO_ROOT)
    try:
        root = config.root.resolve()
        path = (root / uri).resolve()
        if not path.is_relative_to(root):
            raise _forbidden(uri, "the path leads out of image.root")
        if not path.is_file():  # nor directories, pipes and devices
            raise _missing(uri)
        with path.open("rb") as file:
            return _bounded(file.read(config.max_bytes + 1), config)
    except (OSError, ValueError, RuntimeError) as error:  # an over-long name, a NUL, a loop of links
        raise _unreadable(uri, str(error)) from error


async def _public_address(url: httpx.URL) -> str:
    """An address of the URL's host, all of whose addresses are on the public internet."""
    if url.scheme != "https" or not url.host:
        raise _forbidden(str(url), "only https:// addresses are fetched")
    host, port = url.raw_host.decode("ascii"), url.port or 443
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not all(_is_public(address) for address in addresses):
        raise _forbidden(str(url), "its host is on a private network")
    return addresses[0]


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        # Addresses that carry an IPv4 address lead where that one leads.
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
        if inner:
            return _is_public(str(inner))
        if ip.is_site_local or any(ip in network for network in _INSIDE):
            return False
    return ip.is_global and not ip.is_multicast


def _bounded(data: bytes, config: ImageConfig) -> bytes:
    if len(data) > config.max_bytes:
        raise ImageError.over_max_bytes(len(data), config)
    return data


def _s3_object(uri: str) -> s3.S3Uri:
    # Only bucket and key: nothing else in a URI may say where our credentials are sent.
    try:
        place = s3.S3Uri.parse(uri)
    except ValueError:
        raise _forbidden(uri, "it is not s3://bucket/key") from None
    if not place.key:
        raise _forbidden(uri, "it is a bucket, not an image in one")
    return place


def _refusal(uri: str, error: ClientError) -> ImageError:
    status = error.response["ResponseMetadata"]["HTTPStatusCode"]
    reason = f"S3 answered {error.response['Error']['Code']}"
    if status == 404:
        return _missing(uri)
    if status == 403:
        return _forbidden(uri, reason)
    return _unreadable(uri, reason, _TransientError if status >= 500 else ImageError)


def _forbidden(uri: str, reason: str) -> ImageError:
    return ImageError(ProblemKind.IMAGE_FORBIDDEN, f"{_short(uri)} may not be read: {reason}")


def _missing(uri: str) -> ImageError:
    return ImageError(ProblemKind.IMAGE_MISSING, f"there is no image at {_short(uri)}")


def _may_be_over_soon(error: Exception) -> bool:
    """True for connections that could not be made or broke off, and for a name server that had no time."""
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    is_broken = isinstance(error, (httpx.NetworkError, httpx.RemoteProtocolError))
    return is_broken and "CERTIFICATE_VERIFY_FAILED" not in str(error)


def _unreadable(uri: str, reason: str, kind: type[_Kind] = ImageError) -> _Kind:  # type: ignore[assignment]
    return kind(ProblemKind.IMAGE_UNREADABLE, f"{_short(uri)} could not be read: {reason}")


def _short(uri: str) -> str:
    """The URI as messages show it: without password and query, which may hold a signature, and not endless."""
    bare = _USERINFO.sub("//", uri.partition("?")[0])
    return repr(bare if len(bare) <= 120 else bare[:117] + "…")
