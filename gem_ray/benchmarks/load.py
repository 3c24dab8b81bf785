"""Load on a running service: clients in a closed loop, or requests that arrive whether or not the last are answered."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from gem_ray.data.generated import generate

_SEED = 7
_QUANTILES = (50, 90, 95, 99)
_TIMEOUT_S = 120


@dataclass
class Outcome:
    """What became of the requests of one load.

    Attributes:
        seconds: from the first request to the last answer.
        latencies: of the answers by status; 0 stands for connections that broke.
        stage_seconds: sums over the answers of 200: of each stage, whose batches count for each of their posts, and of
            `waiting`.
    """

    seconds: float = 0.0
    latencies: dict[int, list[float]] = field(default_factory=dict)
    stage_seconds: Counter[str] = field(default_factory=Counter)

    @property
    def per_second(self) -> float:
        """Annotated posts a second."""
        return len(self.latencies.get(200, ())) / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Rates, percentiles in seconds by status, and the shares of stages and of waiting in the time of posts."""
        total = sum(self.stage_seconds.values()) or 1.0
        return {
            "annotated_per_second": self.per_second,
            "seconds": self.seconds,
            "statuses": {str(status): len(times) for status, times in sorted(self.latencies.items())},
            "latency_s": {str(status): percentiles(times) for status, times in sorted(self.latencies.items())},
            "share_of_time": {name: seconds / total for name, seconds in self.stage_seconds.most_common()},
        }


class Load:
    """Sends generated posts with their images to a service.

    Args:
        url: where it is.
        posts: how many different posts; they are sent over and over.
        api_key: a key that the service knows, if it wants one.
    """

    def __init__(self, url: str, posts: int = 256, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        self._new_client = lambda: httpx.AsyncClient(base_url=url, headers=headers, timeout=_TIMEOUT_S, limits=limits)
        self._requests = cycle([request_of(post.text, post.image_bytes or b"") for post in generate(posts, _SEED)])

    async def closed(self, clients: int, requests: int) -> Outcome:
        """Clients that send their next request when the last is answered."""
        outcome, todo = Outcome(), iter(range(requests))
        started = time.perf_counter()
        async with self._new_client() as http:
            await asyncio.gather(*(self._client(http, todo, outcome) for _ in range(clients)))
        outcome.seconds = time.perf_counter() - started
        return outcome

    async def open(self, rate: float, seconds: float) -> Outcome:
        """Requests that arrive at random, independent of each other (a Poisson process), `rate` a second."""
        outcome, chance = Outcome(), random.Random(_SEED)
        started = time.perf_counter()
        due = started
        async with self._new_client() as http, asyncio.TaskGroup() as tasks:
            while (due := due + chance.expovariate(rate)) < started + seconds:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                tasks.create_task(self._send(http, outcome))
        outcome.seconds = time.perf_counter() - started
        return outcome

    async def _client(self, http: httpx.AsyncClient, todo: Iterator[int], outcome: Outcome) -> None:
        for _ in todo:
            await self._send(http, outcome)

    async def _send(self, http: httpx.AsyncClient, outcome: Outcome) -> None:
        content, headers = next(self._requests)
        started = time.perf_counter()
        status = 0
        try:
            answer = await http.post("/v1/annotate", content=content, headers=headers)
            status = answer.status_code
        except httpx.TransportError:
            pass
        outcome.latencies.setdefault(status, []).append(time.perf_counter() - started)
        if status == 200:
            outcome.stage_seconds.update(answer.json()["seconds"])


async def measure_load(load: Load, clients: Sequence[int], requests: int, seconds: float) -> dict[str, Any]:
    """Ever more clients; then twice what the service can take, and how soon it is itself again.

    Args:
        load: the service.
        clients: of each closed loop, from few to many; the first is the service's usual time.
        requests: of the last closed loop; the others send fewer, but for as long.
        seconds: length of the overload.
    """
    most = clients[-1]
    await load.closed(most, 2 * most)  # every process has done something once
    memory = [memory_of_processes()]
    loops = {count: await load.closed(count, max(8 * count, requests * min(4, count) // 16)) for count in clients[:-1]}
    loops[most] = await load.closed(most, requests)
    memory.append(memory_of_processes())
    few, many = loops[clients[0]], loops[most]
    overload = await load.open(2 * many.per_second, seconds)
    recovery = await _seconds_to_recover(load, _median(few))
    return {
        "clients": {str(count): outcome.to_dict() for count, outcome in loops.items()},
        "throughput_ratio": many.per_second / few.per_second,
        "memory_mib": dict(zip(("before", "after"), memory, strict=True)),
        "twice_the_sustainable_rate": overload.to_dict(),
        "seconds_to_recover": recovery,
    }


async def _seconds_to_recover(load: Load, usual: float) -> float:
    """Until a request is answered within twice the time that it takes on an idle service."""
    started = time.perf_counter()
    while True:
        one = await load.closed(1, 1)
        if one.latencies.get(200, [2 * usual])[0] < 2 * usual:
            return time.perf_counter() - started


def memory_of_processes() -> dict[str, float]:
    """Resident memory in MiB of each process that this one has started, a service's among them, by kind and id."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            found[f"{_kind(process)} {process.pid}"] = process.memory_info().rss / 2**20
    return found


def _kind(process: psutil.Process) -> str:
    """`ray::ServeReplica:APPLICATION:DEPLOYMENT`, a script's file, or the program's."""
    program, *arguments = process.cmdline() or [process.name()]
    if program.startswith("ray::"):
        return program.partition(".")[0].strip()  # a method follows while it runs
    return next((Path(word).name for word in arguments if word.endswith(".py")), Path(program).name)


def request_of(text: str, image: bytes) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a form, made once: making them takes as long as sending."""
    request = httpx.Request("POST", "http://any", data={"text": text}, files={"image": ("image", image)})
    return request.read(), {"Content-Type": request.headers["content-type"]}


def _median(outcome: Outcome) -> float:
    return float(np.median(outcome.latencies[200]))


def percentiles(times: Sequence[float]) -> dict[str, float]:
    """Percentiles of times and the longest, in their unit."""
    quantiles = {f"p{quantile}": float(np.percentile(times, quantile)) for quantile in _QUANTILES}
    return quantiles | {"max": max(times)}
