"""The error report: a page of what is wrong, with charts, and the worst posts with their pictures."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gem_ray.config import ImageConfig
from gem_ray.data.files import whole_text
from gem_ray.data.images import ImageError, decode_image
from gem_ray.data.tokenize import word_spans
from gem_ray.evaluation.errors import Errors, PostErrors
from gem_ray.evaluation.rules import Rules, Verdict, judge
from gem_ray.evaluation.score_report import TASK_TITLES
from gem_ray.look.pages import jpeg, named, page, tenths
from gem_ray.records import Entity, GoldEntity
from gem_ray.taxonomy import FMNERG, LabelSet

_SIDE = 480  # of the pictures, in pixels
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
    html = page("gem_ray.evaluation", "errors.html.j2").render(
        title=title,
        errors=errors,
        tasks=[(TASK_TITLES[name], scores) for name, scores in errors.report.tasks.items()],
        confidence=tenths(errors.confidence),
        boundary_rows=[(f"{words:+d}", count) for words, count in sorted(errors.boundary_words.items())],
        matrix=_matrix(errors, labels),
        pairs=errors.confused[:_PAIRS],
        cases=[_case(case, (images or {}).get(case.post.post_id), Rules(labels)) for case in errors.worst],
    )
    with whole_text(out) as file:
        file.write(html)


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
    """What is wrong in a post; each mistake has a number, which stands at its boxes in the picture, too."""
    verdicts, missed = judge(case.post, case.gold.gold or (), rules)
    words = word_spans(case.post.text, case.post.tokens)
    judged = zip(case.post.entities, verdicts, strict=True)
    mistakes = [_entity(*pair, rules) for pair in judged if not (pair[1].category and pair[1].region)]
    mistakes += [_missed(case.post.text, mention, words, rules) for mention in missed]
    return {
        "id": case.post.post_id,
        "text": case.post.text,
        "mistakes": mistakes,
        "picture": _picture(image) if image else None,
    }


def _entity(entity: Entity, verdict: Verdict, rules: Rules) -> dict[str, Any]:
    """A predicted mention that is wrong, and how."""
    gold, fine = verdict.gold, rules.category(entity.fine)
    says = []
    if gold is None:
        says.append(("span", "gold has no mention of these words"))
    elif not verdict.category:
        says.append(("category", f"gold: {named(gold.category)}"))
    if gold is not None and not verdict.region:
        says.append(("region", _region(entity, verdict, rules)))
    return {
        "text": entity.text,
        "coarse": rules.labels.parent[fine],
        "fine": fine,
        "says": says,
        "entity": entity,
        "predicted": [entity.box] if entity.box else [],
        "gold": gold.boxes if gold else (),
    }


def _region(entity: Entity, verdict: Verdict, rules: Rules) -> str:
    if verdict.iou is not None:
        return f"IoU {verdict.iou:.2f} with gold's box; it is right above {rules.iou:g}"
    if entity.box:
        return "a box is predicted, and gold sees it nowhere"
    return f"{'not judged' if entity.seen is None else 'not seen'}, and gold has a box"


def _missed(text: str, mention: GoldEntity, words: list[tuple[int, int]], rules: Rules) -> dict[str, Any]:
    """A gold mention whose span was not predicted."""
    start, end = words[mention.word_start][0], words[mention.word_end - 1][1]
    fine = rules.category(mention.fine)
    return {
        "text": text[start:end],
        "coarse": rules.labels.parent[fine],
        "fine": fine,
        "says": [("missed", "gold sees it in the image" if mention.boxes else "")],
        "entity": None,
        "predicted": [],
        "gold": mention.boxes,
    }


def _picture(image: bytes) -> dict[str, Any] | None:
    """A small JPEG, and the size of the original, in whose pixels boxes are."""
    with suppress(ImageError):
        decoded = decode_image(image, ImageConfig(max_side=_SIDE))
        return {"jpeg": jpeg(decoded.pixels), "width": decoded.width, "height": decoded.height}
    return None
