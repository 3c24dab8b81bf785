"""What the embedded matcher reaches on fresh scenes, and what is chosen for it on generated dev posts."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BertTokenizer, BlipForImageTextRetrieval

from gem_ray.config import ImageConfig
from gem_ray.data.emblems import EMBLEMS
from gem_ray.data.generated import Scene, generate, make_scene
from gem_ray.data.images import ImageLoader
from gem_ray.grounding.blip import load_blip
from gem_ray.grounding.decision import Decision, best_threshold
from gem_ray.grounding.matcher import ImageProcessor, Match, Matcher, MatchQuery, TextProcessor
from gem_ray.grounding.pairs import gold_pairs
from gem_ray.grounding.trace import peak
from gem_ray.nano.scenes import pick_emblems
from gem_ray.records import Box


def measure(model: BlipForImageTextRetrieval, folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Matching and tracing on fresh scenes, through the product's own `Matcher`.

    Every scene is asked for what it shows, for the namesakes of that, and for as many random emblems that it lacks.

    Returns:
        `balanced_accuracy` (mean of the shares right among present and absent names), `namesake_accuracy` (the share
        right among absent namesakes), and `peak_in_box`, for each layer the share of present names whose peak lies in a
        gold box.
    """
    rng = np.random.default_rng([seed, count])
    scenes = [make_scene(rng, pick_emblems(rng)) for _ in range(count)]
    asked: list[tuple[MatchQuery, _Presence]] = []
    for index, scene in enumerate(scenes):
        shown = {EMBLEMS.index(instance.emblem) for instance in scene.instances}
        alike = {other for emblem in shown for other in NAMESAKES[emblem]} - shown
        lacking = [e for e in range(len(EMBLEMS)) if e not in shown | alike]
        random = rng.choice(lacking, size=len(shown) + 1, replace=False)
        for presence, emblems in ((_Presence.SHOWN, shown), (_Presence.NAMESAKE, alike), (_Presence.ABSENT, random)):
            asked += [(MatchQuery(index, EMBLEMS[e].name, EMBLEMS[e].fine), presence) for e in emblems]
    queries = [query for query, _ in asked]
    kinds = np.array([presence for _, presence in asked])
    there = kinds == _Presence.SHOWN
    texts = TextProcessor(BertTokenizer.from_pretrained(folder), model.config.text_config.vocab_size)
    in_box = []
    for layer in range(model.config.text_config.num_hidden_layers):
        matcher = Matcher(model, texts, ImageProcessor.from_pretrained(folder), layer)
        matches = matcher.match([scene.pixels for scene in scenes], queries)
        hits = [_peak_is_right(scenes[q.image], q, m) for q, m in zip(queries, matches, strict=True)]
        in_box.append(float(np.mean(np.array(hits)[there])))
    right = (np.array([match.probability for match in matches]) > 0.5) == there
    return {
        "balanced_accuracy": float((right[there].mean() + right[~there].mean()) / 2),
        "namesake_accuracy": float(right[kinds == _Presence.NAMESAKE].mean()),
        "peak_in_box": in_box,
    }


def decide(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Choose threshold and traced layer on generated posts, and store them with the model in `folder`.

    Returns:
        `dev_accuracy`: the share of mentions that are rightly called seen or not, at the threshold; `dev_peak_in_box`:
        for each layer the share of seen mentions whose peak lies in a gold box.
    """
    posts = [post for post in generate(count, seed) if post.gold]
    loader = ImageLoader(ImageConfig())
    for post in posts:
        loader.load(post)
    asked = [
        (MatchQuery(index, pair.entity, pair.category), gold.boxes)
        for index, post in enumerate(posts)
        for pair, gold in zip(gold_pairs(post), post.gold or (), strict=True)
    ]
    queries, images = [query for query, _ in asked], [post.image for post in posts if post.image is not None]
    model = load_blip(folder)
    texts = TextProcessor(BertTokenizer.from_pretrained(folder), model.config.text_config.vocab_size)
    in_box = []
    for layer in range(model.config.text_config.num_hidden_layers):
        matches = Matcher(model, texts, ImageProcessor.from_pretrained(folder), layer).match(images, queries)
        seen = [
            (images[query.image], boxes, match) for (query, boxes), match in zip(asked, matches, strict=True) if boxes
        ]
        in_box.append(float(np.mean([_peak_in(image, boxes, match) for image, boxes, match in seen])))
    threshold, accuracy = best_threshold([match.probability for match in matches], [bool(boxes) for _, boxes in asked])
    Decision(threshold=threshold, layer=int(np.argmax(in_box))).save(folder)
    return {"dev_accuracy": accuracy, "dev_peak_in_box": in_box}


class _Presence(StrEnum):
    SHOWN = "shown"
    NAMESAKE = "namesake"  # what is shown has the same name
    ABSENT = "absent"


def _peak_is_right(scene: Scene, query: MatchQuery, match: Match) -> bool:
    shown = [i.box for i in scene.instances if (i.emblem.name, i.emblem.fine) == (query.entity, query.category)]
    return _peak_in(scene.pixels, shown, match)


def _peak_in(image: np.ndarray, boxes: Iterable[Box], match: Match) -> bool:
    x, y = peak(match.map, *image.shape[:2])
    return any(box.x1 <= x < box.x2 and box.y1 <= y < box.y2 for box in boxes)


NAMESAKES: tuple[tuple[int, ...], ...] = tuple(
    tuple(index for index, other in enumerate(EMBLEMS) if other.name == emblem.name and other != emblem)
    for emblem in EMBLEMS
)
