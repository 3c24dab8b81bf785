"""The folder that `annotate` writes, as readers see it: which files hold the annotations, and whether they are all.

    annotations/status=ok/part-RUN-GROUP-….parquet   the rows
    run.json                                         facts of the run that finished last
    _SUCCESS                                         there while `annotations/` holds all rows of a run and nothing else
    _run/RUN/live.json                               this run's rows are the ones to read; the last run with it counts
    _run/RUN/published/GROUP.json                    the files of a group, and those whose place they take

A group is published in the moment in which its file in `published/` appears. Its Parquet files are moved to
`annotations/` right after; until then they are in `_run/RUN/merged/GROUP/`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

from gem_ray.data.files import open_filesystem
from gem_ray.data.storage import Storage, as_json, side_by_side

T = TypeVar("T")

ANNOTATIONS = "annotations"
RUN_FACTS = "run.json"
SUCCESS = "_SUCCESS"
RUNS = "_run"
RUN_ID = re.compile(r"\d{8}T\d{6}-[0-9a-f]{8}")  # what folders of runs are called
RUN_ID_TIME = "%Y%m%dT%H%M%S"


@dataclass(frozen=True)
class PublishedFile:
    """A file of annotations.

    Attributes:
        name: below `annotations/`.
        rows: how many rows it has.
        size: in bytes.
        tally: counts over its rows.
    """

    name: str
    rows: int
    size: int
    tally: dict[str, Any]

    @property
    def path(self) -> str:
        """Its name in the output."""
        return f"{ANNOTATIONS}/{self.name}"


@dataclass(frozen=True)
class Publication:
    """What publishes a group: decided once, and never changed.

    Attributes:
        files: the group's rows.
        replaces: names of files published earlier whose rows are in `files` now.
    """

    files: list[PublishedFile]
    replaces: list[str]

    def to_json(self) -> bytes:
        """As it is stored."""
        return as_json({"files": [vars(file) for file in self.files], "replaces": self.replaces})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Publication:
        """The inverse of `to_json`."""
        return cls([PublishedFile(**file) for file in values["files"]], list(values["replaces"]))


def run_ids(storage: Storage) -> list[str]:
    """Runs that have begun in an output, in the order of their beginning."""
    names = (name for name in storage.folders(RUNS) if RUN_ID.fullmatch(name))  # and no copy that somebody has made
    return [name for name in names if storage.exists(f"{RUNS}/{name}/manifest.json")]


def live_run(storage: Storage) -> str | None:
    """The run whose rows are the output's; None if no run has got so far."""
    for run_id in reversed(run_ids(storage)):
        if storage.exists(f"{RUNS}/{run_id}/live.json"):
            return run_id
    return None


def publications(
    storage: Storage, run_id: str, known: Mapping[str, Publication] = MappingProxyType({})
) -> dict[str, Publication]:
    """The published groups of a run, by name.

    Args:
        storage: of the output.
        run_id: of the run.
        known: groups that need not be read again; what is published never changes.
    """
    paths = {name_of_facts(path): path for path in storage.files(f"{RUNS}/{run_id}/published") if is_facts(path)}
    new = [name for name in paths if name not in known]
    facts = zip(new, side_by_side(storage.read_json, [paths[name] for name in new]), strict=True)
    read = {name: Publication.from_dict(values) for name, values in facts if values is not None}
    return {name: each for name in paths if (each := known.get(name) or read.get(name))}


def is_facts(path: str) -> bool:
    """True for a file of facts, and not one that is still being written."""
    name = path.rpartition("/")[2]
    return name.endswith(".json") and not name.startswith(".")


def name_of_facts(path: str) -> str:
    """What a file of facts is about."""
    return path.rpartition("/")[2].removesuffix(".json")


def numbered(paths: Iterable[str]) -> list[str]:
    """Those files of facts whose names are numbers, in their order; those after 9999 have a digit more."""
    return sorted(
        (path for path in paths if name_of_facts(path).isdecimal()), key=lambda path: int(name_of_facts(path))
    )


def live_files(published: Mapping[str, Publication]) -> dict[str, str]:
    """The files that count, with the group of each: published, and not replaced since."""
    replaced = {name for each in published.values() for name in each.replaces}
    return {file.name: group for group, each in published.items() for file in each.files if file.name not in replaced}


def merged_folder(run_id: str) -> str:
    """Where published files wait until they are moved to `annotations/`, in a folder for each group."""
    return f"{RUNS}/{run_id}/merged"


def merged_name(run_id: str, group: str, file: str) -> str:
    """Where one published file waits."""
    return f"{merged_folder(run_id)}/{group}/{file}"


def annotation_paths(storage: Storage) -> list[str] | None:
    """Paths on the storage's file system of the files that hold an output's annotations, sorted by name.

    None where no run says which: in an output of an earlier version, or in a copy of `annotations/` alone.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    return _of_live_run(storage, partial(_paths_of_run, storage))


def _of_live_run(storage: Storage, read: Callable[[str], T]) -> T | None:
    """What is read of the live run; once more where another run took its place meanwhile, and it may be half gone."""
    while (run_id := live_run(storage)) is not None:
        try:
            found = read(run_id)
        except FileNotFoundError:
            if live_run(storage) == run_id:
                raise
            continue
        if live_run(storage) == run_id:
            return found
    return None


def _paths_of_run(storage: Storage, run_id: str) -> list[str]:
    live = live_files(publications(storage, run_id))
    there = storage.files(merged_folder(run_id))
    there |= storage.files(ANNOTATIONS)  # listed second, as files are moved from the one to the other
    paths = []
    for name, group in sorted(live.items()):
        places = (f"{ANNOTATIONS}/{name}", merged_name(run_id, group, name))
        path = next((place for place in places if place in there), None)
        if path is None:
            raise FileNotFoundError(
                f"{storage.path(places[0])} is gone, or was replaced just now: repeat the command; where that does not "
                "help, start `gem-ray annotate` again, which does its rows anew"
            )
        paths.append(storage.path(path))
    return paths


@dataclass(frozen=True)
class InputOfRun:
    """What a run knows of its input, so that others read the same rows under the same ids.

    Attributes:
        root: the input as it was named.
        numbers: of its files, by path; None for files that it could not read.
        columns: field of an input row -> the column that holds it, where that has another name.
    """

    root: str
    numbers: dict[str, int | None]
    columns: dict[str, str]

    @property
    def names(self) -> dict[str, int | None]:
        """The numbers by path below the root, which a copy of the folder has too."""
        root = open_filesystem(self.root)[1]
        return {path.removeprefix(root): number for path, number in self.numbers.items()}


def input_of_run(storage: Storage) -> InputOfRun | None:
    """The input of the run whose rows are an output's; None where no run says."""
    return _of_live_run(storage, partial(_input_of, storage))


def _input_of(storage: Storage, run_id: str) -> InputOfRun:
    folder = f"{RUNS}/{run_id}"
    names = (f"{folder}/manifest.json", *numbered(storage.files(f"{folder}/files")))
    facts = [each for name in names if (each := storage.read_json(name)) is not None]
    files = [file for each in facts for file in each["files"]]  # a file that was mended is there twice; the last counts
    numbers = {file["path"]: None if file.get("unread") else file["number"] for file in files}
    manifest: dict[str, Any] = facts[0] if facts else {"input": ""}  # none where the run has just been deleted
    return InputOfRun(manifest["input"], numbers, manifest.get("columns", {}))
