"""One self-contained HTML page that shows annotated posts: entities in the text, boxes and heat maps in the image."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gem_ray.config import ImageConfig, parse_config
from gem_ray.data.files import whole_text
from gem_ray.data.images import ImageError, decode_image
from gem_ray.data.output import ANNOTATIONS
from gem_ray.data.tokenize import word_spans
from gem_ray.evaluation.joins import matched, with_distinct_ids
from gem_ray.evaluation.metrics import ScoreReport, evaluate
from gem_ray.evaluation.predictions import iterate_predictions, read_images, read_inputs, read_run
from gem_ray.evaluation.rules import EvaluationError, Rules, Verdict, judge, words_of
from gem_ray.evaluation.score_report import TASK_TITLES
from gem_ray.look.pages import jpeg, page
from gem_ray.records import GoldEntity, Post
from gem_ray.taxonomy import FMNERG, LABEL_SETS, LabelSet

# By post id: a mapping, a function, or pairs in any order, which are read once and held one at a time.
ImageSource = Mapping[str, bytes] | Callable[[str], bytes | None] | Iterable[tuple[str, bytes]]


def write_gallery(
    posts: Sequence[Post],
    out: Path,
    *,
    images: ImageSource,
    gold: Mapping[str, Sequence[GoldEntity]] | None = None,
    title: str = "gem-ray gallery",
    labels: LabelSet = FMNERG,
    report: ScoreReport | None = None,
    facts: Mapping[str, str] | None = None,
    gamma: float | None = None,
    annotations: str | None = None,
    max_image_side: int = 384,
) -> None:
    """Write the page.

    Args:
        posts: annotated posts, in the order of the input.
        out: the HTML file.
        images: the encoded images by post id; posts without one are shown without.
        gold: post id -> its gold mentions, where they are known: what is wrong is then marked.
        title: heading of the page.
        labels: the categories, and what the marks compare.
        report: scores to show in the heading; its overlap is also the marks'.
        facts: what is known of the run, for the heading.
        gamma: entropy in nats above which entities went to the reranker, where it is known.
        annotations: the folder of the run's Parquet files, where there is one.
        max_image_side: longer side of the images in the page, in pixels.
    """
    rules = Rules(labels, iou=report.iou) if report else Rules(labels)
    stream = page("gem_ray.evaluation", "gallery.html.j2", "gallery.js").stream(
        title=title,
        data={
            "coarse": list(labels.coarse),
            "gamma": gamma,
            "annotations": annotations,
            "posts": [_post_data(post, (gold or {}).get(post.post_id), rules) for post in posts],
        },
        # A generator: the images pass through one at a time, however many there are.
        pictures=_pictures(posts, _image_pairs(posts, images), max_image_side),
        scores=[(TASK_TITLES[name], scores) for name, scores in report.tasks.items()] if report else [],
        report=report,
        facts=facts or {},
    )
    with whole_text(out) as file:
        file.writelines(stream)


def write_gallery_of_run(shards: Path | str, annotations: Path | str, out: Path, *, limit: int = 5000) -> None:
    """Write the page of a run, in the order of its input; with scores and marks where the input has gold.

    Args:
        shards: that were annotated, local or `s3://`, or a folder of images named by post id.
        annotations: an output directory of `annotate`, local or `s3://`.
        out: the HTML file.
        limit: only the first posts.

    Raises:
        FileNotFoundError: nothing is at `shards` or `annotations`.
        EvaluationError: what is there are no annotations, or none of the posts that were annotated.
    """
    run = read_run(annotations)
    config = parse_config(run.get("config", {}))
    labels = LABEL_SETS[config.labels]
    inputs = with_distinct_ids(read_inputs(shards, annotations))
    order = {post.post_id: position for position, post in enumerate(inputs[:limit])}
    annotated = iterate_predictions(annotations)
    posts = [post for post in matched(annotated, inputs) if post.post_id in order] if inputs else list(annotated)
    if not posts:
        raise EvaluationError(f"{annotations} annotates none of the posts at {shards}")
    posts = sorted(posts, key=lambda post: order.get(post.post_id, 0))[:limit]
    gold = {post.post_id: post for post in inputs[:limit] if post.gold is not None}
    judged = [post for post in posts if post.post_id in gold]
    write_gallery(
        posts,
        out,
        images=read_images(shards, config.image, {post.post_id for post in posts}, annotations),
        gold={post_id: post.gold or [] for post_id, post in gold.items()},
        title="Annotated posts",
        labels=labels,
        report=evaluate(gold.values(), judged, labels=labels) if gold else None,
        facts=_run_facts(run),
        gamma=run.get("gamma"),
        annotations=f"{str(annotations).rstrip('/').removesuffix(f'/{ANNOTATIONS}')}/{ANNOTATIONS}",
    )


def _run_facts(run: Mapping[str, Any]) -> dict[str, str]:
    """What a reader asks first of a run."""
    if not run:
        return {}
    begun = {"input": run["input"], "run": run["run_id"]}
    if "rows_per_second" not in run:
        return {**begun, "finished": "not yet", **run["models"]}
    share = run.get("accepted_share")
    accepted = {} if share is None else {"accepted": f"{100 * share:.1f} % of the mentions"}
    return {
        **begun,
        "posts a second": f"{run['rows_per_second']:.1f}, start-up included",
        "reranked": f"{100 * run['reranked_share']:.1f} % of the mentions",
        **accepted,
        **run["models"],
    }


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
            yield {
                "position": positions[post_id],
                "width": image.width,
                "height": image.height,
                "jpeg": jpeg(image.pixels),
            }


def _post_data(post: Post, gold: Sequence[GoldEntity] | None, rules: Rules) -> dict[str, Any]:
    """The output row; the verdict on each entity, null where there is no gold; and the gold mentions that it misses."""
    verdicts: Sequence[Verdict | None] = [None] * len(post.entities)
    missed: Sequence[GoldEntity] = ()
    if gold is not None:
        verdicts, missed = judge(post, gold, rules)
    more = {"verdicts": [verdict and _verdict(verdict) for verdict in verdicts], "missed": _missed(post, missed, rules)}
    plain: dict[str, Any] = _plain(post.annotation() | more)
    return plain


def _verdict(verdict: Verdict) -> dict[str, Any]:
    gold = verdict.gold
    return {
        "span": verdict.span,
        "category": verdict.category,
        "region": verdict.region,
        "iou": verdict.iou,
        "gold": gold.category if gold else None,
        "boxes": [asdict(box) for box in gold.boxes] if gold else [],
    }


def _missed(post: Post, missed: Sequence[GoldEntity], rules: Rules) -> list[dict[str, Any]]:
    if not missed:
        return []
    words = word_spans(post.text, words_of(post))
    return [
        {
            "text": post.text[(start := words[entity.word_start][0]) : (end := words[entity.word_end - 1][1])],
            "start": start,
            "end": end,
            "coarse": rules.labels.parent[rules.category(entity.fine)],
            "fine": rules.category(entity.fine),
            "boxes": [asdict(box) for box in entity.boxes],
        }
        for entity in missed
        if entity.word_end <= len(words)  # a rejected post may have lost its words
    ]


def _plain(value: Any) -> Any:
    """As JSON can hold it: numbers are short, and never NaN; bytes in base64."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value
