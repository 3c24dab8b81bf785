"""The plain way gives the same annotations, or its time would say nothing."""

from __future__ import annotations

import pytest

from gem_ray.annotator import Annotator
from gem_ray.benchmarks.plain import PlainAnnotator
from gem_ray.config import load_config
from gem_ray.data.generated import generate

pytestmark = pytest.mark.alone


def test_plain_way_and_annotator_agree() -> None:
    config = load_config()
    plain = PlainAnnotator(config).annotate(list(generate(12, seed=9)))
    shared = Annotator.from_config(config).annotate(list(generate(12, seed=9)))
    said = [[(e.text, e.fine, e.reranked, e.box, e.box_source) for e in post.entities] for post in plain]
    assert said == [[(e.text, e.fine, e.reranked, e.box, e.box_source) for e in post.entities] for post in shared]
    assert sum(entity is not None for row in said for *_, entity, _ in row) > 5
