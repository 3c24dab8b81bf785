"""One self-contained HTML page that shows annotated posts: entities in the text, boxes and heat maps in the image."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from gem_ray.config import ImageConfig, parse_config
from gem_ray.data.files import whole_text
from gem_ray.data.images import ImageError, decode_image
from gem_ray.data.tokenize import word_spans
from gem_ray.evaluation.joins import matched, with_distinct_ids
from gem_ray.evaluation.metrics import Report, evaluate
from gem_ray.evaluation.predictions import iterate_predictions, read_images, read_inputs, read_run
from gem_ray.evaluation.report import TASK_TITLES, percent
from gem_ray.evaluation.rules import EvaluationError, Rules, Verdict, judge, words_of
from gem_ray.records import Box, Entity, GoldEntity, Post
from gem_ray.taxonomy import FMNERG, LABEL_SETS, LabelSet

# By post id: a mapping, a function, or pairs in any order, which are read once and held one at a time.
ImageSource = Mapping[str, bytes] | Callable[[str], bytes | None] | Iterable[tuple[str, bytes]]

_JPEG_QUALITY = 78


def write_gallery(
    posts: Sequence[Post],
    out: Path,
    *,
    images: ImageSource,
    gold: Mapping[str, Sequence[GoldEntity]] | None = None,
    title: str = "gem-ray gallery",
    labels: LabelSet = FMNERG,
    report: Report | None = None,
    facts: Mapping[str, str] | None = None,
    max_image_side: int = 384,
) -> None:
    """Write the page.

    Args:
        posts: annotated posts, in the order in which they are shown.
        out: the HTML file.
        images: the encoded images by post id; posts without one are shown without.
        gold: post id -> its gold mentions, where they are known: what is wrong is then marked.
        title: heading of the page.
        labels: the categories, and what the marks compare.
        report: scores to show in the heading; its overlap is also the marks'.
        facts: what is known of the run, for the heading.
        max_image_side: longer side of the images in the page, in pixels.
    """
    rules = Rules(labels, iou=report.iou) if report else Rules(labels)
    script = _asset("gallery_cards.js") + _asset("gallery.js")
    stream = (
        page_environment()
        .get_template("gallery.html.j2")
        .stream(
            title=title,
            style=Markup(_asset("gallery.css")),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            data={
                "coarse": list(labels.coarse),
                "posts": [_post_data(post, (gold or {}).get(post.post_id), rules) for post in posts],
            },
            # A generator: the images pass through one at a time, however many there are.
            pictures=_pictures(posts, _image_pairs(posts, images), max_image_side),
            scores=[(TASK_TITLES[name], scores) for name, scores in report.tasks.items()] if report else [],
            report=report,
            facts=facts or {},
        )
    )
    with whole_text(out) as file:
        file.writelines(stream)


def write_gallery_of_run(annotations: Path | str, images: Path | str, out: Path, *, limit: int = 5000) -> None:
    """Write the page of a run, in the order of its input; with scores and marks where the input has gold.

    Args:
        annotations: an output directory of `annotate`, local or `s3://`.
        images: the shards that were annotated, local or `s3://`, or a folder of images named by post id.
        out: the HTML file.
        limit: only the first posts.

    Raises:
        FileNotFoundError: nothing is at `annotations` or `images`.
        EvaluationError: what is there are no annotations, or none of the posts that were annotated.
    """
    run = read_run(annotations)
    config = parse_config(run.get("config", {}))
    labels = LABEL_SETS[config.labels]
    inputs = with_distinct_ids(read_inputs(images, annotations))
    order = {post.post_id: position for position, post in enumerate(inputs[:limit])}
    annotated = iterate_predictions(annotations)
    posts = [post for post in matched(annotated, inputs) if post.post_id in order] if inputs else list(annotated)
    if not posts:
        raise EvaluationError(f"{annotations} annotates none of the posts at {images}")
    posts = sorted(posts, key=lambda post: order.get(post.post_id, 0))[:limit]
    gold = {post.post_id: post for post in inputs[:limit] if post.gold is not None}
    judged = [post for post in posts if post.post_id in gold]
    write_gallery(
        posts,
        out,
        images=read_images(images, config.image, {post.post_id for post in posts}, annotations),
        gold={post_id: post.gold or [] for post_id, post in gold.items()},
        title="Annotated posts",
        labels=labels,
        report=evaluate(gold.values(), judged, labels=labels) if gold else None,
        facts=_run_facts(run),
    )


def _run_facts(run: Mapping[str, Any]) -> dict[str, str]:
    """What a reader asks first of a run."""
    if not run:
        return {}
    return {
        "input": run["input"],
        "run": run["run_id"],
        "posts a second": f"{run['rows_per_second']:.1f}, start-up included",
        "reranked": f"{100 * run['reranked_share']:.1f} % of the mentions",
        **run["models"],
    }


def page_environment() -> Environment:
    """Of the templates of this package's pages."""
    environment = Environment(
        loader=PackageLoader("gem_ray.evaluation", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    return environment


def _asset(name: str) -> str:
    return (resources.files("gem_ray.evaluation") / name).read_text(encoding="utf-8")


def _image_pairs(posts: Sequence[Post], images: ImageSource) -> Iterable[tuple[str, bytes | None]]:
    if isinstance(images, Mapping):
        return images.items()
    if callable(images):
        return ((post.post_id, images(post.post_id)) for post in posts)
    return images


def _pictures(
    posts: Sequence[Post], pairs: Iterable[tuple[str, bytes | None]], max_side: int
) -> Iterator[dict[str, Any]]:
    """A small JPEG for each post that has a readable image, with the size of the upright original."""
    positions = {post.post_id: position for position, post in enumerate(posts)}
    config = ImageConfig(max_side=max_side)
    for post_id, data in pairs:
        if not data or post_id not in positions:
            continue
        with suppress(ImageError):
            image = decode_image(data, config)
            buffer = io.BytesIO()
            Image.fromarray(image.pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY)
            yield {
                "position": positions[post_id],
                "width": image.width,
                "height": image.height,
                "jpeg": base64.b64encode(buffer.getvalue()).decode(),
            }


def _post_data(post: Post, gold: Sequence[GoldEntity] | None, rules: Rules) -> dict[str, Any]:
    verdicts: Sequence[Verdict | None] = [None] * len(post.entities)
    missed: Sequence[GoldEntity] = ()
    if gold is not None:
        verdicts, missed = judge(post, gold, rules)
    return {
        "id": post.post_id,
        "text": post.text,
        "status": post.status,
        "caption": post.caption,
        "problems": [asdict(problem) for problem in post.problems],
        "entities": [_entity_data(*judged) for judged in zip(post.entities, verdicts, strict=True)],
        "missed": _missed_data(post, missed, rules),
    }


def _entity_data(entity: Entity, verdict: Verdict | None) -> dict[str, Any]:
    heatmap = entity.heatmap
    return {
        "start": entity.start,
        "end": entity.end,
        "coarse": entity.coarse,
        "fine": entity.fine,
        "score": _number(entity.score),
        "entropy": _number(entity.entropy),
        "reranked": entity.reranked,
        "candidates": [[candidate.fine, _number(candidate.probability)] for candidate in entity.candidates],
        "seen": entity.seen,
        "match": _number(entity.match_score),
        "point": [_number(entity.point.x), _number(entity.point.y)] if entity.point else None,
        "box": _box_data(entity.box) if entity.box else None,
        "source": entity.box_source,
        "boxScore": _number(entity.box_score),
        "heat": [heatmap.width, heatmap.height, base64.b64encode(heatmap.data).decode()] if heatmap else None,
        "verdict": _verdict_data(verdict) if verdict else None,
    }


def _verdict_data(verdict: Verdict) -> dict[str, Any]:
    gold = verdict.gold
    return {
        "span": verdict.span,
        "category": verdict.category,
        "region": verdict.region,
        "gold": gold.category if gold else None,
        "boxes": [_box_data(box) for box in gold.boxes] if gold else [],
    }


def _missed_data(post: Post, missed: Sequence[GoldEntity], rules: Rules) -> list[dict[str, Any]]:
    if not missed:
        return []
    words = word_spans(post.text, words_of(post))
    return [
        {
            "start": words[entity.word_start][0],
            "end": words[entity.word_end - 1][1],
            "coarse": rules.labels.parent[rules.category(entity.fine)],
            "fine": rules.category(entity.fine),
            "boxes": [_box_data(box) for box in entity.boxes],
        }
        for entity in missed
        if entity.word_end <= len(words)  # a rejected post may have lost its words
    ]


def _box_data(box: Box) -> list[float | None]:
    return [_number(value) for value in (box.x1, box.y1, box.x2, box.y2)]


def _number(value: float | None) -> float | None:
    """Short, and never NaN, which is no JSON."""
    return round(value, 4) if value is not None and math.isfinite(value) else None
