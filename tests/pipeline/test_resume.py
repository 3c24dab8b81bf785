"""Runs that fail and are started again: every row once, nothing done twice, nothing finished lost."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from gem_ray.config import Config, merge_trees, parse_config
from gem_ray.data.generated import generate
from gem_ray.data.listing import MARKER
from gem_ray.data.output import run_ids
from gem_ray.data.shards import ROWS_BITS, write_posts
from gem_ray.pipeline import graph
from gem_ray.pipeline.output_folder import OutputFolder, RunFolder
from gem_ray.pipeline.run import RunError, annotate_dataset
from gem_ray.records import Status

Same = Callable[[Any, Any], None]


@pytest.fixture(autouse=True)
def _without_models(quick_actor: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gem_ray.pipeline.graph.PoolActor", quick_actor)


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

    class Breaking(graph.PoolActor):
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


@pytest.fixture
def groups_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group is an execution of its own, so that those before the one that fails are published."""
    monkeypatch.setattr("gem_ray.pipeline.groups.ROWS_AT_ONCE", 0)


@pytest.mark.usefixtures("groups_apart")
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


def test_groups_share_actors(local_ray, text_config: Config, posts: Path, tmp_path: Path) -> None:
    loaded = tmp_path / "loaded"
    loaded.mkdir()

    class Counted(graph.PoolActor):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            (loaded / str(os.getpid())).touch()
            super().__init__(*arguments, **named)

    config = text_config.model_copy(deep=True)
    config.pipeline.rows_per_group = 10
    annotate_dataset(posts, tmp_path / "out", config, actor=Counted)
    assert len(list(loaded.iterdir())) == 1
    assert len(list((tmp_path / "out" / "_run").glob("*/published/*.json"))) == 3
    assert len(rows_of(tmp_path / "out")) == 30


@pytest.mark.usefixtures("groups_apart")
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
    assert run_ids(OutputFolder(str(out)).storage) == [summary.run_id]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": {"max_chars": 99}}, "text.max_chars: 10000 → 99"),
        ({"tagger": {"max_length": 64}}, r"tagger.max_length: \d+ → 64"),
    ],
)
def test_other_settings_on_the_same_output_are_refused(
    local_ray, text_config: Config, posts: Path, tmp_path: Path, change: dict[str, dict[str, Any]], message: str
) -> None:
    annotate_dataset(posts, tmp_path / "out", text_config, limit=3)
    before = files_of(tmp_path / "out")
    changed = parse_config(merge_trees(text_config.model_dump(), change))
    with pytest.raises(ValueError, match=message):
        annotate_dataset(posts, tmp_path / "out", changed, limit=3)
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


def test_problems_are_done_again_under_the_limits_of_the_last_start(
    local_ray, text_config: Config, posts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed round has made under other limits does not count."""
    out = tmp_path / "out"

    def with_limit(most: int) -> Config:
        return text_config.model_copy(update={"text": text_config.text.model_copy(update={"max_chars": most})})

    annotate_dataset(posts, out, with_limit(40))
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "publish", raising(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            annotate_dataset(posts, out, with_limit(60), only_problems=True)
    summary = annotate_dataset(posts, out, with_limit(80), only_problems=True)
    rejected = [row for row in rows_of(out).values() if row["problems"]]
    assert all(len(row["text"]) > 80 for row in rejected)
    assert summary.rejected == len(rejected)
    assert json.loads((out / "run.json").read_text())["config"]["text"]["max_chars"] == 80


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise error

    return fail


@pytest.mark.usefixtures("groups_apart")
def test_rows_that_were_written_twice_are_published_once(
    local_ray, text_config: Config, posts: Path, tmp_path: Path
) -> None:
    """By a task that was taken for dead, or by a driver that was: what is there twice is the same work done twice."""
    config = text_config.model_copy(deep=True)
    config.pipeline.rows_per_group = 10
    out = tmp_path / "out"
    with pytest.raises(RunError):
        annotate_dataset(posts, out, config, actor=breaking_at(2))
    annotate_dataset(posts, tmp_path / "other", config)
    folder = OutputFolder(str(out)).last_run()
    assert folder is not None
    (path,) = (p for p in (tmp_path / "other" / "annotations").rglob("*.parquet") if "-g00002-" in p.name)
    rows = pq.ParquetFile(path).read()
    staged = rows.append_column("status", pa.array(["ok"] * len(rows)))
    (out / folder.staged("g00002", 0)).mkdir(parents=True, exist_ok=True)
    for name in ("one", "other"):
        pq.write_table(staged, out / folder.staged("g00002", 0) / f"{name}.parquet")
    assert annotate_dataset(posts, out, config).annotated == 0
    assert len(rows_of(out)) == 30


def test_published_files_that_have_gone_are_made_again(
    local_ray, text_config: Config, posts: Path, tmp_path: Path, assert_same: Same
) -> None:
    out = tmp_path / "out"
    config = text_config.model_copy(deep=True)
    config.pipeline.rows_per_group = 10
    annotate_dataset(posts, out, config)
    before = without_run(rows_of(out))
    gone, cut, _ = sorted((out / "annotations").rglob("*.parquet"))
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:100])
    summary = annotate_dataset(posts, out, config)
    assert (summary.annotated, summary.rows) == (20, 30)
    assert_same(without_run(rows_of(out)), before)
    assert annotate_dataset(posts, out, config).annotated == 0


def test_new_files_are_taken_in_without_touching_what_is_done(
    local_ray, text_config: Config, posts: Path, tmp_path: Path, assert_same: Same
) -> None:
    """In whatever order files arrive, the rows are those of one run over all of them."""
    arriving = tmp_path / "arriving"
    arriving.mkdir()
    names = sorted(path.name for path in posts.glob("*.parquet"))
    first, *later = names[1], names[0], names[2]
    shutil.copy(posts / first, arriving)
    out = tmp_path / "out"
    annotate_dataset(arriving, out, text_config)
    for name in later:
        before = {path: path.read_bytes() for path in (out / "annotations").rglob("*.parquet")}
        shutil.copy(posts / name, arriving)
        with pytest.raises(ValueError, match=rf"does not know: .*{name}; pass --update"):
            annotate_dataset(arriving, out, text_config)
        assert annotate_dataset(arriving, out, text_config, update=True).annotated == 10
        assert {path: path.read_bytes() for path in before} == before
    rows = rows_of(out)
    assert {row_id >> ROWS_BITS for row_id in rows} == {0, 1, 2}
    annotate_dataset(posts, tmp_path / "whole", text_config)
    assert_same(by_post(rows), by_post(rows_of(tmp_path / "whole")))


def by_post(rows: dict[int, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["post_id"]: {**row, "row_id": None, "run_id": None} for row in rows.values()}


def test_file_of_another_content_is_refused_by_name(
    local_ray, text_config: Config, posts: Path, tmp_path: Path
) -> None:
    """Also one of the same name, size and number of rows."""
    out = tmp_path / "out"
    (posts / MARKER).unlink()  # with which a file that is gone is found missing without any run
    annotate_dataset(posts, out, text_config, limit=20)
    path = posts / "part-00001.parquet"
    content, facts = path.read_bytes(), path.stat()
    for change in (content, content[:-1]):
        path.write_bytes(change)
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + (change == content)))
        for options in ({}, {"only_problems": True}, {"update": True}):
            with pytest.raises(ValueError, match=r"part-00001\.parquet: not the file that this run began with"):
                annotate_dataset(posts, out, text_config, limit=20, **options)
    path.unlink()
    with pytest.raises(ValueError, match=r"are gone: .*part-00001\.parquet"):
        annotate_dataset(posts, out, text_config, limit=20)
    path.write_bytes(content)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert annotate_dataset(posts, out, text_config, limit=20).annotated == 0
    (posts / "part-00002.parquet").rename(posts / "a.parquet")
    with pytest.raises(ValueError, match=r"new files before those of this run: .*a\.parquet"):
        annotate_dataset(posts, out, text_config, limit=20)
