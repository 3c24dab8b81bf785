"""The folder of a run: what is for readers (`gem_ray.data.output`), and what a later start needs to resume.

    _run/lease.json                    which process is writing, while one is
    _run/RUN/manifest.json             input files, configuration, models: what the run is
    _run/RUN/files/0001.json           input files that `--update` has added
    _run/RUN/gamma.json                γ as it was measured for a budget
    _run/RUN/rounds/p000.json          rows that are done again: which files they replace, under which limits
    _run/RUN/starts/                   what each start has taken; only itself writes its file, now and then
    _run/RUN/staged/GROUP-p0/          rows as they come out of a pass
    _run/RUN/merged/GROUP/             the files of a group on their way to `annotations/`
    _run/RUN/published/, live.json     what readers may see

All other files of facts are created once and never changed, so that a process that was taken for dead cannot undo a
decision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from pyarrow import fs

from gem_ray.atomic import name_of_partial
from gem_ray.data.output import (
    RUN_FACTS,
    RUN_ID,
    RUNS,
    SUCCESS,
    Publication,
    is_facts,
    live_run,
    merged_folder,
    name_of_facts,
    numbered,
    publications,
    run_ids,
)
from gem_ray.data.storage import Storage, as_exact_json, as_json, open_storage, side_by_side
from gem_ray.pipeline.inputs import InputFile

EDITION = 5  # of this layout, and of the rows that a run can resume with


# Files that all runs of an output write.
_SHARED = {"": (RUN_FACTS, SUCCESS), RUNS: ("lease.json", "report.json", "report.html")}


class OutputFolder:
    """Where runs write.

    Attributes:
        output: the folder as the user named it.
        storage: what it is on.
    """

    def __init__(self, output: str, storage: Storage | None = None) -> None:
        self.output = output
        self.storage = storage or open_storage(output)
        self._folders: dict[str, RunFolder] = {}
        if self.storage.filesystem.get_file_info(self.storage.root).type is fs.FileType.File:
            raise NotADirectoryError(f"{output} is a file; the output must be a folder")

    def run(self, run_id: str) -> RunFolder:
        """The folder of one run: the same object each time, which reads what never changes once."""
        return self._folders.setdefault(run_id, RunFolder(self.storage, run_id))

    def last_run(self) -> RunFolder | None:
        """The run that was started last: the one to resume."""
        begun = run_ids(self.storage)
        return self.run(begun[-1]) if begun else None

    def live_run(self) -> RunFolder | None:
        """The run whose rows are in `annotations/`."""
        run_id = live_run(self.storage)
        return self.run(run_id) if run_id else None

    def all_runs(self) -> set[str]:
        """Ids of the runs that the output has, and of those that it has had."""
        begun = run_ids(self.storage)
        return {*begun, *(earlier for run_id in begun for earlier in self.run(run_id).earlier_runs)}

    def summary(self) -> dict[str, Any] | None:
        """What `run.json` says, if a run has finished."""
        return self.storage.read_json(RUN_FACTS)

    def forget_runs_before(self, run_id: str) -> None:
        """Delete the folders of earlier runs. The manifest goes first: without it a run is none."""
        for earlier in self.storage.folders(RUNS):
            if RUN_ID.fullmatch(earlier) and earlier < run_id:
                self.storage.delete(f"{RUNS}/{earlier}/manifest.json")
                self.storage.delete_folder(f"{RUNS}/{earlier}")

    def sweep(self) -> None:
        """Delete what writers that were killed have left half written, but for what lies in the folders of runs."""
        for folder, names in _SHARED.items():
            entries = self.storage.filesystem.get_file_info(
                fs.FileSelector(self.storage.path(folder).rstrip("/"), allow_not_found=True)
            )
            for entry in entries:
                if name_of_partial(entry.base_name) in names:
                    self.storage.delete(f"{folder}/{entry.base_name}".lstrip("/"))


@dataclass(frozen=True)
class Manifest:
    """What a run is: with the same input, models and configuration it gives the same rows.

    Attributes:
        files: of the input, in the order of their numbers: those that the run began with, then those that came later.
        rows_per_group: about how many rows a group has.
        parts: how many of the files came together, at the beginning and with each `--update`.
        passes: names of the stages of each pass.
        columns: field of an input row -> the column that holds it, where that has another name.
        earlier_runs: ids of the runs that the output has had before.
        versions: of this product and its libraries, with which the run began.
    """

    run_id: str
    started_at: str
    input: str
    limit: int | None
    files: list[InputFile]
    rows_per_group: int
    models: dict[str, str]
    config: dict[str, Any]
    parts: list[int]
    passes: list[list[str]]
    columns: dict[str, str] = field(default_factory=dict)
    earlier_runs: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    edition: int = EDITION

    @property
    def rows(self) -> int:
        """How many rows the run reads."""
        return sum(file.rows for file in self.files)

    @property
    def unread(self) -> list[InputFile]:
        """Files that were left out because they cannot be read; those that were mended and taken in later are not."""
        last = {file.path: file for file in self.files}
        return [file for file in last.values() if file.unread is not None]


@dataclass(frozen=True)
class Round:
    """Rows that are done again.

    Attributes:
        replaces: names below `annotations/` of the files that hold them, or held them.
        limits: the configuration's limits on posts and images, with which they are done.
    """

    replaces: list[str]
    limits: dict[str, Any]


class RunFolder:
    """`_run/RUN/`: what the run is, what is published, and what is not yet."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self.storage = storage
        self.run_id = run_id
        self._root = f"{RUNS}/{run_id}"
        self._manifest: Manifest | None = None
        self._publications: dict[str, Publication] = {}

    def read(self, name: str) -> dict[str, Any] | None:
        """The facts in a file; None if it is not there."""
        return self.storage.read_json(f"{self._root}/{name}.json")

    def create(self, name: str, facts: Mapping[str, Any]) -> bool:
        """Write a file of facts to the letter, as later starts compare them: credentials have been cut out before.

        Returns:
            False if there is one already, which stays as it is.
        """
        return self.storage.create(f"{self._root}/{name}.json", as_exact_json(facts))

    def manifest(self) -> Manifest:
        """The run's manifest, with the files that were added later.

        Raises:
            ValueError: another version of gem-ray started the run.
        """
        self._manifest = self._manifest or self._read_manifest()
        return self._manifest

    @cached_property
    def earlier_runs(self) -> list[str]:
        """Ids of the runs that the output has had before this one, whatever version of gem-ray has begun it."""
        return (self.read("manifest") or {}).get("earlier_runs", [])

    def _read_manifest(self) -> Manifest:
        values = self.read("manifest")
        assert values is not None  # a run without manifest is none
        if values.get("edition") != EDITION:
            raise ValueError(
                f"run {self.run_id} was started by another version of gem-ray and cannot be continued; "
                "choose another output, or pass --fresh to replace it"
            )
        parts = [values["files"], *(added["files"] for added in self._added())]
        files = [InputFile(**file) for part in parts for file in part]
        return Manifest(**{**values, "files": files, "parts": [len(part) for part in parts]})

    def begin(self, manifest: Manifest) -> None:
        """Write the manifest: from now on the run can be continued."""
        self.create("manifest", asdict(replace(manifest, parts=[])))

    def add(self, files: Sequence[InputFile]) -> None:
        """Add files to the input.

        Raises:
            FileExistsError: another process has done so.
        """
        # After the parts that these files' numbers follow, whatever has been added since.
        name = f"files/{len(self.manifest().parts):04d}"
        if not self.create(name, {"files": [asdict(file) for file in files]}):
            raise FileExistsError("another process has added files to this run; try again")
        self._manifest = None

    def _added(self) -> list[dict[str, Any]]:
        names = numbered(self.storage.files(f"{self._root}/files"))
        return [facts for facts in side_by_side(self.storage.read_json, names) if facts is not None]

    def keep_start(self, name: str, facts: Mapping[str, Any]) -> None:
        """Write what a start has taken until now."""
        self.storage.write(f"{self._root}/starts/{name}.json", as_json(facts))

    def starts(self) -> list[dict[str, Any]]:
        """What each start has taken, in their order."""
        return [facts for name in self._names("starts") if (facts := self.read(f"starts/{name}")) is not None]

    @property
    def is_live(self) -> bool:
        """True if readers may see its rows."""
        return self.storage.exists(f"{self._root}/live.json")

    def make_live(self) -> None:
        """From now on readers see this run's rows, and not those of an earlier one."""
        self.create("live", {"run_id": self.run_id})

    def publications(self) -> dict[str, Publication]:
        """The published groups, by name."""
        self._publications = publications(self.storage, self.run_id, known=self._publications)
        return self._publications

    def publish(self, group: str, publication: Publication) -> None:
        """Decide what the rows of a group are; what has been decided before stays."""
        self.storage.create(f"{self._root}/published/{group}.json", publication.to_json())

    def rounds(self) -> dict[str, Round]:
        """Rounds that were started, by name."""
        facts = {name: self.read(f"rounds/{name}") for name in self._names("rounds")}
        return {name: Round(**each) for name, each in facts.items() if each is not None}

    def begin_round(self, name: str, each: Round) -> None:
        """Fix what a round does.

        Raises:
            FileExistsError: another process has fixed it otherwise.
        """
        if not self.create(f"rounds/{name}", asdict(each)):
            raise FileExistsError("another process does rows of this run again; try again")

    def staged(self, group: str, number: int) -> str:
        """Where a pass over a group writes its rows."""
        return f"{self._root}/staged/{group}-p{number}"

    @property
    def merged(self) -> str:
        """Where published files wait to be moved to `annotations/`, a folder for each group."""
        return merged_folder(self.run_id)

    def clear_staged(self, group: str, passes: int) -> None:
        """Delete the rows as they were staged, of a group that is published."""
        for number in range(passes):
            self.storage.delete_folder(self.staged(group, number))

    def clear(self) -> None:
        """Delete everything that a run whose rows are all in `annotations/` no longer needs."""
        for name in ("staged", "merged"):
            self.storage.delete_folder(f"{self._root}/{name}")

    def _names(self, folder: str) -> list[str]:
        return sorted(name_of_facts(path) for path in self.storage.files(f"{self._root}/{folder}") if is_facts(path))
