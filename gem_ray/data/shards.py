"""Posts from and to shards: Parquet files and WebDataset tars, on this machine or in S3."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import NativeFile, fs

from gem_ray.data.files import StoredFile, list_files, open_filesystem
from gem_ray.data.prepare import ERROR_FIELD, post_from_row, row_from_post
from gem_ray.data.webdataset import count_rows_in_tar, rows_from_tar
from gem_ray.records import INPUT_SCHEMA, Post
from gem_ray.taxonomy import FMNERG, GMNER, LabelSet, gmner_category

PARQUET_SUFFIXES = (".parquet",)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")

# Rows carry images: small groups and batches keep memory low and let a reader split a shard.
_ROWS_PER_GROUP = 128
_ROWS_PER_BATCH = 64
_PIECE_BYTES = 8 * 2**20

_UNREADABLE = (ValueError, OverflowError)  # text that is no UTF-8, a date out of range


def read_posts(path: str | Path, limit: int | None = None) -> Iterator[Post]:
    """Posts of a shard or of every shard in a folder, in the order of the files' names.

    Rows that are wrong become posts with problems. Images stay encoded.

    Args:
        path: a `.parquet` or `.tar` file or a folder of them, local or `s3://`.
        limit: at most so many posts; none: all.

    Raises:
        FileNotFoundError: there is nothing at `path`, or no shard in it.
        ValueError: a shard cannot be read; the message names it.
    """
    listing = list_shards(path)
    rows = chain.from_iterable(shard_rows(listing.filesystem, file) for file in listing.paths)
    return islice((post_from_row(row) for _, row in rows), limit)


def read_labelled(path: str | Path, labels: LabelSet) -> list[Post]:
    """As `read_posts`, with gold under a label set: GMNER's categories follow from fine ones.

    Raises:
        FileNotFoundError, ValueError: as `read_posts`.
    """
    posts = list(read_posts(path))
    return [_as_gmner(post) for post in posts] if labels.name == GMNER.name else posts


def _as_gmner(post: Post) -> Post:
    if post.gold is None:
        return post
    gold = [replace(g, fine=gmner_category(g.fine) if g.fine in FMNERG.parent else g.fine) for g in post.gold]
    return replace(post, gold=gold)


@dataclass(frozen=True)
class Listing:
    """What lies at an input.

    Attributes:
        filesystem: what the files are on.
        shards: the files that are read, sorted by path.
        left_out: those that are not, and why, by path.
    """

    filesystem: fs.FileSystem
    shards: list[StoredFile]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def paths(self) -> list[str]:
        """The shards' paths."""
        return [shard.path for shard in self.shards]


def list_shards(path: str | Path) -> Listing:
    """The shards at a path or in a folder and below; hidden names (`_…`, `.…`) are left out.

    Raises:
        FileNotFoundError: there is nothing at `path`, or no shard in it.
    """
    suffixes = (*PARQUET_SUFFIXES, *TAR_SUFFIXES)
    filesystem, root, files = list_files(path)
    shards = [file for file in files if file.path.endswith(suffixes) and not _is_hidden(file.path, root)]
    if not shards and [file.path for file in files] == [root]:
        raise FileNotFoundError(f"{path} is no shard ({_names(suffixes)}); `gem-ray shards` makes shards of it")
    if not shards:
        raise FileNotFoundError(f"there are no shards ({_names(suffixes)}) in {path}; `gem-ray shards` makes them")
    return Listing(filesystem, shards)


def shard_rows(
    filesystem: fs.FileSystem, file: str, wanted: np.ndarray | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of one shard with the types that it has; a cell that cannot be read is named in `ERROR_FIELD`.

    Args:
        filesystem: what the shard is on.
        file: its path.
        wanted: positions of the rows to read, sorted; all if None. Row groups without one are not read.

    Yields:
        The row's position in the shard, counted from 0, and its values. Where a row group of a Parquet file is damaged,
        its rows have no values but `ERROR_FIELD`.

    Raises:
        ValueError: the shard cannot be read; the message names it.
    """
    with _naming(file):
        if file.endswith(TAR_SUFFIXES):
            with filesystem.open_input_stream(file, compression=None) as stream:
                positions = None if wanted is None else set(wanted.tolist())
                for position, row in enumerate(rows_from_tar(stream)):
                    if positions is None or position in positions:
                        yield position, row
        else:
            with filesystem.open_input_file(file) as stream:
                yield from _parquet_rows(stream, wanted)


def _parquet_rows(stream: NativeFile, wanted: np.ndarray | None) -> Iterator[tuple[int, dict[str, Any]]]:
    parquet = pq.ParquetFile(stream)
    end = 0
    for group in range(parquet.num_row_groups):
        first, end = end, end + parquet.metadata.row_group(group).num_rows
        inside = np.arange(first, end) if wanted is None else wanted[(wanted >= first) & (wanted < end)]
        if not len(inside):
            continue
        done = first
        try:
            for positions, batch in _batches(parquet, group, first, inside):
                done = int(positions[-1]) + 1
                yield from zip(positions.tolist(), _rows(batch), strict=True)
        except (pa.ArrowException, OSError) as error:
            _check_readable(stream, parquet.metadata.row_group(group))
            reason = f"row group {group} of the file is damaged: {error}"
            yield from ((position, {ERROR_FIELD: reason}) for position in inside[inside >= done].tolist())


def _batches(
    parquet: pq.ParquetFile, group: int, first: int, inside: np.ndarray
) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
    """A row group's rows `inside`, with their positions; `first` is the position of its first row."""
    columns = [name for name in INPUT_SCHEMA.names if name in parquet.schema_arrow.names]
    for batch in parquet.iter_batches(_ROWS_PER_BATCH, row_groups=[group], columns=columns):
        positions = np.arange(first, first + batch.num_rows)
        first += batch.num_rows
        mask = np.isin(positions, inside)
        if not mask.all():  # filtering copies the images
            batch, positions = batch.filter(pa.array(mask)), positions[mask]
        if len(positions):
            yield positions, batch


def _check_readable(stream: NativeFile, group: pq.RowGroupMetaData) -> None:
    """Tell a storage that does not answer from bytes that are wrong: only the latter are the rows' own problem.

    Raises:
        OSError: the bytes of the row group cannot be read.
    """
    for index in range(group.num_columns):
        column = group.column(index)
        stream.seek(column.dictionary_page_offset or column.data_page_offset)
        left = column.total_compressed_size
        while left > 0 and (piece := stream.read(min(left, _PIECE_BYTES))):
            left -= len(piece)


def count_rows(filesystem: fs.FileSystem, file: str) -> int:
    """How many rows `shard_rows` gives: from a Parquet file's footer, or by walking through a tar.

    Raises:
        ValueError: the shard cannot be read; the message names it.
    """
    with _naming(file):
        if file.endswith(TAR_SUFFIXES):
            with filesystem.open_input_stream(file, compression=None) as stream:
                return count_rows_in_tar(stream)
        with filesystem.open_input_file(file) as stream:
            return pq.ParquetFile(stream).metadata.num_rows


def write_posts(posts: Iterable[Post], out_dir: str | Path, per_shard: int = 1000) -> int:
    """Write posts to `part-00000.parquet`, `part-00001.parquet` …; the same posts give the same files.

    Args:
        posts: in the order in which they are read back.
        out_dir: a folder, made if it is not there, local or `s3://`.
        per_shard: posts in a file.

    Returns:
        How many posts were written. None: one empty shard, so that the folder is still an input.

    Raises:
        FileExistsError: the folder holds shards already, which would mix with the new ones.
    """
    filesystem, root = open_filesystem(out_dir)
    filesystem.create_dir(root, recursive=True)
    if any(e.path.endswith(PARQUET_SUFFIXES) for e in filesystem.get_file_info(fs.FileSelector(root))):
        raise FileExistsError(f"{out_dir} already holds shards; write to another folder or remove them first")
    remaining = iter(posts)
    written = 0
    for shard in count():
        first = list(islice(remaining, 1))
        if not first and shard > 0:
            break
        shard_posts = chain(first, islice(remaining, per_shard - 1))
        written += _write_shard(shard_posts, filesystem, f"{root}/part-{shard:05d}.parquet")
    return written


def _write_shard(posts: Iterator[Post], filesystem: fs.FileSystem, file: str) -> int:
    written = 0
    with pq.ParquetWriter(file, INPUT_SCHEMA, filesystem=filesystem, compression="zstd") as writer:
        while group := [row_from_post(post) for post in islice(posts, _ROWS_PER_GROUP)]:
            writer.write_table(pa.Table.from_pylist(group, INPUT_SCHEMA))
            written += len(group)
    return written


@contextmanager
def _naming(file: str) -> Iterator[None]:
    kind = "WebDataset tar" if file.endswith(TAR_SUFFIXES) else "Parquet file"
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{file} is not a readable {kind}: {error}") from error


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except _UNREADABLE:
        return [_readable_cells(batch, index) for index in range(batch.num_rows)]


def _readable_cells(batch: pa.RecordBatch, index: int) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[index].as_py()
        except _UNREADABLE as error:
            row[ERROR_FIELD] = f"{name} cannot be read: {error}"
    return row


def _is_hidden(file: str, root: str) -> bool:
    return any(part.startswith(("_", ".")) for part in Path(file).relative_to(root).parts)


def _names(suffixes: tuple[str, ...]) -> str:
    return ", ".join(suffixes)


def fingerprint(posts: Iterable[Post]) -> str:
    """A short hash of posts: their ids, texts, knowledge, gold and images."""
    digest = hashlib.sha256()
    for post in posts:
        facts = (post.post_id, post.text, post.caption, post.knowledge, post.gold, post.image_uri)
        digest.update(repr(facts).encode())
        digest.update(post.image_bytes or b"")
    return digest.hexdigest()[:16]
