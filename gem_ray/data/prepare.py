"""From an input row, which may hold anything, to a post whose fields have the right types, and back."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from numbers import Integral
from typing import Any

import pyarrow as pa

from gem_ray.config import Config, ImageConfig, TextConfig
from gem_ray.data.fetch import ImageError
from gem_ray.data.tokenize import has_words, tokenize, word_spans
from gem_ray.records import GOLD_TYPE, GoldEntity, Post, ProblemKind, gold_from_rows, is_missing

# A reader that meets a row it cannot parse says so here; the rest of the row holds what could be saved.
ERROR_FIELD = "__error__"
# Likewise for the image alone: the post is annotated without it.
IMAGE_ERROR_FIELD = "__image_error__"

_STAGE = "prepare"
_BAD = ProblemKind.BAD_RECORD


def post_from_row(row: Mapping[str, Any]) -> Post:
    """A post from the plain values of an input row; what is wrong with them becomes the post's problems.

    Never raises. A wrong image field leaves a degraded post, any other wrong field a rejected one; wrong gold, which
    only evaluation needs, is left out and named. Columns that are not in `INPUT_SCHEMA` are ignored; NaN and NA, which
    pandas has for a missing value, are missing values.
    """
    post = Post(post_id="", text="")
    if not isinstance(row, Mapping):
        post.fail(_STAGE, _BAD, f"the row is {_type(row)}, not a mapping")
        return post
    if isinstance(row.get(ERROR_FIELD), str):
        post.fail(_STAGE, _BAD, _encodable(row[ERROR_FIELD]))
        if len(row) == 1:
            return post
    if isinstance(row.get(IMAGE_ERROR_FIELD), str):
        post.fail(_STAGE, ProblemKind.IMAGE_UNREADABLE, _encodable(row[IMAGE_ERROR_FIELD]))
    _fill(post, row)
    post.gold = _gold(row, post)
    if not post.is_rejected:
        _check_text(post)
    return post


def check_fields(post: Post) -> None:
    """Hold a post that somebody made by hand to what `post_from_row` promises, by its own values."""
    if post.is_rejected:
        return
    _fill(post, vars(post) | {"image": post.image_bytes})
    if post.image is not None and getattr(post.image, "shape", ())[2:] != (3,):
        message = f"Post.image is {_type(post.image)}, not an array of (height, width, 3): give image_bytes instead"
        post.fail(_STAGE, ProblemKind.IMAGE_UNREADABLE, message)
        post.image = None


def _fill(post: Post, row: Mapping[str, Any]) -> None:
    post.post_id = _post_id(row, post)
    post.tokens = _tokens(row, post)
    post.text = _string(row, "text", post) or ""
    if is_missing(row.get("text")):
        if post.tokens:
            post.text = " ".join(post.tokens)
        else:
            post.fail(_STAGE, _BAD, "text is missing")
    post.caption = _string(row, "caption", post)
    post.knowledge = _string(row, "knowledge", post)
    post.image_bytes = _image(row, post)
    post.image_uri = _image_uri(row, post)


def row_from_post(post: Post) -> dict[str, Any]:
    """The row of `INPUT_SCHEMA` that `post_from_row` reads back.

    A rejected post whose fields were mended on the way in (a broken character replaced, a field of the wrong type
    dropped) would pass when read again: its text is left out, so that it is rejected again.
    """
    row: dict[str, Any] = {
        "post_id": post.post_id,
        "text": post.text,
        "tokens": post.tokens or None,
        "image": post.image_bytes,
        "image_uri": post.image_uri,
        "caption": post.caption,
        "knowledge": post.knowledge,
        "gold": None if post.gold is None else [asdict(entity) for entity in post.gold],
    }
    if post.is_rejected and not post_from_row(row).is_rejected:
        row["text"] = row["tokens"] = None
    return row


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row with the names of an input row's fields.

    Args:
        row: values by name.
        columns: field of an input row -> the name that it has in `row`; fields may share one.
    """
    named = {name: value for name, value in row.items() if name not in columns and name not in columns.values()}
    return named | {field: row[name] for field, name in columns.items() if name in row}


def decoded_text(data: bytes) -> str:
    """What a text file holds, without a byte order mark and outer white space.

    UTF-8, or UTF-16 where the mark says so. Bytes that are neither become characters for which a post is rejected.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        with suppress(UnicodeDecodeError):
            return data.decode("utf-16").strip()
    return data.decode("utf-8-sig", "surrogateescape").strip()


def drop_oversized_image(post: Post, config: ImageConfig) -> None:
    """Leave out an encoded image that is over `image.max_bytes`, and say so: nothing of it has to travel."""
    if not post.is_rejected and post.image_bytes is not None and len(post.image_bytes) > config.max_bytes:
        error = ImageError.over_max_bytes(len(post.image_bytes), config)
        post.image_bytes = None
        post.fail(_STAGE, error.kind, str(error))


class Preparer:
    """Stage PREPARE: checks text and tokens, cuts the text into words where the data brings none.

    Args:
        config: limits of the text.
        image: limits of the image.
    """

    def __init__(self, config: TextConfig, image: ImageConfig | None = None):
        self._config = config
        self._image = image or ImageConfig()

    @classmethod
    def from_config(cls, config: Config) -> Preparer:
        """Built from the sections `text` and `image`."""
        return cls(config.text, config.image)

    def __call__(self, posts: list[Post]) -> list[Post]:
        """Fill `tokens`; record texts that cannot be used, and posts that bring no image."""
        for post in posts:
            if not post.is_rejected:
                self._prepare(post)
        return posts

    def _prepare(self, post: Post) -> None:
        drop_oversized_image(post, self._image)
        limit = self._config.max_chars
        if len(post.text) > limit:
            message = f"text has {len(post.text):,} characters; text.max_chars allows {limit:,}"
            post.fail(_STAGE, ProblemKind.TEXT_TOO_LONG, message)
            return
        _check_text(post)
        if post.is_rejected:
            return
        post.tokens = post.tokens or tokenize(post.text)
        has_image = post.image is not None or post.image_bytes is not None or post.image_uri is not None
        if not has_image and not post.lacks_image:
            post.fail(_STAGE, ProblemKind.IMAGE_MISSING, "the post has neither image nor image_uri")


def _check_text(post: Post) -> None:
    if not (post.tokens or has_words(post.text)):
        post.fail(_STAGE, _BAD, "text is empty")
        return
    try:
        word_spans(post.text, post.tokens)
    except ValueError as error:
        post.fail(_STAGE, _BAD, f"tokens: {error}")


def _post_id(row: Mapping[str, Any], post: Post) -> str:
    value: Any = row.get("post_id")
    # Bounded, because Python refuses to print integers of thousands of digits.
    if isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) < 2**64:
        return str(int(value))
    post_id = _string(row, "post_id", post)
    if is_missing(value):
        post.fail(_STAGE, _BAD, "post_id is missing")
    elif post_id is not None and not post_id.strip():
        post.fail(_STAGE, _BAD, "post_id is empty")
    return post_id or ""


def _tokens(row: Mapping[str, Any], post: Post) -> list[str]:
    values: Any = row.get("tokens")
    if is_missing(values):
        return []
    if not _is_list(values):
        post.fail(_STAGE, _BAD, f"tokens is {_type(values)}, not a list of strings")
        return []
    wrong = next((position for position, value in enumerate(values) if not isinstance(value, str)), None)
    if wrong is not None:
        post.fail(_STAGE, _BAD, f"tokens: token {wrong} is {_type(values[wrong])}, not a string")
        return []
    if any(_encodable(value) != value for value in values):
        post.fail(_STAGE, _BAD, "tokens holds characters that are not valid Unicode")
    return [_encodable(value) for value in values]


def _string(row: Mapping[str, Any], name: str, post: Post) -> str | None:
    value = row.get(name)
    if is_missing(value):
        return None
    if not isinstance(value, str):
        post.fail(_STAGE, _BAD, f"{name} is {_type(value)}, not a string")
        return None
    encodable = _encodable(value)
    if encodable != value:
        post.fail(_STAGE, _BAD, f"{name} holds characters that are not valid Unicode")
    return encodable


def _image(row: Mapping[str, Any], post: Post) -> bytes | None:
    value = row.get("image")
    if is_missing(value):
        return None
    if not isinstance(value, (bytes, bytearray, memoryview)):
        post.fail(_STAGE, ProblemKind.IMAGE_UNREADABLE, f"image is {_type(value)}, not bytes")
        return None
    return bytes(value)


def _image_uri(row: Mapping[str, Any], post: Post) -> str | None:
    value = row.get("image_uri")
    if is_missing(value) or (isinstance(value, str) and not value):
        return None
    if not isinstance(value, str) or _encodable(value) != value:
        post.fail(_STAGE, ProblemKind.IMAGE_UNREADABLE, f"image_uri is {_type(value)}, not a string of valid Unicode")
        return None
    return value


def _gold(row: Mapping[str, Any], post: Post) -> list[GoldEntity] | None:
    value: Any = row.get("gold")
    if is_missing(value):
        return None
    try:
        gold = gold_from_rows(value) or []
        pa.array([[asdict(entity) for entity in gold]], GOLD_TYPE)  # checks the types
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        message = f"gold is not a list of word_start, word_end, fine and boxes: {error}"
        post.fail(_STAGE, ProblemKind.BAD_GOLD, _encodable(message))
        return None
    return gold


def _is_list(values: Any) -> bool:
    # Ray Data hands out numpy arrays for Arrow lists.
    return isinstance(values, (list, tuple)) or (isinstance(values, Iterable) and hasattr(values, "tolist"))


def _encodable(text: str) -> str:
    """`text` with what cannot be written as UTF-8 (lone surrogates) replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _type(value: Any) -> str:
    return type(value).__name__
