"""The plain way to write the system: one post and one entity at a time, nothing shared, every gradient computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from segment_anything import SamPredictor, modeling
from torch import Tensor

from gem_ray.annotator import GuardedStage, build_stage
from gem_ray.config import Config
from gem_ray.grounding.grounder import Grounder
from gem_ray.grounding.matcher import Match, Matcher, MatchQuery
from gem_ray.grounding.sam import PointMasks, SamSegmenter
from gem_ray.grounding.trace import MATCH, patch_scores
from gem_ray.records import Post
from gem_ray.stages import StageSpec, active_stages

_ENTITY_STAGES = ("rerank", "ground")


class PlainMatcher(Matcher):
    """Eq. 11 by the whole model forward and backward, for every entity again."""

    def match(self, images: Sequence[np.ndarray], queries: Sequence[MatchQuery]) -> list[Match]:
        """As `Matcher.match`, with the same answers."""
        return [
            answer
            for query in queries
            for answer in self.match_squares(self.images.squares([images[query.image]]), [query])
        ]

    def match_squares(self, squares: Tensor, queries: Sequence[MatchQuery]) -> list[Match]:
        """Answer queries in one batch; `squares`, `(B, side, side, 3)` uint8, has an image for each of them."""
        batch = self.texts(queries, self.model.device)
        pixels = self.images.normalize(squares.to(self.model.device)).to(self.model.dtype)
        self.model.requires_grad_(True)
        states = self.model.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
        encoded = self.model.text_encoder(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            encoder_hidden_states=states,
            output_attentions=True,
        )
        attention = encoded.cross_attentions[self.layer]  # (B, H, T, 1 + P)
        attention.retain_grad()
        probability = self.model.itm_head(encoded.last_hidden_state[:, 0]).softmax(-1)[:, MATCH]  # P_T
        probability.sum().backward()
        scores = patch_scores(attention.detach().float(), attention.grad.float(), batch.counted(self.tokens))  # eq. 11
        self.model.zero_grad()
        self.model.requires_grad_(False)
        side = self.images.side // self.model.config.vision_config.patch_size
        maps = scores.view(-1, side, side).cpu().numpy()
        return [Match(p, m) for p, m in zip(probability.tolist(), maps, strict=True)]


class PlainSam(SamSegmenter):
    """SAM by its package's own predictor: the image encoded for every point again, in float32."""

    def __init__(self, model: modeling.Sam) -> None:
        self.model = model

    def masks(
        self,
        images: Sequence[np.ndarray],
        points: Sequence[Sequence[tuple[float, float]]],
        best_only: bool = False,
    ) -> list[list[PointMasks]]:
        """As `SamSegmenter.masks`, with the same answers."""
        return [[self._masks_at(image, p, best_only) for p in own] for image, own in zip(images, points, strict=True)]

    def _masks_at(self, image: np.ndarray, point: tuple[float, float], best_only: bool) -> PointMasks:
        predictor = SamPredictor(self.model)
        predictor.set_image(image)
        masks, iou, _ = predictor.predict(np.array([point]), np.array([1]))
        kept = [int(iou.argmax())] if best_only else slice(None)
        return PointMasks(masks[kept], iou[kept])


class PlainAnnotator:
    """`Annotator` written the plain way; the same annotations."""

    def __init__(self, config: Config) -> None:
        self._stages = [_plain_stage(spec, config) for spec in active_stages(config)]

    def annotate(self, posts: Sequence[Post]) -> list[Post]:
        """Annotate posts in place, one after the other."""
        for post in posts:
            for stage in self._stages:
                for part in entity_by_entity(post) if stage.name in _ENTITY_STAGES else [post]:
                    stage([part])
        return list(posts)


def _plain_stage(spec: StageSpec, config: Config) -> GuardedStage:
    if spec.name != "ground":
        return build_stage(spec, config)
    grounder = Grounder.from_config(config)
    grounder.matcher = PlainMatcher.from_config(config)
    return GuardedStage(spec.name, grounder)


def entity_by_entity(post: Post) -> list[Post]:
    """The post once for every entity, with that entity alone; entities and problems are the post's own."""
    return [replace(post, entities=[entity]) for entity in post.entities]
