"""Stage GROUND (§3.4): match every entity with its image, trace the matches, box what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from gem_ray.confidence import GrounderCalibration, box_features, seen_features
from gem_ray.config import Config, MatcherConfig
from gem_ray.grounding.blip import check_blip
from gem_ray.grounding.boxes import BoxMaker, BoxRequest
from gem_ray.grounding.decision import Decision
from gem_ray.grounding.matcher import Match, Matcher, MatchQuery
from gem_ray.grounding.trace import peak
from gem_ray.model_paths import resolve
from gem_ray.noise import settled
from gem_ray.records import Box, Entity, HeatMap, Point, Post
from gem_ray.scope import Scope, is_known, load_scopes


class AnyMatcher(Protocol):
    """Says how probably each entity is seen in its image, and where."""

    def match(self, images: Sequence[np.ndarray], queries: Sequence[MatchQuery]) -> list[Match]:
        """Answer queries about `(h, w, 3)` uint8 images, in the order of the queries."""
        ...


def load_matcher(config: Config) -> AnyMatcher:
    """The matcher that `grounder.matcher.kind` names."""
    kind = config.grounder.matcher.kind
    if kind == "blip":
        return Matcher.from_config(config)
    from gem_ray.grounding.other_matchers import Blip2Matcher, LlavaMatcher

    return LlavaMatcher.from_config(config) if kind == "llava" else Blip2Matcher.from_config(config)


def check_matcher(settings: MatcherConfig, folder: Path) -> None:
    """Check a matcher without reading its weights.

    Raises:
        ValueError: weights are missing, unexpected or of another shape, another file is not the model's, or it has no
            such layer.
        OSError: files are missing.
    """
    GrounderCalibration.load(folder)
    Decision.load(folder)
    if settings.kind == "blip":
        Matcher.of(check_blip(folder), folder, settings)
        return
    from gem_ray.grounding.other_matchers import check_other_matcher

    check_other_matcher(settings, folder)


@dataclass(frozen=True)
class _Found:
    """An entity that its image shows."""

    post: Post
    entity: Entity
    map: np.ndarray


class Grounder:
    """Fills `seen` and `match_score` of entities, and `point`, `box` and `heatmap` of those that are seen.

    With a calibration, `seen_probability` and `box_confidence` too.

    Args:
        matcher: says whether and where.
        boxes: makes boxes out of peaks.
        threshold: P_T above which an entity is grounded.
        save_heatmaps: keep the maps.
        subpatch_peak: interpolate peaks between patches.
        scopes: what the models know; entities outside are not judged.
        calibration: says how far P_T and boxes can be trusted; `None`: nobody does.
    """

    def __init__(
        self,
        matcher: AnyMatcher,
        boxes: BoxMaker,
        threshold: float = 0.5,
        save_heatmaps: bool = False,
        subpatch_peak: bool = False,
        scopes: Sequence[Scope] = (),
        calibration: GrounderCalibration | None = None,
    ) -> None:
        self.matcher = matcher
        self.boxes = boxes
        self.threshold = threshold
        self.save_heatmaps = save_heatmaps
        self.subpatch_peak = subpatch_peak
        self._scopes = tuple(scopes)
        self._calibration = calibration

    @classmethod
    def from_config(cls, config: Config) -> Grounder:
        """Load what the `grounder` section names."""
        settings = config.grounder.matcher
        return cls(
            load_matcher(config),
            BoxMaker.from_config(config),
            threshold_of(settings),
            settings.save_heatmaps,
            settings.subpatch_peak,
            load_scopes("ground", config),
            GrounderCalibration.load(resolve(settings.model)),
        )

    def reconfigure(self, config: Config) -> None:
        """Take over the threshold of P_T."""
        self.threshold = threshold_of(config.grounder.matcher)

    def __call__(self, posts: list[Post]) -> list[Post]:
        """Ground the entities that the models know; only images in which one is seen are segmented."""
        found = self._match(
            [
                (post, known)
                for post in posts
                if not post.is_rejected and post.image is not None
                if (known := [entity for entity in post.entities if is_known(self._scopes, post, entity)])
            ]
        )
        for each in found:
            self._point(each)
        self._box(found)
        return posts

    def _match(self, judged: Sequence[tuple[Post, list[Entity]]]) -> list[_Found]:
        asked = [(index, post, entity) for index, (post, known) in enumerate(judged) for entity in known]
        queries = [MatchQuery(index, entity.text, entity.fine) for index, _, entity in asked]
        matches = self.matcher.match([_pixels(post) for post, _ in judged], queries)
        for (_, _, entity), match in zip(asked, matches, strict=True):
            entity.match_score = float(settled(match.probability))
            entity.seen = self._is_seen(entity.match_score, match)
            if self._calibration is not None:
                entity.seen_probability = float(settled(self._calibration.seen(seen_features(entity))))
        return [
            _Found(post, entity, match.map)
            for (_, post, entity), match in zip(asked, matches, strict=True)
            if entity.seen
        ]

    def _is_seen(self, score: float, match: Match) -> bool:
        # A map without a positive score points nowhere.
        return score > self.threshold and float(match.map.max()) > 0

    def _point(self, found: _Found) -> None:
        width, height = _original_size(found.post)
        x, y = peak(found.map, height, width, self.subpatch_peak)
        found.entity.point = Point(x, y)
        if self.save_heatmaps:
            found.entity.heatmap = heat_map(found.map)

    def _box(self, found: Sequence[_Found]) -> None:
        posts = {id(each.post): each.post for each in found}
        position = {key: index for index, key in enumerate(posts)}
        images = [_pixels(post) for post in posts.values()]
        requests = []
        for each in found:
            index = position[id(each.post)]
            height, width = images[index].shape[:2]
            x, y = peak(each.map, height, width, self.subpatch_peak)
            requests.append(BoxRequest(index, x, y, each.map, each.entity.fine, each.entity.coarse))
        if not requests:
            return
        for each, request, result in zip(found, requests, self.boxes.boxes(images, requests), strict=True):
            height, width = images[request.image].shape[:2]
            each.entity.box = to_original(result.box, (width, height), _original_size(each.post))
            each.entity.box_source = result.source
            each.entity.box_score = result.score
            if self._calibration is not None:
                each.entity.box_confidence = float(settled(self._calibration.box(box_features(each.entity))))


def to_original(box: Box, size: tuple[int, int], original: tuple[int, int]) -> Box:
    """Scale a box from a decoded image to its original, in whole pixels, inside the image, at least one pixel.

    Args:
        box: pixels of the decoded image.
        size: width and height of the decoded image.
        original: width and height of the original.
    """
    x1, x2 = _interval(box.x1, box.x2, size[0], original[0])
    y1, y2 = _interval(box.y1, box.y2, size[1], original[1])
    return Box(x1, y1, x2, y2)


def _interval(low: float, high: float, size: int, original: int) -> tuple[int, int]:
    scale = original / size
    start = min(max(round(low * scale), 0), original - 1)
    return start, max(min(round(high * scale), original), start + 1)


def heat_map(scores: np.ndarray) -> HeatMap:
    """A map `(gh, gw)` with a positive maximum, in 8 bits, its maximum as 255."""
    height, width = scores.shape
    return HeatMap(height, width, np.rint(scores * (255 / scores.max())).astype(np.uint8).tobytes())


def _pixels(post: Post) -> np.ndarray:
    assert post.image is not None  # `__call__` chose the posts
    return post.image


def _original_size(post: Post) -> tuple[int, int]:
    """Width and height of the original; of the decoded image where a caller set only that."""
    height, width = _pixels(post).shape[:2]
    return post.image_width or width, post.image_height or height


def threshold_of(settings: MatcherConfig) -> float:
    """P_T above which an entity is grounded: the configured one, else the one that is stored with the model."""
    if settings.threshold is not None:
        return settings.threshold
    return Decision.load(resolve(settings.model)).threshold
