"""A client of the online service: `gem_ray.Client`."""

from __future__ import annotations

import base64
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from gem_ray.records import Post

_RETRIED = (429, 502, 503, 504)
_FIRST_PAUSE_S = 0.5


class ClientError(RuntimeError):
    """The service did not do what was asked.

    Attributes:
        status: of the answer; None where there was none.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Annotation:
    """An annotated post, and how it came about: see `GET /openapi.json`."""

    post: Post
    run_id: str
    models: dict[str, str]
    seconds: dict[str, float]
    gamma: float

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Annotation:
        """From an answer's values."""
        for entity in row["entities"]:
            if entity["heatmap"]:
                entity["heatmap"]["data"] = base64.b64decode(entity["heatmap"]["data"])
        models = {model["role"]: model["reference"] for model in row["models"]}
        return cls(Post.from_annotation(row), row["run_id"], models, row["seconds"], row["gamma"])


class Client:
    """Asks a service to annotate posts. Safe to use from several threads.

    A request that fails on its way, or that the service is too busy for, is sent again: annotating twice is harmless.

    Args:
        base_url: where the service is.
        api_key: a key that it knows, if it wants one.
        retries: further tries.
        timeout_s: time for one try.
        max_pause_s: longest pause before a retry, whatever the service asks for.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        retries: int = 4,
        timeout_s: float = 90,
        max_pause_s: float = 30,
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=base_url, headers=headers, timeout=timeout_s)
        self._retries = retries
        self._max_pause_s = max_pause_s

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def annotate(
        self, text: str, image: bytes | Path | None = None, *, heatmaps: bool = False, **fields: Any
    ) -> Annotation:
        """Annotate a post.

        Args:
            text: of the post.
            image: encoded, or a file.
            heatmaps: give the heat map of each entity that is seen.
            fields: `post_id`, `tokens`, `caption`, `knowledge`, `image_url`.

        Raises:
            ClientError: the service refused, or could not be reached.
        """
        body = _body({"text": text, "image": image} | fields)
        return Annotation.from_json(self._ask("POST", "/v1/annotate", body, heatmaps).json())

    def annotate_batch(self, posts: Sequence[Mapping[str, Any]], *, heatmaps: bool = False) -> list[Annotation]:
        """Annotate posts, each a mapping of the arguments of `annotate`; the answers are in their order.

        Raises:
            ClientError: the service refused, or could not be reached.
        """
        body = {"posts": [_body(post) for post in posts]}
        answer = self._ask("POST", "/v1/annotate/batch", body, heatmaps).json()
        return [Annotation.from_json(row) for row in answer["annotations"]]

    def stream(
        self, posts: Sequence[Mapping[str, Any]], *, heatmaps: bool = False
    ) -> Iterator[tuple[int, Annotation | ClientError]]:
        """As `annotate_batch`, but each answer, with the position of its post, as soon as it is there.

        Raises:
            ClientError: the service refused all of them, or the connection broke.
        """
        request = self._request("POST", "/v1/annotate/batch", {"posts": [_body(post) for post in posts]}, heatmaps)
        request.headers["Accept"] = "application/x-ndjson"
        answer = self._send(request, stream=True)
        try:
            for line in answer.iter_lines():
                row = json.loads(line)
                if problem := row.get("problem"):
                    yield row["index"], ClientError(problem["detail"], problem["status"])
                else:
                    yield row["index"], Annotation.from_json(row)
        except httpx.HTTPError as error:
            raise ClientError(f"the answer broke off: {error}") from error
        finally:
            answer.close()

    def taxonomy(self) -> dict[str, list[str]]:
        """Coarse category -> its fine categories."""
        return self._ask("GET", "/v1/taxonomy").json()["coarse"]

    def limits(self) -> dict[str, Any]:
        """What a request may hold."""
        return self._ask("GET", "/v1/limits").json()

    def _ask(self, method: str, path: str, body: Any = None, heatmaps: bool = False) -> httpx.Response:
        return self._send(self._request(method, path, body, heatmaps))

    def _request(self, method: str, path: str, body: Any, heatmaps: bool) -> httpx.Request:
        return self._http.build_request(method, path, json=body, params={"heatmaps": "true"} if heatmaps else None)

    def _send(self, request: httpx.Request, stream: bool = False) -> httpx.Response:
        for attempt in range(self._retries + 1):
            is_last = attempt == self._retries
            try:
                answer = self._http.send(request, stream=stream)
            except httpx.TransportError as error:
                if is_last:
                    raise ClientError(f"{request.url} gave no answer in {attempt + 1} tries: {error}") from error
                self._pause(attempt)
                continue
            if answer.is_success:
                return answer
            answer.read()
            if is_last or answer.status_code not in _RETRIED:
                raise ClientError(_detail(answer), answer.status_code)
            self._pause(attempt, answer.headers.get("Retry-After", ""))
        raise AssertionError("the last try returns or raises")

    def _pause(self, attempt: int, retry_after: str = "") -> None:
        asked = float(retry_after) if retry_after.isdecimal() else 0.0
        # Half of it random, so that clients that were refused together do not come back together.
        time.sleep(min(max(_FIRST_PAUSE_S * 2**attempt, asked) * random.uniform(1, 1.5), self._max_pause_s))


def _body(post: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: value for name, value in post.items() if value is not None}
    image = values.get("image")
    if image is not None:
        data = image.read_bytes() if isinstance(image, Path) else image
        values["image"] = base64.b64encode(data).decode("ascii")
    return values


def _detail(answer: httpx.Response) -> str:
    try:
        problem = answer.json()
        return f"{problem['status']} {problem['title']}: {problem['detail']}"
    except (ValueError, KeyError, TypeError):  # from a proxy in between, or from Serve itself
        return f"the service answered {answer.status_code}"
