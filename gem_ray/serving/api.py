"""The HTTP API, version 1: its routes and what they answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib import resources
from typing import Annotated as Typed
from typing import Any
from uuid import uuid4

import httpx
from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

import gem_ray
from gem_ray.data.fetch import ImageError
from gem_ray.records import Post, ProblemKind, Status, model_rows
from gem_ray.serving.bodies import JSON, prefers, read_batch, read_post
from gem_ray.serving.flow import Flow, UnavailableError
from gem_ray.serving.kept import Kept
from gem_ray.serving.messages import AnnotationOut, AnyPost, BatchOut, Limits, ModelOut, Models, Taxonomy, Version
from gem_ray.serving.openapi import BATCH_BODY, LINES, NDJSON, POST_BODY, add_openapi, problems
from gem_ray.serving.problems import ProblemError, add_problem_handlers, problem_of
from gem_ray.serving.scrape import METRICS_TYPE, scrape
from gem_ray.serving.service import Service
from gem_ray.taxonomy import LABEL_SETS

_DESCRIPTION = """Fine-grained entities of social posts, and where they are seen in the image.

Every error is a problem (RFC 9457). A post that cannot be annotated for its own fault is an error of `/v1/annotate`
(422; 403, 413 and 504 for what `image_url` leads to), and a `rejected` or `degraded` row of `/v1/annotate/batch`."""
_SWAGGER = ("swagger-ui-bundle.js", "swagger-ui.css")
_SCRAPED_S = 1.0
_FETCH_STATUS = {ProblemKind.IMAGE_FORBIDDEN: 403, ProblemKind.IMAGE_TOO_LARGE: 413}

HeatMaps = Typed[bool, Query(description="Give the heat map of each entity that is seen.")]


def create_api(service: Service) -> FastAPI:
    """The API of a service."""
    api = FastAPI(
        title="gem-ray",
        version=gem_ray.__version__,
        description=_DESCRIPTION,
        docs_url=None,  # FastAPI's pages load their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # the guard takes them away: a redirect would leave a TLS proxy's scheme behind
    )
    add_problem_handlers(api, service.flow)
    add_openapi(api)
    _add_annotate(api, service)
    _add_batch(api, service)
    _add_facts(api, service)
    _add_state(api, service)
    _add_page(api)
    return api


def _add_page(api: FastAPI) -> None:
    """A route for each file: files that were mounted at the root would take requests of a wrong method for theirs."""
    folders = [("gem_ray.serving", "page"), ("gem_ray.look", "static")]
    page = StaticFiles(packages=[*folders])
    names = [file.name for package, folder in folders for file in (resources.files(package) / folder).iterdir()]
    paths = {"/": "index.html", "/docs": "docs.html"} | {f"/{name}": name for name in names}
    swagger = StaticFiles(packages=[("fastapi_offline", "static")])
    for files, shown in ((page, paths), (swagger, {f"/docs/{name}": name for name in _SWAGGER})):
        for path, name in shown.items():
            api.add_route(path, _answer_with(files, path, name), ["GET"], include_in_schema=False)


def _answer_with(files: StaticFiles, path: str, name: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        asked = request.scope["raw_path"].decode("ascii")
        slashes = len(asked) - len(asked.rstrip("/")) - (path == "/")
        # The guard takes no notice of slashes at the end, but to a browser the page's links begin there.
        if slashes > 0:
            return RedirectResponse("../" * slashes + path.rpartition("/")[2])
        if slashes < 0:
            return RedirectResponse(f"./{asked.rpartition('/')[2]}/")
        # A part of a file is for downloads that go on; what is wrong with a range would be answered with plain text.
        request.scope["headers"] = [each for each in request.headers.raw if each[0] != b"range"]
        return await files.get_response(name, request.scope)

    return answer


_REFUSALS = problems(400, 401, 403, 408, 413, 415, 422, 429, 500, 503, 504)


def _add_annotate(api: FastAPI, service: Service) -> None:
    @api.post(
        "/v1/annotate",
        operation_id="annotate",
        tags=["annotate"],
        summary="Annotate a post",
        responses={200: {"model": AnnotationOut}, **_REFUSALS},
        openapi_extra=POST_BODY,
    )
    async def annotate(request: Request, heatmaps: HeatMaps = False) -> JSONResponse:
        key = service.sharing_key(request.state.caller)
        service.flow.check_room(1, key)
        asked = await read_post(request, service.config)
        with service.flow.admitted(1, key):
            post = asked.to_post(uuid4().hex, service.config.text.max_chars)
            if asked.image_url and not post.is_rejected:
                await _fetch_or_refuse(service.flow, post, asked.image_url)
            done = await service.flow.annotate(post)
        if done.post.is_rejected:
            raise _refusal(done.post)
        return JSONResponse(service.row(done, heatmaps))


async def _fetch_or_refuse(flow: Flow, post: Post, url: str) -> None:
    try:
        await flow.fetch_image(post, url)
    except ImageError as error:
        timed_out = isinstance(error.__cause__, (TimeoutError, httpx.TimeoutException))
        raise ProblemError(504 if timed_out else _FETCH_STATUS.get(error.kind, 422), str(error)) from error


def _refusal(post: Post) -> ProblemError:
    reason = next(problem for problem in post.problems if problem.status is Status.REJECTED)
    if reason.kind is ProblemKind.STAGE_FAILED:
        return ProblemError(500, f"the stage {reason.stage} failed on this post")
    return ProblemError(422, reason.message)


def _add_batch(api: FastAPI, service: Service) -> None:
    @api.post(
        "/v1/annotate/batch",
        operation_id="annotate_batch",
        tags=["annotate"],
        summary="Annotate posts; with `Accept: application/x-ndjson` each is answered as soon as it is done",
        responses={200: {"model": BatchOut, "content": {NDJSON: LINES}}, **_REFUSALS},
        openapi_extra=BATCH_BODY,
    )
    async def annotate_batch(request: Request, heatmaps: HeatMaps = False) -> Response:
        key = service.sharing_key(request.state.caller)
        service.flow.check_room(1, key)
        asked = (await read_batch(request, service.config, service.max_batch_posts(key))).posts
        if prefers(NDJSON, JSON, ",".join(request.headers.getlist("accept"))):
            return _Lines(service, asked, heatmaps, key)
        with service.flow.admitted(len(asked), key):
            answers = await asyncio.gather(
                *(_row(service, each, heatmaps) for each in asked), return_exceptions=True
            )  # none is left behind when another fails
        failed = next((answer for answer in answers if isinstance(answer, BaseException)), None)
        if failed is not None:
            raise failed
        return JSONResponse({"annotations": answers})


async def _row(service: Service, asked: AnyPost, heatmaps: bool) -> dict[str, Any]:
    """A post of a batch: what is wrong with it is in its row."""
    post = asked.to_post(uuid4().hex, service.config.text.max_chars)
    if asked.image_url and not post.is_rejected:
        try:
            await service.flow.fetch_image(post, asked.image_url)
        except ImageError as error:
            post.fail("load_image", error.kind, str(error))
        except TimeoutError:
            reason = f"not fetched within {service.config.serving.timeout_s:g} s"
            post.fail("load_image", ProblemKind.IMAGE_UNREADABLE, reason)
    return service.row(await service.flow.annotate(post), heatmaps)


class _Lines(StreamingResponse):
    """A line of JSON for each post, in the order in which they are done: its row, or a `problem`, and its `index`."""

    def __init__(self, service: Service, asked: Sequence[AnyPost], heatmaps: bool, key: str | None) -> None:
        super().__init__(self._lines(), media_type=NDJSON)
        self._service = service
        self._asked = asked
        self._heatmaps = heatmaps
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._service.flow.admitted(len(self._asked), self._key):
            await super().__call__(scope, receive, send)

    async def _lines(self) -> AsyncIterator[str]:
        tasks = [asyncio.create_task(self._line(*item)) for item in enumerate(self._asked)]
        try:
            for done in asyncio.as_completed(tasks):
                yield await done
        finally:
            for task in tasks:
                task.cancel()

    async def _line(self, index: int, asked: AnyPost) -> str:
        try:
            answer = await _row(self._service, asked, self._heatmaps)
        except Exception as error:
            answer = {"problem": problem_of(error, self._service.flow.retry_after_s).to_dict()}
        return json.dumps({"index": index} | answer) + "\n"


def _add_facts(api: FastAPI, service: Service) -> None:
    facts = APIRouter(tags=["facts"], responses=problems(400, 401, 403))

    @facts.get("/v1/taxonomy", summary="The categories", operation_id="get_taxonomy")
    async def taxonomy() -> Taxonomy:
        labels = LABEL_SETS[service.config.labels]
        coarse = {name: list(fine) for name, fine in labels.tree.items()}
        return Taxonomy(labels=service.config.labels, coarse=coarse)

    @facts.get("/v1/limits", summary="What a request may hold", operation_id="get_limits")
    async def limits(request: Request) -> Limits:
        max_posts = service.max_batch_posts(service.sharing_key(request.state.caller))
        return Limits.of(service.config, service.flow.filter, bool(service.keys), max_posts)

    @facts.get("/v1/models", summary="What annotates", operation_id="get_models")
    async def models() -> Models:
        return Models(models=[ModelOut(**row) for row in model_rows(await service.models())])

    @facts.get("/version", summary="What answers", operation_id="get_version")
    async def version() -> Version:
        return Version(version=gem_ray.__version__, run_id=service.run_id)

    api.include_router(facts)


def _add_state(api: FastAPI, service: Service) -> None:
    scraped = Kept(scrape, _SCRAPED_S)
    state = APIRouter(tags=["operations"], default_response_class=PlainTextResponse, responses=problems(400))

    @state.get("/healthz", summary="Whether this process answers", operation_id="get_health")
    async def healthz() -> str:
        return "ok\n"

    @state.get(
        "/readyz",
        summary="Whether every pool of stages has a process",
        operation_id="get_readiness",
        responses=problems(503),
    )
    async def readyz() -> str:
        missing = await service.missing_pools()
        if missing:
            raise UnavailableError(f"no process of {', '.join(missing)}")
        return "ready\n"

    @state.get(
        "/metrics",
        summary="Of all nodes, for Prometheus",
        operation_id="get_metrics",
        responses=problems(401, 403, 503),
    )
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(await scraped(), media_type=METRICS_TYPE)

    api.include_router(state)
