"""Runs that fail and are started again: every row once, nothing done twice, nothing finished lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from pyarrow import fs

from gem_ray.config import Config
from gem_ray.data.generated import generate
from gem_ray.data.shards import write_posts
from gem_ray.pipeline.checkpoint import committed_ids
from gem_ray.pipeline.graph import StageActor
from gem_ray.pipeline.run import RunError, annotate_dataset
from gem_ray.pipeline.run_directory import RunDirectory
from gem_ray.pipeline.source import ROWS_BITS
from gem_ray.records import Status

Same = Callable[[Any, Any], None]


def rows_of(output: Path) -> dict[int, dict[str, Any]]:
    """Rows by id; each id is there once."""
    tables = [pq.ParquetFile(path).read() for path in (output / "annotations").rglob("part-*.parquet")]
    rows = [row for table in tables for row in table.to_pylist()]
    by_id = {row["row_id"]: row for row in rows}
    assert len(by_id) == len(rows)
    return by_id


def without_run(rows: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {row_id: {**row, "run_id": None} for row_id, row in rows.items()}


def files_of(output: Path) -> set[Path]:
    return {path.relative_to(output) for path in output.rglob("*") if path.is_file()}


def breaking_at(file: int) -> type:
    """Actors that fail with the first row of a file of the input, counted from 0."""

    class Breaking(StageActor):
        def __call__(self, table: pa.Table) -> pa.Table:
            if (table["row_id"].to_numpy() >> ROWS_BITS == file).any():
                self._ledger.set_failure("the card fell off the bus")
                raise RuntimeError
            return super().__call__(table)

    return Breaking


def all_cpus_are_free() -> bool:
    """Soon: actors end a moment after the last that knows them."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]:
            return True
        time.sleep(0.2)
    return False


@pytest.fixture
def posts(tmp_path: Path) -> Path:
    write_posts(generate(30, seed=5), tmp_path / "posts", per_shard=10)
    return tmp_path / "posts"


def test_failed_run_goes_on_where_it_stopped(
    local_ray, text_config: Config, posts: Path, tmp_path: Path, assert_same: Same
) -> None:
    """Two groups are published before the third fails; after it is mended, only its rows are annotated."""
    config = text_config.model_copy(deep=True)
    config.pipeline.rows_per_group = 10
    with pytest.raises(RunError, match="the card fell off the bus") as error:
        annotate_dataset(posts, tmp_path / "out", config, actor=breaking_at(2))
    assert "\n" not in str(error.value)
    assert all_cpus_are_free()  # although the error is still at hand
    assert len(rows_of(tmp_path / "out")) == 20
    before = files_of(tmp_path / "out" / "annotations")
    summary = annotate_dataset(posts, tmp_path / "out", config)
    assert (summary.annotated, summary.rows) == (10, 30)
    assert before < files_of(tmp_path / "out" / "annotations")
    annotate_dataset(posts, tmp_path / "undisturbed", text_config)
    assert_same(without_run(rows_of(tmp_path / "out")), without_run(rows_of(tmp_path / "undisturbed")))
    assert not list((tmp_path / "out" / "_run").rglob("staged/*"))


def test_old_annotations_stay_until_a_fresh_run_is_complete(
    local_ray, text_config: Config, posts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = annotate_dataset(posts, out, text_config, limit=12)
    published = files_of(out / "annotations")
    config = text_config.model_copy(deep=True)
    config.pipeline.rows_per_group = 10
    with pytest.raises(RunError):
        annotate_dataset(posts, out, config, fresh=True, actor=breaking_at(2))
    assert files_of(out / "annotations") == published
    assert {row["run_id"] for row in rows_of(out).values()} == {first.run_id}
    summary = annotate_dataset(posts, out, config)  # goes on with the fresh run
    assert summary.annotated == 10
    assert {row["run_id"] for row in rows_of(out).values()} == {summary.run_id} != {first.run_id}
    assert len(rows_of(out)) == 30
    assert RunDirectory(str(out)).run_ids() == [summary.run_id]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": {"max_chars": 99}}, "text.max_chars: 10000 → 99"),
        ({"tagger": {"max_length": 64}}, r"tagger.max_length: \d+ → 64"),
        (
            {"pipeline": {"passes": [["knowledge", "tag"], ["load_image", "rerank", "ground"]]}},
            "pipeline.passes: None → ",
        ),
    ],
)
def test_other_settings_on_the_same_output_are_refused(
    local_ray, text_config: Config, posts: Path, tmp_path: Path, change: dict[str, dict[str, Any]], message: str
) -> None:
    annotate_dataset(posts, tmp_path / "out", text_config, limit=3)
    before = files_of(tmp_path / "out")
    sections = {name: getattr(text_config, name).model_copy(update=values) for name, values in change.items()}
    with pytest.raises(ValueError, match=message):
        annotate_dataset(posts, tmp_path / "out", text_config.model_copy(update=sections), limit=3)
    with pytest.raises(ValueError, match="limit: 3 → None"):
        annotate_dataset(posts, tmp_path / "out", text_config)
    assert files_of(tmp_path / "out") == before
    faster = text_config.model_copy(deep=True)
    faster.tagger.batch_tokens = faster.pipeline.rows_per_block = 30  # changes no annotation
    assert annotate_dataset(posts, tmp_path / "out", faster, limit=3).rows == 3


def test_only_problems_are_done_again(
    local_ray, text_config: Config, posts: Path, tmp_path: Path, assert_same: Same
) -> None:
    out = tmp_path / "out"
    strict = text_config.model_copy(deep=True)
    strict.text.max_chars = 60
    with pytest.raises(FileNotFoundError, match="no finished run"):
        annotate_dataset(posts, out, strict, only_problems=True)
    RunDirectory(str(out)).forget_unfinished()
    first = annotate_dataset(posts, out, strict)
    kept = {row_id: row for row_id, row in rows_of(out).items() if not row["problems"]}
    assert 0 < first.rejected < 30
    second = annotate_dataset(posts, out, text_config, only_problems=True)
    assert (second.rejected, second.annotated, second.rows) == (0, first.rejected, 30)
    assert second.tally.entities > first.tally.entities
    assert second.tally.statuses[Status.OK] == 30
    rows = rows_of(out)
    assert len(rows) == 30
    assert {row_id: rows[row_id] for row_id in kept} == kept
    annotate_dataset(posts, tmp_path / "undisturbed", text_config)
    assert_same(without_run(rows), without_run(rows_of(tmp_path / "undisturbed")))
    assert annotate_dataset(posts, out, text_config, only_problems=True).annotated == 0


def test_problems_whose_old_rows_a_kill_has_left_are_there_once(
    local_ray, text_config: Config, posts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    strict = text_config.model_copy(deep=True)
    strict.text.max_chars = 60
    annotate_dataset(posts, out, strict)

    def kill(directory: RunDirectory, paths: list[str]) -> None:
        if paths:
            raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "delete_published", kill)
        with pytest.raises(OSError, match="killed"):
            annotate_dataset(posts, out, text_config, only_problems=True)
    with pytest.raises(AssertionError):
        rows_of(out)  # some are there twice
    summary = annotate_dataset(posts, out, strict)
    assert summary.tally.statuses[Status.OK] == summary.rows == len(rows_of(out)) == 30
    assert annotate_dataset(posts, out, text_config, only_problems=True).annotated == 0
    assert len(rows_of(out)) == 30


def test_rows_that_two_processes_have_written_are_never_published(
    local_ray, text_config: Config, posts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = text_config.model_copy(deep=True)
    config.pipeline.rows_per_group = 10
    with pytest.raises(RunError):
        annotate_dataset(posts, tmp_path / "out", config, actor=breaking_at(2))
    directory = RunDirectory(str(tmp_path / "out"))
    begun = Path(directory.run(directory.run_ids()[-1]).checkpoint("g00002", 0))
    begun.mkdir(parents=True, exist_ok=True)
    ids = pa.table({"row_id": pa.array([(2 << ROWS_BITS) + row for row in range(10)], pa.int64())})
    for name in ("one", "other"):
        pq.write_table(ids, begun / f"{name}.parquet")
    for _ in range(2):
        with pytest.raises(RunError, match="rows were written twice"):
            annotate_dataset(posts, tmp_path / "out", config)
    assert len(rows_of(tmp_path / "out")) == 20


def test_ids_of_a_rename_that_was_cut_short_count_as_committed(tmp_path: Path) -> None:
    """To rename in S3 is to copy and delete: with the copy there, Ray must not undo the rows."""
    filesystem = fs.LocalFileSystem()
    for name, ids in (("a.parquet", [1, 2]), ("a.pending.parquet", [1, 2]), ("b.pending.parquet", [3])):
        pq.write_table(pa.table({"row_id": pa.array(ids, pa.int64())}), tmp_path / name)
    assert sorted(committed_ids(filesystem, str(tmp_path))) == [1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"a.parquet", "b.pending.parquet"}
    assert len(committed_ids(filesystem, str(tmp_path / "nowhere"))) == 0
