"""A client of the online service: `gem_ray.Client`, `gem_ray.AsyncClient`.

It needs httpx alone, and nothing else of this package: the distribution `gem-ray-client` is this file.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import httpx

__all__ = [
    "Annotation",
    "AsyncClient",
    "Box",
    "Candidate",
    "Client",
    "ClientError",
    "Entity",
    "HeatMap",
    "Limits",
    "Point",
    "Problem",
]

Image: TypeAlias = bytes | str | os.PathLike[str]
_T = TypeVar("_T")
_RETRIED = (429, 502, 503, 504)
_FIRST_PAUSE_S = 0.5
_FRAME = ('{"posts":[', "]}")


class ClientError(RuntimeError):
    """The service did not do what was asked.

    Attributes:
        status: of the answer; None where there was none.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Candidate:
    """A fine category and its probability."""

    fine: str
    probability: float


@dataclass(frozen=True)
class Point:
    """A pixel of the upright original image."""

    x: float
    y: float


@dataclass(frozen=True)
class Box:
    """Pixels of the upright original image; `x2`, `y2` exclusive."""

    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class HeatMap:
    """Over image patches: `height * width` bytes, row by row."""

    height: int
    width: int
    data: bytes


@dataclass(frozen=True)
class Entity:
    """An entity; `text[start:end]` of the post is its text. `GET /openapi.json` says what the numbers mean."""

    text: str
    start: int
    end: int
    word_start: int
    word_end: int
    coarse: str
    fine: str
    score: float
    entropy: float
    hard: bool
    reranked: bool
    confidence: float | None
    accepted: bool | None
    candidates: list[Candidate]
    seen: bool | None
    match_score: float | None
    seen_probability: float | None
    point: Point | None
    box: Box | None
    box_source: str | None
    box_score: float | None
    box_confidence: float | None
    heatmap: HeatMap | None


@dataclass(frozen=True)
class Problem:
    """Why a post is degraded or rejected."""

    stage: str
    kind: str
    message: str


@dataclass(frozen=True)
class Annotation:
    """An annotated post, and how it came about.

    Attributes:
        models: role -> `reference@hash` of the models that the post needed.
        seconds: of its batch in each stage that it needed, and `waiting` for them.
        gamma: entropy in nats above which an entity was reranked.
    """

    post_id: str
    text: str
    tokens: list[str]
    image_width: int | None
    image_height: int | None
    caption: str | None
    knowledge: str | None
    entities: list[Entity]
    status: Literal["ok", "degraded", "rejected"]
    problems: list[Problem]
    run_id: str
    models: dict[str, str]
    seconds: dict[str, float]
    gamma: float

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Annotation:
        """From an answer's values; what a newer service says besides is left out."""
        return _known(
            cls,
            row,
            entities=[_entity(each) for each in row["entities"]],
            problems=[_known(Problem, each) for each in row["problems"]],
            models={model["role"]: model["reference"] for model in row["models"]},
        )


@dataclass(frozen=True)
class Limits:
    """What a request may hold."""

    max_body_bytes: int
    max_image_bytes: int
    max_image_pixels: int
    max_text_chars: int
    max_tokens: int
    max_batch_posts: int
    timeout_s: float
    image_urls: bool
    gamma: float
    k: int
    api_key: bool


def _known(cls: type[_T], row: Mapping[str, Any], **changed: Any) -> _T:
    return cls(**{each.name: changed.get(each.name, row[each.name]) for each in fields(cls)})  # type: ignore[arg-type]


def _entity(row: Mapping[str, Any]) -> Entity:
    heatmap = row["heatmap"]
    return _known(
        Entity,
        row,
        candidates=[_known(Candidate, each) for each in row["candidates"]],
        point=row["point"] and _known(Point, row["point"]),
        box=row["box"] and _known(Box, row["box"]),
        heatmap=heatmap and _known(HeatMap, heatmap, data=base64.b64decode(heatmap["data"])),
    )


class _Requests:
    """What both clients are made with, what they send, and when they try again."""

    _transport: type[httpx.Client | httpx.AsyncClient]
    _http: Any

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        retries: int = 4,
        timeout_s: float = 90,
        max_pause_s: float = 30,
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = self._transport(base_url=base_url, headers=headers, timeout=timeout_s)
        self._retries = retries
        self._max_pause_s = max_pause_s

    def _get(self, path: str) -> httpx.Request:
        return self._http.build_request("GET", path)

    def _post(self, path: str, body: str, heatmaps: bool, accept: str = "application/json") -> httpx.Request:
        headers = {"Content-Type": "application/json", "Accept": accept}
        return self._http.build_request(
            "POST", path, content=body.encode(), headers=headers, params={"heatmaps": "true"} if heatmaps else None
        )

    def _cut(self, posts: Sequence[str], limits: Limits) -> Iterator[tuple[int, str]]:
        """Bodies of at most so many posts and bytes, each with the position of its first post."""
        start, size = 0, 0
        room = limits.max_body_bytes - sum(map(len, _FRAME))
        for index, post in enumerate(posts):
            if index > start and (index - start == limits.max_batch_posts or size + len(post) + 1 > room):
                yield start, ",".join(posts[start:index]).join(_FRAME)
                start, size = index, 0
            size += len(post) + 1
        yield start, ",".join(posts[start:]).join(_FRAME)

    def _pause_after(self, answer: httpx.Response, attempt: int) -> float | None:
        """None for a success, else the seconds to wait before another try; raises for a refusal that stays."""
        if answer.is_success:
            return None
        if attempt == self._retries or answer.status_code not in _RETRIED:
            raise ClientError(_detail(answer), answer.status_code)
        return self._pause_s(attempt, answer.headers.get("Retry-After", ""))

    def _pause_after_failure(self, request: httpx.Request, error: httpx.TransportError, attempt: int) -> float:
        """As `_pause_after`, of a request that got no answer."""
        if attempt == self._retries:
            raise ClientError(f"{request.url} gave no answer in {attempt + 1} tries: {error}") from error
        return self._pause_s(attempt)

    def _pause_s(self, attempt: int, retry_after: str = "") -> float:
        asked = float(retry_after) if retry_after.isdecimal() else 0.0
        # Half of it random, so that clients that were refused together do not come back together.
        return min(max(_FIRST_PAUSE_S * 2**attempt, asked) * random.uniform(1, 1.5), self._max_pause_s)


class Client(_Requests):
    """Asks a service to annotate posts. Safe to use from several threads.

    A request that fails on its way, or that the service is too busy for, is sent again: annotating twice is harmless.

    Args:
        base_url: where the service is.
        api_key: a key that it knows, if it wants one.
        retries: further tries.
        timeout_s: time for one try.
        max_pause_s: longest pause before a retry, whatever the service asks for.
    """

    _transport = httpx.Client
    _http: httpx.Client

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def annotate(self, text: str, image: Image | None = None, *, heatmaps: bool = False, **fields: Any) -> Annotation:
        """Annotate a post.

        Args:
            text: of the post.
            image: encoded, or the path of a file.
            heatmaps: give the heat map of each entity that is seen.
            fields: `post_id`, `tokens`, `caption`, `knowledge`, `image_url`.

        Raises:
            ClientError: the service refused, or could not be reached.
        """
        body = _body({"text": text, "image": image} | fields)
        return Annotation.from_json(self._ask(self._post("/v1/annotate", body, heatmaps)))

    def annotate_batch(self, posts: Sequence[Mapping[str, Any]], *, heatmaps: bool = False) -> list[Annotation]:
        """Annotate any number of posts, each a mapping of the arguments of `annotate`; the answers are in their order.

        Raises:
            ClientError: the service refused, or could not be reached.
        """
        rows: list[Any] = []
        for _, body in self._batches(posts):
            rows += self._ask(self._post("/v1/annotate/batch", body, heatmaps))["annotations"]
        return [Annotation.from_json(row) for row in rows]

    def stream(
        self, posts: Sequence[Mapping[str, Any]], *, heatmaps: bool = False
    ) -> Iterator[tuple[int, Annotation | ClientError]]:
        """As `annotate_batch`, but each answer, with the position of its post, as soon as it is there.

        Raises:
            ClientError: the service refused a whole batch, or the connection broke.
        """
        for start, body in self._batches(posts):
            request = self._post("/v1/annotate/batch", body, heatmaps, "application/x-ndjson")
            answer = self._send(request, stream=True)
            try:
                for line in answer.iter_lines():
                    yield _line(line, start)
            except httpx.HTTPError as error:
                raise ClientError(f"the answer broke off: {error}") from error
            finally:
                answer.close()

    def taxonomy(self) -> dict[str, list[str]]:
        """Coarse category -> its fine categories."""
        coarse: dict[str, list[str]] = self._ask(self._get("/v1/taxonomy"))["coarse"]
        return coarse

    def limits(self) -> Limits:
        """What a request may hold."""
        return _known(Limits, self._ask(self._get("/v1/limits")))

    def _batches(self, posts: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str]]:
        return self._cut([_body(post) for post in posts], self.limits()) if posts else iter(())

    def _ask(self, request: httpx.Request) -> Any:
        return self._send(request).json()

    def _send(self, request: httpx.Request, stream: bool = False) -> httpx.Response:
        attempt = 0
        while True:
            try:
                answer = self._http.send(request, stream=stream)
                if not answer.is_success:
                    answer.read()
                pause_s = self._pause_after(answer, attempt)
            except httpx.TransportError as error:
                pause_s = self._pause_after_failure(request, error, attempt)
            if pause_s is None:
                return answer
            time.sleep(pause_s)
            attempt += 1


class AsyncClient(_Requests):
    """As `Client`, for asyncio."""

    _transport = httpx.AsyncClient
    _http: httpx.AsyncClient

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def annotate(
        self, text: str, image: Image | None = None, *, heatmaps: bool = False, **fields: Any
    ) -> Annotation:
        """As `Client.annotate`."""
        body = await asyncio.to_thread(_body, {"text": text, "image": image} | fields)  # it may read a file
        return Annotation.from_json(await self._ask(self._post("/v1/annotate", body, heatmaps)))

    async def annotate_batch(self, posts: Sequence[Mapping[str, Any]], *, heatmaps: bool = False) -> list[Annotation]:
        """As `Client.annotate_batch`."""
        rows: list[Any] = []
        for _, body in await self._batches(posts):
            rows += (await self._ask(self._post("/v1/annotate/batch", body, heatmaps)))["annotations"]
        return [Annotation.from_json(row) for row in rows]

    async def stream(
        self, posts: Sequence[Mapping[str, Any]], *, heatmaps: bool = False
    ) -> AsyncIterator[tuple[int, Annotation | ClientError]]:
        """As `Client.stream`."""
        for start, body in await self._batches(posts):
            request = self._post("/v1/annotate/batch", body, heatmaps, "application/x-ndjson")
            answer = await self._send(request, stream=True)
            try:
                async for line in answer.aiter_lines():
                    yield _line(line, start)
            except httpx.HTTPError as error:
                raise ClientError(f"the answer broke off: {error}") from error
            finally:
                await answer.aclose()

    async def taxonomy(self) -> dict[str, list[str]]:
        """As `Client.taxonomy`."""
        coarse: dict[str, list[str]] = (await self._ask(self._get("/v1/taxonomy")))["coarse"]
        return coarse

    async def limits(self) -> Limits:
        """As `Client.limits`."""
        return _known(Limits, await self._ask(self._get("/v1/limits")))

    async def _batches(self, posts: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str]]:
        if not posts:
            return iter(())
        bodies = await asyncio.to_thread(lambda: [_body(post) for post in posts])
        return self._cut(bodies, await self.limits())

    async def _ask(self, request: httpx.Request) -> Any:
        return (await self._send(request)).json()

    async def _send(self, request: httpx.Request, stream: bool = False) -> httpx.Response:
        attempt = 0
        while True:
            try:
                answer = await self._http.send(request, stream=stream)
                if not answer.is_success:
                    await answer.aread()
                pause_s = self._pause_after(answer, attempt)
            except httpx.TransportError as error:
                pause_s = self._pause_after_failure(request, error, attempt)
            if pause_s is None:
                return answer
            await asyncio.sleep(pause_s)
            attempt += 1


def _body(post: Mapping[str, Any]) -> str:
    values = {name: value for name, value in post.items() if value is not None}
    image = values.get("image")
    if image is not None:
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        values["image"] = base64.b64encode(data).decode("ascii")
    return json.dumps(values)


def _line(line: str, start: int) -> tuple[int, Annotation | ClientError]:
    row = json.loads(line)
    index = start + row["index"]
    if problem := row.get("problem"):
        return index, ClientError(problem["detail"], problem["status"])
    return index, Annotation.from_json(row)


def _detail(answer: httpx.Response) -> str:
    try:
        problem = answer.json()
        return f"{problem['status']} {problem['title']}: {problem['detail']}"
    except (ValueError, KeyError, TypeError):  # from a proxy in between, or from Serve itself
        return f"the service answered {answer.status_code}"
