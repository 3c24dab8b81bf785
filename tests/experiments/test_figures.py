"""What plots and figure 5 are made of."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from gem_ray.experiments.by_entropy import calibration_of
from gem_ray.experiments.definition import Experiment
from gem_ray.experiments.outputs import write_results
from gem_ray.experiments.plot import pareto, plot
from gem_ray.experiments.predictions import store_predictions
from gem_ray.experiments.results import Cell
from gem_ray.records import Candidate, Entity, GoldEntity, Post

TEXT = "ann in rome"


def dev(split: str, labels: str) -> list[Post]:
    category = {"fmnerg": "actor", "gmner": "PER"}[labels]
    return [Post(f"p{n}", TEXT, TEXT.split(), gold=[GoldEntity(0, 1, category)]) for n in range(4)]


def annotated(said: list[str], entropies: list[float], reranked: bool = False) -> list[Post]:
    """Each post's `ann` with a category; `rome`, which gold does not have, in the first."""
    candidates = [Candidate("musician", 0.5), Candidate("actor", 0.4)]
    posts = []
    for number, (fine, nats) in enumerate(zip(said, entropies, strict=True)):
        ann = Entity("ann", 0, 3, 0, 1, "person", fine, 0.5, entropy=nats, reranked=reranked, candidates=candidates)
        posts.append(Post(f"p{number}", TEXT, TEXT.split(), entities=[ann]))
    posts[0].entities.append(Entity("rome", 7, 11, 2, 3, "location", "city", 0.9, entropy=0.1))
    return posts


def store(out: Path, variant: str, posts: list[Post], labels: str = "fmnerg") -> None:
    folder = out / "runs" / variant / "seed-0"
    store_predictions(posts, folder / "without-knowledge")
    result = {
        "recipe": None,
        "config": {"labels": labels, "filter": {"gamma": 0.3}},
        "posts": 4,
        "device": "nothing",
        "reports": {"without-knowledge": {"mner": {"f1": 0.5}}},
    }
    (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    store(tmp_path, "tagger", annotated(["actor", "actor", "musician", "musician"], [0.1, 0.3, 0.5, 0.9]))
    store(tmp_path, "asked", annotated(["musician", "actor", "actor", "actor"], [0.1, 0.3, 0.5, 0.9], reranked=True))
    return Experiment.model_validate(
        {
            "name": "figure",
            "title": "Figure",
            "columns": [{"label": "F1", "metric": "mner.f1"}],
            "variants": [{"name": "tagger", "label": "tagger"}, {"name": "asked", "label": "asked"}],
            "plot": {"kind": "entropy", "reranked": "asked"},
        }
    )


def test_figure_5_follows_from_the_stored_predictions_of_two_runs(experiment: Experiment, tmp_path: Path) -> None:
    calibration = calibration_of(experiment, tmp_path, dev)
    assert calibration is not None
    everything = calibration.all
    assert (everything.share.total, everything.accuracy.total) == (5, 4)  # `rome` is no gold mention
    assert (everything.accuracy.right, everything.reranked.right, everything.top_recall.right) == (2, 3, 4)
    # Above 0.3 the reranker is right twice where the tagger is wrong; up to it, it loses one and wins none. γ lies
    # half-way to the next entropy, 0.5.
    assert calibration.thresholds["crossing"].gamma == pytest.approx(0.4, abs=2e-4)
    assert calibration.thresholds["configured"].gamma == 0.3
    results = write_results(tmp_path, experiment, {}, dev)
    assert results["calibration"]["all"]["reranked"]["right"] == 3
    assert (tmp_path / "figure" / "plot.png").stat().st_size > 10_000


def test_without_the_reranker_figure_5_has_the_tagger_alone(experiment: Experiment, tmp_path: Path) -> None:
    (tmp_path / "runs" / "asked").rename(tmp_path / "elsewhere")
    calibration = calibration_of(experiment, tmp_path, dev)
    assert calibration is not None
    assert calibration.all.reranked.total == 0
    assert "crossing" not in calibration.thresholds


def test_rows_are_compared_on_every_label_set_that_the_table_has(tmp_path: Path) -> None:
    right, half_right = ["actor"] * 4, ["actor", "actor", "musician", "musician"]
    store(tmp_path, "fine", annotated(half_right, [0.1] * 4))
    store(tmp_path, "better", annotated(right, [0.1] * 4))
    store(tmp_path, "coarse", annotated(["PER"] * 4, [0.1] * 4), "gmner")
    experiment = Experiment.model_validate(
        {
            "name": "both",
            "title": "Both label sets",
            "columns": [{"label": name, "metric": "mner.f1", "labels": name} for name in ("gmner", "fmnerg")],
            "variants": [{"name": name, "label": name} for name in ("fine", "better", "coarse")],
            "rows": [
                {"label": "plain", "fmnerg": "fine", "gmner": "coarse"},
                {"label": "other", "fmnerg": "better", "gmner": "coarse"},
            ],
            "against": "plain",
        }
    )
    differences = write_results(tmp_path, experiment, {}, dev)["differences"]
    # Of five predicted mentions, two and four are right, of four in gold.
    assert {row: round(difference["difference"], 9) for row, difference in differences.items()} == {
        "other (GMNER)": 0.0,
        "other (FMNERG)": round(2 * (4 - 2) / (5 + 4), 9),
    }


def test_the_curve_joins_what_nothing_cheaper_equals() -> None:
    points = [
        (3.0, 50.0, "c"),
        (1.0, 40.0, "a"),
        (2.0, 40.0, "b"),
        (4.0, 45.0, "d"),
        (5.0, 60.0, "e"),
        (1.0, 30.0, "f"),
    ]
    assert [name for _, _, name in pareto(points)] == ["a", "c", "e"]


@pytest.mark.parametrize("kind", ["points", "line", "scatter"])
def test_every_kind_of_plot_shows_every_row(experiment: Experiment, kind: str) -> None:
    columns = [{"label": "F1", "metric": "mner.f1"}, {"label": "s", "metric": "seconds.total"}]
    variants = [{"name": name, "label": name, "at": at} for at, name in enumerate("abc")]
    values = {"name": "x", "title": "X", "columns": columns, "variants": variants, "plot": {"kind": kind, "x": "s"}}
    results = {
        name: {"F1": Cell(0.5 + at / 10, 0.01, 3), "s": Cell(2.0 + at, None, 1)} for at, name in enumerate("abc")
    }
    figure = plot(Experiment.model_validate(values), results)
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    curve = axes.lines[0]
    heights = list(curve.get_xdata() if kind == "points" else curve.get_ydata())
    assert heights == pytest.approx([50, 60, 70])


def test_a_scatter_over_a_share_is_in_percent_and_begins_at_none() -> None:
    values = {
        "name": "x",
        "title": "X",
        "columns": [{"label": "F1", "metric": "mner.f1"}, {"label": "share", "metric": "reranked.share"}],
        "variants": [{"name": name, "label": name} for name in "ab"],
        "plot": {"kind": "scatter", "columns": ["F1"], "x": "share"},
    }
    results = {"a": {"F1": Cell(0.5, None, 1), "share": Cell(0.0, None, 1)}}
    results["b"] = {"F1": Cell(0.6, None, 1), "share": Cell(0.2, None, 1)}
    (axes,) = plot(Experiment.model_validate(values), results).axes
    assert list(axes.lines[0].get_xdata()) == pytest.approx([0, 20])
    assert (axes.get_xscale(), axes.get_xlabel()) == ("linear", "share, percent")


def test_a_line_shows_rows_with_labels_of_their_own() -> None:
    values = {
        "name": "x",
        "title": "X",
        "columns": [{"label": "F1", "metric": "mner.f1"}],
        "variants": [{"name": name, "label": name, "at": at} for at, name in enumerate("ab")],
        "rows": [{"label": f"row {name}", "fmnerg": name} for name in "ab"],
        "plot": {"kind": "line", "x": "K"},
    }
    results = {f"row {name}": {"F1": Cell(0.5 + at / 10, None, 1)} for at, name in enumerate("ab")}
    (axes,) = plot(Experiment.model_validate(values), results).axes
    assert list(axes.lines[0].get_ydata()) == pytest.approx([50, 60])
