"""Experiments: every run once, whatever interrupts them, and a table that says what the runs say."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from gem_ray.config import ConfigError, load_config
from gem_ray.evaluation.metrics import evaluate
from gem_ray.evaluation.predictions import read_predictions
from gem_ray.experiments import run
from gem_ray.experiments.definition import Experiment, experiment_names, load_experiment
from gem_ray.experiments.run import refuse_overruled
from gem_ray.experiments.system import system_config
from gem_ray.records import Post
from gem_ray.taxonomy import LABEL_SETS

Read = Callable[[str, str], list[Post]]


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """`(crf, seed)` of every training that was begun."""
    begun: list[tuple[bool, int]] = []
    train = run.train_tagger

    def counted(posts: Any, dev: Any, out: Path, settings: Any) -> dict[str, Any]:
        begun.append((settings.crf, settings.seed))
        return train(posts, dev, out, settings)

    monkeypatch.setattr(run, "train_tagger", counted)
    return begun


def test_every_shipped_experiment_has_recipes_and_configurations_that_can_be() -> None:
    assert {"table1", "table2", "table3", "table5", "figure3", "figure4", "figure5", "figure6", "cost"} <= set(
        experiment_names()
    )
    for name in experiment_names():
        experiment = load_experiment(name)
        for variant in experiment.variants:
            recipe = experiment.recipe_of(variant, 1, {"device": "cuda"})
            assert (recipe is not None) == variant.is_trained
            if recipe is not None:
                assert (recipe.seed, recipe.device) == (1, "cuda")
            changes = {**experiment.config, **variant.config}
            system_config(load_config(), changes, recipe, images=True)


def test_a_run_leaves_its_recipe_configuration_scores_and_predictions(
    experiment: Experiment, posts: Read, tmp_path: Path
) -> None:
    results = run.run_experiment(experiment, posts, tmp_path, seeds=2)
    f1s = []
    for seed in range(2):
        folder = tmp_path / "runs" / "full" / f"seed-{seed}"
        result = json.loads((folder / "result.json").read_text())
        assert (result["recipe"]["seed"], result["train"], result["posts"]) == (seed, 12, 6)
        assert result["config"]["reranker"]["enabled"] is False  # the posts have no images
        for kind in ("with-knowledge", "without-knowledge"):
            assert sum(file.stat().st_size for file in (folder / kind).iterdir()) < 400_000
            report = evaluate(posts("dev", "fmnerg"), read_predictions(folder / kind))
            assert report.mner.f1 == result["reports"][kind]["mner"]["f1"]
            # The training's own scores are another computation.
            assert report.mner.f1 == pytest.approx(result["dev"][kind.replace("-", "_")]["fine"])
        f1s.append(result["reports"]["with-knowledge"]["mner"]["f1"])
    cell = results["rows"]["all on"]["fine"]
    assert (cell["mean"], cell["deviation"], cell["runs"]) == (mean(f1s), stdev(f1s), 2)
    assert not list(tmp_path.rglob("model"))


def test_the_table_has_measured_and_quoted_rows_and_says_which(
    experiment: Experiment, posts: Read, tmp_path: Path
) -> None:
    results = run.run_experiment(experiment, posts, tmp_path, seeds=1)
    folder = tmp_path / "trial"
    table = (folder / "table.md").read_text()
    fine = results["rows"]["all on"]["fine"]["mean"]
    assert f"| all on | {100 * fine:.2f} |" in table
    assert "| *Theirs* [1] | 50.5 ± 0.1 | – | 40.25 | – | 77.00 | quoted |" in table
    assert "[1] Quoted, not measured here: A paper" in table
    assert "A correction." in table
    assert "Not run: no reranker." in table
    assert re.search(r"\n\n- .*: the posts have no images", table)
    # What all runs share and the preset has not: nothing of the variant without CRF, or of GMNER.
    recipe = re.search(r" with ([^\n]*), the epoch chosen", table)
    assert recipe is not None
    assert {"epochs=2", "batch_size=4", "head_lr=0.05"} <= {*recipe[1].split(", ")}
    assert "crf=" not in table
    lines = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert {line["source"] for line in lines} == {"measured", "quoted: A paper"}
    theirs = next(line for line in lines if line["row"] == "Theirs")
    assert (theirs["mean"], theirs["deviation"]) == ("0.505", "0.001")
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert load_experiment(str(folder / "experiment.yaml")) == experiment


def test_rows_are_compared_by_bootstrap_with_the_one_that_is_named(
    experiment: Experiment, posts: Read, tmp_path: Path
) -> None:
    results = run.run_experiment(experiment, posts, tmp_path, seeds=1)
    difference = results["differences"]["no CRF (FMNERG)"]
    rows = results["rows"]
    assert difference["first"] == pytest.approx(rows["no CRF"]["fine"]["mean"])
    assert difference["difference"] == pytest.approx(rows["no CRF"]["fine"]["mean"] - rows["all on"]["fine"]["mean"])
    bare = results["differences"]["no CRF (FMNERG, without knowledge)"]
    assert bare["first"] == pytest.approx(rows["no CRF"]["fine, bare"]["mean"])
    same = results["differences"]["tagger alone (FMNERG)"]
    assert same["low"] == same["high"] == 0
    assert "## Against all on" in (tmp_path / "trial" / "table.md").read_text()


def test_the_measure_that_is_named_is_the_one_that_is_compared(
    experiment: Experiment, posts: Read, tmp_path: Path
) -> None:
    values = experiment.model_dump(exclude_defaults=True) | {"metric": "span.recall", "published": []}
    values["columns"] = [{"label": "recall", "metric": "span.recall"}, {"label": "bad posts", "metric": "problems"}]
    results = run.run_experiment(
        Experiment.model_validate(values), posts, tmp_path, seeds=1, only=["full", "no-crf"], overrides={"epochs": 1}
    )
    difference, rows = results["differences"]["no CRF"], results["rows"]
    assert difference["first"] == pytest.approx(rows["no CRF"]["recall"]["mean"])
    table = (tmp_path / "trial" / "table.md").read_text()
    assert f" {rows['all on']['bad posts']['mean']:.2f} |" in table  # a number, not percent


def test_a_configuration_that_cannot_be_is_refused_before_anything_is_trained(
    experiment: Experiment, posts: Read, tmp_path: Path, trainings: list[tuple[bool, int]]
) -> None:
    values = experiment.model_dump(exclude_defaults=True)
    values["variants"][3]["config"] = {"filter": {"gama": 1}}
    with pytest.raises(ConfigError, match="gama"):
        run.run_experiment(Experiment.model_validate(values), posts, tmp_path, seeds=1)
    assert not trainings


def test_variants_that_come_to_the_same_are_one_training(
    experiment: Experiment, posts: Read, tmp_path: Path, trainings: list[tuple[bool, int]]
) -> None:
    run.run_experiment(experiment, posts, tmp_path, seeds=1, only=["alone", "full", "no-rerank"])
    assert trainings == [(True, 0)]
    results = [(tmp_path / "runs" / name / "seed-0" / "result.json").read_text() for name in ("alone", "full")]
    assert results[0] == results[1]


def test_gmner_is_trained_and_scored_under_its_own_labels(experiment: Experiment, posts: Read, tmp_path: Path) -> None:
    results = run.run_experiment(experiment, posts, tmp_path, seeds=1, only=["gmner"])
    predicted = read_predictions(tmp_path / "runs" / "gmner" / "seed-0" / "with-knowledge")
    expected = evaluate(posts("dev", "gmner"), predicted, labels=LABEL_SETS["gmner"]).mner.f1
    assert results["rows"]["all on"]["GMNER"]["mean"] == expected
    assert "fine" not in results["rows"]["all on"]


def test_what_is_done_is_not_done_again_and_the_same_seed_gives_the_same(
    experiment: Experiment,
    posts: Read,
    tmp_path: Path,
    trainings: list[tuple[bool, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = run.run_experiment(experiment, posts, tmp_path / "whole", seeds=2, only=["full", "no-crf"])
    assert trainings == [(True, 0), (False, 0), (True, 1), (False, 1)]
    annotate = run.annotate_and_score
    calls = []

    def interrupted(*args: Any) -> dict[str, Any]:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return annotate(*args)

    monkeypatch.setattr(run, "annotate_and_score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run_experiment(experiment, posts, tmp_path / "part", seeds=2, only=["full", "no-crf"])
    results = run.run_experiment(experiment, posts, tmp_path / "part", seeds=2, only=["full", "no-crf"])
    # The third training was done before the interruption: its model was there.
    assert trainings[4:] == [(True, 0), (False, 0), (True, 1), (False, 1)]
    assert results == whole


def test_what_is_there_is_tabulated_without_running_the_rest(
    experiment: Experiment, posts: Read, tmp_path: Path, trainings: list[tuple[bool, int]]
) -> None:
    run.run_experiment(experiment, posts, tmp_path, seeds=1, only=["full"])
    results = run.run_experiment(experiment, posts, tmp_path, run_missing=False)
    assert trainings == [(True, 0)]
    assert results["rows"]["all on"]["fine"]["runs"] == 1
    assert results["rows"]["tagger alone"] == {**results["rows"]["all on"]}  # it comes to the same: copied, not run
    assert results["rows"]["no CRF"] == {}


def test_results_of_another_recipe_or_configuration_are_not_mixed_in(
    experiment: Experiment, posts: Read, tmp_path: Path
) -> None:
    run.run_experiment(experiment, posts, tmp_path, seeds=1, only=["full"])
    with pytest.raises(ConfigError, match="result of another recipe"):
        run.run_experiment(experiment, posts, tmp_path, seeds=1, only=["full"], overrides={"epochs": 3})
    shorter = load_config(text={"max_chars": 5})
    with pytest.raises(ConfigError, match="result of another configuration"):
        run.run_experiment(experiment, posts, tmp_path, seeds=1, only=["full"], base=shorter)
    with pytest.raises(ConfigError, match="result of other posts"):
        run.run_experiment(experiment, lambda *which: posts(*which)[1:], tmp_path, seeds=1, only=["full"])
    # Nor into a table in which only other variants, or fewer seeds, are run now.
    with pytest.raises(ConfigError, match=r"full/seed-0/result\.json has the result of another recipe"):
        run.run_experiment(experiment, posts, tmp_path, seeds=1, only=["no-crf"], overrides={"epochs": 3})
    # Where it runs, and how fast, does not matter.
    faster = load_config(overrides=["tagger.batch_tokens=64", "pipeline.pools.tag.threads=2", "filter.gamma=0.7"])
    run.run_experiment(experiment, posts, tmp_path, seeds=1, only=["full"], overrides={"device": "cuda"}, base=faster)


def test_a_tagger_of_another_recipe_is_not_taken_over_from_an_interrupted_run(
    experiment: Experiment, posts: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "annotate_and_score", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.run_experiment(experiment, posts, tmp_path, seeds=1, only=["full"])
    for read, overrides in ((posts, {"epochs": 3}), (lambda *which: posts(*which)[1:], {})):
        with pytest.raises(ConfigError, match="was trained by another recipe, on other posts or from another encoder"):
            run.run_experiment(experiment, read, tmp_path, seeds=1, only=["full"], overrides=overrides)
    assert run.run_experiment(experiment, posts, tmp_path, seeds=1, only=["full"])["rows"]["all on"]


def test_results_of_a_model_that_was_trained_again_are_not_mixed_in(
    experiment: Experiment, posts: Read, tmp_path: Path
) -> None:
    encoder, out = tmp_path / "encoder", tmp_path / "out"
    shutil.copytree(experiment.recipe_of(experiment.variants[0], 0, {}).encoder, encoder)
    overrides = {"encoder": str(encoder)}
    done = run.run_experiment(experiment, posts, out, seeds=1, only=["full"], overrides=overrides)
    (encoder / "notes.txt").write_text("trained again")
    run._hash.cache_clear()  # as in another process
    with pytest.raises(ConfigError, match=r"full/seed-0/result\.json has the result of another tagger"):
        run.run_experiment(experiment, posts, out, seeds=1, only=["full"], overrides=overrides)
    shutil.rmtree(encoder)
    run._hash.cache_clear()
    tabulated = run.run_experiment(experiment, posts, out, overrides=overrides, run_missing=False)
    assert tabulated["rows"]["all on"] == done["rows"]["all on"]


def test_two_do_not_run_in_one_folder_at_once(experiment: Experiment, posts: Read, tmp_path: Path) -> None:
    refused = []

    def begin_another(*_: Any) -> None:
        with pytest.raises(ConfigError, match="an experiment is running in"):
            run.run_experiment(experiment, posts, tmp_path, seeds=1, only=["full"])
        refused.append(run.run_experiment(experiment, posts, tmp_path, only=["full"], run_missing=False))

    run.run_experiment(experiment, posts, tmp_path, seeds=1, only=["full"], on_done=begin_another)
    assert len(refused) == 1  # but what is there can be tabulated meanwhile
    run.run_experiment(experiment, posts, tmp_path, seeds=1, only=["full"])


def test_a_model_that_is_not_there_costs_its_row_alone(experiment: Experiment, posts: Read, tmp_path: Path) -> None:
    values = experiment.model_dump(exclude_defaults=True)
    values["variants"][1]["settings"] = {"encoder": str(tmp_path / "nowhere")}
    results = run.run_experiment(Experiment.model_validate(values), posts, tmp_path, seeds=1, only=["full", "no-crf"])
    assert results["rows"]["all on"]["fine"]["runs"] == 1
    assert "nowhere" in results["obstacles"]["no-crf"]


def test_unknown_names_are_refused_with_the_known_ones(experiment: Experiment, posts: Read, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are full, no-crf"):
        run.run_experiment(experiment, posts, tmp_path, only=["crf"])
    with pytest.raises(ConfigError, match="or one of cost, figure3"):
        load_experiment("taggr")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("against: nobody", "no row is called 'nobody'"),
        ("plot: {columns: [MNRG]}", "'MNRG' is not one of the table's columns"),
        (
            "columns: [{label: F1, metric: mner.f1}, {label: bad, metric: problems}]\nplot: {columns: [bad]}",
            "'bad' is no ratio",
        ),
        ("columns: [{label: F1, metric: mner.f1}, {label: F1, metric: span.f1}]", "two columns have the same label"),
        ("variants: [{name: a, label: x}, {name: b, label: x}]", "two rows have the same label"),
        ("variants: [{name: a, label: x, recipe: paper-bert}]", "a: `recipe` is of a tagger that is trained"),
        ("plot: {kind: line}", "a line needs the variants' places"),
        ("variants: [tagger/ful]", "tagger has no variant 'ful'"),
        ("rows: [{label: x, fmnerg: none}]", "no variant is called 'none'"),
        ("colums: []", "colums: no such key; did you mean 'columns'"),
        ("columns: [{label: F1, metric: mner.f2}]", r"columns.0.metric: .*\(got 'mner.f2'\)"),
    ],
)
def test_a_definition_that_names_what_is_not_there_is_refused(tmp_path: Path, change: str, message: str) -> None:
    file = tmp_path / "own.yaml"
    lines = {"title": "title: x", "columns": "columns: [{label: F1, metric: mner.f1}]", "variants": "variants: []"}
    lines[change.partition(":")[0]] = change
    file.write_text("\n".join(lines.values()), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_experiment(str(file))


def test_the_papers_rule_decides_unless_another_one_was_asked_for() -> None:
    """`--set`, a file and an assignment alike."""
    assigned = load_config()
    assigned.reranker.decision = "calibrated"
    for base, decision in (
        (load_config(), "answer"),
        (load_config(overrides=["reranker.batch_size=2"]), "answer"),
        (load_config(overrides=["reranker.decision=calibrated"]), "calibrated"),
        (load_config(reranker={"decision": "answer"}), "answer"),
        (assigned, "calibrated"),
    ):
        assert system_config(base, {}, None, True).reranker.decision == decision


def test_what_some_variant_takes_from_the_command_line_is_not_refused() -> None:
    figure4, tagger = load_experiment("figure4"), load_experiment("tagger")
    for key in ("reranker.decision=calibrated", "filter.gamma=0.1", "grounder.enabled=false", "reranker.adapter=null"):
        refuse_overruled(figure4, (), load_config(overrides=[key]), [key], {})
    refuse_overruled(tagger, (), load_config(), (), {"epochs": 1, "device": "cpu", "dropout": 0.2})
    (of_knowledge,) = (v.name for v in tagger.variants if v.settings == {"knowledge": "caption"})
    with pytest.raises(ConfigError, match="knowledge has no effect: every variant"):
        refuse_overruled(tagger, [of_knowledge], load_config(), (), {"knowledge": "none"})
