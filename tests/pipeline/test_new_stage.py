"""The example of docs/new-stage.md: a stage is a class and one entry in the table."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gem_ray import stages
from gem_ray.annotator import Annotator
from gem_ray.config import Config
from gem_ray.data.shards import read_posts, write_posts
from gem_ray.pipeline.run import annotate_dataset
from gem_ray.pools import serving_pools
from gem_ray.records import Post
from gem_ray.stages import StageSpec

DOCS = Path(__file__).parents[2] / "docs" / "new-stage.md"


@pytest.fixture
def language(monkeypatch: pytest.MonkeyPatch) -> StageSpec:
    """The stage of the page, in the table. Its class is in no module, so that it travels to Ray's processes whole."""
    module, entry = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(module.replace("from __future__ import annotations\n", ""), names)
    spec: StageSpec = eval(entry.splitlines()[-1].rstrip(","), {"StageSpec": StageSpec})
    assert spec.component == "gem_ray.data.language:LanguageFilter"
    spec = StageSpec(spec.name, names["LanguageFilter"].from_config, has_model=spec.has_model)
    table = list(stages.STAGES)
    table.insert(1, spec)
    monkeypatch.setattr(stages, "STAGES", table)
    monkeypatch.setattr("gem_ray.records.STAGES", table)
    return spec


def test_a_language_filter_is_a_class_and_an_entry(
    local_ray: None,
    language: StageSpec,
    text_config: Config,
    tmp_path: Path,
    assert_same: Callable[[Any, Any], None],
) -> None:
    texts = ["Taylor Swift sings in Paris", "Тейлор Свифт поёт в Париже", "🎉🎉", "東京の夜"]
    write_posts([Post(str(number), text) for number, text in enumerate(texts)], tmp_path / "posts")
    summary = annotate_dataset(tmp_path / "posts", tmp_path / "out", text_config)
    assert summary.tally.problems["filtered"] == 2
    assert summary.tally.statuses["rejected"] == 2
    assert "language" in summary.account.stage_seconds
    rows = sorted(
        (
            row
            for path in (tmp_path / "out" / "annotations").rglob("*.parquet")
            for row in pq.read_table(path).to_pylist()
        ),
        key=lambda row: row["post_id"],
    )
    posts = Annotator.from_config(text_config).annotate(list(read_posts(tmp_path / "posts")))
    assert [post.is_rejected for post in posts] == [False, True, False, True]
    kept = ("post_id", "entities", "problems")
    expected = [{name: post.annotation()[name] for name in kept} for post in posts]
    assert_same([{name: row[name] for name in kept} for row in rows], expected)
    ingress, _ = serving_pools(text_config)
    assert [spec.name for spec in ingress] == ["prepare", "language"]
    with pytest.MonkeyPatch.context() as without:
        without.setattr(stages, "STAGES", [spec for spec in stages.STAGES if spec is not language])
        with pytest.raises(ValueError, match=r"stages: \[\['prepare', 'language'"):
            annotate_dataset(tmp_path / "posts", tmp_path / "out", text_config)
