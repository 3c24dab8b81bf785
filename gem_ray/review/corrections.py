"""Label Studio's export, read back: what people made of the predictions, as gold.

The format is that of its JSON export (labelstud.io/guide/export): tasks with `data` and `annotations`, whose `result`
has spans, boxes and relations as the predictions have them.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from gem_ray.data.tokenize import word_spans
from gem_ray.evaluation.rules import touched_words, words_of
from gem_ray.export.label_studio import IMAGE, TEXT, without_nul
from gem_ray.records import Box, GoldEntity, Post
from gem_ray.review.folder import Review
from gem_ray.taxonomy import LabelSet

_SHOWN = 5  # tasks that are named in one error
_LINE_END = r"\n"  # two characters, as Label Studio's editor writes one in the text of a span that was marked by hand
UNSEEN = "checks without a time, as annotations have that Label Studio makes of predictions: has anybody looked?"
_READ = {"labels", "rectanglelabels", "relation"}


@dataclass(frozen=True)
class Corrections:
    """What an export says of a review's posts.

    Attributes:
        posts: row id -> the post with its gold.
        with_image: rows whose image the checker saw.
        remarks: what is to be said of some tasks -> of how many.
    """

    posts: dict[int, Post]
    with_image: set[int]
    remarks: Counter[str] = field(default_factory=Counter)

    def in_order(self, review: Review) -> list[Post]:
        """The checked posts at the beginning of the review, up to the first that is not checked.

        They alone are the sample that was drawn: posts beyond a gap were checked because somebody chose to.
        """
        checked = []
        for post in review.posts:
            if post.row_id not in self.posts:
                break
            checked.append(self.posts[post.row_id])
        return checked


def read_corrections(export: Path, review: Review) -> Corrections:
    """Read a JSON export of Label Studio.

    A task counts as checked when it has an annotation that was not skipped: the one marked as ground truth, or else the
    last. Tasks are known by their `row_id` and `post_id`, as rows of another run's input may have the same numbers;
    those of other reviews are passed over.

    Args:
        export: the file.
        review: whose tasks were imported.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON export, its tasks are not the review's, or something in them cannot be gold: the
            message names the tasks, and what to mend in Label Studio.
    """
    known = {post.row_id: post for post in review.posts if post.row_id is not None}
    remarks: Counter[str] = Counter()
    chosen: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
    tasks = _read_tasks(export)
    for task in tasks:
        row_id = task["data"].get("row_id")
        if row_id not in known or task["data"].get("post_id") != without_nul(known[row_id]).post_id:
            remarks["tasks of other posts, passed over"] += 1
            continue
        finished = [each for each in task["annotations"] if not each.get("was_cancelled")]
        if not finished:
            remarks["tasks that nobody has checked"] += 1
            continue
        candidates = finished if row_id not in chosen else [*finished, chosen[row_id][1]]
        remarks["posts checked more than once, of which the last check counts"] += len(candidates) > 1
        best = max(candidates, key=_precedence)
        if row_id not in chosen or best is not chosen[row_id][1]:
            chosen[row_id] = task, best
    if tasks and remarks["tasks of other posts, passed over"] == len(tasks):
        raise ValueError(f"{export} has no task of the review {review.path}: their ids are none of its posts")
    corrected, wrong = {}, []
    for row_id, (task, annotation) in chosen.items():
        remarks[UNSEEN] += "lead_time" in annotation and annotation["lead_time"] is None
        where = f"task {task.get('id')} (post {known[row_id].post_id!r})"
        try:
            corrected[row_id] = _corrected(known[row_id], task["data"], annotation["result"], review.facts.label_set)
            for kind in sorted({str(part.get("type")) for part in annotation["result"]} - _READ):
                remarks[f"tasks with {kind}, which are not read: the posts count with their spans and boxes"] += 1
        except ValueError as error:
            wrong.append(f"{where}: {error}")
        except (AttributeError, KeyError, TypeError) as error:
            wrong.append(f"{where}: a region is broken, save it anew: {type(error).__name__} {error}")
    if wrong:
        more = f"\nand {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        listed = "\n".join(wrong[:_SHOWN])
        raise ValueError(f"{export}: mend in Label Studio, and export again:\n{listed}{more}")
    shown = {row_id for row_id, (task, _) in chosen.items() if task["data"].get(IMAGE)}
    hidden = sum(bool(post.image_width) for row_id, post in corrected.items() if row_id not in shown)
    remarks["posts whose image the checker was not shown: their gold has no boxes, and says nothing of it"] += hidden
    return Corrections(corrected, shown, +remarks)


def _read_tasks(export: Path) -> list[dict[str, Any]]:
    refusal = f"{export} is not Label Studio's JSON export: choose the format JSON, neither JSON-MIN nor another"
    try:
        tasks = json.loads(export.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{refusal} ({error})") from None
    if not isinstance(tasks, list):
        raise ValueError(refusal)
    for task in tasks:
        annotations = task.get("annotations") if isinstance(task, dict) else None
        if not isinstance(annotations, list) or not isinstance(task.get("data"), dict):
            raise ValueError(refusal)
        if not all(isinstance(each, dict) and isinstance(each.get("result"), list) for each in annotations):
            raise ValueError(refusal)
    return tasks


def _precedence(annotation: Mapping[str, Any]) -> tuple[bool, str, int]:
    times = annotation.get("updated_at") or annotation.get("created_at") or ""
    return bool(annotation.get("ground_truth")), times, annotation.get("id") or 0


def _corrected(post: Post, data: Mapping[str, Any], result: list[dict[str, Any]], labels: LabelSet) -> Post:
    if data.get(TEXT) != without_nul(post).text:
        raise ValueError("its text is not the post's")
    tokens = words_of(post)
    words = word_spans(post.text, tokens)
    spans = {part["id"]: _span(part, data[TEXT], words, labels) for part in result if part.get("type") == "labels"}
    # Over an image that was not shown, the boxes are still the prediction's: nobody has checked them.
    drawn = result if data.get(IMAGE) else []
    boxes = {part["id"]: part for part in drawn if part.get("type") == "rectanglelabels"}
    of_span: dict[str, list[Box]] = defaultdict(list)
    for span_id, box_id in _relations(result, spans, boxes):
        of_span[span_id].append(_box(boxes[box_id], post))
    golds = [replace(gold, boxes=tuple(of_span[span_id])) for span_id, gold in spans.items()]
    return replace(post, tokens=tokens, entities=[], problems=[], gold=_with_shared_boxes(_distinct(golds), tokens))


def _span(part: Mapping[str, Any], text: str, words: list[tuple[int, int]], labels: LabelSet) -> GoldEntity:
    value = part["value"]
    start, end = int(value["start"]), int(value["end"])
    quoted = text[start:end]
    if value.get("text") is not None and _visible(value["text"]) != _visible(quoted):
        raise ValueError(f"the span {value['text']!r} is not what stands at its characters {start} to {end}")
    first, last = touched_words(start, end, words)
    if first == last:
        raise ValueError(f"the span {quoted!r} holds no word; delete it")
    return GoldEntity(first, last, _category(value.get("labels"), quoted, labels))


def _visible(text: str) -> list[str]:
    return text.replace(_LINE_END, " ").split()


def _category(names: Any, quoted: str, labels: LabelSet) -> str:
    if not isinstance(names, list) or len(names) != 1:
        raise ValueError(f"the span {quoted!r} has {len(names or ())} categories; give it one")
    if names[0] not in labels.parent:
        raise ValueError(f"the span {quoted!r} is {names[0]!r}, which is not a category of {labels.name}")
    return str(names[0])


def _relations(
    result: list[dict[str, Any]], spans: Mapping[str, GoldEntity], boxes: Mapping[str, dict[str, Any]]
) -> list[tuple[str, str]]:
    """Span and box of each relation; a box without one belongs to the only span of its category.

    Raises:
        ValueError: there is no such span, or there are several.
    """
    ends = [(part["from_id"], part["to_id"]) for part in result if part.get("type") == "relation"]
    pairs = {
        (span, box)
        for one, other in ends
        for span, box in ((one, other), (other, one))
        if span in spans and box in boxes
    }
    for box in boxes.keys() - {box for _, box in pairs}:
        names = boxes[box]["value"].get("rectanglelabels") or [None]
        own = [span for span, gold in spans.items() if gold.fine == names[0]]
        if len(own) != 1:
            raise ValueError(f"a box of category {names[0]} is related to no span; relate it to the span that it shows")
        pairs.add((own[0], box))
    return sorted(pairs)


def _box(part: Mapping[str, Any], post: Post) -> Box:
    """A rectangle in percent, turned about its upper left corner, as the upright box around it in pixels."""
    value = part["value"]
    width, height = part.get("original_width") or post.image_width, part.get("original_height") or post.image_height
    if not width or not height:
        raise ValueError("the size of its image is not known, so its boxes mean nothing; save the task again")
    left, top, across, down = (value[name] / 100 for name in ("x", "y", "width", "height"))
    left, across, top, down = left * width, across * width, top * height, down * height
    turn = math.radians(value.get("rotation") or 0)
    corners = [
        (left + x * math.cos(turn) - y * math.sin(turn), top + x * math.sin(turn) + y * math.cos(turn))
        for x in (0, across)
        for y in (0, down)
    ]
    xs, ys = zip(*corners, strict=True)
    box = Box(max(0.0, min(xs)), max(0.0, min(ys)), min(float(width), max(xs)), min(float(height), max(ys)))
    if box.x1 >= box.x2 or box.y1 >= box.y2:
        raise ValueError("a box is empty, or lies beside its image; delete it")
    return box


def _distinct(golds: Iterable[GoldEntity]) -> list[GoldEntity]:
    """In the order of the words; the same span of the same category twice is one.

    Raises:
        ValueError: two spans share words.
    """
    merged: dict[tuple[int, int, str], GoldEntity] = {}
    for gold in golds:
        key = gold.word_start, gold.word_end, gold.fine
        known = merged.get(key)
        merged[key] = replace(gold, boxes=known.boxes + gold.boxes) if known else gold
    found = sorted(merged.values(), key=lambda gold: (gold.word_start, gold.word_end))
    for one, other in pairwise(found):
        if other.word_start < one.word_end:
            raise ValueError(
                f"a {one.fine} and a {other.fine} share words {other.word_start + 1} to {one.word_end}; keep one"
            )
    return found


def _with_shared_boxes(golds: list[GoldEntity], tokens: list[str]) -> list[GoldEntity]:
    """Every mention of one text has the boxes of all its mentions, as in the scoring protocol."""
    of_text: dict[str, tuple[Box, ...]] = {}
    texts = [" ".join(tokens[gold.word_start : gold.word_end]) for gold in golds]
    for text, gold in zip(texts, golds, strict=True):
        of_text[text] = tuple(dict.fromkeys((*of_text.get(text, ()), *gold.boxes)))
    return [replace(gold, boxes=of_text[text]) for text, gold in zip(texts, golds, strict=True)]
