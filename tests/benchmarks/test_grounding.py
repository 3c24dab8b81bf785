from __future__ import annotations

import numpy as np
import pytest
import torch

from gem_ray.benchmarks.grounding_table import VARIANTS, WHOLE_SYSTEM, as_table, measure_grounding
from gem_ray.benchmarks.plain import PlainMatcher, PlainSam
from gem_ray.config import load_config
from gem_ray.grounding.matcher import Matcher, MatchQuery
from gem_ray.grounding.sam import SamSegmenter
from gem_ray.nano.segmenters import SAM_SIZES, untrained_sam

pytestmark = pytest.mark.alone


def test_every_variant_grounds_the_same_mentions(tmp_path):
    results = measure_grounding(load_config("nano"), count=4, seed=7, out=tmp_path)
    system = {name.removeprefix(f"{WHOLE_SYSTEM}, "): row for name, row in results.items() if name not in VARIANTS}
    assert list(results)[: len(VARIANTS)] == list(VARIANTS)
    (mentions,) = {results[name]["mentions"] for name in VARIANTS}
    assert 0 < system["all"]["mentions"] <= mentions
    assert system["all"]["mentions"] == sum(row["mentions"] for name, row in system.items() if name != "all")
    assert results["as configured"]["groundable"] > results["matcher untrained"]["groundable"]
    lines = as_table(results).splitlines()
    assert len(lines) == 2 + len(VARIANTS) + 3
    assert f"| {100 * results['logit']['eeg']:.1f} |" in lines[1 + len(VARIANTS)]


@pytest.mark.parametrize("tokens", ["all", "inner", "words"])
def test_the_plain_matcher_gives_the_same_maps(tokens):
    config = load_config("nano", overrides=[f"grounder.matcher.tokens={tokens}"])
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (60, 80, 3), dtype=np.uint8) for _ in range(2)]
    queries = [MatchQuery(0, "Vexley", "actor"), MatchQuery(1, "Port Almery", "city"), MatchQuery(0, "x", "band")]
    plain, shared = (kind.from_config(config).match(images, queries) for kind in (PlainMatcher, Matcher))
    for one, other in zip(plain, shared, strict=True):
        assert one.probability == pytest.approx(other.probability, rel=1e-4)
        np.testing.assert_allclose(one.map, other.map, atol=1e-4 * one.map.max())


@pytest.mark.parametrize("best_only", [False, True])
def test_the_plain_sam_gives_the_same_masks(best_only):
    torch.manual_seed(0)
    model = untrained_sam(SAM_SIZES).eval()
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (60, 80, 3), dtype=np.uint8) for _ in range(2)]
    points = [[(5.0, 9.0), (40.0, 30.0)], [(70.0, 50.0)]]
    plain = PlainSam(model).masks(images, points, best_only)
    shared = SamSegmenter(model).masks(images, points, best_only)
    for row, other in zip(plain, shared, strict=True):
        for one, two in zip(row, other, strict=True):
            np.testing.assert_allclose(one.iou, two.iou, atol=1e-5)
            assert (one.masks != two.masks).mean() < 1e-3
