"""What labelled posts let one promise of a run, in words and as a piece of its configuration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import yaml

from gem_ray.config import AcceptanceConfig, Config, PromiseConfig, RoutingConfig
from gem_ray.data.files import whole_text
from gem_ray.evaluation.acceptance import Acceptance, certify, fewest_posts
from gem_ray.evaluation.confidences import judge_confidences
from gem_ray.evaluation.rules import EvaluationError
from gem_ray.model_paths import describe as describe_model
from gem_ray.records import Post

_FILE = "thresholds.yaml"
_SECTIONS: dict[str, type[PromiseConfig]] = {"routing": RoutingConfig, "acceptance": AcceptanceConfig}


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
            f"{len(judged)} entities; at least {fewest_posts(precision, delta)} posts with some above it, and "
            "without an error, are needed: label more posts, or ask for less"
        )
    return found


def certify_tagger(posts: Iterable[Post], config: Config, precision: float, delta: float) -> Acceptance:
    """The same of the tagger alone: from which confidence on it needs no reranker.

    Raises:
        EvaluationError: as `certify_posts`.
    """
    reranker = config.reranker.model_copy(update={"enabled": False})
    return certify_posts(posts, config.model_copy(update={"reranker": reranker}), precision, delta)


def describe(found: Acceptance) -> str:
    """In a sentence."""
    return (
        f"with probability {1 - found.delta:g}, at least {100 * found.precision:g} % of the entities with a confidence "
        f"from {found.threshold:g} on are right: {100 * found.share:.1f} % of all; of the labelled ones, "
        f"{found.right} of {found.accepted} are"
    )


def promised(found: Acceptance, section: str, config: Config) -> Config:
    """A configuration with a threshold in its section `routing` or `acceptance`."""
    promise = _SECTIONS[section](
        threshold=found.threshold,
        precision=found.precision,
        delta=found.delta,
        tagger=describe_model(config.tagger.model),
    )
    return config.model_copy(update={section: promise})


def write_promises(config: Config, folder: Path) -> Path:
    """Write the sections of a configuration in which something is promised."""
    sections = {name: getattr(config, name) for name in _SECTIONS}
    values = {name: section.model_dump() for name, section in sections.items() if section.threshold is not None}
    with whole_text(folder / _FILE) as file:
        yaml.safe_dump(values, file, sort_keys=False)
    return folder / _FILE
