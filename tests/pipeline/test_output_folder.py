"""The run's folder, on a disk and in S3: facts that are whole or not there, and runs that follow one another."""

from __future__ import annotations

import errno
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gem_ray.config import load_config
from gem_ray.data.generated import generate
from gem_ray.data.listing import list_shards
from gem_ray.data.output import (
    Publication,
    PublishedFile,
    annotation_paths,
    input_of_run,
    live_files,
    live_run,
    run_ids,
)
from gem_ray.data.shards import write_posts
from gem_ray.data.storage import ConflictError, LocalStorage, Storage, as_json, open_storage
from gem_ray.pipeline.identity import check_same, stages_by_pass
from gem_ray.pipeline.inputs import InputFile, InputReader, count_input
from gem_ray.pipeline.lease import Lease
from gem_ray.pipeline.output_folder import Manifest, OutputFolder, Round
from gem_ray.pipeline.publishing import ids_of_files, lost_files
from gem_ray.pipeline.run import annotate_dataset
from gem_ray.pipeline.source import PostSource
from gem_ray.pipeline.staging import StagedRows

RUN_IDS = [f"2026010{day}T000000-0123abcd" for day in (1, 2, 3)]


@pytest.fixture(params=["disk", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "out")
    return request.getfixturevalue("s3").bucket("runs") + "/out"


def manifest(run_id: str) -> Manifest:
    files = [InputFile("posts/a.parquet", 0, 5, 100, 1), InputFile("posts/c.parquet", 1, 7, 100, 2)]
    begun = "2026-01-01T00:00:00+00:00"
    return Manifest(
        run_id, begun, "posts", None, files, 10, {"tagger": "t@1"}, {}, parts=[2], passes=[["prepare", "tag"]]
    )


def put(storage: Storage, name: str, content: bytes = b"x") -> None:
    storage.write(name, content)


def test_runs_are_found_in_the_order_of_their_beginning(output: str) -> None:
    directory = OutputFolder(output)
    assert directory.last_run() is None
    assert directory.summary() is None
    first, second, _ = RUN_IDS
    for run_id in (second, first):
        directory.run(run_id).begin(manifest(run_id))
    put(directory.storage, f"_run/{second}.copy/manifest.json")  # that somebody has kept
    assert run_ids(directory.storage) == [first, second]
    last = directory.last_run()
    assert last is not None
    assert last.manifest() == manifest(second)


def test_files_that_are_added_come_after_those_that_are_there(output: str) -> None:
    folder = OutputFolder(output).run("1")
    folder.begin(manifest("1"))
    more = InputFile("posts/b.parquet", 2, 3, 100, 3)
    folder.add([more])
    assert folder.manifest() == replace(manifest("1"), files=[*manifest("1").files, more], parts=[2, 1])


def test_files_are_in_the_order_in_which_they_were_added_also_after_ten_thousand_times(output: str) -> None:
    """Numbers of groups follow from it: another order, and rows are done twice or not at all."""
    storage, run_id = open_storage(output), RUN_IDS[0]
    directory = OutputFolder(output, storage)
    directory.run(run_id).begin(manifest(run_id))
    for number in (10_000, 9_999):
        file = InputFile(f"posts/{number}.parquet", number, 3, 100, 3)
        put(storage, f"_run/{run_id}/files/{number:04d}.json", as_json({"files": [vars(file)]}))
    added = [file.number for file in directory.run(run_id).manifest().files[2:]]
    assert added == [9_999, 10_000]
    directory.run(run_id).make_live()
    described = input_of_run(storage)
    assert described is not None
    assert list(described.numbers.values())[2:] == added


def test_run_of_another_version_is_named(output: str) -> None:
    directory = OutputFolder(output)
    put(directory.storage, "_run/1/manifest.json", b'{"run_id": "1", "listing": "3 (abc)"}')
    with pytest.raises(ValueError, match="another version of gem-ray"):
        directory.run("1").manifest()


def test_what_has_been_decided_stays(output: str) -> None:
    folder = OutputFolder(output).run("1")
    first, second = (Publication([PublishedFile(name, 1, 1, {})], []) for name in ("first", "second"))
    folder.publish("g00000", first)
    folder.publish("g00000", second)
    assert folder.publications() == {"g00000": first}
    assert folder.create("gamma", {"gamma": 1}) is True
    assert folder.create("gamma", {"gamma": 1}) is True  # the same once more: as if the answer had been lost
    assert folder.create("gamma", {"gamma": 2}) is False
    assert folder.read("gamma") == {"gamma": 1}


def test_last_run_that_is_live_is_the_one_to_read(output: str) -> None:
    directory = OutputFolder(output)
    first, second, third = RUN_IDS
    for run_id in RUN_IDS:
        directory.run(run_id).begin(manifest(run_id))
    assert live_run(directory.storage) is None
    assert annotation_paths(directory.storage) is None
    directory.run(second).make_live()
    directory.run(first).make_live()
    assert live_run(directory.storage) == second
    put(directory.storage, "_run/2026-notes/mine")
    directory.forget_runs_before(second)
    assert directory.storage.folders("_run") == ["2026-notes", second, third]


def test_published_files_are_found_before_and_after_they_are_moved(output: str) -> None:
    directory = OutputFolder(output)
    folder, storage = directory.run(RUN_IDS[0]), directory.storage
    folder.begin(manifest(RUN_IDS[0]))
    folder.make_live()
    files = [PublishedFile(f"status=ok/{name}.parquet", 1, 1, {}) for name in ("old", "new")]
    folder.publish("g00000", Publication(files[:1], []))
    folder.publish("p000", Publication(files[1:], [files[0].name]))
    assert live_files(folder.publications()) == {"status=ok/new.parquet": "p000"}
    waiting, moved = f"_run/{RUN_IDS[0]}/merged/p000/status=ok/new.parquet", "annotations/status=ok/new.parquet"
    put(storage, waiting)
    assert annotation_paths(storage) == [storage.path(waiting)]
    storage.move(waiting, moved)
    assert annotation_paths(storage) == [storage.path(moved)]
    for name in (waiting, moved):  # in S3 both are there
        storage.delete(name)
    with pytest.raises(FileNotFoundError, match=r"annotations/status=ok/new\.parquet is gone"):
        annotation_paths(storage)


def test_rounds_are_kept(output: str) -> None:
    folder = OutputFolder(output).run("1")
    assert folder.rounds() == {}
    folder.begin_round("p000", Round(["status=degraded/a.parquet"], {"text": {"max_chars": 10}}))
    assert folder.rounds() == {"p000": Round(["status=degraded/a.parquet"], {"text": {"max_chars": 10}})}


def test_clearing_a_group_leaves_the_others(output: str) -> None:
    folder = OutputFolder(output).run("1")
    storage = folder.storage
    for group in ("g00000", "g00001"):
        for number in (0, 1):
            put(storage, f"{folder.staged(group, number)}/x.parquet")
    folder.clear_staged("g00000", passes=2)
    assert list(storage.files("_run/1")) == [f"{folder.staged('g00001', number)}/x.parquet" for number in (0, 1)]
    folder.clear()
    assert storage.files("_run/1") == {}


def test_conditional_writes(output: str) -> None:
    storage = open_storage(output)
    first = storage.swap("_run/x", b"1", None)
    assert storage.version("_run/x") == first
    with pytest.raises(ConflictError, match=r"^_run/x was changed by another process meanwhile; start again$"):
        storage.swap("_run/x", b"2", None)
    second = storage.swap("_run/x", b"3", first)
    with pytest.raises(ConflictError):
        storage.swap("_run/x", b"4", first)
    assert (storage.read("_run/x"), storage.version("_run/x")) == (b"3", second)
    with pytest.raises(ConflictError):
        storage.swap("_run/missing", b"5", second)
    assert storage.read("_run/missing") is None


def test_a_file_is_deleted_in_the_version_that_was_seen(output: str) -> None:
    storage = open_storage(output)
    storage.delete_version("_run/x", None)
    first = storage.swap("_run/x", b"1", None)
    storage.delete_version("_run/x", None)
    second = storage.swap("_run/x", b"2", first)
    storage.delete_version("_run/x", first)
    assert storage.read("_run/x") == b"2"
    storage.delete_version("_run/x", second)
    assert storage.read("_run/x") is None


def test_a_write_that_s3_is_too_busy_for_is_tried_again(s3: Any, faulty_s3: Any) -> None:
    """Of two conditional writes at a time, perhaps one sent twice, it refuses one whatever the condition."""
    folder = OutputFolder(s3.bucket("runs") + "/out").run("1")
    group = Publication([PublishedFile("first", 1, 1, {})], [])
    faulty_s3.plan = ["busy"]
    folder.publish("g00000", group)
    assert faulty_s3.counts["busy"] == 1
    assert folder.publications() == {"g00000": group}


def test_a_bucket_whose_policy_forbids_deleting_is_refused_before_a_row_is_read(s3: Any, tmp_path: Path) -> None:
    bucket = s3.bucket("runs")
    s3.forbid(f"{bucket}/*", "s3:DeleteObject")
    write_posts(list(generate(2, seed=1)), tmp_path / "posts")
    with pytest.raises(PermissionError, match=r"may not be read, written or deleted \(.* for DeleteObject\)"):
        annotate_dataset(tmp_path / "posts", f"{bucket}/out", load_config())


def test_a_lock_of_a_process_that_was_stopped_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Amid a write of the lease, say; a start would wait forever, without a word."""
    monkeypatch.setattr("gem_ray.data.storage._LOCKED_S", 0.1)
    storage = LocalStorage(str(tmp_path))
    with storage._locked(), pytest.raises(TimeoutError, match=r"_run/\.lock has been locked for 0\.1 s by a process"):
        storage.swap("_run/lease.json", b"{}", None)
    storage.swap("_run/lease.json", b"{}", None)


def test_what_is_neither_written_nor_there_is_no_decision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(storage: Storage, name: str, content: bytes, expected: str | None) -> str:
        raise ConflictError(name)

    monkeypatch.setattr(LocalStorage, "swap", refuse)
    with pytest.raises(ConflictError):
        OutputFolder(str(tmp_path)).run("1").publish("g00000", Publication([], []))


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the lease is every five seconds, which the nodes of a cluster read for each block that they write."""
    storage, read = LocalStorage(str(tmp_path)), Storage.read
    put(storage, "x", b"new")
    failures = [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error")]

    def stale(self: Storage, name: str) -> bytes | None:
        if failures:
            raise failures.pop(0)
        return read(self, name)

    monkeypatch.setattr(Storage, "read", stale)
    with pytest.raises(OSError, match="Input/output error"):
        storage.read("x")
    failures.append(OSError(errno.ESTALE, "Stale file handle"))
    assert storage.read("x") == b"new"


@pytest.mark.parametrize("content", [b"", b'{"run_id": "2026', b"[]", b"\xff"])
def test_facts_that_are_damaged_are_named(tmp_path: Path, content: bytes) -> None:
    directory = OutputFolder(str(tmp_path))
    directory.run(RUN_IDS[0]).begin(manifest(RUN_IDS[0]))
    put(directory.storage, f"_run/{RUN_IDS[0]}/manifest.json", content)
    put(directory.storage, "_run/lease.json", content)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/_run/{RUN_IDS[0]}/manifest\.json is damaged: "):
        OutputFolder(str(tmp_path)).run(RUN_IDS[0]).manifest()
    with pytest.raises(ValueError, match=rf"^{tmp_path}/_run/lease\.json is damaged: "), Lease(directory).held():
        pass


def test_annotations_may_be_on_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.replace

    def refuse(source: Path, target: str) -> Path:
        if Path(target).parent != source.parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(source, target)

    monkeypatch.setattr(Path, "replace", refuse)
    storage = open_storage(str(tmp_path))
    put(storage, "_run/1/merged/g00000/x.parquet", b"rows")
    storage.move("_run/1/merged/g00000/x.parquet", "annotations/status=ok/x.parquet")
    assert storage.read("annotations/status=ok/x.parquet") == b"rows"
    assert list(storage.files("annotations")) == ["annotations/status=ok/x.parquet"]


def test_write_that_fails_leaves_what_was_there(output: str) -> None:
    storage = open_storage(output)
    storage.write("a", b"old")
    with pytest.raises(RuntimeError), storage.writing("b/a"):
        raise RuntimeError
    assert list(storage.files("")) == ["a"] if storage.root else True
    storage.delete("nowhere")
    storage.delete_folder("nowhere")
    assert storage.read("a") == b"old"


def test_leftovers_of_killed_writers_are_swept_away(tmp_path: Path) -> None:
    directory = OutputFolder(str(tmp_path))
    (tmp_path / "_run").mkdir()
    theirs = ["_run/lease.json", ".mine.partial", ".mine.12345678.partial", "_run/.x.json.12345678.partial"]
    for name in (".run.json.12345678.partial", "_run/.lease.json.12345678.partial", *theirs):
        (tmp_path / name).write_text("x")
    directory.sweep()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(theirs)


def test_a_run_that_takes_the_place_of_another_while_it_is_read_is_read_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = OutputFolder(str(tmp_path))
    first, second, _ = RUN_IDS
    for run_id in (first, second):
        directory.run(run_id).begin(manifest(run_id))
        directory.run(run_id).publish("g00000", Publication([PublishedFile(f"status=ok/{run_id}", 1, 1, {})], []))
        put(directory.storage, f"annotations/status=ok/{run_id}")
    directory.run(first).make_live()
    read = Storage.read_json

    def read_json(storage: Storage, name: str) -> object:
        """The first time: the other run goes live, and the old one is forgotten."""
        if not directory.run(second).is_live:
            directory.run(second).make_live()
            directory.forget_runs_before(second)
        return read(storage, name)

    monkeypatch.setattr(Storage, "read_json", read_json)
    assert annotation_paths(directory.storage) == [str(tmp_path / f"annotations/status=ok/{second}")]


def test_a_file_with_any_byte_wrong_is_whole_or_damaged_and_stops_nobody(tmp_path: Path) -> None:
    """Arrow says it in many ways: ArrowInvalid, OSError, UnicodeDecodeError."""
    storage = open_storage(str(tmp_path))
    (tmp_path / "annotations").mkdir()
    (tmp_path / "staged").mkdir()
    table = pa.table({"row_id": pa.array([1, 2, 3]), "text": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "whole", write_page_checksum=True)
    content = (tmp_path / "whole").read_bytes()
    facts = Publication([PublishedFile("x.parquet", 3, len(content), {})], [])
    found = set()
    for place in range(0, len(content), 2):
        for damaged in (
            content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :],
            content[:place] + bytes(len(content) - place),
        ):
            (tmp_path / "annotations" / "x.parquet").write_bytes(damaged)
            (tmp_path / "staged" / "x.parquet").write_bytes(damaged)
            found.add(bool(lost_files(storage, {"g": facts})))
            assert list(StagedRows(storage, "staged").ids()) in ([1, 2, 3], [])
    assert found == {True, False}


def test_a_published_file_with_a_damaged_page_is_named_with_what_to_do(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    path = tmp_path / "annotations" / "x.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"row_id": range(1000)}), path, compression="zstd")
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(500) + content[504:])
    assert not lost_files(storage, {"g": Publication([PublishedFile("x.parquet", 1000, len(content), {})], [])})
    with pytest.raises(ValueError, match=r"annotations/x\.parquet is damaged: .*; delete it"):
        ids_of_files(storage, ["x.parquet"])


def test_file_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"):
        OutputFolder(str(tmp_path / "out"))


def test_posts_are_read_from_where_they_were_written(output: str) -> None:
    write_posts(generate(5, seed=2), output, per_shard=2)
    listing = list_shards(output)
    reader = InputReader(listing.filesystem)
    files = count_input(reader, listing.shards, limit=3)
    assert [file.rows for file in files] == [2, 1]
    source = PostSource(reader, files)
    assert sum(table.num_rows for task in source.get_read_tasks(1) for table in task()) == 3


@pytest.mark.parametrize(
    ("pools", "is_same"),
    [
        ("[{stages: [tag]}, {stages: [rerank, ground]}]", True),  # who shares processes within a pass changes nothing
        ("[{stages: [tag]}, {stages: [ground], pass_number: 2}]", False),
    ],
)
def test_a_run_keeps_its_passes(pools: str, is_same: bool) -> None:
    config = load_config()
    begun = replace(manifest("run"), config=config.public(), passes=stages_by_pass(config))
    now = load_config(overrides=[f"pipeline.pools={pools}"])
    refused = (
        nullcontext() if is_same else pytest.raises(ValueError, match=r"stages: \[\['prepare', 'tag', 'load_image'")
    )
    with refused:
        check_same(begun, now, begun.models, None, {}, may_have_other_limits=False)
