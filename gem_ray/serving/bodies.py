"""From the body of a request to what is asked: JSON, or the parts of a form."""

from __future__ import annotations

import asyncio
import codecs
import json
import re
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from gem_ray.config import Config
from gem_ray.plurals import counted
from gem_ray.serving.messages import MAX_POST_ID_CHARS, MAX_TOKENS, TEXTS, BatchIn, PostIn, described
from gem_ray.serving.problems import ProblemError

_Model = TypeVar("_Model", bound=BaseModel)
JSON, FORM = "application/json", "multipart/form-data"
_IN_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_READ_AT_ONCE = 2**14
# A parser keeps the interpreter's lock. A small body is parsed sooner than a thread begins; of large ones, never more
# than one stands between the event loop and its next turn.
_PARSED_AT_ONCE = 2**16
_PARSER = ThreadPoolExecutor(1, "parse")
_SHOWN_CHARS = 40
_ESCAPES_OF_A_CHAR = 2  # of one outside the basic plane
_BASE64_OF_AN_ESCAPE = 32  # many programs write / as \\/; every 64th character of base64 is one
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


async def read_batch(request: Request, config: Config, max_posts: int) -> BatchIn:
    """The posts of a request, at most so many.

    Raises:
        ProblemError: as `read_post`, and 413 for too many posts.
    """
    _content_type(request, JSON)
    return await _from_json(request, BatchIn, max_posts, config)


async def _pieces(request: Request) -> AsyncGenerator[bytes, None]:
    """The body as it comes, and others have their turn while a little of it is looked at."""
    async for part in request.stream():
        for start in range(0, len(part), _READ_AT_ONCE):
            yield part[start : start + _READ_AT_ONCE]
            await asyncio.sleep(0)


async def _from_json(request: Request, model: type[_Model], posts: int, config: Config) -> _Model:
    """What a JSON body holds.

    Raises:
        ProblemError: 413 for more values than a request can need, 422 for a wrong body.
    """
    counter = _JsonCounter(posts, _escapes_of(posts, config))
    pieces = []
    async for piece in _pieces(request):
        pieces.append(piece)
        counter.add(piece)
    body = b"".join(pieces)
    if len(body) <= _PARSED_AT_ONCE:
        return _parse(model, body)
    return await asyncio.get_running_loop().run_in_executor(_PARSER, _parse, model, body)


def _escapes_of(posts: int, config: Config) -> int:
    """Most that good posts can hold."""
    chars = len(TEXTS) * config.text.max_chars + MAX_POST_ID_CHARS
    return posts * chars * _ESCAPES_OF_A_CHAR + config.serving.max_body_bytes // _BASE64_OF_AN_ESCAPE


class _JsonCounter:
    """Counts what a JSON body holds while it comes: a parser makes an object of each value before it checks any.

    Only strings and structure are told apart. (ijson, which counts as well, takes seconds for a string of megabytes: it
    reads what it has of it again with every part.)

    Args:
        posts: that the body may hold.
        escapes: in all its strings.
    """

    def __init__(self, posts: int, escapes: int) -> None:
        self._posts = posts
        self._escapes_left = escapes
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
            limit = f"more than {counted(self._posts, 'post')} in the body"
            raise ProblemError(413, f"{limit}; GET /v1/limits says how many there may be")
        if self._values > self._posts * _VALUES_OF_A_POST:
            raise ProblemError(413, "the body holds more JSON values than so many posts can")
        return end + 1 if end >= 0 else len(part)


def _parse(model: type[_Model], body: bytes) -> _Model:
    try:
        values = _values(body)
    except (ValueError, RecursionError) as error:
        raise ProblemError(422, f"the body is no JSON: {error}") from None
    return _checked(model, values)


def _values(body: bytes) -> Any:
    body = body.removeprefix(codecs.BOM_UTF8)  # files of Windows programs begin with it; RFC 8259 lets it be ignored
    try:
        return from_json(body)
    except ValueError:
        if not _SURROGATE.search(body):
            raise
    return json.loads(body.decode())  # which takes half a character; the post that holds it is refused


def _checked(model: type[_Model], values: Any) -> _Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ProblemError(422, described(error)) from None


class _PostForm(MultiPartParser):
    """Starlette's parser, which refuses wrong parts as they come, and an end before the last boundary."""

    def __init__(self, request: Request) -> None:
        super().__init__(
            request.headers, _pieces(request), max_files=1, max_fields=MAX_TOKENS + len(PostIn.model_fields)
        )
        self._names: set[str] = set()
        self._has_ended = False

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        name, is_file = self._current_part.field_name, self._current_part.file is not None
        if name not in PostIn.model_fields:
            raise MultiPartException(f"{name[:_SHOWN_CHARS]!r} is no field")
        if is_file and name != "image":
            raise MultiPartException(f"{name}: the part must be text, not a file")
        if name in self._names and name != "tokens":
            raise MultiPartException(f"{name}: given twice")
        self._names.add(name)

    def on_part_end(self) -> None:
        part = self._current_part
        if part.file is None:
            if part.field_name == "image" and part.data:
                raise MultiPartException("image: the part must be a file, with a filename")
            part.data.decode()  # Starlette itself would take what is no UTF-8 for Latin-1
        super().on_part_end()

    def on_end(self) -> None:
        self._has_ended = True

    async def parse(self) -> FormData:
        form = await super().parse()
        if not self._has_ended:
            await form.close()
            raise MultiPartException("it ends before its last boundary")
        return form


async def _from_form(request: Request) -> PostIn:
    try:
        form = await _PostForm(request).parse()
    except MultiPartException as error:
        raise ProblemError(422, f"the form cannot be read: {error.message}") from None
    except UnicodeError:
        raise ProblemError(422, "the form is not in UTF-8") from None
    try:
        # Where no file was chosen, there is an empty file or text, and where nothing was written, an empty text.
        values: dict[str, Any] = {
            name: given
            for name, value in form.multi_items()
            if name != "tokens" and (given := await value.read() if isinstance(value, UploadFile) else value)
        }
        if any(tokens := form.getlist("tokens")):
            values["tokens"] = tokens
    finally:
        await form.close()
    return _checked(PostIn, values)


def prefers(media_type: str, other: str, accept: str) -> bool:
    """Whether an `Accept` header names a media type, and names no other one with more weight."""
    weights = dict.fromkeys((media_type, other), 0.0)
    for each in accept.split(","):
        name, options = parse_options_header(each)
        try:
            weights[name.decode("latin-1").strip().lower()] = float(options.get(b"q", b"1"))
        except ValueError:
            return False
    return 0 < weights[media_type] >= weights[other]


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
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
        raise ProblemError(415, "the body must be in UTF-8")
    return name
