"""Tables for the terminal, and the JSON."""

import json

from rich.console import Console

from gem_ray.evaluation.metrics import CategoryScores, ScoreReport, Scores
from gem_ray.evaluation.score_report import print_comparison, print_scores, write_scores


def report(right, per_category=None):
    scores = Scores(right=right, predicted=4, gold=4)
    odd = {"posts": 9, "unknown_posts": 2, "unannotated_posts": 1}
    return ScoreReport(*[scores] * 7, groundable_accuracy=0.25, per_category=per_category or {}, **odd)


def printed(show, *args):
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(*args, console)
    return console.export_text(styles=False).splitlines()


def test_the_report_shows_every_task_and_what_is_odd():
    lines = printed(print_scores, report(3))
    for task in ("MNER ", "EEG ", "MNERG ", "span ", "MNER, coarse ", "EEG, small boxes ", "EEG, large boxes "):
        (line,) = [line for line in lines if line[2:].startswith(task)]
        assert line.split()[-2 * 6 :].count("75.00") == 3
    assert any("25.00" in line for line in lines)
    assert any("counted as wrong: 2 predicted posts" in line for line in lines)
    assert any("not annotated, and counted as missed: 1 gold post" in line for line in lines)


def test_categories_are_shown_with_both_scores():
    scores = CategoryScores(mner=Scores(1, 1, 1), mnerg=Scores(0, 1, 1))
    lines = printed(print_scores, report(1, {"city": scores, "state": scores}))
    (line,) = [line for line in lines if "city" in line]
    assert "100.00" in line
    assert "0.00" in line.replace("100.00", "")


def test_the_comparison_has_a_column_for_each_system_and_marks_the_best():
    console = Console(width=100, record=True, file=open("/dev/null", "w"), force_terminal=True)  # noqa: SIM115
    print_comparison({"whole": report(3), "without reranker": report(1)}, "F1, known names", console)
    text = console.export_text(styles=True)
    assert "known names" in text
    assert "whole" in text
    assert "without reranker" in text
    assert text.count("\x1b[1m75.00") == 7
    assert "\x1b[1m25.00" not in text


def test_the_json_file_holds_ratios(tmp_path):
    write_scores(report(3), tmp_path / "new" / "metrics.json")
    values = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert values["mnerg"] == {"precision": 0.75, "recall": 0.75, "f1": 0.75, "right": 3, "predicted": 4, "gold": 4}
    assert values["groundable_accuracy"] == 0.25
