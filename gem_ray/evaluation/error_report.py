"""The error report: one self-contained HTML page without scripts, readable in grey print."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from gem_ray.config import ImageConfig
from gem_ray.data.files import whole_text
from gem_ray.data.images import ImageError, decode_image
from gem_ray.data.tokenize import word_spans
from gem_ray.evaluation.errors import Errors, PostErrors
from gem_ray.evaluation.gallery import page_environment
from gem_ray.evaluation.report import TASK_TITLES
from gem_ray.evaluation.rules import Rules, Verdict, judge
from gem_ray.records import Entity, GoldEntity
from gem_ray.taxonomy import FMNERG, LabelSet

_SIDE = 320  # of the pictures, in pixels
_JPEG_QUALITY = 78
_MOST_CONFUSED = 24  # categories in the matrix; all pairs are in the list
_PAIRS = 40


def write_error_report(
    errors: Errors,
    out: Path,
    *,
    images: Mapping[str, bytes] | None = None,
    labels: LabelSet = FMNERG,
    title: str = "Error report",
) -> None:
    """Write the page.

    Args:
        errors: what `find_errors` found.
        out: the HTML file.
        images: encoded images by post id; worst cases without one are shown without.
        labels: the categories.
        title: heading of the page.
    """
    page = (
        page_environment()
        .get_template("errors.html.j2")
        .render(
            title=title,
            errors=errors,
            tasks=[(TASK_TITLES[name], scores) for name, scores in errors.report.tasks.items()],
            matrix=_matrix(errors, labels),
            pairs=errors.confused[:_PAIRS],
            cases=[_case(case, (images or {}).get(case.post.post_id), Rules(labels)) for case in errors.worst],
        )
    )
    with whole_text(out) as file:
        file.write(page)


def _matrix(errors: Errors, labels: LabelSet) -> dict[str, Any]:
    """Rows are gold, columns predicted: the categories with the most confusions, in the label set's order."""
    wrong = dict.fromkeys(labels.fine, 0)
    for (gold, predicted), count in errors.confused:
        wrong[gold] += count
        wrong[predicted] += count
    most = sorted(wrong, key=lambda name: -wrong[name])[:_MOST_CONFUSED]
    chosen = [name for name in labels.fine if name in most and wrong[name]]
    totals = {name: sum(n for (gold, _), n in errors.confusion.items() if gold == name) for name in chosen}
    rows = [
        {
            "category": gold,
            "cells": [
                {
                    "count": (count := errors.confusion[gold, predicted]),
                    "share": count / totals[gold] if totals[gold] else 0.0,
                    "right": gold == predicted,
                }
                for predicted in chosen
            ],
        }
        for gold in chosen
    ]
    return {"categories": chosen, "rows": rows}


def _case(case: PostErrors, image: bytes | None, rules: Rules) -> dict[str, Any]:
    verdicts, missed = judge(case.post, case.gold.gold or (), rules)
    entities = [_entity(*pair) for pair in zip(case.post.entities, verdicts, strict=True)]
    words = word_spans(case.post.text, case.post.tokens)
    return {
        "id": case.post.post_id,
        "text": case.post.text,
        "weight": case.weight,
        "entities": entities,
        "missed": [_missed(case.post.text, mention, words, rules) for mention in missed],
        "picture": _picture(case, image),
    }


def _entity(entity: Entity, verdict: Verdict) -> dict[str, Any]:
    gold = verdict.gold
    return {
        "text": entity.text,
        "fine": entity.fine,
        "gold": gold.category if gold else None,
        "span": verdict.span,
        "category": verdict.category,
        "region": verdict.region,
        "found": {True: "a box", False: "not seen", None: "not judged"}[entity.seen],
        "score": entity.score,
        "entropy": entity.entropy,
        "reranked": entity.reranked,
        "candidates": [(known.fine, known.probability) for known in entity.candidates],
    }


def _missed(text: str, mention: GoldEntity, words: list[tuple[int, int]], rules: Rules) -> dict[str, Any]:
    start, end = words[mention.word_start][0], words[mention.word_end - 1][1]
    return {"text": text[start:end], "fine": rules.category(mention.fine), "box": bool(mention.boxes)}


def _picture(case: PostErrors, image: bytes | None) -> dict[str, Any] | None:
    """A small JPEG, and the boxes over it in pixels of the original: predicted ones, and gold's."""
    if image is None:
        return None
    with suppress(ImageError):
        decoded = decode_image(image, ImageConfig(max_side=_SIDE))
        buffer = io.BytesIO()
        Image.fromarray(decoded.pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY)
        return {
            "jpeg": base64.b64encode(buffer.getvalue()).decode(),
            "width": decoded.width,
            "height": decoded.height,
            "predicted": [(entity.box, entity.text) for entity in case.post.entities if entity.box],
            "gold": [box for mention in case.gold.gold or () for box in mention.boxes],
        }
    return None
