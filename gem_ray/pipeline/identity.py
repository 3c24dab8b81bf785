"""What makes two starts the same run: input files, models, configuration. What differs is refused by name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from posixpath import dirname, normpath
from typing import TYPE_CHECKING, Any

from gem_ray.config import affecting
from gem_ray.data.files import StoredFile, inode, open_filesystem
from gem_ray.data.output import ANNOTATIONS, RUNS
from gem_ray.data.storage import LocalStorage
from gem_ray.pipeline.inputs import is_same
from gem_ray.pipeline.summary import differences
from gem_ray.pools import passes_of
from gem_ray.s3 import S3Uri
from gem_ray.stages import in_order

if TYPE_CHECKING:
    from gem_ray.config import Config
    from gem_ray.data.listing import Listing
    from gem_ray.pipeline.output_folder import Manifest, OutputFolder

# What may differ besides when failed rows are done again: which posts and images are accepted.
_ONLY_LIMITS = ("image", "text")
_NAMED = 5  # files in a message


def check_same(
    manifest: Manifest,
    config: Config,
    models: dict[str, str],
    limit: int | None,
    columns: Mapping[str, str],
    may_have_other_limits: bool,
) -> None:
    """Refuse to mix rows of two configurations, sets of models or meanings of columns.

    Raises:
        ValueError: they differ; the message shows how.
    """
    mapped = manifest.columns.keys() | columns.keys()
    before = {"models": manifest.models, "limit": manifest.limit, "stages": manifest.passes}
    now = {"models": models, "limit": limit, "stages": stages_by_pass(config)}
    before["--map"], now["--map"] = _columns_of(mapped, manifest.columns), _columns_of(mapped, columns)
    left_out = _ONLY_LIMITS if may_have_other_limits else ()
    different = [
        *differences(before, now),
        *differences(_without(left_out, affecting(manifest.config)), _without(left_out, affecting(config.public()))),
    ]
    if different:
        raise ValueError(
            "the output belongs to a run that differs; choose another output, or pass --fresh to begin a new run:\n  "
            + "\n  ".join(different)
        )


def stages_by_pass(config: Config) -> list[list[str]]:
    """Names of the stages of each pass, whichever pools they share there: what is done is kept by pass."""
    return [in_order(spec.name for pool in pools for spec in pool.stages) for pools in passes_of(config)]


def _columns_of(fields: Iterable[str], columns: Mapping[str, str]) -> dict[str, str]:
    return {field: columns.get(field, field) for field in fields}


def limits_of(config: Config) -> dict[str, Any]:
    """The settings that rows which are done again may have of their own."""
    settings = affecting(config.public())
    return {name: settings[name] for name in _ONLY_LIMITS}


def _without(names: Sequence[str], tree: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if name not in names}


def new_files(manifest: Manifest, listing: Listing, update: bool) -> list[StoredFile]:
    """Files that were added to the input since the run began, or since the last update.

    Args:
        manifest: of the run.
        listing: the input as it is now.
        update: whether files may have been added.

    Returns:
        Files that were added, and those that could not be read before and have changed since.

    Raises:
        ValueError: a file is gone, or is not the file that the run began with; or files were added or mended without
            `update`.
    """
    known = {file.path: file for file in manifest.files}  # of a file that was mended, as it was taken in last
    found = {shard.path: shard for shard in listing.shards}
    unread = {file.path for file in manifest.unread}
    if gone := sorted(known.keys() - found.keys() - unread):
        raise ValueError(f"files of the input are gone: {_named(gone)}; put them back, or choose another output")
    changed = [path for path, file in known.items() if path in found and not is_same(file, found[path])]
    if replaced := [path for path in changed if path not in unread]:
        raise ValueError(
            f"{_named(replaced)}: not the file that this run began with (another size, modification time or ETag); "
            "put it back, give new posts a file name of their own, or choose another output"
        )
    if manifest.limit is not None:
        _check_limit(manifest, listing, update, changed)
        return []
    if changed and not update:
        raise ValueError(
            f"{_named(changed)}: could not be read when this run began, and has changed since; pass --update to take "
            "it in"
        )
    added = [shard for shard in listing.shards if shard.path not in known or shard.path in changed]
    if added and not update:
        raise ValueError(
            f"the input has files that this run does not know: {_named([file.path for file in added])}; "
            "pass --update to take them in"
        )
    return added


def _check_limit(manifest: Manifest, listing: Listing, update: bool, mended: Sequence[str]) -> None:
    """With a limit, the run has read the first files only; others may follow those in which it is reached."""
    if update:
        raise ValueError(f"--update needs a run over all files, and this one has --limit {manifest.limit}")
    if mended:
        raise ValueError(
            f"{_named(mended)}: could not be read when this run began, and has changed since; its --limit would reach "
            "other rows now, so choose another output, or pass --fresh to begin a new run"
        )
    unread = {file.path for file in manifest.unread}
    expected = [file.path for file in manifest.files if file.path not in unread]
    first = [path for path in listing.paths if path not in unread][: len(expected)]
    if first != expected:
        before = sorted(set(first) - set(expected))
        raise ValueError(f"the input has new files before those of this run: {_named(before)}; choose another output")
    known = {file.path for file in manifest.files}
    new = [path for path in listing.paths if path not in known]
    if new and manifest.limit is not None and manifest.rows < manifest.limit:
        raise ValueError(
            f"the input has files that this run does not know, and could read within its --limit {manifest.limit}: "
            f"{_named(new)}; choose another output, or pass --fresh to begin a new run"
        )


def _named(paths: Sequence[str]) -> str:
    return ", ".join(paths[:_NAMED]) + (f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else "")


def check_apart(input: str, listing: Listing, directory: OutputFolder) -> None:
    """Refuse an output in its own input, whose annotations would be read as posts, and an input in its own output.

    Raises:
        ValueError: one is inside the other, also by another name of the same folder.
    """
    storage = directory.storage
    is_local = not input.startswith("s3://")
    if is_local is not isinstance(storage, LocalStorage):
        return
    place = open_filesystem(input)[1] if is_local else S3Uri.parse(input).path
    root = _real(place, is_local)
    output = _real(storage.root, is_local)
    if _is_inside(output, root, is_local) or (is_local and _is_found(output, listing)):
        raise ValueError(f"the output {directory.output} is in the input {input}, and would be read as posts; {_APART}")
    own = [f"{output}/{ANNOTATIONS}", f"{output}/{RUNS}"]
    # Folders of files, not the files: an input may have a hundred thousand, and each takes a dozen looks at the disk.
    for path in (root, *{dirname(_real(shard, is_local)) for shard in listing.paths}):
        if any(_is_inside(path, folder, is_local) for folder in own):
            raise ValueError(
                f"the input {path} is where the output {directory.output} keeps its annotations, and would be replaced "
                f"by them; {_APART}"
            )


def _is_found(output: str, listing: Listing) -> bool:
    """True if the listing has looked into a folder that holds the output, or will: links may lead there."""
    for folder in _and_parents(output):
        with suppress(OSError):  # not there yet
            if inode(folder) in listing.folders:
                return True
    return False


_APART = "keep them apart"


def _real(path: str, is_local: bool) -> str:
    return os.path.realpath(path) if is_local else normpath(path)


def _is_inside(path: str, folder: str, is_local: bool) -> bool:
    """True if a path is a folder or below it."""
    if f"{path}/".startswith(f"{folder}/"):
        return True
    return is_local and any(_is_same_file(parent, folder) for parent in _and_parents(path))


def _and_parents(path: str) -> Iterable[Path]:
    return (Path(path), *Path(path).parents)


def _is_same_file(path: Path, folder: str) -> bool:
    """True also where a disk takes upper and lower case for the same, or has a folder in two places."""
    try:
        return os.path.samefile(path, folder)
    except OSError:
        return False
