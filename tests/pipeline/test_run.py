"""The Ray Data graph on a real local Ray: the same answers as one process, each row once, and a folder to trust."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.exceptions import RayTaskError

from gem_ray.annotator import Annotator, models_of
from gem_ray.config import Config, StagePool
from gem_ray.data.generated import generate
from gem_ray.data.shards import read_posts, write_posts
from gem_ray.pipeline.execution import RayExecutor
from gem_ray.pipeline.run import RunError, annotate_dataset
from gem_ray.pipeline.summary import RunSummary
from gem_ray.pipeline.tables import annotations_table
from gem_ray.records import ANNOTATION_SCHEMA, Post, Status

Run = tuple[Path, RunSummary]


def read_output(output: Path) -> list[dict[str, Any]]:
    """Rows of every file, each file by itself, with the status that its folder says."""
    rows = []
    for file in (output / "annotations").rglob("*.parquet"):
        with file.open("rb") as stream:
            status = file.parent.name.removeprefix("status=")
            rows += [row | {"status": status} for row in pq.read_table(stream).to_pylist()]
    return rows


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (row["post_id"], row["text"], str(row["problems"])))


def test_pipeline_and_annotator_give_the_same_rows(
    run: Run, dataset: Path, config: Config, assert_same: Callable[[Any, Any], None]
) -> None:
    output, summary = run
    posts = Annotator.from_config(config).annotate(list(read_posts(dataset)))
    expected = annotations_table(posts, summary.run_id, summary.models).to_pylist()
    rows = read_output(output)
    assert len({row.pop("row_id") for row in rows}) == len(rows)
    for row in expected:
        del row["row_id"]  # given by files, which one process need not have
    assert_same(in_order(rows), in_order(expected))


def test_passes_give_the_rows_of_one_execution(
    run: Run, dataset: Path, config: Config, tmp_path: Path, assert_same: Callable[[Any, Any], None]
) -> None:
    in_passes = config.model_copy(deep=True)
    pools = [StagePool(stages=["tag", "rerank"]), StagePool(stages=["ground"], pass_number=2)]
    in_passes.pipeline = config.pipeline.model_copy(update={"pools": pools})
    summary = annotate_dataset(dataset, tmp_path / "out", in_passes)
    rows, expected = in_order(read_output(tmp_path / "out")), in_order(read_output(run[0]))
    for row in (*rows, *expected):
        del row["run_id"]
    assert_same(rows, expected)
    assert summary.tally.problems == run[1].tally.problems


def test_every_row_leaves_once_and_bad_rows_say_why(run: Run, dataset: Path) -> None:
    output, _ = run
    rows = read_output(output)
    given = Counter((post.post_id, post.text) for post in read_posts(dataset))
    assert Counter((row["post_id"], row["text"]) for row in rows) == given
    kinds = {row["post_id"]: {problem["kind"] for problem in row["problems"]} for row in rows}
    statuses = {row["post_id"]: row["status"] for row in rows}
    assert (statuses["empty text"], kinds["empty text"]) == ("rejected", {"bad_record"})
    assert (statuses["no image"], kinds["no image"]) == ("degraded", {"image_missing"})
    assert (statuses["broken image"], kinds["broken image"]) == ("degraded", {"image_unreadable"})
    assert statuses["no such file"] == "degraded"
    assert (statuses["twice"], statuses["7"]) == ("ok", "degraded")
    assert {statuses["a"], statuses["b"], statuses[""]} == {"rejected"}


def test_output_has_the_promised_columns_and_holds_no_image(run: Run) -> None:
    output, summary = run
    files = list((output / "annotations").rglob("*.parquet"))
    expected = pa.schema([field for field in ANNOTATION_SCHEMA if field.name != "status"])
    for file in files:
        assert pq.read_schema(file).equals(expected)
    assert {row["run_id"] for row in read_output(output)} == {summary.run_id}


def test_run_json_agrees_with_the_rows(run: Run, config: Config) -> None:
    output, summary = run
    facts = json.loads((output / "run.json").read_text())
    rows = read_output(output)
    entities = [entity for row in rows for entity in row["entities"]]
    assert facts["rows"] == len(rows) == summary.rows
    assert facts["statuses"] == {status: sum(row["status"] == status for row in rows) for status in map(str, Status)}
    assert facts["statuses"]["rejected"] == summary.rejected > 0
    kinds = [{problem["kind"] for problem in row["problems"]} for row in rows]  # a post counts once for each
    assert facts["problems"] == dict(Counter(kind for each in kinds for kind in each))
    assert facts["entities"] == len(entities) > 0
    assert facts["grounded"] == sum(entity["box"] is not None for entity in entities) > 0
    assert facts["reranked"] == sum(entity["reranked"] for entity in entities)
    assert facts["reranked_share"] == pytest.approx(facts["reranked"] / facts["entities"])
    assert facts["rows_per_second"] == pytest.approx(facts["rows"] / facts["seconds"], rel=0.01)
    assert set(facts["account"]["stage_seconds"]) == {"prepare", "tag", "load_image", "rerank", "ground"}
    assert 0 < facts["account"]["stage_seconds"]["tag"] < facts["seconds"]
    (pool,) = facts["account"]["pools"].values()
    assert pool["actors"] in (1, 2)  # as many as the work asked for
    assert 0 < pool["busy"] < pool["busy"] + pool["idle"] + pool["loading"] < 2 * facts["account"]["seconds"]
    assert facts["account"]["written_bytes"] > 0
    assert facts["models"] == models_of(config)
    assert Config.model_validate(facts["config"]) == config
    assert facts["versions"]["ray"]


def test_finished_run_is_not_run_again(run: Run, dataset: Path, config: Config) -> None:
    output, summary = run
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file() and "lock" not in path.name}
    again = annotate_dataset(dataset, output, config)
    assert (again.annotated, again.to_dict() | {"annotated": 0, "rows_per_second": 0}) == (
        0,
        summary.to_dict() | {"annotated": 0, "rows_per_second": 0},
    )
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"lease.json"}


def test_annotations_of_unknown_origin_are_refused(text_config: Config, tmp_path: Path) -> None:
    write_posts(generate(2, seed=5), tmp_path / "posts")
    old = tmp_path / "out" / "annotations" / "status=ok" / "old.parquet"
    old.parent.mkdir(parents=True)
    old.write_text("somebody else's")
    of_another_output = old.with_name("part-20260101T000000-0123abcd-g00000-89ab4567-0000.parquet")
    for file in (old, old.rename(of_another_output)):
        file.write_text("not to be deleted")
        for fresh in (False, True):
            with pytest.raises(FileExistsError, match=rf"no run of this output has written: status=ok/.*{file.name}"):
                annotate_dataset(tmp_path / "posts", tmp_path / "out", text_config, fresh=fresh)
        assert file.exists()


def test_fresh_replaces_the_old_and_limit_takes_the_first_posts(local_ray, text_config: Config, tmp_path: Path) -> None:
    write_posts(generate(20, seed=5), tmp_path / "posts", per_shard=6)
    reports = []
    summary = annotate_dataset(
        tmp_path / "posts",
        tmp_path / "out",
        text_config,
        limit=8,
        fresh=True,
        progress=lambda reading: reports.append((reading.done, reading.total)),
    )
    rows = read_output(tmp_path / "out")
    assert {row["post_id"] for row in rows} == {post.post_id for post in read_posts(tmp_path / "posts", limit=8)}
    assert summary.rows == summary.annotated == len(rows) == 8
    assert reports[-1] == (8, 8)


def test_model_that_cannot_be_loaded_ends_the_run_with_its_reason(
    local_ray, text_config: Config, tmp_path: Path
) -> None:
    write_posts(generate(2, seed=5), tmp_path / "posts")
    (tmp_path / "tagger").mkdir()
    (tmp_path / "tagger" / "config.json").write_text("{}")
    config = text_config.model_copy(deep=True)
    config.tagger.model = str(tmp_path / "tagger")
    with pytest.raises(RunError, match=r"a model cannot be loaded: .*config\.json is not a tagger's"):
        annotate_dataset(tmp_path / "posts", tmp_path / "out", config)


def test_too_many_actors_for_a_local_ray_are_refused_instead_of_hanging(
    local_ray, text_config: Config, tmp_path: Path
) -> None:
    write_posts(generate(1, seed=5), tmp_path / "posts")
    config = text_config.model_copy(deep=True)
    config.pipeline.pools[0].num_cpus = 4
    with pytest.raises(ValueError, match="needs at least 5 CPUs and Ray has 4"):
        annotate_dataset(tmp_path / "posts", tmp_path / "out", config)


@pytest.mark.parametrize("output", [".", "out", "deep/out", "../link/out", "../other/../posts/out"])
def test_output_inside_the_input_is_refused_before_anything_is_written(
    text_config: Config, tmp_path: Path, output: str
) -> None:
    """The next run over the same input would annotate annotations."""
    write_posts([Post("1", "x")], tmp_path / "posts")
    before = sorted(path.name for path in (tmp_path / "posts").iterdir())
    (tmp_path / "link").symlink_to(tmp_path / "posts")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"is in the input .* keep them apart"):
        annotate_dataset(tmp_path / "posts", tmp_path / "posts" / output, text_config)
    assert sorted(path.name for path in (tmp_path / "posts").iterdir()) == before


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("folder", ["annotations", "annotations/status=ok", "_run/mine"])
def test_input_inside_the_output_is_refused_and_stays(
    text_config: Config, tmp_path: Path, folder: str, fresh: bool
) -> None:
    """A run replaces what is there."""
    write_posts([Post("1", "my only copy")], tmp_path / "data" / folder)
    (tmp_path / "link").symlink_to(tmp_path / "data" / folder)
    before = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    for source in (tmp_path / "data" / folder, tmp_path / "link"):
        with pytest.raises(ValueError, match=r"keeps its annotations.* keep them apart"):
            annotate_dataset(source, tmp_path / "data", text_config, fresh=fresh)
    assert {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()} == before


def test_a_failure_without_words_is_named_by_its_kind(config: Config) -> None:
    error = RayTaskError("stage", "", MemoryError())
    assert str(RayExecutor(config)._run_error(error)) == "MemoryError()"
