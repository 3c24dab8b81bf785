"""What strangers send to a service: bodies that cost, bodies that never end, wrong keys; and what it does to others."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from io import BytesIO
from itertools import cycle
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from PIL import Image

from gem_ray.benchmarks.load import Load, percentiles, request_of
from gem_ray.data.generated import generate

_SEED, _POSTS = 7, 64
_TIMEOUT_S = 120
_SETTLE_S = 5.0  # what has ended is freed
_LARGE_BYTES = 23 * 2**20  # just below what a request may have
_SLOW_PAUSE_S = 0.5
_SLOW_PARTS = 10
_MIXTURE = {  # of twenty requests
    "good": 10,
    "large image": 2,
    "broken image": 2,
    "hostile body": 2,
    "slow": 1,
    "slow and gone": 1,
    "wrong key": 2,
}
_JSON = "application/json"
FORM = "multipart/form-data; boundary=y"
_PART = b'--y\r\nContent-Disposition: form-data; name="%s"\r\n\r\n'


def hostile_bodies(size: int) -> dict[str, bytes]:
    """JSON bodies of about `size` bytes that are small work to send and would be large work to parse."""
    return {
        "posts": _repeated(size, b'{"posts":[', b'{"text":"a"}', b"]}"),
        "tokens": _repeated(size, b'{"posts":[{"text":"a","tokens":[', b'"a"', b"]}]}"),
        "numbers": _repeated(size, b'{"posts":[', b"0", b"]}"),
        "fields": _repeated(size, b'{"posts":[{"text":"a"}],', b'"a":0', b"}"),
        "after NaN": _repeated(size, b'{"posts":[NaN,', b'{"text":"a"}', b"]}"),
        "depth": b'{"posts":' + b"[" * size,
        "objects": b'{"posts":' + b'{"a":' * (size // 5),
        "a number": b'{"posts":' + b"9" * size + b"}",
        "a string": b'{"posts":"' + b"a" * size + b'"}',
        "a text": b'{"posts":[{"text":"' + rb"\u0061" * (size // 6) + b'"}]}',
        "an image": b'{"posts":[{"text":"a","image":"' + b"A" * size + b'"}]}',
        "spaces": b'{"posts":' + b" " * size + b"[]}",
        "no end": b'{"posts":[{"text":"' + b"a" * size,
    }


def hostile_forms(size: int) -> dict[str, bytes]:
    """Forms of about `size` bytes, their boundary `y`: of many parts, of long texts, of a file that is not an image."""
    part = _PART % b"tokens" + b"a\r\n"
    return {
        "parts": part * (size // len(part)) + b"--y--\r\n",
        "long texts": (_PART % b"tokens" + b"a" * 10**6 + b"\r\n") * (size // 10**6) + b"--y--\r\n",
        "a long text": _PART % b"text" + b"a" * size + b"\r\n--y--\r\n",
        "a file": _PART % b'image"; filename="a' + b"\r\n" * (size // 2) + b"\r\n--y--\r\n",
    }


def _large_bodies() -> list[tuple[str, bytes]]:
    """Their content types, and the bodies of every kind."""
    bodies = [(_JSON, body) for body in hostile_bodies(_LARGE_BYTES).values()]
    return bodies + [(FORM, body) for body in hostile_forms(_LARGE_BYTES).values()]


def _repeated(size: int, start: bytes, item: bytes, end: bytes) -> bytes:
    return start + b",".join([item] * ((size - len(start) - len(end)) // (len(item) + 1))) + end


class Abuse:
    """Connections that misbehave, each on and on until it is cancelled.

    Args:
        url: of a service, by plain HTTP.
        api_key: a key that it knows, if it wants one.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._large = cycle(_large_bodies())

    async def send_slowly(self) -> None:
        """A body that begins, and then a byte now and then."""
        while True:
            await self._send(_JSON, 10_000, self._drips())

    async def send_large(self) -> None:
        """One large body after the other, each as fast as it goes."""
        while True:
            kind, body = next(self._large)
            await self._send(kind, len(body), _at_once(body))

    async def _drips(self) -> AsyncIterator[bytes]:
        yield b"{"
        while True:
            await asyncio.sleep(_SLOW_PAUSE_S)
            yield b" "

    async def _send(self, kind: str, length: int, parts: AsyncIterator[bytes]) -> None:
        head = (
            f"POST /v1/annotate HTTP/1.1\r\nHost: {self._host}\r\n{self._key}Content-Type: {kind}\r\n"
            f"Content-Length: {length}\r\n\r\n"
        )
        with suppress(OSError):  # cut off, as it should be
            reader, writer = await asyncio.open_connection(self._host, self._port)
            try:
                writer.write(head.encode())
                sending = asyncio.create_task(_write(writer, parts))
                await reader.readline()
                sending.cancel()
            finally:
                writer.close()


async def _at_once(body: bytes) -> AsyncIterator[bytes]:
    yield body


async def _write(writer: asyncio.StreamWriter, parts: AsyncIterator[bytes]) -> None:
    with suppress(OSError):
        async for part in parts:
            writer.write(part)
            await writer.drain()


class Mixture:
    """Requests of all kinds, good and bad, by turns.

    Args:
        url: of a service.
        api_key: a key that it knows; the wrong one is refused only by a service that has keys.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url
        self._key = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        good = [request_of(post.text, post.image_bytes or b"") for post in generate(_POSTS, _SEED)]
        broken = [
            request_of("Paris tonight", image) for image in (b"no image", good[0][0][:2000], b"\x89PNG\r\n\x1a\n")
        ]
        self._of_kind = {
            "good": cycle(good),
            "large image": cycle([request_of("Paris tonight", _large_image())]),
            "broken image": cycle(broken),
            "hostile body": cycle([(body, {"Content-Type": kind}) for kind, body in _large_bodies()]),
            "slow": cycle(good),
            "slow and gone": cycle(good),
            "wrong key": cycle(good),
        }
        self._kinds = cycle([kind for kind, number in _MIXTURE.items() for _ in range(number)])

    async def send(self, requests: int, clients: int) -> dict[str, dict[str, int]]:
        """Send requests, from some clients in a closed loop.

        Returns:
            kind -> status, or the name of what broke the connection -> how many.
        """
        todo = iter(range(requests))
        seen: dict[str, Counter[str]] = {kind: Counter() for kind in _MIXTURE}
        async with httpx.AsyncClient(base_url=self._url, headers=self._key, timeout=_TIMEOUT_S) as http:

            async def client() -> None:
                for _ in todo:
                    kind = next(self._kinds)
                    seen[kind][await self._send(http, kind)] += 1

            await asyncio.gather(*(client() for _ in range(clients)))
        return {kind: dict(statuses) for kind, statuses in seen.items()}

    async def _send(self, http: httpx.AsyncClient, kind: str) -> str:
        body, headers = next(self._of_kind[kind])
        if kind == "wrong key":
            headers = {**headers, "Authorization": "Bearer wrong"}
        content: Any = _slowly(body, is_whole=kind == "slow") if kind.startswith("slow") else body
        try:
            return str((await http.post("/v1/annotate", content=content, headers=headers)).status_code)
        except (httpx.TransportError, _GoneError) as error:
            return type(error).__name__


class _GoneError(Exception):
    """A client that leaves in the middle of its body."""


async def _slowly(body: bytes, is_whole: bool) -> AsyncIterator[bytes]:
    size = -(-len(body) // _SLOW_PARTS)
    for part in range(_SLOW_PARTS if is_whole else _SLOW_PARTS // 2):
        yield body[part * size : (part + 1) * size]
        await asyncio.sleep(_SLOW_PAUSE_S / _SLOW_PARTS)
    if not is_whole:
        raise _GoneError


def _large_image() -> bytes:
    """A photo-like JPEG of 12 megapixels."""
    coarse = np.random.default_rng(_SEED).integers(0, 256, (30, 40, 3), np.uint8)
    encoded = BytesIO()
    Image.fromarray(coarse).resize((4000, 3000)).save(encoded, "JPEG", quality=95)
    return encoded.getvalue()


async def measure_memory(
    mixture: Mixture, memory: Callable[[], dict[str, float]], few: int, many: int, clients: int
) -> dict[str, Any]:
    """Memory of a service after few mixed requests, and after many.

    Args:
        mixture: of requests.
        memory: of each of the service's processes, in MiB.
        few: requests before the first look.
        many: before the second, the first ones among them.
        clients: that send them.

    Returns:
        what became of the requests of each kind, the processes' memory, and the ratio of their sums.
    """
    statuses, looks, before = {}, {}, 0
    for requests in (few, many):
        statuses[str(requests)] = await mixture.send(requests - before, clients)
        await asyncio.sleep(_SETTLE_S)
        looks[str(requests)] = memory()
        before = requests
    totals = {requests: sum(look.values()) for requests, look in looks.items()}
    return {
        "statuses": statuses,
        "memory_mib": looks,
        "total_mib": totals,
        "ratio": totals[str(many)] / totals[str(few)],
    }


async def measure_health(
    load: Load, abuse: Abuse, url: str, seconds: float, clients: int, slow: int, large: int
) -> dict[str, Any]:
    """How soon `/healthz` is answered on an idle service, under each kind of load, and under all at once.

    Args:
        load: good posts.
        abuse: the others.
        url: of the service.
        seconds: of each kind.
        clients: that send good posts, in a closed loop.
        slow: connections that send slowly.
        large: connections that send large bodies.

    Returns:
        kind of load -> percentiles in seconds.
    """
    kinds: dict[str, list[Callable[[], Coroutine[Any, Any, Any]]]] = {
        "idle": [],
        "posts": [lambda: load.closed(clients, sys.maxsize)],
        "slow_senders": [abuse.send_slowly] * slow,
        "large_bodies": [abuse.send_large] * large,
    }
    kinds["all"] = [begin for each in kinds.values() for begin in each]
    await load.closed(clients, 2 * clients)  # every process has done something once
    return {name: await _health_under(url, seconds, begins) for name, begins in kinds.items()}


async def _health_under(
    url: str, seconds: float, begins: Sequence[Callable[[], Coroutine[Any, Any, Any]]]
) -> dict[str, float]:
    tasks = [asyncio.create_task(begin()) for begin in begins]
    try:
        await asyncio.sleep(1)  # the load is there
        answers = await _ask_health(url, seconds)
        return {"answers": len(answers), **percentiles(answers)}
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _ask_health(url: str, seconds: float) -> list[float]:
    parts = urlsplit(url)
    command = ["-m", "gem_ray.benchmarks.health", parts.hostname or "", str(parts.port or 80), str(seconds)]
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    return json.loads(output)
