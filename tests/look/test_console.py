"""Printed tables."""

from gem_ray.evaluation.metrics import evaluate
from gem_ray.evaluation.score_report import print_scores
from gem_ray.records import GoldEntity, Post


def test_a_table_in_a_file_has_every_name_whole(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    gold = [
        GoldEntity(0, 1, "sports_team"),
        GoldEntity(1, 2, "sports_facility"),
        GoldEntity(2, 3, "brand_name_products"),
    ]
    post = Post("1", "Lakers Wembley Cola", tokens=["Lakers", "Wembley", "Cola"], gold=gold)
    print_scores(evaluate([post], [post]))
    printed = capsys.readouterr().out
    assert all(entity.fine in printed for entity in gold)
    assert "predicted" in printed
    assert "…" not in printed
