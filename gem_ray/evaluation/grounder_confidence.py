"""How far a grounder's numbers can be trusted on labelled posts: what its calibration is fitted to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gem_ray.annotator import build_stage
from gem_ray.confidence import GrounderCalibration, box_features, seen_features
from gem_ray.config import Config
from gem_ray.evaluation.confidences import labelled_blocks, own_folder
from gem_ray.evaluation.rules import Rules, judge
from gem_ray.logistic import Features, Logistic
from gem_ray.records import Post
from gem_ray.stages import active_stages
from gem_ray.taxonomy import LABEL_SETS


@dataclass(frozen=True)
class GroundedExample:
    """An entity of a labelled post that the grounder judged.

    Attributes:
        post_id: of the post.
        text: of the entity.
        match: features of the match.
        match_score: P_T.
        is_shown: gold has a box for it; `None` if its span is wrong, so that gold says nothing.
        box: features of its box; `None` if it has none.
        box_score: of the segmenter; 0 where it gives none.
        box_right: gold has such a box for it.
    """

    post_id: str
    text: str
    match: Features
    match_score: float
    is_shown: bool | None
    box: Features | None
    box_score: float
    box_right: bool


def grounder_examples(posts: Iterable[Post], config: Config) -> Iterator[GroundedExample]:
    """Annotate labelled posts, and judge every entity that the grounder judged.

    Args:
        posts: those without gold are left out; none that a model was trained on.
        config: of the system.

    Raises:
        EvaluationError: there is no post with gold.
    """
    stages, rules = [build_stage(spec, config) for spec in active_stages(config)], Rules(LABEL_SETS[config.labels])
    for block in labelled_blocks(posts):
        for stage in stages:
            stage(block)
        for post in block:
            verdicts, _ = judge(post, post.gold or (), rules)
            for entity, verdict in zip(post.entities, verdicts, strict=True):
                if entity.match_score is not None:
                    yield GroundedExample(
                        post.post_id,
                        entity.text,
                        seen_features(entity),
                        entity.match_score,
                        None if verdict.gold is None else bool(verdict.gold.boxes),
                        None if entity.box is None else box_features(entity),
                        entity.box_score or 0.0,
                        verdict.region,
                    )


def fit_grounder(examples: Sequence[GroundedExample], fitted_on: str) -> GrounderCalibration:
    """The grounder's calibration.

    Args:
        examples: of posts as they will come.
        fitted_on: which posts, for people.

    Raises:
        ValueError: no entity was judged, or none has a box.
    """
    known = [each for each in examples if each.is_shown is not None]
    boxed = [each for each in examples if each.box is not None]
    if not known or not boxed:
        raise ValueError("the grounder has boxed no entity of the labelled posts: there is nothing to calibrate on")
    return GrounderCalibration(
        fitted_on=fitted_on,
        seen=Logistic.fit([each.match for each in known], [bool(each.is_shown) for each in known]),
        box=Logistic.fit([each.box or {} for each in boxed], [each.box_right for each in boxed]),
    )


def store_grounder(posts: Sequence[Post], config: Config, fitted_on: str) -> Path:
    """Fit the confidence of the grounder to labelled posts, and keep it in its matcher's directory.

    Args:
        posts: with images, that no model of the system was trained on.
        config: of the system.
        fitted_on: which posts, for people.

    Returns:
        The directory.

    Raises:
        ValueError: the matcher is not a directory of this machine; or nothing was boxed in the posts.
    """
    folder = own_folder(config.grounder.matcher.model)
    fresh = (replace(post, entities=[], problems=[]) for post in posts)
    fit_grounder(list(grounder_examples(fresh, config)), fitted_on).save(folder)
    return folder
