"""A run that dies at every single write, beside late tasks and second drivers: each row once, whatever happened.

Everything is the real code but for four things: the stages (a rule about the text), the rows (without most columns,
which cost time), Ray (blocks are written one after the other, some of them twice, as by a worker that is taken for
dead), and the storage, which counts what is written and lets the process die there. It behaves as a disk (temporary
file, rename) or as S3 (no rename, folders are prefixes).
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

import gem_ray.data.storage as storage_module
import gem_ray.pipeline.compaction as compaction_module
import gem_ray.pipeline.groups as groups_module
import gem_ray.pipeline.lease as lease_module
import gem_ray.pipeline.meter as meter_module
import gem_ray.pipeline.output_folder as output_folder_module
import gem_ray.pipeline.run as run_module
from gem_ray.config import Config, load_config
from gem_ray.data.output import ANNOTATIONS, SUCCESS, annotation_paths
from gem_ray.data.storage import ConflictError, LocalStorage, Storage
from gem_ray.pipeline.compaction import merge
from gem_ray.pipeline.lease import Lease, LeaseClaim
from gem_ray.pipeline.ledger import Progress
from gem_ray.pipeline.limits import RunLimits
from gem_ray.pipeline.output_folder import OutputFolder
from gem_ray.pipeline.run import RunError, annotate_dataset
from gem_ray.pipeline.summary import versions
from gem_ray.pipeline.tables import annotations_table, pass_table, posts_to_table, table_to_posts
from gem_ray.records import ANNOTATION_SCHEMA, Post, ProblemKind
from gem_ray.tally import Tally

Rows = dict[int, tuple[str, str]]  # id -> text, status

OFF = ["reranker.enabled=false", "grounder.enabled=false", "pipeline.rows_per_group=3"]
CONFIG = load_config(overrides=OFF)
SHORT = load_config(overrides=[*OFF, "text.max_chars=8"])
IN_PASSES = load_config(
    overrides=[
        *OFF,
        "knowledge.explainer.base_url=http://127.0.0.1:9/v1",
        "pipeline.pools=[{stages: [knowledge]}, {stages: [tag], pass_number: 2}]",
    ]
)
FLAKY = "flaky"  # a post whose image is there at one attempt and not at the next
ROWS_PER_BLOCK = 2
FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EACCES)


class Crash(BaseException):
    """The process is gone: nothing that it would still do happens."""


@dataclass
class Process:
    """Counts the writes of one process; at one of them it dies, or `meanwhile` happens."""

    stop_at: int | None = None
    meanwhile: Callable[[], None] | None = None
    writes: int = 0
    is_dead: bool = False

    def check(self) -> None:
        if self.is_dead:
            raise Crash

    def write(self) -> None:
        self.check()
        self.writes += 1
        if self.writes != self.stop_at:
            return
        if self.meanwhile is None:
            self.is_dead = True
            raise Crash
        self.meanwhile()


class ReadOnly(Process):
    """One for which the file system is mounted read-only."""

    def write(self) -> None:
        raise OSError(errno.EROFS, "Read-only file system")


class CountedStorage(Storage):
    """A folder of this machine, as a disk or as a bucket."""

    def __init__(self, root: str, process: Process, is_bucket: bool) -> None:
        super().__init__(fs.LocalFileSystem(), root)
        self.process = process
        self.is_bucket = is_bucket

    def read(self, name: str) -> bytes | None:
        self.process.check()
        return super().read(name)

    def files(self, folder: str) -> dict[str, int]:
        self.process.check()
        return super().files(folder)

    def folders(self, folder: str) -> list[str]:
        self.process.check()
        names = super().folders(folder)
        return [name for name in names if not self.is_bucket or super(CountedStorage, self).files(f"{folder}/{name}")]

    @contextmanager
    def writing(self, name: str) -> Iterator[str]:
        self.process.write()
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        unseen = Path(f"{self.root}-uploads", uuid4().hex)
        unseen.parent.mkdir(exist_ok=True)
        partial = unseen if self.is_bucket else target.with_name(f".{target.name}.{uuid4().hex[:8]}.partial")
        yield str(partial)
        try:
            self.process.write()
        except Crash:
            partial.write_bytes(partial.read_bytes()[:100])
            raise
        partial.replace(target)

    def version(self, name: str) -> str | None:
        content = self.read(name)
        return None if content is None else content.hex()

    def swap(self, name: str, content: bytes, expected: str | None) -> str:
        self.process.write()
        if self.version(name) != expected:
            raise ConflictError(name)
        Path(self.path(name)).parent.mkdir(parents=True, exist_ok=True)
        Path(self.path(name)).write_bytes(content)
        return content.hex()

    def delete_version(self, name: str, expected: str | None) -> None:
        self.process.write()
        if expected is not None and self.version(name) == expected:
            Path(self.path(name)).unlink()

    def move(self, source: str, target: str) -> None:
        self.process.write()
        Path(self.path(target)).parent.mkdir(parents=True, exist_ok=True)
        if self.is_bucket:  # the server takes its time over a copy
            content = Path(self.path(source)).read_bytes()
            self.process.write()
            Path(self.path(target)).write_bytes(content)
        else:
            Path(self.path(source)).replace(self.path(target))

    def delete(self, name: str) -> None:
        self.process.write()
        Path(self.path(name)).unlink(missing_ok=True)

    def delete_folder(self, name: str) -> None:
        for path in super().files(name):
            self.process.write()
            Path(self.path(path)).unlink(missing_ok=True)
        shutil.rmtree(self.path(name), ignore_errors=True)


class Unfenced(LeaseClaim):
    """Of a task that looked at the lease just before somebody took it, and writes now."""

    def check(self) -> None:
        pass


class InlineExecutor:
    """Does what `RayExecutor` has Ray do, block by block; remembers the task that was under way when it was killed."""

    last: InlineExecutor
    after_block: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, config: Config, actor: type | None = None) -> None:
        self.late_task: Callable[[Storage], Any] = lambda storage: None
        self.rows = 0
        InlineExecutor.last = self

    def session(self, run_id: str, max_problem_share: float | None) -> Any:
        return nullcontext()

    def check_models(self, config: Config, models: dict[str, str]) -> None:
        pass

    def run_pass(
        self, source: Any, config: Config, origin: Any, pools: Any, sink: Any, number: int | None, meanwhile: Any
    ) -> None:
        try:
            posts = [post for task in source.get_read_tasks(1) for table in task() for post in table_to_posts(table)]
        except (KeyError, OSError) as error:  # as Ray says it of a task
            raise RunError(str(error)) from error
        for first in range(0, len(posts), ROWS_PER_BLOCK):
            block = posts[first : first + ROWS_PER_BLOCK]
            attempts = [True, False] if any(post.text == FLAKY for post in block) else [True]
            for has_failed in attempts:
                self._write(block, config, sink, origin if number is None else None, has_failed)
            InlineExecutor.after_block()
            meanwhile()

    def _write(self, block: list[Post], config: Config, sink: Any, origin: Any, has_failed: bool) -> None:
        done = [annotated(post, config, has_failed) for post in block]
        self.rows += len(done)
        if origin is None:
            table = pass_table(posts_to_table(done))
        else:
            table = annotations_table(done, origin.run_id, origin.models)
        self.late_task = lambda storage: late_sink(sink, storage).write([table])
        sink.write([table])

    def merge(self, storage: Storage, merges: Sequence[Any]) -> list[Any]:
        files = []
        for each in merges:
            self.late_task = lambda storage, each=each: merge(storage, each)
            files += merge(storage, each)
        return files

    def work(self) -> Progress:
        return Progress(tally=Tally(rows=self.rows))

    def units(self) -> float:
        return 1.0


def late_sink(sink: Any, storage: Storage) -> Any:
    return type(sink)(sink._folders, sink._schema, Unfenced(storage, "", ""))


def annotated(post: Post, config: Config, has_failed: bool) -> Post:
    """What the stages make of a post: a rule about its text."""
    done = Post(post.post_id, post.text, row_id=post.row_id, tokens=post.text.split())
    if len(post.text) > config.text.max_chars:
        done.fail("prepare", ProblemKind.TEXT_TOO_LONG, "too long")
    elif "image" in post.text or (post.text == FLAKY and has_failed):
        done.fail("load_image", ProblemKind.IMAGE_UNREADABLE, "the server answered 503")
    return done


@dataclass
class World:
    """A folder with an input and an output, and processes that work on it."""

    root: Path
    is_bucket: bool = False
    process: Process = field(default_factory=Process)

    @property
    def output(self) -> Path:
        return self.root / "out"

    def put(self, **files: list[str]) -> None:
        (self.root / "in").mkdir(exist_ok=True, parents=True)
        for name, texts in files.items():
            ids = [f"{name}{number}" for number in range(len(texts))]
            pq.write_table(pa.table({"post_id": ids, "text": texts}), self.root / "in" / f"{name}.parquet")

    def storage(self, process: Process | None = None) -> CountedStorage:
        return CountedStorage(str(self.output), process or Process(), self.is_bucket)

    def annotate(self, config: Config = CONFIG, process: Process | None = None, **options: Any) -> Any:
        """One start, by a process of its own."""
        before, self.process = self.process, process or Process()
        try:
            return annotate_dataset(self.root / "in", self.output, config, **options)
        finally:
            self.process = before

    def save(self) -> Path:
        """Keep the output as it is."""
        saved = self.root / "saved"
        shutil.copytree(self.output, saved) if self.output.exists() else saved.mkdir()
        return saved

    def restore(self, saved: Path) -> None:
        """Bring the output back to what was saved."""
        shutil.rmtree(self.output, ignore_errors=True)
        shutil.copytree(saved, self.output)


def few_columns() -> pa.Schema:
    """What publishing looks at, of the columns of annotations."""
    entities = ANNOTATION_SCHEMA.field("entities")
    names = ("score", "confidence", "hard", "accepted", "reranked", "seen", "box")
    counted = pa.list_(pa.struct([entities.type.value_type.field(name) for name in names]))
    others = ("row_id", "post_id", "text", "status", "problems", "image_width")
    return pa.schema([*(ANNOTATION_SCHEMA.field(name) for name in others), entities.with_type(counted)])


class OneByOne:
    """Reads in the order of the names, so that a run that dies at a write is the same run each time."""

    def __init__(self, threads: int) -> None:
        self.map = map

    def __enter__(self) -> OneByOne:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where there is such a folder: it is operations that count here, and there are hundreds of thousands."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "ThreadPoolExecutor", OneByOne)
    schema = few_columns()
    monkeypatch.setattr(groups_module, "ANNOTATION_SCHEMA", schema)
    monkeypatch.setattr(compaction_module, "ANNOTATION_SCHEMA", schema)
    monkeypatch.setattr(compaction_module, "_SCHEMA", schema.remove(schema.get_field_index("status")))
    monkeypatch.setattr(run_module, "RayExecutor", InlineExecutor)
    monkeypatch.setattr(run_module, "models_of", lambda config: {"tagger": "t@1"})
    # Whoever held the output is dead, or is taken for dead.
    monkeypatch.setattr(lease_module, "_is_dead_here", lambda holder: True)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[World], World]:
    """Let runs write to the storage of a world."""

    def begin(world: World) -> World:
        monkeypatch.setattr(output_folder_module, "open_storage", lambda _: world.storage(world.process))
        return world

    return begin


def published_rows(world: World) -> Rows:
    """What anybody finds below `annotations/`, each row once."""
    paths = [p for p in (world.output / ANNOTATIONS).rglob("*") if p.is_file()]
    assert not [path for path in paths if path.suffix != ".parquet"]
    return rows_in(paths)


def listed_rows(world: World) -> Rows:
    """What this product's readers find."""
    return rows_in([Path(path) for path in annotation_paths(world.storage()) or ()])


def rows_in(paths: list[Path]) -> Rows:
    found: list[tuple[int, tuple[str, str]]] = []
    for path in paths:
        status = path.parent.name.removeprefix("status=")
        table = pq.ParquetFile(path).read(["row_id", "text"], use_threads=False)
        found += [(row["row_id"], (row["text"], status)) for row in table.to_pylist()]
    twice = [row for row, times in Counter(row for row, _ in found).items() if times > 1]
    assert not twice, f"rows {twice} are there twice"
    return dict(found)


def same_but_for_chance(left: Rows, right: Rows) -> bool:
    """Equal but for the status of posts that fail at one attempt and not at the next."""

    def certain(rows: Rows) -> Rows:
        return {row: (text, "" if text == FLAKY else status) for row, (text, status) in rows.items()}

    return certain(left) == certain(right)


@dataclass(frozen=True)
class Scenario:
    """Something that is done to an output, and may be killed.

    Attributes:
        prepare: brings a new world to where it begins.
        options: of the start that is killed, and of the one after it.
        config: of both.
        keeps: readers find all rows at every moment: either the old or the new ones.
    """

    name: str
    prepare: Callable[[World], None]
    options: dict[str, bool] = field(default_factory=dict)
    config: Config = field(default_factory=lambda: CONFIG)
    keeps: bool = False

    @property
    def again(self) -> dict[str, bool]:
        """The options of the start after a crash: a run that was begun anew goes on without `fresh`."""
        return {name: value for name, value in self.options.items() if name != "fresh"}


INPUT = {"a": ["one", FLAKY], "ab": [], "b": ["no image", "far too long a text", "three"]}


def unfinished(world: World) -> None:
    world.put(**INPUT)
    with pytest.raises(Crash):
        world.annotate(process=Process(stop_at=18))


def finished(config: Config = CONFIG) -> Callable[[World], None]:
    def prepare(world: World) -> None:
        world.put(**INPUT)
        world.annotate(config)

    return prepare


def grown(world: World) -> None:
    finished()(world)
    world.put(aa=["new", "no image 2"])


def grown_unfinished(world: World) -> None:
    unfinished(world)
    world.put(aa=["new", "no image 2"])


def half_lost(world: World) -> None:
    finished()(world)
    for path in sorted((world.output / ANNOTATIONS).rglob("*.parquet"))[::2]:
        path.unlink()


SCENARIOS = [
    Scenario("first", lambda world: world.put(**INPUT)),
    Scenario("passes", lambda world: world.put(**INPUT), config=IN_PASSES),
    Scenario("resume", unfinished),
    Scenario("update", grown, {"update": True}, keeps=True),
    Scenario("update of an unfinished run", grown_unfinished, {"update": True}),
    Scenario("only problems", finished(SHORT), {"only_problems": True}, keeps=True),
    Scenario("fresh", finished(), {"fresh": True}, keeps=True),
    Scenario("lost files", half_lost),
]


def check(world: World, expected: Rows) -> None:
    """Everything is there once, the same for all readers, and said to be complete."""
    rows = published_rows(world)
    assert same_but_for_chance(rows, expected), (rows, expected)
    assert listed_rows(world) == rows
    assert (world.output / SUCCESS).exists()


@pytest.mark.parametrize("is_bucket", [False, True], ids=["disk", "bucket"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_start_after_a_crash_anywhere_gives_every_row_once(
    scenario: Scenario, is_bucket: bool, tmp_path: Path, use: Callable[[World], World]
) -> None:
    assert crash_everywhere(scenario, use(World(tmp_path, is_bucket))) > 10


def crash_everywhere(scenario: Scenario, world: World) -> int:
    """Kill the start at its first write, at its second …; after each, one clean start. How many points there were."""
    scenario.prepare(world)
    begin, old = world.save(), published_rows(world)
    writes, expected = undisturbed(scenario, world)
    for point in range(1, writes + 1):
        world.restore(begin)
        with suppress(Crash):  # which attempt at the flaky post counts decides on a file more or less
            world.annotate(scenario.config, Process(stop_at=point), **scenario.options)
        published_rows(world)
        if scenario.keeps:
            assert any(same_but_for_chance(listed_rows(world), rows) for rows in partly(old, expected)), point
        go_on_beside_a_late_task(world, scenario, point)
        check(world, expected)
    return writes


def test_the_account_is_complete_wherever_a_start_was_killed(
    tmp_path: Path, use: Callable[[World], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Posts, bytes, seconds and money, but for what was done after the meter last kept its account."""

    @contextmanager
    def after_each_block(action: Callable[[], None], every_s: float) -> Iterator[None]:
        monkeypatch.setattr(InlineExecutor, "after_block", staticmethod(action))
        yield

    monkeypatch.setattr(run_module, "polling", after_each_block)
    monkeypatch.setattr(meter_module, "_SAVED_EVERY_S", -1)
    world, posts, price = use(World(tmp_path)), 8, 3600.0  # of a second
    world.put(a=["one", "two", "three"], b=["four", "five"], c=["six", "seven", "eight"])
    begin, counting, limits = world.save(), Process(), RunLimits(price)
    whole = world.annotate(process=counting, limits=limits).account
    assert (whole.starts, whole.annotated) == (1, posts)
    for point in range(2, counting.writes + 1, 2):
        world.restore(begin)
        began = time.perf_counter()
        with suppress(Crash):
            world.annotate(process=Process(stop_at=point), limits=limits)
        killed = InlineExecutor.last
        account = world.annotate(limits=limits).account
        done = killed.rows + InlineExecutor.last.rows
        assert posts <= done <= posts + ROWS_PER_BLOCK
        assert done - ROWS_PER_BLOCK <= account.annotated <= done, point
        assert account.written_bytes == sum(
            path.stat().st_size for path in (world.output / ANNOTATIONS).rglob("*.parquet")
        )
        assert 1 <= account.starts <= 2
        assert account.money == pytest.approx(account.unit_seconds)
        assert account.unit_seconds <= account.seconds <= time.perf_counter() - began


def undisturbed(scenario: Scenario, world: World) -> tuple[int, Rows]:
    """How many writes the start takes when it is left alone, and the rows that it gives."""
    counting = Process()
    world.annotate(scenario.config, counting, **scenario.options)
    return counting.writes, published_rows(world)


def partly(old: Rows, new: Rows) -> list[Rows]:
    """The old rows, the new ones, and (where files came in between) the old with a whole number of new groups."""
    added = sorted(new.keys() - old.keys())
    return [old, new, *({**old, **{row: new[row] for row in added[:count]}} for count in range(len(added)))]


def go_on_beside_a_late_task(world: World, scenario: Scenario, point: int) -> None:
    """One clean start; what the dead one had under way is written before it, in the middle of it, or after it."""
    late = InlineExecutor.last.late_task
    storage = world.storage()

    def write() -> None:
        with suppress(FileNotFoundError):  # a merge whose sources are gone
            late(storage)

    when = point % 3
    if when == 0:
        write()
    beside = Process(stop_at=7 + point % 11, meanwhile=write) if when == 1 else None
    world.annotate(scenario.config, beside, **scenario.again)
    if when == 2:
        write()
        world.annotate(scenario.config, **scenario.again)


@pytest.mark.parametrize("is_bucket", [False, True], ids=["disk", "bucket"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_driver_that_was_taken_for_dead_harms_nothing_when_it_wakes_up(
    scenario: Scenario, is_bucket: bool, tmp_path: Path, use: Callable[[World], World]
) -> None:
    """At every write of one driver another takes the output over and does everything; then the first goes on."""
    world = use(World(tmp_path, is_bucket))
    scenario.prepare(world)
    begin = world.save()
    writes, expected = undisturbed(scenario, world)
    for point in range(1 + is_bucket, writes + 1, 2):  # every other write on a disk, the others in a bucket
        world.restore(begin)
        first = Process(stop_at=point, meanwhile=lambda: world.annotate(scenario.config, **scenario.options))
        with suppress(FileExistsError):  # it says that the output is another's, whatever it finds missing
            world.annotate(scenario.config, first, **scenario.options)
        check(world, expected)  # as the other one has said
        world.annotate(scenario.config, **scenario.again)
        check(world, expected)


@pytest.mark.parametrize("is_bucket", [False, True], ids=["disk", "bucket"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_write_that_fails_is_said_or_made_up_for_and_the_next_start_gives_every_row_once(
    scenario: Scenario, is_bucket: bool, tmp_path: Path, use: Callable[[World], World]
) -> None:
    """A full disk, a quota, a handle that is stale, S3 that is slow or refuses: once, at every fourth write."""
    world = use(World(tmp_path, is_bucket))
    scenario.prepare(world)
    begin = world.save()
    writes, expected = undisturbed(scenario, world)
    for point in range(1 + 2 * is_bucket, writes + 1, 4):
        world.restore(begin)
        error = OSError(FAULTS[point % len(FAULTS)], "the write failed")

        def fail(error: OSError = error) -> None:
            raise error

        try:
            world.annotate(scenario.config, Process(stop_at=point, meanwhile=fail), **scenario.options)
        except (OSError, RunError):
            published_rows(world)
        else:
            check(world, expected)
        world.annotate(scenario.config, **scenario.again)
        check(world, expected)


@pytest.mark.parametrize("is_bucket", [False, True], ids=["disk", "bucket"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_driver_that_wakes_up_while_another_is_at_work_harms_nothing(
    scenario: Scenario, is_bucket: bool, tmp_path: Path, use: Callable[[World], World]
) -> None:
    """It was taken for dead at one write, goes on while the other is at another, and that one goes on after it."""
    world = use(World(tmp_path, is_bucket))
    scenario.prepare(world)
    begin = world.save()
    writes, expected = undisturbed(scenario, world)
    chance = random.Random(f"{scenario.name} {is_bucket}")
    for _ in range(5):
        world.restore(begin)
        first, second = chance.randint(2, writes), chance.randint(2, writes)
        if annotate_beside_a_sleeper(world, scenario, first, second):
            check(world, expected)
        published_rows(world)
        world.annotate(scenario.config, **scenario.again)
        check(world, expected)


def annotate_beside_a_sleeper(world: World, scenario: Scenario, first: int, second: int) -> bool:
    """Whether a driver says that it has finished, which rests at a write while one that slept at another goes on."""
    at_work, is_awake, finished = threading.Event(), threading.Event(), list[bool]()

    def rest() -> None:
        at_work.set()
        assert is_awake.wait(30)

    def take_over() -> None:
        with suppress(ConflictError):  # the sleeper has just written `run.json`
            world.annotate(scenario.config, Process(stop_at=second, meanwhile=rest), **scenario.options)
            finished.append(True)
        at_work.set()

    other = threading.Thread(target=take_over)

    def sleep() -> None:
        other.start()
        assert at_work.wait(30)

    with suppress(FileExistsError):
        world.annotate(scenario.config, Process(stop_at=first, meanwhile=sleep), **scenario.options)
    is_awake.set()
    if other.ident is not None:  # which attempt at the flaky post counts decides on a write more or less
        other.join()
    return bool(finished)


@pytest.mark.parametrize("config", [CONFIG, IN_PASSES], ids=["one pass", "passes"])
def test_rows_that_other_nodes_wrote_and_are_listed_late_are_waited_for(
    config: Config, tmp_path: Path, use: Callable[[World], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, where a machine keeps what it knows of a folder for up to a minute."""
    known: dict[str, list[dict[str, int]]] = {}
    files = CountedStorage.files

    def as_some_looks_ago(self: CountedStorage, folder: str) -> dict[str, int]:
        found = files(self, folder)
        if "/staged" not in folder and "/merged" not in folder:
            return found
        known.setdefault(folder, [{}] * 3).append(found)
        return known[folder][-4]

    monkeypatch.setattr(CountedStorage, "files", as_some_looks_ago)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    world = use(World(tmp_path))
    world.put(**INPUT)
    assert world.annotate(config).rows == len(published_rows(world)) == 5
    assert (world.output / SUCCESS).exists()


def test_files_that_two_drivers_add_are_in_the_run_once(
    tmp_path: Path, use: Callable[[World], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second does everything while the first counts the new files, which takes minutes and writes nothing."""
    world = use(World(tmp_path))
    grown(world)
    count = run_module.count_input
    others = iter([lambda: world.annotate(update=True)])

    def counted(*arguments: Any) -> Any:
        files = count(*arguments)
        next(others, lambda: None)()
        return files

    monkeypatch.setattr(run_module, "count_input", counted)
    with pytest.raises(FileExistsError, match="another process"):
        world.annotate(update=True)
    world.annotate()
    assert len(published_rows(world)) == 7
    assert listed_rows(world) == published_rows(world)


def test_late_end_of_a_run_does_not_say_what_the_output_no_longer_is(
    tmp_path: Path, use: Callable[[World], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver sleeps before the write of `_SUCCESS`, while another takes files in and finishes."""
    world = use(World(tmp_path))
    finished()(world)
    (world.output / SUCCESS).unlink()
    swap = CountedStorage.swap

    def take_files_in() -> None:
        world.put(aa=["new", "no image 2"])
        world.annotate(update=True)

    others = iter([take_files_in])

    def sleeping(self: CountedStorage, name: str, content: bytes, expected: str | None) -> str:
        if name == SUCCESS:
            next(others, lambda: None)()
        return swap(self, name, content, expected)

    monkeypatch.setattr(CountedStorage, "swap", sleeping)
    with pytest.raises(FileExistsError, match="another process"):
        world.annotate()
    assert json.loads((world.output / SUCCESS).read_text())["rows"] == len(published_rows(world)) == 7


@pytest.mark.parametrize(
    ("gone", "options"), [("annotations", {}), ("status=ok", {}), ("annotations", {"fresh": True})]
)
def test_output_that_lost_files_does_not_say_that_it_is_complete(
    gone: str,
    options: dict[str, bool],
    tmp_path: Path,
    use: Callable[[World], World],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = use(World(tmp_path))
    finished()(world)
    shutil.rmtree(next(world.output.rglob(gone)))
    monkeypatch.setattr(InlineExecutor, "check_models", failing)
    with pytest.raises(RunError):
        world.annotate(**options)
    assert not (world.output / SUCCESS).exists()


def test_published_rows_that_are_not_moved_yet_stay_while_a_fresh_run_is_under_way(
    tmp_path: Path, use: Callable[[World], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = use(World(tmp_path))
    world.put(**INPUT)
    point = itertools.count(1)
    while not (rows := listed_rows(world)):
        with suppress(Crash):
            world.annotate(process=Process(stop_at=next(point)))
    assert not published_rows(world)
    monkeypatch.setattr(InlineExecutor, "check_models", failing)
    with pytest.raises(RunError):
        world.annotate(fresh=True)
    assert listed_rows(world) == published_rows(world) == rows


def test_first_run_is_the_one_to_read_from_its_beginning(tmp_path: Path, use: Callable[[World], World]) -> None:
    """Wherever it was killed: otherwise its groups would be seen when all of them are done."""
    world = use(World(tmp_path))
    world.put(**INPUT)
    begin = world.save()
    found = []
    for point in range(1, 8):
        world.restore(begin)
        with suppress(Crash):
            world.annotate(process=Process(stop_at=point))
        run = OutputFolder("out", world.storage()).last_run()
        found.append(run and run.is_live)
    assert set(found) == {None, True}


@pytest.mark.parametrize("is_bucket", [False, True])
def test_a_finished_run_is_looked_up_where_nothing_can_be_written(
    tmp_path: Path, use: Callable[[World], World], is_bucket: bool
) -> None:
    world = use(World(tmp_path, is_bucket))
    world.put(**INPUT)
    with pytest.raises(OSError, match="Read-only"):
        world.annotate(process=ReadOnly())
    assert world.annotate().annotated
    assert world.annotate(process=ReadOnly()) == world.annotate()
    with pytest.raises(ValueError, match="max_chars"):
        world.annotate(SHORT, ReadOnly())
    for options in ({"fresh": True}, {"update": True}, {"only_problems": True}):
        with pytest.raises(OSError, match="Read-only"):
            world.annotate(process=ReadOnly(), **options)
    next((world.output / ANNOTATIONS).rglob("*.parquet")).unlink()
    with pytest.raises(OSError, match="Read-only"):
        world.annotate(process=ReadOnly())


def test_facts_of_another_version_do_not_keep_a_run_from_finishing(
    tmp_path: Path, use: Callable[[World], World]
) -> None:
    """They are those of the run before, where a fresh one was killed between its last row and its own facts."""
    world = use(World(tmp_path))
    finished()(world)
    summary = world.output / "run.json"
    mine = json.loads(summary.read_text())
    summary.write_text('{"run_id": "20200101T000000-00000000", "rows": 5}')
    assert world.annotate().annotated == 0
    assert json.loads(summary.read_text())["run_id"] == mine["run_id"]


def test_half_a_file_that_was_copied_from_another_disk_is_removed(
    tmp_path: Path, use: Callable[[World], World]
) -> None:
    """`annotations/` may be on another one, and the driver may be killed in the middle of a copy."""
    world = use(World(tmp_path))
    finished()(world)
    whole = next((world.output / ANNOTATIONS).rglob("*.parquet"))
    half, theirs = (whole.with_name(f".{name}.0123abcd.partial") for name in (whole.name, "theirs.parquet"))
    for path in (half, theirs):
        path.write_bytes(b"PAR1")
    world.annotate()
    assert (half.exists(), theirs.exists()) == (False, True)
    assert (world.output / SUCCESS).exists()


def test_a_run_that_goes_on_with_other_versions_says_so(
    tmp_path: Path, use: Callable[[World], World], caplog: pytest.LogCaptureFixture
) -> None:
    world = use(World(tmp_path))
    unfinished(world)
    (path,) = world.output.rglob("manifest.json")
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"versions": manifest["versions"] | {"torch": "1.0"}}))
    world.annotate()
    assert [record.message.partition("differ: ")[2] for record in caplog.records] == [
        f"torch: 1.0 → {versions()['torch']}"
    ]
    assert len(published_rows(world)) == 5


def failing(*_: Any) -> None:
    raise RunError("a model cannot be loaded")


def schedules(steps: int) -> Iterator[tuple[str, ...]]:
    """Every order in which two processes can do so many steps each."""
    for chosen in itertools.combinations(range(2 * steps), steps):
        yield tuple("A" if step in chosen else "B" for step in range(2 * steps))


class Turns:
    """Lets two threads do their steps in a given order."""

    def __init__(self, order: Sequence[str]) -> None:
        self._left = list(order)
        self._changed = threading.Condition()
        self._ended: set[str] = set()
        self.taken: list[str | None] = []  # the versions that were replaced

    def take(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._next() in (name, None), timeout=10)
            if self._left:
                self._left.remove(name) if name in self._left else None
            self._changed.notify_all()

    def end(self, name: str) -> None:
        with self._changed:
            self._ended.add(name)
            self._changed.notify_all()

    def _next(self) -> str | None:
        return next((name for name in self._left if name not in self._ended), None)


class SteppedStorage(LocalStorage):
    """A disk whose operations on the lease wait for their turn."""

    def __init__(self, root: str, name: str, turns: Turns) -> None:
        super().__init__(root)
        self._name, self._turns = name, turns

    def version(self, name: str) -> str | None:
        self._turns.take(self._name)
        return super().version(name)

    def read(self, name: str) -> bytes | None:
        self._turns.take(self._name)
        return super().read(name)

    def swap(self, name: str, content: bytes, expected: str | None) -> str:
        self._turns.take(self._name)
        version = LocalStorage(self.root).swap(name, content, expected)
        self._turns.taken.append(expected)
        return version


@pytest.mark.parametrize("before", ["nobody", "released", "dead"])
def test_of_two_starts_one_gets_the_output_in_whatever_order_they_look_and_write(before: str, tmp_path: Path) -> None:
    for number, order in enumerate(schedules(3)):
        assert holders_after(order, tmp_path / f"{number}", before, SteppedStorage) == 1, order


def holders_after(order: Sequence[str], root: Path, before: str, kind: type[SteppedStorage]) -> int:
    """How many of two processes took the output from the same state, with steps in this order."""
    if before != "nobody":
        with Lease(OutputFolder("out", LocalStorage(str(root)))).held() as claim:
            content = claim.storage.read("_run/lease.json")
        if before == "dead" and content:
            claim.storage.write("_run/lease.json", content)
    turns = Turns(order)
    claims: list[LeaseClaim] = []

    def start(name: str) -> None:
        with suppress(FileExistsError):
            claims.append(Lease(OutputFolder("out", kind(str(root), name, turns)), beat_s=60)._take())
        turns.end(name)

    threads = [threading.Thread(target=start, args=(name,)) for name in "AB"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(LeaseClaim(LocalStorage(str(root)), "", claim.owner).holds for claim in claims) == 1
    return max(Counter(turns.taken).values())


class Unconditional(SteppedStorage):
    """A disk that writes whatever version is there."""

    def swap(self, name: str, content: bytes, expected: str | None) -> str:
        self._turns.take(self._name)
        LocalStorage(self.root).write(name, content)
        self._turns.taken.append(expected)
        return ""


def test_without_conditions_two_starts_would_both_get_the_output(tmp_path: Path) -> None:
    holders = [holders_after(order, tmp_path / f"{n}", "nobody", Unconditional) for n, order in enumerate(schedules(3))]
    assert max(holders) == 2


def ones(files: Sequence[Any]) -> list[Any]:
    return [np.ones(len(file.ids), bool) for file in files]


@pytest.mark.parametrize(
    ("scenario", "module", "name", "instead"),
    [
        pytest.param("first", compaction_module, "rows_once", ones, id="every row counts in every file"),
        pytest.param("lost files", run_module, "lost_files", lambda *_: [], id="nobody looks at files"),
        pytest.param("only problems", run_module, "settle", lambda *_: None, id="replaced files stay"),
    ],
)
def test_without_one_of_the_mends_rows_would_be_lost_or_doubled(
    scenario: str,
    module: Any,
    name: str,
    instead: Any,
    tmp_path: Path,
    use: Callable[[World], World],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (found,) = (each for each in SCENARIOS if each.name == scenario)
    world = use(World(tmp_path))
    found.prepare(world)
    monkeypatch.setattr(module, name, instead)
    with pytest.raises((AssertionError, RunError, FileNotFoundError)):
        crash_everywhere(replace(found, prepare=lambda _: None), world)
