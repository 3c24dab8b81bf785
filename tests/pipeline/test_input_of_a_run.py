"""What a run says of an input with bad files, other columns or new files, and of its output; later starts, too."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

import gem_ray.pipeline.run as run_module
from gem_ray.commands import annotate as command
from gem_ray.config import Config, load_config
from gem_ray.data.check import check_input
from gem_ray.data.counting import count_shards
from gem_ray.evaluation.joins import matched, with_distinct_ids
from gem_ray.evaluation.predictions import check_same_rows, iterate_predictions, read_inputs, read_predictions
from gem_ray.evaluation.rules import EvaluationError
from gem_ray.pipeline.compaction import merge
from gem_ray.pipeline.ledger import Progress
from gem_ray.pipeline.mass_failure import mass_failure
from gem_ray.pipeline.run import annotate_dataset
from gem_ray.pipeline.summary import RunSummary
from gem_ray.pipeline.tables import annotations_table, table_to_posts
from gem_ray.records import ProblemKind

CONFIG = load_config(overrides=["reranker.enabled=false", "grounder.enabled=false"])


class InlineExecutor:
    """Does what `RayExecutor` has Ray do, in this process; no stage changes a post."""

    def __init__(self, config: Any, actor: Any = None) -> None:
        pass

    def session(self, run_id: str, max_problem_share: float | None) -> Any:
        return nullcontext()

    def check_models(self, config: Any, models: Any) -> None:
        pass

    def run_pass(
        self, source: Any, config: Any, origin: Any, pools: Any, sink: Any, number: int | None, meanwhile: Any
    ) -> None:
        for task in source.get_read_tasks(1):
            for table in task():
                sink.write([annotations_table(table_to_posts(table), origin.run_id, origin.models)])

    def merge(self, storage: Any, merges: Any) -> list[Any]:
        return [file for each in merges for file in merge(storage, each)]

    def work(self) -> Progress:
        return Progress()

    def units(self) -> float:
        return 1.0


@pytest.fixture(autouse=True)
def _inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "RayExecutor", InlineExecutor)


def put(
    file: Path, texts: list[str], ids: list[str] | None = None, names: tuple[str, str] = ("post_id", "text")
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({names[0]: ids or [f"{file.stem}{n}" for n in range(len(texts))], names[1]: texts}), file)


def annotate(folder: Path, **options: Any) -> RunSummary:
    return annotate_dataset(folder / "in", folder / "out", CONFIG, **options)


def texts_by_row(folder: Path) -> dict[int, str]:
    return {post.row_id or 0: post.text for post in read_predictions(folder / "out")}


def write_some_bad(folder: Path) -> None:
    put(folder / "in" / "b.parquet", ["one", "two"])
    put(folder / "in" / "d.parquet", ["three"])
    put(folder / "in" / "c.parquet", ["x"] * 7, names=("id", "tweet"))
    (folder / "in" / "a.parquet").write_bytes((folder / "in" / "b.parquet").read_bytes()[:-9])
    (folder / "in" / "e.tar").write_bytes(b"\1" * 2000)


def test_bad_files_are_refused_by_name_before_anything_is_written(tmp_path: Path) -> None:
    write_some_bad(tmp_path)
    with pytest.raises(ValueError, match="--skip-bad-files") as refusal:
        annotate(tmp_path)
    lines = str(refusal.value).splitlines()
    assert [name in line for name, line in zip(("a.parquet", "c.parquet", "e.tar"), lines, strict=False)] == [True] * 3
    assert not list((tmp_path / "out").rglob("manifest.json"))


def test_skipped_files_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_some_bad(tmp_path)
    (tmp_path / "in" / "notes.txt").write_text("of another kind")
    summary = annotate(tmp_path, skip_bad_files=True)
    assert texts_by_row(tmp_path) == {1 << 32: "one", (1 << 32) + 1: "two", 3 << 32: "three"}
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [(Path(file["file"]).name, file["rows"]) for file in facts["unread"]] == [
        ("a.parquet", None), ("c.parquet", 7), ("e.tar", None)
    ]  # fmt: skip
    assert "no column post_id, text" in facts["unread"][1]["reason"]
    assert (facts["rows"], facts["unread_rows"], summary.unread_rows) == (3, 7, 7)
    assert facts["left_out"] == [{"reason": "of another kind, by its suffix", "files": 1, "examples": ["notes.txt"]}]
    page = (tmp_path / "out" / "_run" / "report.html").read_text()
    warnings = caplog.text
    for name in ("a.parquet", "c.parquet", "e.tar", "notes.txt"):
        assert name in page
        assert name in warnings
    # Nothing is asked for again, and nothing is forgotten.
    assert annotate(tmp_path).unread == summary.unread
    assert annotate(tmp_path, update=True).annotated == 0


class SomeFail(InlineExecutor):
    """Posts whose text says so lose their images."""

    def run_pass(self, source: Any, config: Any, origin: Any, pools: Any, sink: Any, *rest: Any) -> None:
        for task in source.get_read_tasks(1):
            for table in task():
                posts = table_to_posts(table)
                for post in posts:
                    if post.text.startswith("fails"):
                        post.fail("load_image", ProblemKind.IMAGE_MISSING, "it is gone")
                sink.write([annotations_table(posts, origin.run_id, origin.models)])


def test_new_files_that_failed_are_not_hidden_by_the_many_good_rows_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "RayExecutor", SomeFail)
    put(tmp_path / "in" / "monday.parquet", ["fine"] * 40)
    assert annotate(tmp_path).newest.rows == 40
    put(tmp_path / "in" / "tuesday.parquet", ["fails", "fails, too", "fine"])
    put(tmp_path / "in" / "wednesday.parquet", ["fails"])
    for options in ({"update": True}, {}):  # the next start says so again
        summary = annotate(tmp_path, **options)
        assert (summary.rows, summary.newest.rows, summary.newest.problems["image_missing"]) == (44, 4, 3)
        assert mass_failure(summary.tally, 0.5) is None
    context = typer.Context(typer.main.get_command(command.app), obj={"json_logs": False})
    arguments = [context, str(tmp_path / "in"), str(tmp_path / "out")]
    overrides = ["reranker.enabled=false", "grounder.enabled=false"]
    with pytest.raises(RuntimeError, match="of the files that were added last: 3 of 4 posts"):
        command.annotate(*arguments, set_=overrides, max_problem_share=0.5)
    monkeypatch.setattr(run_module, "RayExecutor", InlineExecutor)
    again = annotate(tmp_path, only_problems=True)
    assert sum(again.tally.problems.values()) == 0
    assert again.newest.problems.total() == 0


def test_a_mended_file_is_taken_in_by_update_under_a_new_number(tmp_path: Path) -> None:
    write_some_bad(tmp_path)
    annotate(tmp_path, skip_bad_files=True)
    before = texts_by_row(tmp_path)
    put(tmp_path / "in" / "c.parquet", ["mended"])
    (tmp_path / "in" / "e.tar").unlink()  # what was never read may go
    for options in ({}, {"skip_bad_files": True}):
        with pytest.raises(ValueError, match=r"c\.parquet: could not be read .* pass --update"):
            annotate(tmp_path, **options)
    summary = annotate(tmp_path, update=True)
    assert texts_by_row(tmp_path) == before | {5 << 32: "mended"}
    assert [Path(file["file"]).name for file in summary.unread] == ["a.parquet", "e.tar"]
    put(tmp_path / "in" / "c.parquet", ["changed again"])
    with pytest.raises(ValueError, match=r"c\.parquet: not the file that this run began with"):
        annotate(tmp_path, update=True)


def test_a_file_that_is_still_bad_needs_the_flag_again(tmp_path: Path) -> None:
    write_some_bad(tmp_path)
    annotate(tmp_path, skip_bad_files=True)
    put(tmp_path / "in" / "c.parquet", ["x"] * 9, names=("key", "words"))
    with pytest.raises(ValueError, match=r"c\.parquet holds no posts: .* key, words"):
        annotate(tmp_path, update=True)
    summary = annotate(tmp_path, update=True, skip_bad_files=True)
    assert summary.unread_rows == 9
    assert json.loads((tmp_path / "out" / "run.json").read_text())["unread_rows"] == 9
    assert len(texts_by_row(tmp_path)) == summary.rows == 3


def test_nothing_but_bad_files_is_no_input(tmp_path: Path) -> None:
    put(tmp_path / "in" / "c.parquet", ["x"], names=("id", "tweet"))
    with pytest.raises(ValueError, match="no posts"):
        annotate(tmp_path, skip_bad_files=True)


def test_check_says_what_would_be_skipped(tmp_path: Path) -> None:
    write_some_bad(tmp_path)
    refused = check_input(tmp_path / "in", Config())
    skipped = check_input(tmp_path / "in", Config(), skip_bad_files=True)
    assert (len(refused.refused), len(skipped.refused), skipped.files, skipped.rows) == (3, 0, 2, 3)
    assert skipped.skipped == refused.refused


def test_a_storage_that_does_not_answer_damages_no_file() -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("connection lost")

    storage = SimpleNamespace(open_input_file=fail, open_input_stream=fail)
    [found] = count_shards(storage, ["a.parquet"], {})
    assert not found.is_damaged  # type: ignore[union-attr]
    assert "a.parquet cannot be read: connection lost" in found.reason  # type: ignore[union-attr]


def test_columns_are_part_of_what_a_run_is(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.parquet", ["Lyon"], ["7"], names=("id", "tweet"))
    columns = {"post_id": "id", "text": "tweet"}
    annotate(tmp_path, columns=columns)
    put(tmp_path / "in" / "b.parquet", ["Rome"], ["8"], names=("id", "tweet"))
    with pytest.raises(ValueError, match=r"--map\.text: tweet → text"):
        annotate(tmp_path, columns={"post_id": "id"})
    annotate(tmp_path, columns=columns, update=True)
    posts = read_predictions(tmp_path / "out")
    assert sorted((post.post_id, post.text) for post in posts) == [("7", "Lyon"), ("8", "Rome")]
    # Whoever joins posts and annotations reads the same columns.
    assert [(post.post_id, post.text) for post in read_inputs(tmp_path / "in", tmp_path / "out")] == [
        ("7", "Lyon"), ("8", "Rome")
    ]  # fmt: skip


def test_fields_of_tars_are_renamed_too(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "a.tar", "w") as tar:
        entry, data = tarfile.TarInfo("1.json"), json.dumps({"id": "7", "tweet": "Lyon"}).encode()
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
    annotate(tmp_path, columns={"post_id": "id", "text": "tweet"})
    [post] = read_predictions(tmp_path / "out")
    assert (post.post_id, post.text) == ("7", "Lyon")


@settings(max_examples=15)
@given(st.lists(st.sampled_from(["first", "later", "bad"]), min_size=2, max_size=5), st.booleans())
def test_rows_are_joined_as_the_run_has_numbered_them(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str], is_copied: bool
) -> None:
    """Every post has the same id, in files that came at once, later, or cannot be read, under names in any order."""
    folder = tmp_path_factory.mktemp("joins")
    put(folder / "in" / "m.parquet", ["m"], ["same"])
    for number, kind in enumerate(kinds):
        if kind == "first":
            put(folder / "in" / f"{'az'[number % 2]}{number}.parquet", [f"text {number}"], ["same"])
        elif kind == "bad":
            (folder / "in" / f"b{number}.parquet").write_bytes(b"damaged")
    annotate(folder, skip_bad_files=True)
    for number, kind in enumerate(kinds):
        if kind == "later":
            put(folder / "in" / f"{'az'[number % 2]}{number}.parquet", [f"text {number}"], ["same"])
            annotate(folder, update=True)
    posts = folder / "in"
    if is_copied:
        posts = folder / "copy" / "of"
        shutil.copytree(folder / "in", posts)
    inputs = with_distinct_ids(read_inputs(posts, folder / "out"))
    texts = {post.post_id: post.text for post in inputs}
    joined = list(matched(iterate_predictions(folder / "out"), inputs))
    assert len(joined) == 1 + sum(kind != "bad" for kind in kinds)
    assert all(post.text == texts[post.post_id] for post in joined)


def test_two_runs_that_number_files_differently_are_not_compared_by_row(tmp_path: Path) -> None:
    put(tmp_path / "in" / "b.parquet", ["b"], ["same"])
    annotate(tmp_path)
    put(tmp_path / "in" / "a.parquet", ["a"], ["same"])
    annotate(tmp_path, update=True)
    annotate_dataset(tmp_path / "in", tmp_path / "other", CONFIG)
    gold = with_distinct_ids(read_inputs(tmp_path / "in", tmp_path / "out"))
    check_same_rows(gold, tmp_path / "out", tmp_path / "out")
    with pytest.raises(EvaluationError, match="numbered differently"):
        check_same_rows(gold, tmp_path / "out", tmp_path / "other")


def test_files_are_known_by_their_paths_also_by_those_that_look_like_credentials(tmp_path: Path) -> None:
    for name in ("token=a", "token=b"):
        put(tmp_path / "in" / name / "part-0.parquet", [name], ["1"])
    (tmp_path / "in" / "password=c.parquet").write_bytes(b"damaged")
    annotate(tmp_path, skip_bad_files=True)
    assert annotate(tmp_path, skip_bad_files=True).annotated == 0
    inputs = with_distinct_ids(read_inputs(tmp_path / "in", tmp_path / "out"))
    assert len(list(matched(iterate_predictions(tmp_path / "out"), inputs))) == 2
    for name in ("run.json", "_run/report.html", "_run/report.json"):
        assert "password=c" not in (tmp_path / "out" / name).read_text()


def rows_by_status(folder: Path) -> dict[str, list[str]]:
    files = sorted((folder / "out" / "annotations").rglob("*.parquet"))
    found: dict[str, list[str]] = {}
    for file in files:
        found.setdefault(file.parent.name, []).extend(pq.ParquetFile(file).read(["text"])["text"].to_pylist())
    return {status: sorted(texts) for status, texts in found.items()}


def test_new_files_within_a_limit_are_named(tmp_path: Path) -> None:
    """A fresh run would read them, or the file that was mended; those behind the limit it would not."""
    put(tmp_path / "in" / "b.parquet", ["one", "two"])
    (tmp_path / "in" / "a.parquet").write_bytes(b"damaged")
    annotate(tmp_path, limit=2, skip_bad_files=True)
    put(tmp_path / "in" / "c.parquet", ["three"])
    assert annotate(tmp_path, limit=2, skip_bad_files=True).annotated == 0
    put(tmp_path / "in" / "a.parquet", ["mended"])
    with pytest.raises(ValueError, match=r"a\.parquet: could not be read .* --limit"):
        annotate(tmp_path, limit=2)
    annotate(tmp_path, limit=10, fresh=True)
    put(tmp_path / "in" / "d.parquet", ["four"])
    with pytest.raises(ValueError, match=r"--limit 10: \S*/d\.parquet"):
        annotate(tmp_path, limit=10)


def test_an_output_that_links_of_the_input_lead_to_is_refused_at_once(tmp_path: Path) -> None:
    """Nothing needs to lie there yet; the second run would read the annotations of the first."""
    put(tmp_path / "in" / "a.parquet", ["one"])
    (tmp_path / "shared").mkdir()
    (tmp_path / "in" / "all").symlink_to(tmp_path / "shared")
    with pytest.raises(ValueError, match="keep them apart"):
        annotate_dataset(tmp_path / "in", tmp_path / "shared" / "deep" / "out", CONFIG)
    assert not list((tmp_path / "shared").iterdir())


def test_refused_starts_begin_no_run(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.parquet", ["one"])
    with pytest.raises(FileNotFoundError, match="no finished run"):
        annotate(tmp_path, only_problems=True)
    with pytest.raises(ValueError, match="exclude one another"):
        annotate(tmp_path, only_problems=True, fresh=True)
    assert not list((tmp_path / "out").rglob("manifest.json"))


def test_a_new_run_that_was_begun_by_mistake_can_be_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "in" / "a.parquet", ["one"])
    first = annotate(tmp_path)
    other = load_config(overrides=["reranker.enabled=false", "grounder.enabled=false", "text.max_chars=7"])
    with monkeypatch.context() as patch:
        patch.setattr(InlineExecutor, "merge", lambda *_: [][1])
        with pytest.raises(IndexError):
            annotate_dataset(tmp_path / "in", tmp_path / "out", other, fresh=True)
    with pytest.raises(
        ValueError, match=rf"max_chars(.|\n)*Run {first.run_id} is what readers see.* delete "
    ) as refusal:
        annotate(tmp_path)
    shutil.rmtree(str(refusal.value).rpartition("delete ")[2])
    again = annotate(tmp_path)
    assert (again.run_id, again.annotated) == (first.run_id, 0)


def test_problems_are_not_done_again_while_other_rows_are_lost(tmp_path: Path) -> None:
    """Their limits may be other ones, which the lost rows must not get."""
    put(tmp_path / "in" / "a.parquet", ["one", "two"])
    annotate(tmp_path)
    before = rows_by_status(tmp_path)
    for file in (tmp_path / "out" / "annotations").rglob("*.parquet"):
        file.unlink()
    other = load_config(overrides=["reranker.enabled=false", "grounder.enabled=false", "text.max_chars=1"])
    with pytest.raises(FileNotFoundError, match="start without --only-problems first"):
        annotate_dataset(tmp_path / "in", tmp_path / "out", other, only_problems=True)
    assert annotate(tmp_path).annotated == 2
    assert rows_by_status(tmp_path) == before
    assert annotate(tmp_path, only_problems=True).annotated == 0


def test_files_of_this_output_s_earlier_runs_are_cleared_and_those_of_others_are_not(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.parquet", ["one"])
    runs = [annotate(tmp_path, fresh=True).run_id for _ in range(3)]
    folder = tmp_path / "out" / "annotations" / "status=ok"
    (own,) = folder.iterdir()
    late = folder / own.name.replace(runs[2], runs[0])  # written by a task of the first run that was taken for dead
    shutil.copy(own, late)
    annotate(tmp_path)
    assert list(folder.iterdir()) == [own]
    other = folder / own.name.replace(runs[2], "20260101T000000-0123abcd")
    shutil.copy(own, other)
    for fresh in (False, True):
        with pytest.raises(FileExistsError, match=other.name):
            annotate(tmp_path, fresh=fresh)
    assert other.exists()


@pytest.mark.parametrize("damage", [b"\xff" * 8, bytes(8)])
def test_rows_of_a_published_file_whose_footer_is_damaged_are_done_again(tmp_path: Path, damage: bytes) -> None:
    put(tmp_path / "in" / "a.parquet", ["one", "two"])
    annotate(tmp_path)
    before = rows_by_status(tmp_path)
    (file,) = (tmp_path / "out" / "annotations").rglob("*.parquet")
    content = file.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    file.write_bytes(content[:footer] + damage + content[footer + 8 :])
    assert annotate(tmp_path).annotated == 2
    assert rows_by_status(tmp_path) == before
