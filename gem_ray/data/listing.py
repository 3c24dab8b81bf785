"""Which files of an input are read: shards by name or content; the rest is left out, and it is said why."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

import pyarrow as pa
from pyarrow import fs

from gem_ray.data.damage import json_object
from gem_ray.data.files import Inode, StoredFile, is_key_for_arrow, links_again, list_files
from gem_ray.data.formats import (
    HEAD_BYTES,
    TAR_SUFFIXES,
    Format,
    format_of_head,
    format_of_name,
    is_hidden,
    is_other_name,
)
from gem_ray.data.parquet import has_posts
from gem_ray.plurals import counted

_log = logging.getLogger(__name__)

# What `gem-ray shards` writes first, and again when all shards are there.
MARKER = "_gem_ray_shards.json"

# Files that say something of the others, and hold no rows.
_MARKERS = (MARKER, "_SUCCESS", "_metadata", "_common_metadata")

_LOOKS_AT_ONCE = 16
_SHOWN_NAMES = 3

# Folders in which a table format keeps which of its data files count; the others are old versions of rows.
_TABLES = {"_delta_log": "a Delta table", ".hoodie": "a Hudi table", "_spark_metadata": "a Spark streaming sink"}

_HIDDEN = "hidden by a `_` or `.` in front"
_OTHER_KIND = "of another kind, by its suffix"
_AGAIN = "a link to a file that is listed already"
_NO_KEY = "its key has an empty component (`//`), `.` or `..`, which Arrow cannot open"
_METADATA = "metadata of the tar beside it: no columns post_id and text"
_UNKNOWN = "neither Parquet nor tar, by its first bytes"


@dataclass(frozen=True)
class LeftOut:
    """Files that are not read for one reason.

    Attributes:
        reason: why.
        files: how many.
        examples: names of the first ones, from the input's folder.
    """

    reason: str
    files: int
    examples: list[str]

    def __str__(self) -> str:
        """A sentence."""
        left = self.files - len(self.examples)
        names = ", ".join(self.examples) + (f" and {left:,} more" if left else "")
        files = counted(self.files, "file is", "files are")
        return f"{files} not read ({self.reason}): {names}"


@dataclass(frozen=True)
class Listing:
    """What lies at an input.

    Attributes:
        filesystem: what the files are on.
        root: the input's path there.
        shards: the files that are read, sorted by path.
        left_out: those that are not, and why, by path.
        folders: on a disk, those that were looked into, also behind links.
    """

    filesystem: fs.FileSystem
    root: str
    shards: list[StoredFile]
    left_out: dict[str, str]
    folders: set[Inode] = field(default_factory=set)

    @property
    def paths(self) -> list[str]:
        """The shards' paths."""
        return [shard.path for shard in self.shards]

    def left_out_by_reason(self) -> list[LeftOut]:
        """For each reason for which files are left out, how many there are, the most first."""
        names: dict[str, list[str]] = {}
        for path, reason in self.left_out.items():
            names.setdefault(reason, []).append(path.removeprefix(f"{self.root}/"))
        found = [LeftOut(reason, len(each), each[:_SHOWN_NAMES]) for reason, each in names.items()]
        return sorted(found, key=lambda each: -each.files)

    def remarks(self) -> list[str]:
        """A sentence for each reason for which files are left out."""
        return [str(each) for each in self.left_out_by_reason()]


def list_shards(path: str | Path) -> Listing:
    """As `find_shards`, with a warning for each kind of files that are left out.

    Raises:
        FileNotFoundError, ValueError: as `find_shards`.
    """
    listing = find_shards(path)
    for remark in listing.remarks():
        _log.warning("%s: %s", path, remark)
    return listing


def find_shards(path: str | Path) -> Listing:
    """The shards at a path or in a folder and below, in the order of their paths.

    A suffix that is known decides; a file with another one, or none, is looked into. Left out are hidden names (`_…`
    and `.…`, but partitions like `_date=2024-01-01` are none), and Parquet files of metadata that lie beside tars.

    Raises:
        FileNotFoundError: there is nothing at `path`, or no shard in it.
        ValueError: the folder is a table of a format that keeps old versions of rows, or holds shards of a
            `gem-ray shards` that did not finish.
    """
    filesystem, root, listed, folders = list_files(path)
    if [file.path for file in listed] == [root]:
        return _single(filesystem, root, listed[0], path)
    left_out: dict[str, str] = {}
    files = [file for file in listed if not _note(left_out, file.path, file.unreadable)]
    _refuse_tables(path, root, files)
    _check_markers(filesystem, root, files)
    files = [file for file in files if file.path.rpartition("/")[2] not in _MARKERS]
    candidates = [file for file in files if not _note(left_out, file.path, _reason_of_name(file.path, root))]
    if isinstance(filesystem, fs.LocalFileSystem):
        again = links_again([file.path for file in candidates])
        candidates = [
            file for file in candidates if not _note(left_out, file.path, _AGAIN if file.path in again else None)
        ]
    with ThreadPoolExecutor(_LOOKS_AT_ONCE) as threads:
        tars = {_stem(file.path) for file in candidates if format_of_name(file.path) is Format.TAR}
        reasons = threads.map(partial(_reason_of_content, filesystem, tars), [file.path for file in candidates])
        shards = [
            file for file, reason in zip(candidates, reasons, strict=True) if not _note(left_out, file.path, reason)
        ]
    if not shards:
        raise FileNotFoundError(_nothing(path, Listing(filesystem, root, [], left_out)))
    return Listing(filesystem, root, shards, left_out, folders)


def format_of(filesystem: fs.FileSystem, path: str) -> Format | None:
    """Which shard a file is, by its name or else its first bytes; None if it is none.

    Raises:
        OSError: it cannot be read.
    """
    if known := format_of_name(path):
        return known
    with filesystem.open_input_stream(path, compression=None, buffer_size=HEAD_BYTES) as stream:
        return format_of_head(stream.read(HEAD_BYTES))


def _single(filesystem: fs.FileSystem, root: str, file: StoredFile, path: str | Path) -> Listing:
    if format_of(filesystem, root) is None:
        raise FileNotFoundError(
            f"{path} is not a shard (Parquet or WebDataset tar); `gem-ray shards` makes shards of it"
        )
    return Listing(filesystem, root, [file], {})


def _nothing(path: str | Path, listing: Listing) -> str:
    remarks = "".join(f"\n  {remark}" for remark in listing.remarks())
    return f"there are no shards (Parquet or WebDataset tars) in {path}; `gem-ray shards` makes them{remarks}"


def _note(left_out: dict[str, str], path: str, reason: str | None) -> bool:
    """Note why a file is left out; whether it is."""
    if reason is not None:
        left_out[path] = reason
    return reason is not None


def _reason_of_name(path: str, root: str) -> str | None:
    relative = path.removeprefix(f"{root}/")
    if not is_key_for_arrow(relative):
        return _NO_KEY
    if is_hidden(PurePosixPath(relative)) or "__MACOSX" in relative:
        return _HIDDEN
    return _OTHER_KIND if format_of_name(path) is None and is_other_name(path) else None


def _reason_of_content(filesystem: fs.FileSystem, tars: set[str], path: str) -> str | None:
    kind = format_of(filesystem, path)
    if kind is None:
        return _UNKNOWN
    return _METADATA if kind is Format.PARQUET and _stem(path) in tars and not _has_posts(filesystem, path) else None


def _has_posts(filesystem: fs.FileSystem, path: str) -> bool:
    try:
        with filesystem.open_input_file(path) as stream:
            return has_posts(stream)
    except pa.ArrowException:  # damaged; who reads it says so
        return True


def _stem(path: str) -> str:
    suffix = next((suffix for suffix in TAR_SUFFIXES if path.lower().endswith(suffix)), PurePosixPath(path).suffix)
    return path.removesuffix(path[len(path) - len(suffix) :])


def _refuse_tables(path: str | Path, root: str, files: Iterable[StoredFile]) -> None:
    for name in (file.path.removeprefix(f"{root}/") for file in files):
        parts = PurePosixPath(name).parts
        table = next((kind for part, kind in _TABLES.items() if part in parts[:-1]), None)
        if len(parts) > 1 and parts[-2] == "metadata" and name.endswith((".metadata.json", "version-hint.text")):
            table = "an Iceberg table"
        if table:
            raise ValueError(
                f"{path} is {table} (see {name}): its folder also holds files that are no longer part of it. Write its "
                "current rows as plain Parquet with the tool that made it, and give that folder"
            )


def _check_markers(filesystem: fs.FileSystem, root: str, files: list[StoredFile]) -> None:
    names = Counter(file.path.rpartition("/")[0] for file in files if file.path.endswith(".parquet"))
    for marker in (file.path for file in files if file.path.rpartition("/")[2] == MARKER):
        folder = marker.rpartition("/")[0]
        with filesystem.open_input_stream(marker) as stream:
            facts = json_object(stream.read(), marker)
        if not facts.get("complete"):
            raise ValueError(
                f"the shards in {folder} are not complete: `gem-ray shards` has not finished. If it was "
                "stopped, remove the folder and run it again"
            )
        if names[folder] < facts["shards"]:
            raise ValueError(
                f"{folder} has {names[folder]} of the {counted(facts['shards'], 'shard')} that `gem-ray shards` wrote; "
                f"bring back the others, or delete {MARKER} to continue without them"
            )
