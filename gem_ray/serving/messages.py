"""Bodies of requests and answers of the HTTP API; `/openapi.json` is made of these."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated as Typed
from typing import Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from gem_ray.config import Config, FilterConfig
from gem_ray.data.prepare import post_from_row
from gem_ray.records import Post, ProblemKind, model_rows
from gem_ray.serving.flow import UNTOLD, Annotated


def _from_base64(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("it is not base64 (RFC 4648, with padding, without line breaks)") from None


Base64 = Typed[
    bytes,
    BeforeValidator(_from_base64),
    WithJsonSchema({"type": "string", "contentEncoding": "base64", "pattern": "^[A-Za-z0-9+/]*={0,2}$"}),
]


class PostIn(BaseModel):
    """A post to annotate."""

    model_config = ConfigDict(extra="forbid")

    text: str = Field(min_length=1, description="not blank; `GET /v1/limits` says how long it may be")
    post_id: str | None = Field(
        None, min_length=1, max_length=512, description="comes back in the answer; none: one is made up"
    )
    tokens: list[str] | None = Field(None, description="the text's words in order; none: the text is cut into words")
    caption: str | None = Field(None, description="of the image, for the tagger")
    knowledge: str | None = Field(None, description="auxiliary knowledge, for the tagger")
    image: Base64 | None = Field(None, description="an encoded image, in base64")
    image_url: str | None = Field(None, description="https:// address on a host that the server's owner has allowed")

    @model_validator(mode="after")
    def _has_one_image(self) -> PostIn:
        if self.image is not None and self.image_url is not None:
            raise ValueError("give image or image_url, not both")
        return self

    def to_post(self, post_id: str) -> Post:
        """As `post_from_row` makes it of an input row; `image_url` is left for the caller to fetch."""
        row = self.model_dump(include={"text", "tokens", "caption", "knowledge", "image"})
        return post_from_row(row | {"post_id": self.post_id or post_id})


class BatchIn(BaseModel):
    """Posts to annotate in one request."""

    model_config = ConfigDict(extra="forbid")

    posts: list[PostIn] = Field(min_length=1, description="`GET /v1/limits` says how many there may be")


class CandidateOut(BaseModel):
    """A fine category and its probability."""

    fine: str
    probability: float


class PointOut(BaseModel):
    """A pixel of the upright original image."""

    x: float
    y: float


class BoxOut(BaseModel):
    """Pixels of the upright original image; `x2`, `y2` exclusive."""

    x1: float
    y1: float
    x2: float
    y2: float


class HeatMapOut(BaseModel):
    """The map of eq. 11 over image patches: `height × width` bytes, row by row, in base64."""

    height: int
    width: int
    data: str


class EntityOut(BaseModel):
    """An entity; `text[start:end]` of the post is its text."""

    text: str
    start: int
    end: int
    word_start: int
    word_end: int
    coarse: str
    fine: str
    score: float
    entropy: float
    hard: bool = Field(description="its entropy is above `gamma`")
    reranked: bool
    confidence: float | None = Field(description="that span and category are both right; null: nothing calibrates it")
    candidates: list[CandidateOut]
    seen: bool | None = Field(description="whether the image shows it; null: not judged")
    match_score: float | None
    point: PointOut | None
    box: BoxOut | None
    box_source: str | None
    box_score: float | None
    heatmap: HeatMapOut | None


class ModelOut(BaseModel):
    """A model that the answer is made with."""

    role: str
    reference: str = Field(description="name@hash")


class PostProblemOut(BaseModel):
    """Why a post is degraded or rejected."""

    stage: str
    kind: ProblemKind
    message: str


class AnnotationOut(BaseModel):
    """An annotated post: the fields of an output row, and how they came about."""

    post_id: str
    text: str
    tokens: list[str]
    image_width: int | None
    image_height: int | None
    caption: str | None
    knowledge: str | None
    entities: list[EntityOut]
    status: Literal["ok", "degraded", "rejected"]
    problems: list[PostProblemOut]
    run_id: str = Field(description="of this deployment of the service")
    models: list[ModelOut] = Field(description="of the stages that the post needed")
    seconds: dict[str, float] = Field(description="of its batch in each stage that it needed, and `waiting` for them")
    gamma: float = Field(description="entropy in nats above which an entity was reranked")


class BatchOut(BaseModel):
    """Annotations in the order of the posts."""

    annotations: list[AnnotationOut]


class Taxonomy(BaseModel):
    """Categories: coarse -> fine."""

    labels: Literal["fmnerg", "gmner"]
    coarse: dict[str, list[str]]


class Limits(BaseModel):
    """What a request may hold."""

    max_body_bytes: int = Field(description="of a whole request")
    max_image_bytes: int = Field(description="of an encoded image")
    max_image_pixels: int = Field(description="width × height")
    max_text_chars: int = Field(description="of text, caption and knowledge, each")
    max_batch_posts: int
    timeout_s: float = Field(description="time for a post")
    image_urls: bool = Field(description="whether `image_url` is fetched at all")
    gamma: float = Field(description="entropy in nats above which an entity is reranked")
    k: int = Field(description="candidates of an entity")
    api_key: bool = Field(description="whether annotating wants `Authorization: Bearer KEY`")

    @classmethod
    def of(cls, config: Config, settings: FilterConfig, api_key: bool) -> Limits:
        """From the configuration, and the filter's settings of now."""
        serving = config.serving
        return cls(
            max_body_bytes=serving.max_body_bytes,
            max_image_bytes=config.image.max_bytes,
            max_image_pixels=config.online_image.max_pixels,
            max_text_chars=config.text.max_chars,
            max_batch_posts=serving.max_batch_posts,
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
