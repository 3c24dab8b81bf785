"""`annotations/` as the published groups say: files are moved there, replaced ones deleted, lost ones found.

What is published is decided elsewhere, in one step per group (`gem_ray.data.output`). Everything here may be killed
anywhere and repeated by anybody: it only brings the folder to what has been decided.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from gem_ray.atomic import name_of_partial
from gem_ray.data.damage import DamagedError, json_object, parsed
from gem_ray.data.output import ANNOTATIONS, RUN_ID, SUCCESS, Publication, PublishedFile, live_files, merged_name
from gem_ray.data.parquet import rows_in_footer
from gem_ray.data.storage import as_json, side_by_side
from gem_ray.pipeline.staging import is_rows, read_ids
from gem_ray.records import Status
from gem_ray.tally import Tally

if TYPE_CHECKING:
    from gem_ray.data.storage import Storage
    from gem_ray.pipeline.groups import Group
    from gem_ray.pipeline.lease import LeaseClaim
    from gem_ray.pipeline.output_folder import OutputFolder

_OF_RUN = re.compile(rf"status=\w+/part-(?P<run>{RUN_ID.pattern})-[gpr]\d+-[^/]+\.parquet")
_NAMED = 5  # files in a message


def has_annotations(storage: Storage) -> bool:
    """True if there are Parquet files in `annotations/`."""
    return any(is_rows(name) for name in _names(storage))


def check_no_strangers(directory: OutputFolder) -> None:
    """Refuse to write where somebody else's files are, which must be neither deleted nor taken for rows.

    Raises:
        FileExistsError: there are files that no run of this output has written, also such of another output's run; the
            message names some.
    """
    found = [name for name in _names(directory.storage) if is_rows(name)]
    own = set(_own(directory, found))
    if strangers := [name for name in found if name not in own]:
        shown = ", ".join(strangers[:_NAMED]) + (" …" if len(strangers) > _NAMED else "")
        raise FileExistsError(
            f"{directory.output}/{ANNOTATIONS} holds files that no run of this output has written: {shown}; "
            "move them away, or choose another output"
        )


def _own(directory: OutputFolder, names: Iterable[str]) -> list[str]:
    """Those files that runs of this output have written, or half written when they were killed, by their names."""
    runs = directory.all_runs()
    return [name for name in names if (found := _OF_RUN.fullmatch(_whole_name(name))) and found["run"] in runs]


def _whole_name(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{name_of_partial(file) or file}"


def settle(directory: OutputFolder, claim: LeaseClaim) -> None:
    """Bring `annotations/` to what the live run has published; while it changes, `_SUCCESS` is not there.

    Raises:
        FileExistsError: another process has taken the output.
    """
    storage = directory.storage
    complete = storage.version(SUCCESS)  # which another process may write anew while this one sleeps
    # Listed before what is published is read: whatever was moved here until now has been decided by then.
    there = _names(storage)
    folder = directory.live_run()
    if folder is None:
        return
    published = folder.publications()
    live = live_files(published)
    sizes = {file.name: file.size for each in published.values() for file in each.files}
    waiting = storage.files(folder.merged)
    stale = [name for name in _own(directory, there) if name not in live]
    moves = {name: merged_name(folder.run_id, group, name) for name, group in live.items()}
    moves = {n: source for n, source in moves.items() if there.get(n) != sizes[n]}
    # What other nodes wrote is listed late on NFS, and found by its name.
    moves = {n: source for n, source in moves.items() if source in waiting or storage.exists(source)}
    is_short = not live or any(there.get(name) != sizes[name] for name in live)
    if stale or is_short:
        with claim.checked():
            storage.delete_version(SUCCESS, complete)

    def delete(name: str) -> None:
        with claim.checked():
            storage.delete(f"{ANNOTATIONS}/{name}")

    def move(name: str) -> None:
        try:
            with claim.checked():
                storage.move(moves[name], f"{ANNOTATIONS}/{name}")
        except FileExistsError:
            # A copy takes its time. Whoever took the output over meanwhile may have replaced the file, and deleted it.
            if not _is_live(directory, name):
                storage.delete(f"{ANNOTATIONS}/{name}")
            raise

    side_by_side(delete, stale)  # all of them first, so that no row is there twice
    side_by_side(move, list(moves))  # in S3 each is a copy, and a fresh run may have thousands
    for group in {path.removeprefix(f"{folder.merged}/").partition("/")[0] for path in waiting} & published.keys():
        with claim.checked():
            storage.delete_folder(f"{folder.merged}/{group}")


def _is_live(directory: OutputFolder, name: str) -> bool:
    """Whether a file of `annotations/` is to be read; one that is not will never be again."""
    folder = directory.live_run()
    return folder is not None and name in live_files(folder.publications())


def lost_files(storage: Storage, published: Mapping[str, Publication]) -> list[str]:
    """Names of live files that are not in `annotations/` as they were written: gone, cut, or of other rows."""
    live = live_files(published)
    facts = {file.name: file for each in published.values() for file in each.files}
    there = _names(storage)
    suspects = [facts[name] for name in live if there.get(name) == facts[name].size]
    whole = side_by_side(partial(_is_whole, storage), suspects)
    return sorted(live.keys() - {file.name for file, good in zip(suspects, whole, strict=True) if good})


def _is_whole(storage: Storage, file: PublishedFile) -> bool:
    path = storage.path(file.path)

    def rows() -> int:
        with storage.filesystem.open_input_file(path) as stream:
            return rows_in_footer(stream)

    try:
        return parsed(storage.filesystem, path, rows) == file.rows
    except (FileNotFoundError, DamagedError):
        return False


def ids_of_files(storage: Storage, names: list[str]) -> np.ndarray:
    """The ids of the rows in files of `annotations/`, `(N,)` int64, sorted.

    Raises:
        DamagedError: a file whose footer is whole is damaged all the same; the message says what to do.
        OSError: a file cannot be read.
    """
    ids = side_by_side(partial(_ids_of_file, storage), [f"{ANNOTATIONS}/{name}" for name in names])
    return np.sort(np.concatenate([np.array([], np.int64), *ids]))


def _ids_of_file(storage: Storage, name: str) -> np.ndarray:
    try:
        return read_ids(storage, name)
    except DamagedError as error:
        reason = str(error).partition("\n")[0]
        raise DamagedError(
            f"{storage.path(name)} is damaged: {reason}; delete it, and start without --only-problems, which does its "
            "rows again"
        ) from error


def lost_ids(
    storage: Storage, groups: list[Group], published: Mapping[str, Publication], lost: list[str]
) -> np.ndarray:
    """The ids of the rows that lost files held, `(N,)` int64, sorted.

    Args:
        storage: of the output.
        groups: those of the input.
        published: all publications.
        lost: names of the lost files.
    """
    live = live_files(published)
    input_groups = {group.name for group in groups}
    left = {name: group for name, group in live.items() if name not in set(lost)}
    again = ids_of_files(storage, [name for name, group in left.items() if group not in input_groups])
    # Rows that were done again are in files of other groups: of a lost one, any group may miss rows.
    hit = {live[name] for name in lost}
    searched = [group for group in groups if group.name in published and (group.name in hit or hit - input_groups)]
    missing = [np.array([], np.int64)]
    for group in searched:
        own = ids_of_files(storage, [name for name, each in left.items() if each == group.name])
        missing.append(np.setdiff1d(np.setdiff1d(group.ids, own), again))
    return np.concatenate(missing)


def files_with_problems(published: Mapping[str, Publication]) -> list[str]:
    """Names of the live files whose rows are degraded or rejected, sorted."""
    return sorted(name for name in live_files(published) if not name.startswith(f"status={Status.OK}/"))


def tally_of(published: Mapping[str, Publication], groups: Collection[str] | None = None) -> Tally:
    """Counts over the live files of all groups and rounds, or of some."""
    live = live_files(published)
    files = [
        file
        for name, each in published.items()
        if groups is None or name in groups
        for file in each.files
        if file.name in live
    ]
    return sum((Tally.from_dict(file.tally) for file in sorted(files, key=lambda file: file.name)), Tally())


def mark_complete(directory: OutputFolder, claim: LeaseClaim, run_id: str, rows: int, files: int) -> None:
    """Write `_SUCCESS`: `annotations/` holds all rows of the run, and nothing else.

    Raises:
        FileExistsError: another process has taken the output.
        ConflictError: it has just changed the file.
    """
    storage = directory.storage
    version = storage.version(SUCCESS)
    facts = {"run_id": run_id, "rows": rows, "files": files}
    with claim.checked():
        if not _says(storage.read(SUCCESS), facts):
            # With the moment no two are alike, and a process that wants to delete an earlier one leaves this.
            moment = datetime.now(UTC).isoformat()
            storage.swap(SUCCESS, as_json({**facts, "completed_at": moment}), version)


def _says(content: bytes | None, facts: Mapping[str, Any]) -> bool:
    try:
        return content is not None and facts.items() <= json_object(content, SUCCESS).items()
    except DamagedError:
        return False


def _names(storage: Storage) -> dict[str, int]:
    """Names below `annotations/`, and sizes in bytes."""
    return {path.removeprefix(f"{ANNOTATIONS}/"): size for path, size in storage.files(ANNOTATIONS).items()}
