"""Posts from and to shards: Parquet files and WebDataset tars, on this machine or in S3."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain, count, islice, takewhile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from gem_ray.data.files import open_filesystem, whole_file
from gem_ray.data.formats import LFS_POINTER, Format, format_of_name
from gem_ray.data.listing import MARKER, Listing, format_of, list_shards
from gem_ray.data.output import InputOfRun
from gem_ray.data.parquet import Columns, Counted, SchemaError, count_parquet_rows, parquet_rows
from gem_ray.data.prepare import post_from_row, row_from_post
from gem_ray.data.tokenize import tokenize
from gem_ray.data.webdataset import count_rows_in_tar, rows_from_tar
from gem_ray.records import INPUT_SCHEMA, GoldEntity, Post
from gem_ray.taxonomy import FMNERG, GMNER, LabelSet, gmner_category

ROWS_BITS = 32  # of a row's id, for its position in its file; the number of the file is above them
_ROWS_PER_GROUP = 128  # rows carry images: small groups let a reader split a shard


def read_posts(path: str | Path, limit: int | None = None, columns: Columns | None = None) -> Iterator[Post]:
    """Posts of a shard or of every shard in a folder, in the order of the files' names.

    Rows that are wrong become posts with problems. Images stay encoded.

    Args:
        path: a Parquet file or WebDataset tar or a folder of them, local or `s3://`.
        limit: at most so many posts; `None` means all.
        columns: field of an input row -> the name that it has in the shards, where that is another one.

    Raises:
        FileNotFoundError: there is nothing at `path`, or no shard in it.
        ValueError: a shard cannot be read; the message names it.
    """
    listing = list_shards(path)
    rows = chain.from_iterable(shard_rows(listing.filesystem, file, columns=columns) for file in listing.paths)
    return islice((post_from_row(row) for _, row in rows), limit)


def read_numbered_posts(path: str | Path, run: InputOfRun | None = None) -> Iterator[Post]:
    """As `read_posts`, with the `row_id` that `annotate` gives a row of the same files.

    Args:
        path: as for `read_posts`.
        run: which of the files it has read under which numbers, wherever they lie now; posts have no row if it has read
            none of them. Without it, files are numbered as a first run numbers them.

    Raises:
        FileNotFoundError, ValueError: as `read_posts`.
    """
    listing = list_shards(path)
    numbers: list[int | None] = list(range(len(listing.paths)))
    paths, columns = listing.paths, {}
    if run is not None and (of_run := _numbers_of(run, listing)):
        left = count(max((number for number in of_run.values() if number is not None), default=-1) + 1)
        paths = [file for file in paths if of_run.get(file, 0) is not None]
        numbers = [of_run[file] if file in of_run else next(left) for file in paths]
        columns = run.columns
    elif run is not None:
        numbers = [None] * len(paths)
    for number, file in zip(numbers, paths, strict=True):
        for position, row in shard_rows(listing.filesystem, file, columns=columns):
            yield replace(post_from_row(row), row_id=None if number is None else (number << ROWS_BITS) + position)


def _numbers_of(run: InputOfRun, listing: Listing) -> dict[str, int | None]:
    """Numbers of the listed files that a run knows, by path; the folder may have been copied."""
    names = run.names
    known = {path: path.removeprefix(listing.root) for path in listing.paths}
    return {
        path: run.numbers.get(path, names.get(name))
        for path, name in known.items()
        if path in run.numbers or name in names
    }


def read_labelled(path: str | Path, labels: LabelSet) -> list[Post]:
    """The posts of `read_posts` that have gold, cut into words, under a label set: GMNER's follow from fine categories.

    Raises:
        FileNotFoundError: as `read_posts`.
        ValueError: as `read_posts`; or no post has gold, or a post's gold is of other words or of other categories.
    """
    posts = [_labelled(post, post.gold, labels) for post in read_posts(path) if post.gold is not None]
    if not posts:
        raise ValueError(f"{path} has no gold: its rows need a `gold` column, as `gem-ray shards` writes it")
    return posts


def _labelled(post: Post, gold: Sequence[GoldEntity], labels: LabelSet) -> Post:
    words = post.tokens or tokenize(post.text)
    if labels.name == GMNER.name:
        gold = [replace(g, fine=gmner_category(g.fine) if g.fine in FMNERG.parent else g.fine) for g in gold]
    end = 0
    for mention in sorted(gold, key=lambda g: g.word_start) if words else ():
        place = mention.named(post.post_id)
        if mention.fine not in labels.parent:
            of_gmner = "; that is one of gmner: set labels=gmner" if mention.fine in GMNER.parent else ""
            raise ValueError(f"{place} is {mention.fine!r}, which is no category of {labels.name}{of_gmner}")
        if reason := mention.why_outside(post.post_id, len(words)):
            raise ValueError(reason)
        if mention.word_start < end:
            raise ValueError(f"{place} overlaps another")
        end = mention.word_end
    return replace(post, tokens=words, gold=list(gold))


def shard_rows(
    filesystem: fs.FileSystem, file: str, wanted: np.ndarray | None = None, columns: Columns | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of one shard with the types that it has; a cell that cannot be read is named in `ERROR_FIELD`,
    an image in `IMAGE_ERROR_FIELD`.

    Args:
        filesystem: what the shard is on.
        file: its path.
        wanted: positions of the rows to read, sorted; all if None. Row groups without one are not read.
        columns: field of an input row -> the name that it has in the shard, where that is another one.

    Yields:
        The row's position in the shard, counted from 0, and its values. Where a row group of a Parquet file is damaged,
        its rows have no values but `ERROR_FIELD`.

    Raises:
        ValueError: the shard cannot be read, or its columns are not those of posts; the message names it.
    """
    with _naming(filesystem, file) as kind:
        if kind is Format.TAR:
            with filesystem.open_input_stream(file, compression=None) as stream:
                positions = None if wanted is None else set(wanted.tolist())
                for position, row in enumerate(rows_from_tar(stream, columns)):
                    if positions is None or position in positions:
                        yield position, row
        else:
            with filesystem.open_input_file(file) as stream:
                yield from parquet_rows(stream, wanted, columns or {})


def count_rows(
    filesystem: fs.FileSystem, file: str, columns: Columns | None = None, most: int | None = None
) -> Counted:
    """How many rows `shard_rows` gives: from a Parquet file's footer, or by walking through a tar.

    Args:
        filesystem, file, columns: as for `shard_rows`.
        most: when a tar has so many, walk no further.

    Raises:
        ValueError: as `shard_rows`.
    """
    with _naming(filesystem, file) as kind:
        if kind is Format.TAR:
            with filesystem.open_input_stream(file, compression=None) as stream:
                return Counted(count_rows_in_tar(stream, most))
        with filesystem.open_input_file(file) as stream:
            return count_parquet_rows(stream, columns or {})


def write_posts(posts: Iterable[Post], out_dir: str | Path, per_shard: int = 1000) -> int:
    """Write posts to `part-00000.parquet`, `part-00001.parquet` …; the same posts give the same files.

    A marker beside them says whether all are there: who is killed leaves shards that `list_shards` refuses. Whatever
    fails otherwise leaves nothing, so that it can be repeated.

    Args:
        posts: encoded images are written as they are; whatever cannot be read back is left out, so that rejected posts
            stay rejected when they are read back.
        out_dir: a folder, made if it is not there, local or `s3://`.
        per_shard: posts in a file.

    Returns:
        How many posts were written. For 0, one empty shard is written, so that the folder is still an input.

    Raises:
        FileExistsError: the folder holds shards already, which would mix with the new ones.
    """
    filesystem, root = open_filesystem(out_dir)
    before = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
    if any(format_of_name(entry.path) or entry.base_name == MARKER for entry in before):
        raise FileExistsError(f"{out_dir} already holds shards; write to another folder or remove them first")
    made = _missing_folders(filesystem, root)
    files: list[str] = []
    try:
        return _write_shards(iter(posts), filesystem, root, per_shard, files)
    except BaseException:
        _take_back(filesystem, files, made)
        raise


def _write_shards(
    remaining: Iterator[Post], filesystem: fs.FileSystem, root: str, per_shard: int, files: list[str]
) -> int:
    """As `write_posts`; `files` gets the paths of what is there for it."""
    files.append(f"{root}/{MARKER}")
    _write_marker(filesystem, root, complete=False)
    written = 0
    for shard in count():
        first = list(islice(remaining, 1))
        if not first and shard > 0:
            break
        shard_posts = chain(first, islice(remaining, per_shard - 1))
        file = f"{root}/part-{shard:05d}.parquet"
        files.append(file)  # before it is there: in S3, one that fails may leave what it had written
        written += _write_shard(shard_posts, filesystem, file)
    _write_marker(filesystem, root, complete=True, shards=max(1, -(-written // per_shard)), posts=written)
    return written


def _missing_folders(filesystem: fs.FileSystem, root: str) -> list[str]:
    """The folder and those above it that are not there, the innermost first."""
    folders = [root, *(str(parent) for parent in PurePosixPath(root).parents)]
    return list(takewhile(lambda folder: filesystem.get_file_info(folder).type is fs.FileType.NotFound, folders))


def _take_back(filesystem: fs.FileSystem, files: Sequence[str], made: Sequence[str]) -> None:
    """Delete files that were written, and folders that were made for them and hold nothing else."""
    for file in files:
        with suppress(OSError):
            filesystem.delete_file(file)
    with suppress(OSError):
        for folder in made:
            if filesystem.get_file_info(fs.FileSelector(folder)):
                return
            filesystem.delete_dir(folder)


def _write_marker(filesystem: fs.FileSystem, root: str, **facts: Any) -> None:
    with (
        whole_file(filesystem, f"{root}/{MARKER}") as target,
        filesystem.open_output_stream(target) as stream,
    ):
        stream.write(json.dumps(facts).encode())


def _write_shard(posts: Iterator[Post], filesystem: fs.FileSystem, file: str) -> int:
    written = 0
    with (
        whole_file(filesystem, file) as target,
        pq.ParquetWriter(target, INPUT_SCHEMA, filesystem=filesystem, compression="zstd") as writer,
    ):
        while group := [row_from_post(post) for post in islice(posts, _ROWS_PER_GROUP)]:
            writer.write_table(pa.Table.from_pylist(group, INPUT_SCHEMA))
            written += len(group)
    return written


@contextmanager
def _naming(filesystem: fs.FileSystem, file: str) -> Iterator[Format]:
    """The format of a shard; errors while it is read name it."""
    kind = None
    try:
        kind = format_of(filesystem, file)
        yield kind or Format.TAR
    except SchemaError as error:
        raise ValueError(f"{file} {error}") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        if not isinstance(error, OSError) and _is_pointer(filesystem, file):
            raise ValueError(f"{file} is a Git LFS pointer: `git lfs pull` brings the file itself") from error
        raise ValueError(f"{file} is not a readable {kind or 'shard'}: {error}") from error


def _is_pointer(filesystem: fs.FileSystem, file: str) -> bool:
    with filesystem.open_input_stream(file, compression=None) as stream:
        return bool(stream.read(len(LFS_POINTER)) == LFS_POINTER)


def fingerprint(posts: Iterable[Post]) -> str:
    """A short hash of posts: their ids, texts, knowledge, gold and images."""
    digest = hashlib.sha256()
    for post in posts:
        facts = (post.post_id, post.text, post.caption, post.knowledge, post.gold, post.image_uri)
        digest.update(repr(facts).encode())
        digest.update(post.image_bytes or b"")
    return digest.hexdigest()[:16]
