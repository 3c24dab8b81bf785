"""The folder of a run: `annotations/status=…/` for readers, `_run/` for going on where a run stopped, and `run.json`.

    annotations/status=ok/part-RUN-g00000-0000.parquet    published: complete groups, a few large files
    run.json                                              written last: the facts of the finished run
    _run/lease.json                                       which process is writing, while one is
    _run/RUN/manifest.json                                input files, groups, configuration, models
    _run/RUN/marks/g00000.annotated.json                  every row of the group is staged
    _run/RUN/marks/g00000.published.json                  ... and published; holds the group's counts
    _run/RUN/{staged,checkpoint}/g00000-p0/               small files as they come, and the ids in them

The marks decide what is left to do: each is written when what it says is on disk, and everything before it may be
repeated. The run that was begun last is the one that goes on; what an earlier one finished stays until that is done.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pyarrow import fs

from gem_ray.data.files import open_filesystem, whole_file
from gem_ray.pipeline.source import InputFile
from gem_ray.redaction import redacted

_SUMMARY = "run.json"


class RunDirectory:
    """Where runs write.

    Attributes:
        output: the folder as the user named it.
        filesystem: what it is on.
        root: its path there.
    """

    def __init__(self, output: str) -> None:
        self.output = output
        self.filesystem, self.root = open_filesystem(output)
        if self.filesystem.get_file_info(self.root).type is fs.FileType.File:
            raise NotADirectoryError(f"{output} is a file; the output must be a folder")

    @property
    def annotations(self) -> str:
        """Where finished annotations are."""
        return f"{self.root}/annotations"

    def run(self, run_id: str) -> RunFolder:
        """The folder of one run."""
        return RunFolder(self.filesystem, f"{self.root}/_run/{run_id}")

    def run_ids(self) -> list[str]:
        """Runs that were begun here, in the order of their beginning."""
        names = (path.rsplit("/", 1)[-1] for path in self._entries(f"{self.root}/_run", fs.FileType.Directory))
        return sorted(name for name in names if self.run(name).has("manifest"))

    def published(self) -> list[str]:
        """The files of annotations."""
        return [path for path in self._entries(self.annotations, fs.FileType.File) if path.endswith(".parquet")]

    def delete_published(self, paths: Sequence[str]) -> None:
        """Take files of annotations away."""
        for path in paths:
            self.filesystem.delete_file(path)

    def summary(self) -> dict[str, Any] | None:
        """What `run.json` says, if a run has finished."""
        return self.read_json(_SUMMARY)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The facts in a file, by its path in the folder; None if it is not there."""
        return _read_json(self.filesystem, f"{self.root}/{name}")

    def delete(self, name: str) -> None:
        """Delete a file, by its path in the folder."""
        self.filesystem.delete_file(f"{self.root}/{name}")

    def write_json(self, name: str, facts: Mapping[str, Any]) -> None:
        """Write a file of facts, by its path in the folder."""
        self.write_bytes(name, _as_json(facts))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file, by its path in the folder."""
        _write_bytes(self.filesystem, f"{self.root}/{name}", content)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write `run.json`, and forget earlier runs."""
        self.write_json(_SUMMARY, summary)
        self.forget_unfinished()

    def forget_unfinished(self) -> None:
        """Delete the folders of runs that did not finish; what they have published stays."""
        finished = (self.summary() or {}).get("run_id")
        for run_id in self.run_ids():
            if run_id != finished:
                self.filesystem.delete_dir(f"{self.root}/_run/{run_id}")

    def _entries(self, folder: str, kind: fs.FileType) -> Iterator[str]:
        selector = fs.FileSelector(folder, recursive=kind is fs.FileType.File, allow_not_found=True)
        return (entry.path for entry in self.filesystem.get_file_info(selector) if entry.type is kind)


@dataclass(frozen=True)
class Manifest:
    """What a run is: with the same input, models and configuration it gives the same rows.

    Attributes:
        listing: how many input files there are, and a hash of their names.
        files: those with rows that are read.
        rows_per_group: about how many rows a group has.
    """

    run_id: str
    started_at: str
    input: str
    limit: int | None
    listing: str
    files: list[InputFile]
    rows_per_group: int
    models: dict[str, str]
    config: dict[str, Any]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Manifest:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**values, "files": [InputFile(**file) for file in values["files"]]})


class RunFolder:
    """`_run/RUN/`: the manifest, the marks, and what is not yet published."""

    def __init__(self, filesystem: fs.FileSystem, root: str) -> None:
        self.filesystem = filesystem
        self.root = root

    @property
    def run_id(self) -> str:
        """The name of the run."""
        return self.root.rsplit("/", 1)[-1]

    def has(self, name: str) -> bool:
        """Whether a file of facts is there: `manifest`, or a mark."""
        return self.filesystem.get_file_info(f"{self.root}/{name}.json").type is fs.FileType.File

    def read(self, name: str) -> dict[str, Any] | None:
        """The facts in a file; None if it is not there."""
        return _read_json(self.filesystem, f"{self.root}/{name}.json")

    def write(self, name: str, facts: Mapping[str, Any]) -> None:
        """Write a file of facts."""
        _write_bytes(self.filesystem, f"{self.root}/{name}.json", _as_json(facts))

    def manifest(self) -> Manifest:
        """The run's manifest."""
        values = self.read("manifest")
        assert values is not None  # a run without manifest is none
        return Manifest.from_dict(values)

    def begin(self, manifest: Manifest) -> None:
        """Write the manifest: from now on the run can be gone on with."""
        self.write("manifest", asdict(manifest))

    def marks(self, kind: str) -> list[str]:
        """Names of the groups that are marked so, in order."""
        selector = fs.FileSelector(f"{self.root}/marks", allow_not_found=True)
        names = [entry.base_name.removesuffix(".json") for entry in self.filesystem.get_file_info(selector)]
        return sorted(name.removesuffix(f".{kind}") for name in names if name.endswith(f".{kind}"))

    def staged(self, group: str, number: int) -> str:
        """Where a pass over a group writes its rows."""
        return f"{self.root}/staged/{group}-p{number}"

    def checkpoint(self, group: str, number: int) -> str:
        """Where Ray keeps the ids of these rows."""
        return f"{self.root}/checkpoint/{group}-p{number}"

    def clear(self, group: str, passes: int) -> None:
        """Delete what is staged of a group."""
        for number in range(passes):
            for folder in (self.staged(group, number), self.checkpoint(group, number)):
                if self.filesystem.get_file_info(folder).type is not fs.FileType.NotFound:
                    self.filesystem.delete_dir(folder)


def _read_json(filesystem: fs.FileSystem, path: str) -> dict[str, Any] | None:
    try:
        with filesystem.open_input_stream(path) as stream:
            return json.loads(stream.read())
    except FileNotFoundError:
        return None


def _as_json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(redacted(values), indent=2, ensure_ascii=False) + "\n").encode()


def _write_bytes(filesystem: fs.FileSystem, path: str, content: bytes) -> None:
    with whole_file(filesystem, path) as target, filesystem.open_output_stream(target) as stream:
        stream.write(content)
