"""Bodies of requests and answers of the HTTP API; `/openapi.json` is made of these."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated as Typed
from typing import Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

from gem_ray.config import Config, FilterConfig
from gem_ray.data.images import BYTES_PER_PIXEL
from gem_ray.data.prepare import post_from_row
from gem_ray.records import Post, ProblemKind, model_rows
from gem_ray.serving.flow import UNTOLD, Annotated
from gem_ray.taxonomy import LabelSetName

MAX_TOKENS = 2000
"""Words of a post that brings its own."""
MAX_POST_ID_CHARS = 512
"""Of a post's own id."""
TEXTS = ("text", "tokens", "caption", "knowledge")
"""Fields that are as long as the configuration allows; all tokens together are at most as long as their text."""
_BASE64_PART = 2**20
_BYTES_OF_A_CHAR = 12  # \\ud83d\\ude00
_BODY_FRAME = 2048 + MAX_POST_ID_CHARS * _BYTES_OF_A_CHAR + MAX_TOKENS * len(', ""')  # with names and quotes
_SHOWN_CHARS = 40
_SHOWN_ERRORS = 5
_ERRORS_OF_VALUES = {"string_too_short", "string_too_long", "string_unicode", "too_long", "value_error"}


def described(error: ValidationError) -> str:
    """Where a body is wrong, and why, without repeating it."""
    found = error.errors(include_input=False, include_url=False, include_context=False)
    lines = [f"{'.'.join(map(str, item['loc'])) or 'the body'}: {item['msg']}" for item in found[:_SHOWN_ERRORS]]
    more = f"; and {len(found) - _SHOWN_ERRORS} more" if len(found) > _SHOWN_ERRORS else ""
    return "; ".join(lines) + more


def _from_base64(value: Any) -> Any:
    """Bytes of base64, which may stand in a data URL."""
    if not isinstance(value, str):
        return value
    if value[:5].lower() == "data:":
        head, _, value = value.partition(",")
        if not head.lower().endswith(";base64"):
            raise ValueError("a data URL must be base64: data:image/png;base64,…")
    try:
        if "=" in value[:-2]:
            raise ValueError
        # In parts, because each call keeps the interpreter's lock: other requests get it in between.
        parts = (value[start : start + _BASE64_PART] for start in range(0, len(value), _BASE64_PART))
        return b"".join(binascii.a2b_base64(part, strict_mode=True) for part in parts)
    except ValueError:  # binascii.Error is one
        raise ValueError("it is not base64 (RFC 4648, with padding, without line breaks)") from None


class BadImage(NamedTuple):
    """In the place of an image that cannot be read from its request."""

    reason: str


def _from_base64_or_bad(value: Any) -> Any:
    if not isinstance(value, str):
        raise PydanticKnownError("string_type")
    try:
        return _from_base64(value)
    except ValueError as error:
        return BadImage(str(error))


_PATTERN = "^(data:[^,]*;base64,)?[A-Za-z0-9+/]*={0,2}$"
_BASE64_SCHEMA = {"type": "string", "contentEncoding": "base64"}
Base64 = Typed[bytes, BeforeValidator(_from_base64), WithJsonSchema(_BASE64_SCHEMA | {"pattern": _PATTERN})]
Base64OrBad = Typed[bytes | BadImage, BeforeValidator(_from_base64_or_bad), WithJsonSchema(_BASE64_SCHEMA)]


class _Asked(BaseModel):
    """What a client sends: with known fields only."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _has_known_fields(cls, values: Any) -> Any:
        """By itself, pydantic makes an error for each, which holds its whole name."""
        unknown = (
            next((name for name in values if name not in cls.model_fields), None) if type(values) is dict else None
        )
        if unknown is not None:
            raise PydanticCustomError("extra_forbidden", "{name} is no field", {"name": repr(unknown[:_SHOWN_CHARS])})
        return values


class PostIn(_Asked):
    """A post to annotate."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"text": "Taylor Swift is in Paris tonight"}]})

    text: str = Field(min_length=1, description="not blank; `GET /v1/limits` says how long it may be")
    post_id: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_POST_ID_CHARS,
        description="comes back in the answer; default: one is made up",
    )
    tokens: Typed[list[str], Field(max_length=MAX_TOKENS, fail_fast=True)] | None = Field(
        None, description="the text's words in order; default: the text is cut into words"
    )
    caption: str | None = Field(None, description="of the image, for the tagger")
    knowledge: str | None = Field(None, description="auxiliary knowledge, for the tagger")
    image: Base64 | None = Field(None, description="an encoded image, in base64, or a data URL of that")
    image_url: str | None = Field(
        None, description="https:// address on a host that the server's owner has allowed, or a data URL"
    )

    @model_validator(mode="before")
    @classmethod
    def _with_data_url(cls, values: Any) -> Any:
        """A data URL is an image, wherever it stands."""
        url = values.get("image_url") if isinstance(values, dict) else None
        if isinstance(url, str) and url[:5].lower() == "data:" and values.get("image") is None:
            return values | {"image": url, "image_url": None}
        return values

    @model_validator(mode="after")
    def _has_one_image(self) -> PostIn:
        if self.image is not None and self.image_url is not None:
            raise ValueError("give image or image_url, not both")
        return self

    def to_post(self, post_id: str, max_chars: int) -> Post:
        """As `post_from_row` makes it of an input row; `image_url` is left for the caller to fetch.

        Args:
            post_id: where it has none of its own.
            max_chars: of text, tokens, caption and knowledge; a post with longer ones is rejected, without a look at
                them, and only the beginning of its text is kept.
        """
        name = post_id if self.post_id is None else self.post_id
        for field in TEXTS:
            value = getattr(self, field) or ""
            if (size := sum(map(len, value)) if isinstance(value, list) else len(value)) > max_chars:
                post = Post(name, self.text[:max_chars])
                message = f"{field}: {size:,} characters; {max_chars:,} are allowed"
                post.fail("prepare", ProblemKind.TEXT_TOO_LONG, message)
                return post
        bad = self.image.reason if isinstance(self.image, BadImage) else None
        row = self.model_dump(include={"text", "tokens", "caption", "knowledge"})
        post = post_from_row(row | {"post_id": name, "image": None if bad else self.image})
        if bad:
            post.fail("load_image", ProblemKind.IMAGE_UNREADABLE, bad)
        return post


def _without_limits(schema: dict[str, Any]) -> None:
    for each in schema["properties"].values():
        for part in (each, *each.get("anyOf", ())):
            for limit in ("minLength", "maxLength", "maxItems", "pattern"):
                part.pop(limit, None)


class BatchPostIn(PostIn):
    """A post of a batch: values that cannot be right cost its row, not the batch; see `PostIn` for what they may be."""

    model_config = ConfigDict(json_schema_extra=_without_limits)

    image: Base64OrBad | None = Field(None, description="an encoded image, in base64, or a data URL of that")  # type: ignore[assignment]


class WrongPost:  # no record, of which pydantic would make a schema that OpenAPI then shows
    """In the place of a post of a batch whose values cannot be right.

    Args:
        post_id: None where it has none, or a wrong one.
        text: of the post.
        reason: why it is rejected.
    """

    image_url = None

    def __init__(self, post_id: str | None, text: str, reason: str) -> None:
        self._post_id = post_id
        self._text = text
        self._reason = reason

    def to_post(self, post_id: str, max_chars: int) -> Post:
        """As `PostIn.to_post`; the post is rejected."""
        post = Post(self._post_id or post_id, self._text[:max_chars])
        post.fail("prepare", ProblemKind.BAD_RECORD, self._reason)
        return post


def _post_or_wrong(value: Any) -> BatchPostIn | WrongPost:
    try:
        return BatchPostIn.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False, include_context=False)
        if any(item["type"] not in _ERRORS_OF_VALUES for item in found):
            raise  # of another shape
        has_wrong_id = any(item["loc"][:1] == ("post_id",) for item in found)
        text = value["text"].encode(errors="replace").decode()
        return WrongPost(None if has_wrong_id else value.get("post_id"), text, described(error))


AnyPost = BatchPostIn | WrongPost


class BatchIn(_Asked):
    """Posts to annotate in one request."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"posts": [{"text": "Taylor Swift is in Paris tonight"}]}]}
    )

    posts: list[Typed[AnyPost, PlainValidator(_post_or_wrong, json_schema_input_type=BatchPostIn)]] = Field(
        min_length=1, fail_fast=True, description="`GET /v1/limits` says how many there may be"
    )


class CandidateOut(BaseModel):
    """A fine category and its probability."""

    fine: str = Field(description="one of `GET /v1/taxonomy`")
    probability: float = Field(description="by the tagger")


class PointOut(BaseModel):
    """A pixel of the upright original image."""

    x: float = Field(description="from the left, in pixels")
    y: float = Field(description="from the top, in pixels")


class BoxOut(BaseModel):
    """Pixels of the upright original image; `x2`, `y2` exclusive."""

    x1: float = Field(description="left edge")
    y1: float = Field(description="upper edge")
    x2: float = Field(description="right edge, exclusive")
    y2: float = Field(description="lower edge, exclusive")


class HeatMapOut(BaseModel):
    """The map of eq. 11 over image patches: `height × width` bytes, row by row, in base64."""

    height: int = Field(description="rows of patches")
    width: int = Field(description="patches in a row")
    data: str = Field(description="a byte a patch, from 0 to 255, in base64")


class EntityOut(BaseModel):
    """An entity; `text[start:end]` of the post is its text."""

    text: str = Field(description="as the post has it")
    start: int = Field(description="first character in the post's text")
    end: int = Field(description="behind its last character")
    word_start: int = Field(description="first word in `tokens`")
    word_end: int = Field(description="behind its last word")
    coarse: str = Field(description="coarse category")
    fine: str = Field(description="fine category, below the coarse one")
    score: float = Field(description="probability of `fine`, of the model that decided last")
    entropy: float = Field(description="of the tagger's categories, in nats (eq. 10)")
    hard: bool = Field(
        description="its entropy is above `gamma`, or the tagger's confidence below `routing.threshold`, if configured"
    )
    reranked: bool = Field(description="the reranker was asked, and answered")
    confidence: float | None = Field(description="that span and category are both right; null: nothing calibrates it")
    accepted: bool | None = Field(description="`confidence` reaches `acceptance.threshold`; null: none is configured")
    candidates: list[CandidateOut] = Field(description="the K most probable categories; the first is the likeliest")
    seen: bool | None = Field(description="whether the image shows it; null: not judged")
    match_score: float | None = Field(description="P_T, on which `seen` rests")
    seen_probability: float | None = Field(description="`match_score`, calibrated; null: nothing calibrates it")
    point: PointOut | None = Field(description="peak of the map of eq. 11")
    box: BoxOut | None = Field(description="where it is seen; null unless `seen` is true")
    box_source: str | None = Field(description="`sam`; `text`: the text-prompted segmenter; `map`: the map alone")
    box_score: float | None = Field(description="SAM's predicted IoU, or the segmenter's score; null for `map`")
    box_confidence: float | None = Field(description="that the box is right; null: nothing calibrates it")
    heatmap: HeatMapOut | None = Field(description="with `?heatmaps=true`, of an entity that is seen")


class ModelOut(BaseModel):
    """A model that the answer is made with."""

    role: str = Field(description="`tagger`, `reranker`, `matcher`, …")
    reference: str = Field(description="name@hash")


class PostProblemOut(BaseModel):
    """Why a post is degraded or rejected."""

    stage: str = Field(description="which stage says so")
    kind: ProblemKind = Field(description="for programs")
    message: str = Field(description="for people")


class AnnotationOut(BaseModel):
    """An annotated post: the fields of an output row, and how they came about."""

    post_id: str = Field(description="of the request, or made up")
    text: str = Field(description="of the request; of one that is too long, the beginning")
    tokens: list[str] = Field(description="the words: of the request, or as the text was cut")
    image_width: int | None = Field(description="of the upright image, in pixels; null: none usable, or no entity")
    image_height: int | None = Field(description="of the upright image, in pixels; null: none usable, or no entity")
    caption: str | None = Field(description="as the tagger read it: of the request, or of the knowledge stage")
    knowledge: str | None = Field(description="as the tagger read it: of the request, or of the knowledge stage")
    entities: list[EntityOut] = Field(description="in the order of the text")
    status: Literal["ok", "degraded", "rejected"] = Field(
        description="`degraded`: the text is annotated; an image, a reranking, the grounding or knowledge is missing"
    )
    problems: list[PostProblemOut] = Field(description="why the post is degraded or rejected")
    run_id: str = Field(description="of this deployment of the service")
    models: list[ModelOut] = Field(description="of the stages that the post needed")
    seconds: dict[str, float] = Field(description="of its batch in each stage that it needed, and `waiting` for them")
    gamma: float = Field(description="entropy in nats above which an entity is hard")


class BatchOut(BaseModel):
    """Annotations in the order of the posts."""

    annotations: list[AnnotationOut] = Field(description="one a post")


class AnnotationLine(AnnotationOut):
    """A line of a batch that is answered as posts are done."""

    index: int = Field(description="of the post in the batch")


class Models(BaseModel):
    """What annotates here."""

    models: list[ModelOut] = Field(description="of all stages")


class Version(BaseModel):
    """What answers."""

    version: str = Field(description="of gem-ray")
    api: Literal["v1"] = Field("v1", description="of the paths under `/v1/`")
    run_id: str = Field(description="of this deployment of the service")


class Taxonomy(BaseModel):
    """Categories: coarse -> fine."""

    labels: LabelSetName = Field(description="which set of categories")
    coarse: dict[str, list[str]] = Field(description="coarse category -> its fine ones")


class Limits(BaseModel):
    """What a request may hold."""

    max_body_bytes: int = Field(description="of a whole request, all images of a batch included")
    max_image_bytes: int = Field(
        description="of an encoded image; it fits into a body beside the longest text, in base64"
    )
    max_image_pixels: int = Field(description="width × height, in every format")
    max_text_chars: int = Field(description="of text, caption and knowledge, each, and of all tokens together")
    max_tokens: int = Field(description="words of a post that brings its own")
    max_batch_posts: int = Field(description="posts of a batch, for this API key")
    timeout_s: float = Field(description="time for a post; it may take as long again to fetch its `image_url`")
    image_urls: bool = Field(description="whether `image_url` is fetched at all")
    gamma: float = Field(description="entropy in nats above which an entity is hard")
    k: int = Field(description="candidates of an entity")
    api_key: bool = Field(description="whether annotating wants `Authorization: Bearer KEY`")

    @classmethod
    def of(cls, config: Config, settings: FilterConfig, api_key: bool, max_batch_posts: int) -> Limits:
        """From the configuration, the filter's settings of now, and what the asker may send at once."""
        serving, image = config.serving, config.online_image
        texts = len(TEXTS) * _BYTES_OF_A_CHAR * config.text.max_chars
        beside_texts = serving.max_body_bytes - texts - _BODY_FRAME
        return cls(
            max_body_bytes=serving.max_body_bytes,
            max_image_bytes=max(0, min(image.max_bytes, beside_texts * 3 // 4)),
            max_image_pixels=min(image.max_pixels, image.max_decoding_bytes // max(BYTES_PER_PIXEL.values())),
            max_text_chars=config.text.max_chars,
            max_tokens=MAX_TOKENS,
            max_batch_posts=max_batch_posts,
            timeout_s=serving.timeout_s,
            image_urls=bool(serving.image_hosts),
            gamma=settings.gamma,
            k=settings.k,
            api_key=api_key,
        )


def answer_row(done: Annotated, run_id: str, heatmaps: bool) -> dict[str, Any]:
    """The values of `AnnotationOut`. Messages that quote exceptions, or what an endpoint has said, stay in the log."""
    row = done.post.annotation()
    del row["row_id"]
    for entity in row["entities"]:
        kept = entity["heatmap"] if heatmaps else None
        entity["heatmap"] = kept and kept | {"data": base64.b64encode(kept["data"]).decode("ascii")}
    for problem in row["problems"]:
        if problem["kind"] in UNTOLD:
            problem["message"] = f"the stage {problem['stage']} failed on this post"
    seconds = {name: round(value, 6) for name, value in done.seconds.items()}
    return row | {"run_id": run_id, "models": model_rows(done.models), "seconds": seconds, "gamma": done.settings.gamma}
