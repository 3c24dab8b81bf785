"""A post on its way through the system, what goes wrong with it, and the Arrow schemas of both ends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import pyarrow as pa

from gem_ray.plurals import counted
from gem_ray.redaction import redacted
from gem_ray.stages import LOAD_IMAGE, STAGES

if TYPE_CHECKING:
    import numpy as np


class Status(StrEnum):
    """Outcome of a post. A partition column of the output."""

    OK = "ok"
    DEGRADED = "degraded"  # the text is annotated; an image, knowledge, a reranking or the grounding is missing
    REJECTED = "rejected"  # the text is not annotated


class ProblemKind(StrEnum):
    """Why a post is degraded or rejected."""

    BAD_RECORD = "bad_record"
    BAD_GOLD = "bad_gold"
    TEXT_TOO_LONG = "text_too_long"
    IMAGE_MISSING = "image_missing"
    IMAGE_FORBIDDEN = "image_forbidden"
    IMAGE_UNREADABLE = "image_unreadable"
    IMAGE_TOO_LARGE = "image_too_large"
    KNOWLEDGE_FAILED = "knowledge_failed"
    STAGE_FAILED = "stage_failed"
    FILTERED = "filtered"  # a stage of the user's own has left the post out


# Of a problem's message: it often quotes what the data brought, which may be millions of characters.
_MESSAGE_CHARS = 1000

_REJECTING = (ProblemKind.BAD_RECORD, ProblemKind.TEXT_TOO_LONG, ProblemKind.FILTERED)


@dataclass(frozen=True)
class Problem:
    """Why a row is degraded or rejected: which stage said so, what kind, and a sentence for a person."""

    stage: str
    kind: ProblemKind
    message: str

    @property
    def status(self) -> Status:
        """The best status that a post with this problem can have."""
        if self.kind is ProblemKind.BAD_GOLD:
            return Status.OK
        if self.kind in _REJECTING:
            return Status.REJECTED
        is_text = any(spec.is_text for spec in STAGES if spec.name == self.stage)
        return Status.REJECTED if self.kind is ProblemKind.STAGE_FAILED and is_text else Status.DEGRADED


@dataclass(frozen=True)
class Box:
    """Pixels of the upright original image; `x2`, `y2` exclusive."""

    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def area(self) -> float:
        """In square pixels; 0 for an empty box."""
        return max(0.0, self.x2 - self.x1) * max(0.0, self.y2 - self.y1)

    def iou(self, other: Box) -> float:
        """Intersection over union with another box; 0 when both are empty."""
        width = min(self.x2, other.x2) - max(self.x1, other.x1)
        height = min(self.y2, other.y2) - max(self.y1, other.y1)
        shared = max(0.0, width) * max(0.0, height)
        union = self.area + other.area - shared
        return shared / union if union > 0 else 0.0


@dataclass(frozen=True)
class Point:
    """A pixel position in the upright original image."""

    x: float
    y: float


@dataclass(frozen=True)
class Candidate:
    """A fine category and its probability."""

    fine: str
    probability: float


@dataclass(frozen=True)
class HeatMap:
    """The map of eq. 11 over image patches, scaled to 0…255: `data` holds `height × width` bytes, row by row."""

    height: int
    width: int
    data: bytes


UNWRITTEN = ("logits", "marginal")
"""Fields of an entity that go from the tagger to what judges its entities, in one process."""


@dataclass
class Entity:
    """One mention: where it is in the text, what it is, and where it is seen.

    `text[start:end]` of the post is `text`; words are half-open intervals of the post's tokens.
    `score` is the probability of `fine` that made the last decision about it; `entropy` is in nats (eq. 10), and `hard`
    is the verdict that the reranker is to be asked: the entropy is above γ, or the tagger's confidence below
    `routing.threshold`.
    `seen` is the grounder's verdict: true with a box, false without; None where it did not judge: there is no usable
    image, no grounder, the grounder failed, or its models do not know the entity or the image. `confidence` is None
    where the model that decided has no calibration, and `accepted` then False; `accepted` is None where no threshold is
    configured. `seen_probability` and `box_confidence` are None where the grounder did not judge, or its matcher has no
    calibration.
    """

    text: str
    start: int
    end: int
    word_start: int
    word_end: int
    coarse: str
    fine: str
    score: float
    entropy: float = 0.0
    hard: bool = False
    reranked: bool = False
    confidence: float | None = None  # that span and category are both right
    accepted: bool | None = None  # the confidence is high enough for what was promised
    candidates: list[Candidate] = field(default_factory=list)
    seen: bool | None = None
    match_score: float | None = None  # P_T
    seen_probability: float | None = None  # P_T, calibrated
    point: Point | None = None
    box: Box | None = None
    box_source: str | None = None
    box_score: float | None = None
    box_confidence: float | None = None  # that the box is right
    heatmap: HeatMap | None = None
    # (C_f,) mean fine logits over the words: from the tagger to the filter, never written.
    logits: np.ndarray | None = field(default=None, repr=False, compare=False)
    # The tagger's own probability of exactly this span with this category: to the calibrator, never written.
    marginal: float | None = field(default=None, repr=False, compare=False)

    @property
    def certainty(self) -> float:
        """`confidence`, or `score` where nothing has calibrated it."""
        return self.score if self.confidence is None else self.confidence

    @property
    def is_finite(self) -> bool:
        """Whether all its numbers are; those of a model in half precision may not be."""
        return all(map(math.isfinite, self._numbers()))

    def _numbers(self) -> Iterator[float]:
        parts = (vars(part) for part in (self, self.point, self.box, *self.candidates) if part is not None)
        return (value for part in parts for value in part.values() if isinstance(value, float))

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values of `ENTITY_TYPE`."""
        return asdict(replace(self, logits=None), dict_factory=_written)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Entity:
        """The inverse of `to_dict`."""
        values = dict(values)
        values["candidates"] = [Candidate(**candidate) for candidate in _listed(values.get("candidates"))]
        for name, kind in (("point", Point), ("box", Box), ("heatmap", HeatMap)):
            values[name] = kind(**values[name]) if values.get(name) else None
        return cls(**values)


def _written(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in items if key not in UNWRITTEN}


@dataclass(frozen=True)
class GoldEntity:
    """A gold mention; `boxes` is empty when the entity is not seen."""

    word_start: int
    word_end: int
    fine: str
    boxes: tuple[Box, ...] = ()

    def named(self, post_id: str) -> str:
        """How messages call a mention of a post."""
        return f"post {post_id!r}: the gold mention of the words {self.word_start} to {self.word_end}"

    def why_outside(self, post_id: str, words: int) -> str | None:
        """Why it is no mention of a post with so many words; None if it is one."""
        if 0 <= self.word_start < self.word_end <= words:
            return None
        return f"{self.named(post_id)} is not within the post's {counted(words, 'word')}"


@dataclass
class Post:
    """A row. Stages fill its fields; what is carried between stages but never written comes last.

    `row_id` tells rows of one input apart, as `post_id` need not: the number of the file, in the order of their names,
    times 2³², plus the row's position in it. `image_bytes` is the encoded image; `image` is the decoded, upright RGB
    image as `(h, w, 3)` uint8, perhaps smaller than the original, whose size is `image_width` × `image_height`.
    """

    post_id: str
    text: str
    tokens: list[str] = field(default_factory=list)
    caption: str | None = None
    knowledge: str | None = None
    image_width: int | None = None
    image_height: int | None = None
    entities: list[Entity] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    row_id: int | None = None
    image_bytes: bytes | None = field(default=None, repr=False)
    image_uri: str | None = None
    image: np.ndarray | None = field(default=None, repr=False, compare=False)
    gold: list[GoldEntity] | None = None

    @property
    def status(self) -> Status:
        """The worst that the post's problems allow."""
        statuses = {problem.status for problem in self.problems}
        for status in (Status.REJECTED, Status.DEGRADED):
            if status in statuses:
                return status
        return Status.OK

    @property
    def is_rejected(self) -> bool:
        """True when later stages have nothing to do."""
        return self.status is Status.REJECTED

    @property
    def lacks_image(self) -> bool:
        """True when its image has been asked for, and could not be used."""
        return any(problem.kind.startswith("image_") or problem.stage == LOAD_IMAGE for problem in self.problems)

    def fail(self, stage: str, kind: ProblemKind, message: str) -> None:
        """Record a problem; credentials in the message, as of an image's address, are cut out, and its end if long."""
        # Twice: credentials are looked for in more than is kept, so that none is cut in two and not found.
        message = redacted(message[: 10 * _MESSAGE_CHARS])
        is_long = len(message) > _MESSAGE_CHARS
        self.problems.append(Problem(stage, kind, message[: _MESSAGE_CHARS - 1] + "…" if is_long else message))

    def annotation(self) -> dict[str, Any]:
        """The output row, without `run_id` and `models`, as plain Python values of `ANNOTATION_SCHEMA`."""
        return {
            "post_id": self.post_id,
            "text": self.text,
            "tokens": self.tokens,
            "image_width": self.image_width,
            "image_height": self.image_height,
            "caption": self.caption,
            "knowledge": self.knowledge,
            "entities": [entity.to_dict() for entity in self.entities],
            "status": str(self.status),
            "problems": [asdict(problem) for problem in self.problems],
            "row_id": self.row_id,
        }

    @classmethod
    def from_annotation(cls, row: Mapping[str, Any]) -> Post:
        """The inverse of `annotation`; accepts rows read back from the output, also by pandas or Ray Data."""
        row = {name: None if is_missing(value) else value for name, value in row.items()}
        width, height = row.get("image_width"), row.get("image_height")
        problems = _listed(row.get("problems"))
        return cls(
            post_id=row["post_id"],
            text=row["text"],
            tokens=_listed(row.get("tokens")),
            caption=row.get("caption"),
            knowledge=row.get("knowledge"),
            image_width=None if width is None else int(width),  # pandas has decimals in a column with nulls
            image_height=None if height is None else int(height),
            entities=[Entity.from_dict(entity) for entity in _listed(row["entities"])],
            problems=[Problem(p["stage"], ProblemKind(p["kind"]), p["message"]) for p in problems],
            row_id=row.get("row_id"),
        )


def is_missing(value: Any) -> bool:
    """Whether a row's value is a null: `None`, or NaN or NA, as pandas has it."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or type(value).__name__ == "NAType"


def _listed(values: Any) -> list[Any]:
    """A list's values, none for a null; pandas and Ray Data have arrays, whose truth cannot be asked."""
    return [] if values is None else list(values)


def model_rows(models: Mapping[str, str]) -> list[dict[str, str]]:
    """The `models` of an output row, from role -> `reference@hash`."""
    return [{"role": role, "reference": reference} for role, reference in models.items()]


def gold_from_rows(rows: Sequence[Mapping[str, Any]] | None) -> list[GoldEntity] | None:
    """Gold mentions from the plain values of a `gold` column; None where the column is absent."""
    if rows is None:
        return None
    return [
        GoldEntity(row["word_start"], row["word_end"], row["fine"], tuple(Box(**box) for box in _listed(row["boxes"])))
        for row in rows
    ]


_SCALARS = {
    str: pa.string(),
    ProblemKind: pa.string(),
    int: pa.int32(),
    float: pa.float32(),
    bool: pa.bool_(),
    bytes: pa.binary(),
}


def _struct(kind: Any) -> pa.DataType:
    """A dataclass in Arrow: its fields, without those that are never written."""
    hints = get_type_hints(kind, localns={"np": SimpleNamespace(ndarray=object)})
    return pa.struct([(each.name, _arrow(hints[each.name])) for each in fields(kind) if each.name not in UNWRITTEN])


def _arrow(hint: Any) -> pa.DataType:
    """The Arrow type for an annotation: a scalar, a dataclass, `list[X]`, `tuple[X, ...]` or `X | None`."""
    if (origin := get_origin(hint)) is None:
        return _SCALARS[hint] if hint in _SCALARS else _struct(hint)
    inner = _arrow(get_args(hint)[0])
    return pa.list_(inner) if origin in (list, tuple) else inner


ENTITY_TYPE = _struct(Entity)
GOLD_TYPE = pa.list_(_struct(GoldEntity))

INPUT_SCHEMA = pa.schema(
    [
        ("post_id", pa.string()),
        ("text", pa.string()),
        ("tokens", pa.list_(pa.string())),
        ("image", pa.binary()),
        ("image_uri", pa.string()),
        ("caption", pa.string()),
        ("knowledge", pa.string()),
        ("gold", GOLD_TYPE),
    ]
)
"""What `gem-ray shards` writes and `gem-ray annotate` reads; only `post_id` and `text` are required of a user's own."""

SCHEMA_VERSION = 2
"""Of `ANNOTATION_SCHEMA`; stands in the metadata of every published file."""
SCHEMA_VERSION_KEY = b"gem_ray.schema_version"

ANNOTATION_SCHEMA = pa.schema(
    [
        ("post_id", pa.string()),
        ("text", pa.string()),
        ("tokens", pa.list_(pa.string())),
        ("image_width", pa.int32()),
        ("image_height", pa.int32()),
        ("caption", pa.string()),
        ("knowledge", pa.string()),
        ("entities", pa.list_(ENTITY_TYPE)),
        ("status", pa.string()),
        ("problems", pa.list_(_struct(Problem))),
        ("row_id", pa.int64()),
        ("run_id", pa.string()),
        ("models", pa.list_(pa.struct([("role", pa.string()), ("reference", pa.string())]))),
    ],
    metadata={SCHEMA_VERSION_KEY: str(SCHEMA_VERSION)},
)
"""What `gem-ray annotate` writes, one row a post."""
