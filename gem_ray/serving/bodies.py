"""From the body of a request to what is asked: JSON, or the parts of a form."""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from gem_ray.config import Config
from gem_ray.plurals import counted
from gem_ray.serving.messages import MAX_TOKENS, BatchIn, PostIn
from gem_ray.serving.problems import ProblemError

_Model = TypeVar("_Model", bound=BaseModel)
JSON, FORM = "application/json", "multipart/form-data"
_SHOWN_ERRORS = 5
_IN_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_COUNTED_AT_ONCE = 2**14
# A parser keeps the interpreter's lock. A small body is parsed sooner than a thread begins; of large ones, never more
# than one stands between the event loop and its next turn.
_PARSED_AT_ONCE = 2**16
_PARSER = ThreadPoolExecutor(1, "parse")
_ESCAPES_OF_A_CHAR = 6  # two for one outside the basic plane, in text, caption and knowledge
_VALUES_OF_A_POST = MAX_TOKENS + 64  # fields, and room for some that are wrong


async def read_post(request: Request, config: Config) -> PostIn:
    """The post of a request.

    Raises:
        ProblemError: 413 for an image that is too large, 415 for another type of content, 422 for a wrong body.
    """
    is_form = _content_type(request, JSON, FORM) == FORM
    asked = await (_from_form(request) if is_form else _from_json(request, PostIn, 1, config))
    size, limit = len(asked.image or b""), config.image.max_bytes
    if size > limit:
        raise ProblemError(413, f"the image has {size:,} bytes; {limit:,} are allowed")
    return asked


async def read_batch(request: Request, config: Config) -> BatchIn:
    """The posts of a request.

    Raises:
        ProblemError: as `read_post`, and 413 for too many posts.
    """
    _content_type(request, JSON)
    return await _from_json(request, BatchIn, config.serving.max_batch_posts, config)


async def _from_json(request: Request, model: type[_Model], posts: int, config: Config) -> _Model:
    """What a JSON body holds.

    Raises:
        ProblemError: 413 for more values than a request can need, 422 for a wrong body.
    """
    counter = _JsonCounter(posts, config.text.max_chars)
    parts = []
    async for part in request.stream():
        parts.append(part)
        for start in range(0, len(part), _COUNTED_AT_ONCE):
            counter.add(part[start : start + _COUNTED_AT_ONCE])
            await asyncio.sleep(0)  # others have their turn
    body = b"".join(parts)
    if len(body) <= _PARSED_AT_ONCE:
        return _parse(model, body)
    return await asyncio.get_running_loop().run_in_executor(_PARSER, _parse, model, body)


class _JsonCounter:
    """Counts what a JSON body holds while it comes: a parser makes an object of each value before it checks any.

    Only strings and structure are told apart. (ijson, which counts as well, takes seconds for a string of megabytes: it
    reads what it has of it again with every part.)

    Args:
        posts: that the body may hold.
        chars: of the longest text.
    """

    def __init__(self, posts: int, chars: int) -> None:
        self._posts = posts
        self._escapes_left = posts * chars * _ESCAPES_OF_A_CHAR
        self._objects = 0
        self._values = 0
        self._is_in_string = False
        self._escape = b""

    def add(self, part: bytes) -> None:
        """Count another part of the body.

        Raises:
            ProblemError: 413 for more posts, or more values than they can need.
        """
        part = self._escape + part
        self._escape = b""
        position = 0
        while position < len(part):
            position = self._end_of_string(part, position) if self._is_in_string else self._string(part, position)

    def _end_of_string(self, part: bytes, start: int) -> int:
        end = part.find(b'"', start) % (len(part) + 1)  # the part's own where there is none
        if part.find(b"\\", start, end) >= 0:
            end = _IN_STRING.match(part, start).end()  # type: ignore[union-attr]  # it matches nothing, too
            self._escapes_left -= part.count(b"\\", start, end)
            if self._escapes_left < 0:
                raise ProblemError(413, "the body holds more escapes than texts can")
        self._is_in_string = part[end : end + 1] != b'"'
        if part[end:] == b"\\":  # what it escapes is in the next part
            self._escape = b"\\"
        return end + 1

    def _string(self, part: bytes, start: int) -> int:
        end = part.find(b'"', start)
        self._is_in_string = end >= 0
        structure = part[start : end if end >= 0 else None]
        self._objects += structure.count(b"{")
        self._values += sum(map(structure.count, (b",", b":", b"[", b"{")))
        if self._objects > self._posts + 1:  # the batch itself is one
            raise ProblemError(413, f"more than {counted(self._posts, 'post')} in the body")
        if self._values > self._posts * _VALUES_OF_A_POST:
            raise ProblemError(413, "the body holds more JSON values than so many posts can")
        return end + 1 if end >= 0 else len(part)


def _parse(model: type[_Model], body: bytes) -> _Model:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _unprocessable(error) from None


async def _from_form(request: Request) -> PostIn:
    try:
        form = await request.form(max_files=1, max_fields=MAX_TOKENS + 8)
    except HTTPException as error:  # Starlette's, of a form that it cannot parse
        raise ProblemError(422, f"the form cannot be read: {error.detail}") from None
    except UnicodeError:
        raise ProblemError(422, "the form cannot be read in the character set that it names") from None
    try:
        image = form.get("image")
        if image is not None and not isinstance(image, UploadFile):
            raise ProblemError(422, "image: the part must be a file")
        values = _fields(form)
        if image is not None and (data := await image.read()):  # where no file was chosen, there is an empty one
            values["image"] = data
    finally:
        await form.close()
    try:
        return PostIn.model_validate(values)
    except ValidationError as error:
        raise _unprocessable(error) from None


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
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise ProblemError(
            415, f"the body must not be compressed; {encoding} is not read", {"Accept-Encoding": "identity"}
        )
    media_type, options = parse_options_header(request.headers.get("content-type", ""))
    name = media_type.decode("latin-1").strip().lower()
    if name not in allowed:
        raise ProblemError(415, f"the body must be {' or '.join(allowed)}, not {name or 'untyped'}")
    charset = options.get(b"charset", b"utf-8").lower()
    if name == JSON and charset not in (b"utf-8", b"utf8"):
        raise ProblemError(415, "JSON must be in UTF-8")
    return name


def _unprocessable(error: ValidationError) -> ProblemError:
    """Where the body is wrong, without repeating it."""
    found = error.errors(include_input=False, include_url=False, include_context=False)
    lines = [f"{'.'.join(map(str, item['loc'])) or 'the body'}: {item['msg']}" for item in found[:_SHOWN_ERRORS]]
    more = f"; and {len(found) - _SHOWN_ERRORS} more" if len(found) > _SHOWN_ERRORS else ""
    return ProblemError(422, "; ".join(lines) + more)
