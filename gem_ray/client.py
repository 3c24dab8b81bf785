"""A client of the online service: `gem_ray.Client`, `gem_ray.AsyncClient`.

It needs httpx alone, and nothing else of this package: the distribution `gem-ray-client` is this file.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import re
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing, closing
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import count
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
_Posts: TypeAlias = Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]]
_T = TypeVar("_T")
_RETRIED = (408, 429, 502, 503, 504)
_FIRST_PAUSE_S = 0.5
_DOUBLED = 20  # times; by then it is a week
_FRAME = ('{"posts":[', "]}")
_NDJSON = "application/x-ndjson"
# A proxy that the environment names has no way to this machine, and posts and keys for it are none of its business.
_WITHOUT_PROXY = ("localhost", "127.0.0.1", "::1")
_SHOWN_POSITIONS = 5
_WRONG = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading an answer raises that is not one of gem-ray's."""


class ClientError(RuntimeError):
    """The service did not do what was asked.

    Attributes:
        status: of the answer; None where there was none.
        answered: of `annotate_batch`: the annotations of the first posts, which were answered before.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.answered: list[Annotation] = []


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
        gamma: entropy in nats above which an entity is hard.
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


@dataclass
class _Batch:
    """Posts of one request, in JSON, by their positions; those that a line answers leave it."""

    posts: dict[int, str] = field(default_factory=dict)
    size: int = sum(map(len, _FRAME))
    _asked: dict[int, int] = field(default_factory=dict)

    def add(self, position: int, post: str) -> None:
        self.posts[position] = post
        self.size += len(post) + 1

    def body(self) -> str:
        self._asked = dict(enumerate(self.posts))
        return ",".join(self.posts.values()).join(_FRAME)

    def read(self, answer: Any) -> list[Annotation]:
        pairs = zip(self.posts, answer["annotations"], strict=True)
        return [Annotation.from_json(row) for _, row in pairs]

    def read_line(self, line: str, is_last: bool) -> tuple[int, Annotation | ClientError] | None:
        """The answer of a line; None for a problem that may be over at the next try, if there is one."""
        row = json.loads(line)
        position = self._asked[row["index"]]
        problem = row.get("problem")
        if problem and problem["status"] in _RETRIED and not is_last:
            return None
        answer = ClientError(problem["detail"], problem["status"]) if problem else Annotation.from_json(row)
        del self.posts[position]  # which refuses a second answer
        return position, answer

    def unanswered(self) -> str:
        positions = [*self.posts]
        more = len(positions) - _SHOWN_POSITIONS
        named = ", ".join(map(str, positions[:_SHOWN_POSITIONS])) + (f" and {more} more" if more > 0 else "")
        return f"no answer to the post{'s' * (len(positions) > 1)} at {named}"


class _Cutter:
    """Cuts posts into batches that the service's limits allow. A post that is too large alone is sent alone."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.batch = _Batch()

    def add(self, position: int, post: str) -> _Batch | None:
        """The batch before this post, if there is no room for it there."""
        full, limits = self.batch, self._limits
        has_room = len(full.posts) < limits.max_batch_posts and full.size + len(post) + 1 <= limits.max_body_bytes
        if not full.posts or has_room:
            full.add(position, post)
            return None
        self.batch = _Batch()
        self.batch.add(position, post)
        return full


class _Requests:
    """What both clients are made with, what they send, and when they try again."""

    _transport: Callable[..., Any]
    _http: Any

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        retries: int = 4,
        timeout_s: float = 90,
        max_pause_s: float = 30,
    ) -> None:
        self._arguments = (base_url, api_key, retries, timeout_s, max_pause_s)
        url, auth = _address(base_url)
        headers = {"Authorization": f"Bearer {_checked(api_key)}"} if api_key else {}
        if auth and headers:
            raise ValueError("give an api_key, or a name and password in base_url, not both: one header holds them")
        self._connect = partial(
            self._transport,
            base_url=url,
            headers=headers,
            auth=auth,
            timeout=timeout_s,
            trust_env=url.host not in _WITHOUT_PROXY,
            verify=httpx.create_ssl_context(),  # which heeds the environment, also on this machine
        )
        self._http = self._connect()
        self._retries = retries
        self._max_pause_s = max_pause_s

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it makes connections of its own."""
        return type(self), self._arguments

    def _get(self, path: str) -> httpx.Request:
        return self._http.build_request("GET", path)

    def _post(self, path: str, body: str, heatmaps: bool, accept: str = "application/json") -> httpx.Request:
        headers = {"Content-Type": "application/json", "Accept": accept}
        return self._http.build_request(
            "POST", path, content=body.encode(), headers=headers, params={"heatmaps": "true"} if heatmaps else None
        )

    def _pause_after(self, answer: httpx.Response, attempt: int) -> float | None:
        """None for a success, else the seconds to wait before another try; raises for a refusal that stays."""
        if answer.is_success:
            return None
        if attempt >= self._retries or answer.status_code not in _RETRIED:
            raise ClientError(_detail(answer), answer.status_code)
        return self._pause_s(attempt, answer.headers.get("Retry-After", ""))

    def _pause_after_failure(self, what: str, error: Exception | None, attempt: int) -> float:
        """As `_pause_after`, of a request that got no answer, or not all of it."""
        if attempt >= self._retries:
            reason = error or "the answer ended before that"
            raise ClientError(f"{what} in {attempt + 1} tries: {reason}") from error
        return self._pause_s(attempt)

    def _pause_s(self, attempt: int, retry_after: str = "") -> float:
        asked = _seconds_of(retry_after)
        usual = _FIRST_PAUSE_S * 2 ** min(attempt, _DOUBLED)
        # Half of it random, so that clients that were refused together do not come back together.
        return min(max(usual, asked) * random.uniform(1, 1.5), self._max_pause_s)


def _seconds_of(retry_after: str) -> float:
    """Of a `Retry-After`: seconds, or a date, as proxies send it (RFC 9110, section 10.2.3); 0 for anything else."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        return (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):  # a date without a time zone, or none at all
        return 0.0


class Client(_Requests):
    """Asks a service to annotate posts. Safe to use from several threads.

    A request that fails on its way, or that the service is too busy for, is sent again: annotating twice is harmless.

    Args:
        base_url: where the service is; it may hold a name and password, for a proxy that wants them.
        api_key: a key that it knows, if it wants one.
        retries: further tries.
        timeout_s: longest silence of the service in one try.
        max_pause_s: longest pause before a retry, whatever the service asks for.

    Raises:
        ValueError: the address is none of HTTP, or the key cannot be one. Neither is repeated in the message.
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
            fields: `post_id`, `tokens`, `caption`, `knowledge`, `image_url`; what is `None`, NaN or NA is not sent.

        Raises:
            ClientError: the service refused, could not be reached, or gave an answer that is none of gem-ray's.
            OSError: the image's file cannot be read.
        """
        body = _body({"text": text, "image": image} | fields)
        return self._ask(self._post("/v1/annotate", body, heatmaps), Annotation.from_json)

    def annotate_batch(self, posts: Iterable[Mapping[str, Any]], *, heatmaps: bool = False) -> list[Annotation]:
        """Annotate any number of posts, each a mapping of the arguments of `annotate`; the answers are in their order.

        Posts are taken, and their files read, a request at a time.

        Raises:
            ClientError: as `annotate`, or a post cannot be sent; `answered` has what was answered before.
        """
        done: list[Annotation] = []
        try:
            for batch in self._batches(posts):
                done += self._ask(self._post("/v1/annotate/batch", batch.body(), heatmaps), batch.read)
        except ClientError as error:
            error.answered = done
            raise
        return done

    def stream(
        self, posts: Iterable[Mapping[str, Any]], *, heatmaps: bool = False
    ) -> Iterator[tuple[int, Annotation | ClientError]]:
        """As `annotate_batch`, but each answer, with the position of its post, as soon as it is there.

        Posts that an answer leaves out, because it breaks off or the service is too busy for them, are asked for again.

        Raises:
            ClientError: the service refused a whole batch, left out posts in every try, or a post cannot be sent.
        """
        for batch in self._batches(posts):
            for attempt in count():
                request = self._post("/v1/annotate/batch", batch.body(), heatmaps, _NDJSON)
                broken: Exception | None = None
                with closing(self._send(request, stream=True)) as answer:
                    try:
                        for line in answer.iter_lines():
                            if answered := _understood(batch.read_line, line, attempt >= self._retries):
                                yield answered
                    except (httpx.RequestError, ClientError) as error:
                        broken = error
                if not batch.posts:
                    break
                time.sleep(self._pause_after_failure(batch.unanswered(), broken, attempt))

    def taxonomy(self) -> dict[str, list[str]]:
        """Coarse category -> its fine categories."""
        return self._ask(self._get("/v1/taxonomy"), _coarse)

    def limits(self) -> Limits:
        """What a request may hold."""
        return self._ask(self._get("/v1/limits"), _limits)

    def _batches(self, posts: Iterable[Mapping[str, Any]]) -> Iterator[_Batch]:
        cutter = None
        for position, post in enumerate(posts):
            cutter = cutter or _Cutter(self.limits())
            if full := cutter.add(position, _body_at(position, post)):
                yield full
        if cutter:
            yield cutter.batch

    def _ask(self, request: httpx.Request, read: Callable[[Any], _T]) -> _T:
        answer = self._send(request)
        return _understood(lambda: read(answer.json()))

    def _send(self, request: httpx.Request, stream: bool = False) -> httpx.Response:
        attempt = 0
        while True:
            try:
                answer = self._http.send(request, stream=stream)
                if not answer.is_success:
                    answer.read()
                pause_s = self._pause_after(answer, attempt)
            except httpx.RequestError as error:
                pause_s = self._pause_after_failure(f"{request.url} gave no answer", error, attempt)
            if pause_s is None:
                return answer
            time.sleep(pause_s)
            attempt += 1


class AsyncClient(_Requests):
    """As `Client`, for asyncio: in one event loop at a time. Posts may come from an asynchronous generator, too."""

    _transport = httpx.AsyncClient
    _http: httpx.AsyncClient
    _loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        self._enter_loop()
        await self._http.aclose()

    def _enter_loop(self) -> None:
        """Connect anew in another event loop than before: the connections have ended with the other one."""
        if self._loop is not (loop := asyncio.get_running_loop()):
            if self._loop and not self._http.is_closed:
                self._http = self._connect()
            self._loop = loop

    async def annotate(
        self, text: str, image: Image | None = None, *, heatmaps: bool = False, **fields: Any
    ) -> Annotation:
        """As `Client.annotate`."""
        body = await asyncio.to_thread(_body, {"text": text, "image": image} | fields)  # it may read a file
        return await self._ask(self._post("/v1/annotate", body, heatmaps), Annotation.from_json)

    async def annotate_batch(self, posts: _Posts, *, heatmaps: bool = False) -> list[Annotation]:
        """As `Client.annotate_batch`."""
        done: list[Annotation] = []
        try:
            async for batch in self._batches(posts):
                done += await self._ask(self._post("/v1/annotate/batch", batch.body(), heatmaps), batch.read)
        except ClientError as error:
            error.answered = done
            raise
        return done

    async def stream(
        self, posts: _Posts, *, heatmaps: bool = False
    ) -> AsyncIterator[tuple[int, Annotation | ClientError]]:
        """As `Client.stream`."""
        async for batch in self._batches(posts):
            for attempt in count():
                request = self._post("/v1/annotate/batch", batch.body(), heatmaps, _NDJSON)
                broken: Exception | None = None
                async with aclosing(await self._send(request, stream=True)) as answer:
                    try:
                        async for line in answer.aiter_lines():
                            if answered := _understood(batch.read_line, line, attempt >= self._retries):
                                yield answered
                    except (httpx.RequestError, ClientError) as error:
                        broken = error
                if not batch.posts:
                    break
                await asyncio.sleep(self._pause_after_failure(batch.unanswered(), broken, attempt))

    async def taxonomy(self) -> dict[str, list[str]]:
        """As `Client.taxonomy`."""
        return await self._ask(self._get("/v1/taxonomy"), _coarse)

    async def limits(self) -> Limits:
        """As `Client.limits`."""
        return await self._ask(self._get("/v1/limits"), _limits)

    async def _batches(self, posts: _Posts) -> AsyncIterator[_Batch]:
        cutter = None
        positions = count()
        async for post in _each(posts):
            cutter = cutter or _Cutter(await self.limits())
            position = next(positions)
            if full := cutter.add(position, await asyncio.to_thread(_body_at, position, post)):
                yield full
        if cutter:
            yield cutter.batch

    async def _ask(self, request: httpx.Request, read: Callable[[Any], _T]) -> _T:
        answer = await self._send(request)
        return _understood(lambda: read(answer.json()))

    async def _send(self, request: httpx.Request, stream: bool = False) -> httpx.Response:
        self._enter_loop()
        attempt = 0
        while True:
            try:
                answer = await self._http.send(request, stream=stream)
                if not answer.is_success:
                    await answer.aread()
                pause_s = self._pause_after(answer, attempt)
            except httpx.RequestError as error:
                pause_s = self._pause_after_failure(f"{request.url} gave no answer", error, attempt)
            if pause_s is None:
                return answer
            await asyncio.sleep(pause_s)
            attempt += 1


def _address(base_url: str) -> tuple[httpx.URL, tuple[str, str] | None]:
    """Where requests go, and the name and password for them, which no message then repeats."""
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL:
        raise ValueError("base_url is no URL") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError("base_url must begin with http:// or https://, and name a host")
    if url.query or url.fragment:
        raise ValueError("base_url must end with its path: no ? or # belongs there")
    auth = (url.username, url.password) if url.userinfo else None
    return url.copy_with(userinfo=b""), auth


def _checked(api_key: str) -> str:
    if not re.fullmatch(r"[!-~]+", api_key):
        raise ValueError("api_key must be of visible ASCII characters; does a line feed or blank stand at its end?")
    return api_key


def _body(post: Mapping[str, Any]) -> str:
    values = {name: value for name, value in post.items() if not _is_missing(value)}
    image = values.get("image")
    if image is not None:
        data = Path(image).read_bytes() if isinstance(image, str | os.PathLike) else image
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"image is {type(data).__name__}, not the bytes or the path of an image file")
        values["image"] = base64.b64encode(data).decode("ascii")
    return json.dumps(values, default=_plain)


def _plain(value: Any) -> Any:
    """The values of an array or of one of its numbers, as rows of pandas have them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be sent in JSON")


def _is_missing(value: Any) -> bool:
    """`None`, or NaN or NA, as rows of pandas have it."""
    return value is None or (isinstance(value, float) and value != value) or type(value).__name__ == "NAType"


async def _each(posts: _Posts) -> AsyncIterator[Mapping[str, Any]]:
    if isinstance(posts, AsyncIterable):
        async for post in posts:
            yield post
    else:
        for post in posts:
            yield post


def _body_at(position: int, post: Mapping[str, Any]) -> str:
    try:
        if not hasattr(post, "items"):
            raise TypeError(f"it is {type(post).__name__}, not a mapping with a text; posts are a list of mappings")
        return _body(post)
    except (OSError, *_WRONG) as error:
        raise ClientError(f"the post at {position} cannot be sent: {error}") from error


def _understood(read: Callable[..., _T], *arguments: Any) -> _T:
    try:
        return read(*arguments)
    except _WRONG as error:
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise ClientError(f"the answer is none of gem-ray's; is something else at this address? ({what})") from error


def _coarse(answer: Any) -> dict[str, list[str]]:
    return {**answer["coarse"]}


def _limits(answer: Any) -> Limits:
    return _known(Limits, answer)


def _detail(answer: httpx.Response) -> str:
    try:
        problem = answer.json()
        return f"{problem['status']} {problem['title']}: {problem['detail']}"
    except _WRONG:  # from a proxy in between, or from Serve itself
        there = f": go to {answer.next_request.url}; is base_url right?" if answer.next_request else ""
        return f"the service answered {answer.status_code}{there}"
