"""The OpenAPI document: what FastAPI cannot know of the routes, and names that a generated client can live with."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema

from gem_ray.serving.bodies import FORM, JSON
from gem_ray.serving.messages import AnnotationLine, BatchIn, PostIn
from gem_ray.serving.problems import MEDIA_TYPE, ProblemDetails

NDJSON = "application/x-ndjson"
TAGS = [
    {"name": "annotate", "description": "Posts in, annotations out."},
    {"name": "facts", "description": "What this server can do, and what it is."},
    {"name": "operations", "description": "For those who run it."},
]
_REF = "#/components/schemas/{model}"
_RETRIED = (429, 503, 504)
_MEANINGS = {
    400: "The request cannot be understood.",
    401: "There is no valid API key.",
    403: "The server does not serve this machine or site, or does not fetch this address.",
    408: "The body came too slowly.",
    413: "The body, an image or a batch is too large.",
    415: "The body is of another type or character set, or compressed.",
    422: "The body is wrong, or the post cannot be annotated.",
    429: "There are too many posts or bodies in the service, or too many of this API key.",
    500: "The server failed; its log says why.",
    503: "The service starts, stops, or has lost a process.",
    504: "It took too long.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The answers of a route that are no success."""
    return {status: {"$ref": f"#/components/responses/Problem{status}"} for status in statuses}


def _problem(status: int) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": _MEANINGS[status], "content": {MEDIA_TYPE: {"schema": _schema("Problem")}}}
    if status in _RETRIED:
        answer["headers"] = {
            "Retry-After": {"description": "Seconds to wait before another try.", "schema": {"type": "integer"}}
        }
    return answer


def _schema(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(model=name)}


def _body(**schemas: str) -> dict[str, Any]:
    kinds = {"json": JSON, "form": FORM}
    content = {kinds[kind]: {"schema": _schema(name)} for kind, name in schemas.items()}
    return {"requestBody": {"required": True, "content": content}}


POST_BODY = _body(json="PostIn", form="PostForm")
BATCH_BODY = _body(json="BatchIn")
LINES = {"schema": {"anyOf": [_schema("AnnotationLine"), _schema("ProblemLine")]}}
"""Of each line."""


class ProblemLine(BaseModel):
    """A line about a post that could not be annotated."""

    index: int = Field(description="of the post in the batch")
    problem: ProblemDetails


def _post_form(post: dict[str, Any]) -> dict[str, Any]:
    fields = {name: _in_a_form(field) for name, field in post["properties"].items()}
    image = {"type": "string", "format": "binary", "description": "an encoded image, as a file"}
    return post | {"title": "PostForm", "properties": fields | {"image": image}}


def _in_a_form(field: dict[str, Any]) -> dict[str, Any]:
    """A form holds no null; an empty field is one that is not given. By itself, Swagger UI makes up words to send."""
    if "anyOf" not in field:
        return field
    (kind,) = (each for each in field["anyOf"] if each != {"type": "null"})
    empty = {"default": [] if kind["type"] == "array" else ""}
    return {name: value for name, value in (field | kind | empty).items() if name not in ("anyOf", "minLength")}


def add_openapi(api: FastAPI) -> None:
    """Give an API its document."""

    def document() -> dict[str, Any]:
        if api.openapi_schema is None:
            api.openapi_schema = _document(api)
        return api.openapi_schema

    api.openapi = document  # type: ignore[method-assign]  # as FastAPI's documentation says


def _document(api: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=api.title, version=api.version, description=api.description, routes=api.routes, tags=TAGS,
        license_info={"name": "Apache 2.0", "identifier": "Apache-2.0"},
    )  # fmt: skip
    _, own = models_json_schema(
        [
            (PostIn, "validation"),
            (BatchIn, "validation"),
            (AnnotationLine, "serialization"),
            (ProblemLine, "serialization"),
        ],
        ref_template=_REF,
    )
    components = document["components"]
    schemas = components["schemas"] | own["$defs"]
    schemas["PostForm"] = _post_form(schemas["PostIn"])
    schemas["Problem"] = schemas.pop("ProblemDetails") | {"title": "Problem"}
    schemas["ProblemLine"]["properties"]["problem"] = _schema("Problem") | {"description": "why"}
    components["schemas"] = dict(sorted(schemas.items()))
    components["responses"] = {f"Problem{status}": _problem(status) for status in _MEANINGS}
    components["securitySchemes"] = {
        "ApiKey": {"type": "http", "scheme": "bearer", "description": "of `gem-ray new-key`"}
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            # A server without keys serves its own machine.
            operation["security"] = [{"ApiKey": []}, {}] if path.startswith("/v1/") or path == "/metrics" else []
    return document
