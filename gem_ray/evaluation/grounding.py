"""The grounder alone, on gold mentions: is an entity rightly said to be seen, and where; with pictures of the worst."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from gem_ray.data.tokenize import word_spans
from gem_ray.evaluation.metrics import LARGE, SMALL
from gem_ray.records import Box, Entity, Post
from gem_ray.taxonomy import FMNERG, GMNER

_TILE, _CAPTION, _COLUMNS = 300, 28, 4  # of the picture of the worst, in pixels
_GOLD, _PREDICTED = (40, 200, 80), (230, 40, 40)


@dataclass(frozen=True)
class Grounded:
    """A gold mention and what the grounder said of it; boxes in pixels of the original image."""

    post: Post
    entity: Entity
    gold: tuple[Box, ...]

    @property
    def is_seen(self) -> bool:
        """The grounder found it."""
        return self.entity.box is not None

    @property
    def iou(self) -> float:
        """Of the box with the gold box that it fits best; 0 where one of the two is missing."""
        box = self.entity.box
        return max((box.iou(other) for other in self.gold), default=0.0) if box else 0.0

    def is_right(self, threshold: float = 0.5) -> bool:
        """No box where there is none, and else one that fits."""
        return self.iou > threshold if self.gold else not self.is_seen

    @property
    def area(self) -> int:
        """Of the original image, in pixels."""
        return (self.post.image_width or 0) * (self.post.image_height or 0)

    @property
    def is_small(self) -> bool:
        """One of the gold boxes is below 1/50 of the image."""
        return any(box.area * SMALL < self.area for box in self.gold)

    @property
    def is_large(self) -> bool:
        """All gold boxes are over half of the image."""
        return bool(self.gold) and all(box.area * LARGE > self.area for box in self.gold)


def ground_gold(posts: Sequence[Post], ground: Callable[[list[Post]], list[Post]]) -> list[Grounded]:
    """Ground the gold mentions of posts with a decoded image; the posts' entities are replaced.

    Args:
        posts: with `gold`, `tokens` and `image`.
        ground: a `Grounder`.
    """
    golds = []
    for post in posts:
        spans = word_spans(post.text, post.tokens)
        post.entities = []
        for gold in post.gold or ():
            start, end = spans[gold.word_start][0], spans[gold.word_end - 1][1]
            coarse = (FMNERG if gold.fine in FMNERG.parent else GMNER).parent[gold.fine]
            post.entities.append(
                Entity(post.text[start:end], start, end, gold.word_start, gold.word_end, coarse, gold.fine, 1.0)
            )
            golds.append(gold.boxes)
    ground(list(posts))
    entities = [(post, entity) for post in posts for entity in post.entities]
    return [Grounded(post, entity, tuple(boxes)) for (post, entity), boxes in zip(entities, golds, strict=True)]


def split_by_category(posts: Sequence[Post]) -> tuple[list[Grounded], list[Grounded]]:
    """What a whole system said of the gold mentions whose spans it found: in the right category, and in others.

    Args:
        posts: annotated, with `gold`.
    """
    right: list[Grounded] = []
    wrong: list[Grounded] = []
    for post in posts:
        entities = {(entity.word_start, entity.word_end): entity for entity in post.entities}
        for gold in post.gold or ():
            if entity := entities.get((gold.word_start, gold.word_end)):
                group = right if entity.fine == gold.fine else wrong
                group.append(Grounded(post, entity, tuple(gold.boxes)))
    return right, wrong


def summarize(mentions: Sequence[Grounded]) -> dict[str, float]:
    """Figures of the grounder alone.

    Returns:
        `eeg`: the share of mentions that are right, and the same of `small` and `large` ones; `groundable`: the share
        rightly called seen or not; `mean_iou`: of mentions that are to be seen and got a box; and how many there are.
    """
    found = [each for each in mentions if each.gold and each.is_seen]
    groups = {
        "eeg": mentions,
        "small": [each for each in mentions if each.is_small],
        "large": [each for each in mentions if each.is_large],
    }
    shares = {name: _mean([each.is_right() for each in group]) for name, group in groups.items()}
    return {
        **shares,
        "groundable": _mean([each.is_seen == bool(each.gold) for each in mentions]),
        "mean_iou": _mean([each.iou for each in found]),
        "mentions": len(mentions),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def worst(mentions: Sequence[Grounded], count: int) -> list[Grounded]:
    """The mentions that are most wrong: those the matcher was surest of first, then the boxes that fit least."""

    def wrongness(each: Grounded) -> float:
        probability = each.entity.match_score or 0.0
        if each.gold and each.is_seen:
            return 0.5 - each.iou
        return 1 - probability if each.gold else probability

    wrong = [each for each in mentions if not each.is_right()]
    return sorted(wrong, key=wrongness, reverse=True)[:count]


def draw_worst(mentions: Sequence[Grounded], out: Path) -> None:
    """A picture of mentions in rows: gold boxes in green, the grounder's in red, with its point.

    Raises:
        ValueError: no mentions.
    """
    if not mentions:
        raise ValueError("there is no mention to draw")
    rows = -(-len(mentions) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _TILE, rows * (_TILE + _CAPTION)), "white")
    for position, mention in enumerate(mentions):
        corner = (position % _COLUMNS * _TILE, position // _COLUMNS * (_TILE + _CAPTION))
        sheet.paste(_tile(mention), (corner[0], corner[1] + _CAPTION))
        entity = mention.entity
        caption = f"{entity.text} ({entity.fine})\nP {entity.match_score or 0:.2f}  IoU {mention.iou:.2f}"
        ImageDraw.Draw(sheet).text((corner[0] + 4, corner[1] + 2), f"{caption}  {entity.box_source or ''}", "black")
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)


def _tile(mention: Grounded) -> Image.Image:
    post, entity = mention.post, mention.entity
    assert post.image is not None  # it was grounded
    tile = Image.fromarray(post.image)
    tile.thumbnail((_TILE - 4, _TILE - 4))
    scale_x, scale_y = tile.width / (post.image_width or 1), tile.height / (post.image_height or 1)
    draw = ImageDraw.Draw(tile)
    boxes = [*((box, _GOLD) for box in mention.gold), *([(entity.box, _PREDICTED)] if entity.box else [])]
    for box, color in boxes:
        x1, y1, x2, y2 = box.x1 * scale_x, box.y1 * scale_y, box.x2 * scale_x, box.y2 * scale_y
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=color, width=2)
    if entity.point:
        x, y = entity.point.x * scale_x, entity.point.y * scale_y
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=_PREDICTED)
    return tile
