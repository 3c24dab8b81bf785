"""γ and Figure 5 on entities whose figures are known by hand, and on what the embedded tagger finds."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from gem_ray.annotator import Annotator
from gem_ray.cli import app
from gem_ray.config import Config, load_config
from gem_ray.data.generated import generate
from gem_ray.data.shards import write_posts
from gem_ray.evaluation import acceptance_report
from gem_ray.evaluation.calibration import (
    JudgedEntity,
    calibrate,
    gamma_at_crossing,
    gamma_for_budget,
    threshold,
)
from gem_ray.evaluation.calibration_report import print_calibration, write_calibration
from gem_ray.evaluation.confidences import JudgedConfidence, judge_confidences
from gem_ray.evaluation.dev_set import judge_dev_set
from gem_ray.evaluation.rules import EvaluationError
from gem_ray.evaluation.shares import Share
from gem_ray.records import ANNOTATION_SCHEMA, Post

# The tagger is right where it is sure, the reranker where the tagger is not; two spans are not gold's.
BY_HAND = [
    JudgedEntity(0.05, found=True, right=True, in_top=True, reranked_right=True),
    JudgedEntity(0.10, found=True, right=True, in_top=True, reranked_right=False),
    JudgedEntity(0.15, found=False),
    JudgedEntity(0.30, found=True, right=True, in_top=True, reranked_right=False),
    JudgedEntity(0.50, found=True, right=False, in_top=True, reranked_right=True),
    JudgedEntity(0.90, found=True, right=True, in_top=True, reranked_right=True),
    JudgedEntity(1.00, found=False),
    JudgedEntity(1.10, found=True, right=False, in_top=True, reranked_right=True),
    JudgedEntity(1.20, found=True, right=False, in_top=False, reranked_right=False),
    JudgedEntity(1.30, found=True, right=False, in_top=True, reranked_right=None),
]


def test_bins_hold_what_lies_between_their_bounds() -> None:
    result = calibrate(BY_HAND, k=5, gamma=0.2, bin_width=0.5)
    found = [
        (entry.low, entry.share, entry.accuracy, entry.top_recall, entry.reranked)
        for entry in (*result.bins, result.all)
    ]
    assert found == [
        (0.0, Share(4, 10), Share(3, 3), Share(3, 3), Share(1, 3)),
        (0.5, Share(2, 10), Share(1, 2), Share(2, 2), Share(2, 2)),
        (1.0, Share(4, 10), Share(0, 3), Share(2, 3), Share(1, 2)),
        (0.0, Share(10, 10), Share(4, 8), Share(7, 8), Share(4, 7)),
    ]


@pytest.mark.parametrize(
    ("budget", "gamma", "hard"), [(0.0, 1.306, 0), (0.15, 1.25, 1), (0.3, 1.05, 3), (0.99, 0.08, 9), (1.0, 0.0, 10)]
)
def test_a_budget_is_used_up_and_never_passed(budget: float, gamma: float, hard: int) -> None:
    assert gamma_for_budget(BY_HAND, budget) == pytest.approx(gamma, abs=1e-3)
    assert threshold(BY_HAND, gamma).share == Share(hard, 10)


def test_equal_entropies_stay_together_below_the_budget() -> None:
    entities = [JudgedEntity(0.7, found=False)] * 8 + [JudgedEntity(0.9, found=False)] * 2
    gamma = gamma_for_budget(entities, 0.5)
    assert gamma == 0.8
    assert threshold(entities, gamma).share == Share(2, 10)


def test_the_crossing_has_the_most_right_categories_and_asks_least() -> None:
    gamma = gamma_at_crossing(BY_HAND)
    assert gamma == 0.4  # the reranker mends 1.10 and 0.50, and would spoil 0.30
    assert threshold(BY_HAND, gamma).accuracy == Share(6, 8)
    assert threshold(BY_HAND, 0.0).accuracy == Share(4, 8)


def test_the_crossing_is_the_best_of_all_thresholds() -> None:
    rng = random.Random(2)
    for _ in range(200):
        entities = [
            JudgedEntity(rng.choice([0.0, 0.1, 0.20001, 0.20002, 0.7, 1.5]), True, rng.random() < 0.5, True, reranked)
            for reranked in rng.choices([True, False, None], k=rng.randint(1, 12))
        ]
        rights = {
            gamma: threshold(entities, gamma).accuracy.right
            for gamma in [0.0, *(entity.entropy for entity in entities)]
        }
        gamma = gamma_at_crossing(entities)
        assert threshold(entities, gamma).accuracy.right == max(rights.values())
        best = max(other for other, right in rights.items() if right == max(rights.values()))
        assert threshold(entities, gamma).share == threshold(entities, best).share


def test_a_reranker_that_only_spoils_is_never_asked() -> None:
    worse = [replace(entity, reranked_right=False) for entity in BY_HAND]
    assert threshold(worse, gamma_at_crossing(worse)).share.right == 0


def test_without_a_reranker_nothing_crosses() -> None:
    silent = [replace(entity, reranked_right=None) for entity in BY_HAND]
    assert set(calibrate(silent, 5, 0.2, budget=0.15).thresholds) == {"configured", "budget"}
    assert set(calibrate(BY_HAND, 5, 0.2).thresholds) == {"configured", "crossing"}
    with pytest.raises(ValueError, match="no entity"):
        calibrate([], 5, 0.2)


def test_intervals_are_wilsons() -> None:
    """Newcombe 1998, table I: 81 of 263 and 0 of 20."""
    assert Share(81, 263).interval == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert Share(0, 20).interval == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert Share(0, 0).interval == (0.0, 1.0)
    for total in range(1, 200):
        for share in (Share(0, total), Share(total, total), Share(total // 2, total)):
            assert 0 <= share.interval[0] <= share.value <= share.interval[1] <= 1


def test_table_json_and_plot_show_it(tmp_path: Path) -> None:
    result = calibrate(BY_HAND * 2, k=5, gamma=0.2, budget=0.15, bin_width=0.5)
    console = Console(record=True, width=120)
    print_calibration(result, console)
    printed = console.export_text()
    for expected in ("0.50–1.00", "top-5", "within the budget", "87.50", "75.00"):
        assert expected in printed
    write_calibration(result, tmp_path)
    written = json.loads((tmp_path / "calibration.json").read_text())
    assert written["thresholds"]["budget"]["gamma"] == 1.25
    assert written["bins"][0]["accuracy"] == {
        "right": 6,
        "total": 6,
        "value": 1.0,
        "interval": list(Share(6, 6).interval),
    }
    pixels = np.asarray(Image.open(tmp_path / "calibration.png").convert("RGB"))
    assert pixels.std() > 10


@pytest.fixture(scope="module")
def posts() -> list[Post]:
    return list(generate(24, seed=11))


def test_the_command_calibrates_the_embedded_tagger(posts: list[Post], tmp_path: Path) -> None:
    """Against the annotator's own entities, judged here by hand."""
    write_posts(posts, tmp_path / "posts")
    out = tmp_path / "out"
    options = ["--data", str(tmp_path / "posts"), "--out", str(out), "--max-share", "0.2"]
    result = CliRunner().invoke(app, ["calibrate", *options], catch_exceptions=False)
    assert result.exit_code == 0
    written = json.loads((out / "calibration.json").read_text())

    config = load_config(overrides=["filter.k=5", "reranker.enabled=false", "grounder.enabled=false"])
    annotated = Annotator.from_config(config).annotate([replace(post, problems=[], entities=[]) for post in posts])
    gold = {(p.post_id, g.word_start, g.word_end): g.fine for p in posts for g in p.gold or ()}
    entities = [
        (entity, gold.get((p.post_id, entity.word_start, entity.word_end))) for p in annotated for entity in p.entities
    ]
    found = [(entity, fine) for entity, fine in entities if fine]
    everything = written["all"]
    assert everything["share"]["total"] == len(entities) > 24
    assert (everything["accuracy"]["right"], everything["accuracy"]["total"]) == (
        sum(entity.fine == fine for entity, fine in found),
        len(found),
    )
    in_top = sum(fine in [candidate.fine for candidate in entity.candidates] for entity, fine in found)
    assert everything["top_recall"]["right"] == in_top
    assert written["thresholds"]["configured"]["gamma"] == config.filter.gamma
    hard = sum(entity.entropy > written["thresholds"]["budget"]["gamma"] for entity, _ in entities)
    assert written["thresholds"]["budget"]["share"]["right"] == hard <= 0.2 * len(entities)
    assert (out / "calibration.png").stat().st_size > 10_000


def test_a_target_that_is_kept_is_written_also_where_nothing_can_be_accepted(
    posts: list[Post], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(_posts: object, config: Config) -> list[JudgedConfidence]:
        return [JudgedConfidence(str(n), 0.99, not (config.reranker.enabled and n % 2)) for n in range(200)]

    monkeypatch.setattr(acceptance_report, "judge_confidences", judge)
    write_posts(posts, tmp_path / "posts")
    options = ["--data", str(tmp_path / "posts"), "--out", str(tmp_path), "--target", "0.9", "--accept", "0.9"]
    result = CliRunner().invoke(app, ["calibrate", *options])
    assert isinstance(result.exception, EvaluationError)
    assert list(yaml.safe_load((tmp_path / "thresholds.yaml").read_text())) == ["routing"]


def test_entities_without_a_confidence_are_among_all_and_not_accepted(posts: list[Post]) -> None:
    """Those that the reranker decides, without a confidence of its own."""
    config = load_config(overrides=["filter.gamma=0.01", "reranker.decision=answer", "grounder.enabled=false"])
    annotated = Annotator.from_config(config).annotate([replace(post, problems=[], entities=[]) for post in posts])
    known = [entity.confidence for post in annotated for entity in post.entities]
    assert None in known
    judged = judge_confidences([replace(post, problems=[], entities=[]) for post in posts], config)
    assert [each.confidence for each in judged] == [confidence or 0.0 for confidence in known]


def test_answers_of_an_earlier_run_are_those_of_the_reranker_asked_now(posts: list[Post], tmp_path: Path) -> None:
    config = load_config(overrides=["filter.gamma=0", "reranker.decision=answer", "grounder.enabled=false"])
    write_posts(posts, tmp_path / "posts")
    annotated = Annotator.from_config(config).annotate([replace(post, problems=[], entities=[]) for post in posts])
    rows = [{**post.annotation(), "run_id": "r", "models": []} for post in annotated]
    (tmp_path / "run" / "annotations").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, ANNOTATION_SCHEMA), tmp_path / "run" / "annotations" / "part-0.parquet")
    written = []
    for number, answers in enumerate([["--rerank"], ["--reranked", str(tmp_path / "run")]]):
        out = tmp_path / str(number)
        options = ["--data", str(tmp_path / "posts"), "--out", str(out), *answers]
        assert CliRunner().invoke(app, ["calibrate", *options], catch_exceptions=False).exit_code == 0
        written.append(json.loads((out / "calibration.json").read_text()))
    assert written[0] == written[1]
    assert written[0]["all"]["reranked"]["total"] == written[0]["all"]["accuracy"]["total"] > 20
    assert "crossing" in written[0]["thresholds"]


def test_data_without_gold_and_answers_to_nothing_are_refused(posts: list[Post]) -> None:
    config = load_config()
    with pytest.raises(EvaluationError, match="no gold"):
        list(judge_dev_set([replace(posts[0], gold=None)], config))
    with pytest.raises(EvaluationError, match=r"filter\.gamma=0"):
        list(judge_dev_set(posts[:4], config, answers=lambda block: [[None] * len(post.entities) for post in block]))


def test_a_share_says_what_it_is_of() -> None:
    assert asdict(Share(1, 4)) == {"right": 1, "total": 4}
    assert Share(1, 4).value == 0.25
    assert Share(0, 0).value == 0.0
