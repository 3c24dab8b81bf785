"""From the body of a request to what is asked: JSON, or the parts of a form."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from gem_ray.config import Config
from gem_ray.plurals import counted
from gem_ray.serving.messages import BatchIn, PostIn
from gem_ray.serving.problems import ProblemError

_Model = TypeVar("_Model", bound=BaseModel)
_JSON, _FORM = "application/json", "multipart/form-data"
_SHOWN_ERRORS = 5


def _documented(schemas: dict[str, dict[str, Any]]) -> dict[str, Any]:
    content = {media_type: {"schema": schema} for media_type, schema in schemas.items()}
    return {"requestBody": {"required": True, "content": content}}


def _form_schema() -> dict[str, Any]:
    schema = PostIn.model_json_schema()
    schema["properties"]["image"] = {"type": "string", "format": "binary", "description": "an encoded image, as a file"}
    return schema


def _batch_schema() -> dict[str, Any]:
    schema = BatchIn.model_json_schema()
    del schema["$defs"]
    schema["properties"]["posts"]["items"] = PostIn.model_json_schema()
    return schema


# For the OpenAPI document: FastAPI knows no endpoint that takes one of two kinds of body.
POST_BODY = _documented({_JSON: PostIn.model_json_schema(), _FORM: _form_schema()})
BATCH_BODY = _documented({_JSON: _batch_schema()})


async def read_post(request: Request, config: Config) -> PostIn:
    """The post of a request.

    Raises:
        ProblemError: 408 for a body that does not come, 413 for an image that is too large, 415 for another type of
            content, 422 for a wrong body.
    """
    is_form = _content_type(request, _JSON, _FORM) == _FORM
    async with _in_time(config):
        asked = await _from_form(request) if is_form else _parse(PostIn, await request.body())
    _check_limits(asked, config)
    return asked


async def read_batch(request: Request, config: Config) -> BatchIn:
    """The posts of a request.

    Raises:
        ProblemError: as `read_post`, and 413 for too many posts.
    """
    _content_type(request, _JSON)
    async with _in_time(config):
        asked = _parse(BatchIn, await request.body())
    if len(asked.posts) > config.serving.max_batch_posts:
        raise ProblemError(413, f"{counted(len(asked.posts), 'post')}; {config.serving.max_batch_posts:,} allowed")
    for post in asked.posts:
        _check_limits(post, config)
    return asked


@asynccontextmanager
async def _in_time(config: Config) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(config.serving.timeout_s):
            yield
    except TimeoutError:
        raise ProblemError(408, f"the body did not come within {config.serving.timeout_s:g} s") from None


def _check_limits(asked: PostIn, config: Config) -> None:
    size, limit = len(asked.image or b""), config.image.max_bytes
    if size > limit:
        raise ProblemError(413, f"the image has {size:,} bytes; {limit:,} are allowed")
    for name in ("caption", "knowledge"):  # the text's length is checked with the text, as in bulk
        if len(getattr(asked, name) or "") > config.text.max_chars:
            raise ProblemError(422, f"{name} has more than {config.text.max_chars:,} characters")


def _parse(model: type[_Model], body: bytes) -> _Model:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _unprocessable(error) from None


async def _from_form(request: Request) -> PostIn:
    try:
        form = await request.form(max_files=1, max_fields=2000)
    except HTTPException as error:  # Starlette's, of a form that it cannot parse
        raise ProblemError(422, f"the form cannot be read: {error.detail}") from None
    except UnicodeError:
        raise ProblemError(422, "the form cannot be read in the character set that it names") from None
    try:
        image = form.get("image")
        if image is not None and not isinstance(image, UploadFile):
            raise ProblemError(422, "image: the part must be a file")
        values = _fields(form)
        data = await image.read() if isinstance(image, UploadFile) else None
    finally:
        await form.close()
    try:
        post = PostIn.model_validate(values)
    except ValidationError as error:
        raise _unprocessable(error) from None
    # A form in which no file was chosen holds an empty one.
    return post.model_copy(update={"image": data or None})


def _fields(form: FormData) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in form:
        if name == "image":
            continue
        given = form.getlist(name)
        if any(isinstance(value, UploadFile) for value in given):
            raise ProblemError(422, f"{name}: the part must be text, not a file")
        if name == "tokens":
            values[name] = given
        elif len(given) > 1:
            raise ProblemError(422, f"{name}: given {len(given)} times")
        elif given[0]:
            values[name] = given[0]
    return values


def _content_type(request: Request, *allowed: str) -> str:
    given = request.headers.get("content-type", "")
    media_type = given.partition(";")[0].strip().lower()
    if media_type not in allowed:
        raise ProblemError(415, f"the body must be {' or '.join(allowed)}, not {media_type or 'untyped'}")
    return media_type


def _unprocessable(error: ValidationError) -> ProblemError:
    """Where the body is wrong, without repeating it."""
    found = error.errors(include_input=False, include_url=False, include_context=False)
    lines = [f"{'.'.join(map(str, item['loc'])) or 'the body'}: {item['msg']}" for item in found[:_SHOWN_ERRORS]]
    more = f"; and {len(found) - _SHOWN_ERRORS} more" if len(found) > _SHOWN_ERRORS else ""
    return ProblemError(422, "; ".join(lines) + more)
