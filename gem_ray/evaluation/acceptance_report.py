"""What labelled posts let one promise of a run, in words and as a piece of its configuration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import yaml

from gem_ray.config import AcceptanceConfig, Config
from gem_ray.data.files import whole_text
from gem_ray.evaluation.acceptance import Acceptance, certify, fewest_entities
from gem_ray.evaluation.confidences import judge_confidences
from gem_ray.evaluation.rules import EvaluationError
from gem_ray.model_paths import describe as describe_model
from gem_ray.records import Post

_FILE = "acceptance.yaml"


def certify_posts(posts: Iterable[Post], config: Config, precision: float, delta: float) -> Acceptance:
    """Annotate labelled posts and find the threshold that keeps a promise; see `certify`.

    Raises:
        EvaluationError: no threshold does, or no entity has a confidence.
    """
    judged = list(judge_confidences((replace(post, problems=[]) for post in posts), config))
    confidences, right, ids = zip(*((each.confidence, each.right, each.post_id) for each in judged), strict=True)
    found = certify(confidences, right, ids, precision, delta)
    if found.threshold is None:
        raise EvaluationError(
            f"no confidence promises a precision of {precision:g} with probability {1 - delta:g} from these "
            f"{len(judged)} entities; at least {fewest_entities(precision, delta)} without an error are needed above "
            "it: label more posts, or ask for less"
        )
    return found


def describe(found: Acceptance) -> str:
    """In a sentence."""
    return (
        f"with probability {1 - found.delta:g}, at least {found.precision:.0%} of the entities with a confidence "
        f"from {found.threshold:g} on are right: {found.share:.1%} of all; of the labelled ones, "
        f"{found.right} of {found.accepted} are"
    )


def write_acceptance(found: Acceptance, config: Config, folder: Path) -> Path:
    """Write the section `acceptance` of a configuration."""
    section = AcceptanceConfig(
        threshold=found.threshold,
        precision=found.precision,
        delta=found.delta,
        tagger=describe_model(config.tagger.model),
    )
    with whole_text(folder / _FILE) as file:
        yaml.safe_dump({"acceptance": section.model_dump()}, file, sort_keys=False)
    return folder / _FILE
