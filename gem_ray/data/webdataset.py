"""WebDataset tars: `key.jpg` + `key.json` and/or `key.txt`, one post a key."""

from __future__ import annotations

import io
import lzma
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import PurePosixPath
from typing import IO, Any

import pyarrow as pa

from gem_ray.data.formats import IMAGE_SUFFIXES, compression_of, is_hidden, looks_like_image
from gem_ray.data.prepare import ERROR_FIELD, IMAGE_ERROR_FIELD, decoded_text, post_from_row, renamed, row_from_post
from gem_ray.records import INPUT_SCHEMA, Status
from gem_ray.strict import load_json

# Every row of `rows_from_tar` has these columns, whatever its JSON holds, so that rows stack into tables.
ROW_SCHEMA = pa.schema([*INPUT_SCHEMA, pa.field(ERROR_FIELD, pa.string()), pa.field(IMAGE_ERROR_FIELD, pa.string())])

_MAX_MEMBER_BYTES = 256 * 2**20
_MAX_TEXT_BYTES = 16 * 2**20  # of JSON too
_MAX_HEADER_BYTES = 2**20  # long names and attributes, which `tarfile` reads whole
_HEAD_BYTES = 32
_NO_TAR = (tarfile.TarError, EOFError, OSError, lzma.LZMAError)
_ROLES = {".json": "JSON", ".txt": "text"}
_IMAGE = "image"


def rows_from_tar(file: IO[bytes], columns: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of `ROW_SCHEMA`, one for each key; the tar is read as a stream.

    The fields of `key.json` are those of an input row. `post_id` is by default the key, `text` the contents of
    `key.txt`; the image member is `image`, whatever its suffix. Of `key.jpg` and `key.mask.png` the first is the image;
    where two members have the same claim, both are named. Other members are skipped. What cannot be understood is named
    in the column `ERROR_FIELD`, for which `post_from_row` rejects the row, or in `IMAGE_ERROR_FIELD`.

    Args:
        file: a binary stream of a tar, compressed or not; it need not be seekable.
        columns: field of an input row -> the name that it has in the JSON.

    Raises:
        ValueError: the tar itself is damaged, or members of one key do not stand together.
    """
    with _opened(file) as tar:
        for key, members in _grouped(tar):
            yield _row(tar, key, members, columns or {})


def count_rows_in_tar(file: IO[bytes], most: int | None = None) -> int:
    """How many rows `rows_from_tar` gives; reads through the file, but looks only at its headers.

    Args:
        file: as for `rows_from_tar`.
        most: stop when so many are found.

    Raises:
        ValueError: as `rows_from_tar`.
    """
    with _opened(file) as tar:
        return sum(1 for _ in islice(_grouped(tar), most))


@dataclass(frozen=True)
class _Member:
    """A member that belongs to a key; `suffixes` is what follows the key, in lower case."""

    key: str
    suffixes: str
    entry: tarfile.TarInfo

    @property
    def role(self) -> str | None:
        """What its name says that it holds; None if it says nothing."""
        last = "." + self.suffixes.rpartition(".")[2]
        return _IMAGE if last in IMAGE_SUFFIXES else _ROLES.get(last)

    @property
    def rank(self) -> int:
        """Members of one role: a known suffix comes first, then a single one."""
        return 2 * (self.role is None) + ("." in self.suffixes)


class _ForwardFile(io.RawIOBase):
    """A stream with the places of a file, for `tarfile`; it only moves on.

    `limit` bounds a single read, in bytes: `tarfile` reads what a header claims to be a long name at once.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._place = 0
        self.limit = _MAX_HEADER_BYTES

    def tell(self) -> int:
        return self._place

    def seek(self, place: int, whence: int = 0) -> int:
        while self._place < place and self.read(min(place - self._place, self.limit)):
            pass
        return self._place

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.limit:
            raise tarfile.ReadError(f"a header claims {size:,} bytes; at most {self.limit:,} are read")
        pieces, left = [], size
        while left and (piece := self._stream.read(left)):
            pieces.append(piece)
            left -= len(piece)
        self._place += size - left
        return b"".join(pieces)


@contextmanager
def _opened(file: IO[bytes]) -> Iterator[tarfile.TarFile]:
    try:
        with _reading_header():
            tar = tarfile.TarFile(fileobj=_ForwardFile(_unpacked(file)))
        with tar:
            yield tar
    except _NO_TAR as error:
        raise ValueError(f"not a tar, or cut off: {error}") from error


def _unpacked(file: IO[bytes]) -> IO[bytes]:
    # `tarfile` knows no zstd, and reads a whole claim when it unpacks by itself.
    buffered = io.BufferedReader(_Raw(file), 2**16)
    match compression_of(buffered.peek(8)):
        case None:
            return buffered
        case "xz":
            return lzma.open(buffered)
        case codec:
            return pa.CompressedInputStream(pa.PythonFile(buffered, "r"), codec)


class _Raw(io.RawIOBase):
    """Any stream with `read`, for `io.BufferedReader`."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _grouped(tar: tarfile.TarFile) -> Iterator[tuple[str, Iterator[_Member]]]:
    seen: set[str] = set()
    for key, members in groupby(_members(tar), key=lambda member: member.key):
        if key in seen:
            raise ValueError(
                f"the members of {key} do not stand together, and would be two posts; pack the tar in the order of "
                "names (`tar --sort=name`)"
            )
        seen.add(key)
        yield key, members


def _members(tar: tarfile.TarFile) -> Iterator[_Member]:
    while (entry := _next(tar)) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # `tarfile` would keep all of them
        path = PurePosixPath(entry.name)
        stem, _, suffixes = path.name.partition(".")
        is_leftover = is_hidden(PurePosixPath(*(part for part in path.parts if not part.startswith("_"))))
        if (entry.isfile() or entry.islnk() or entry.issym()) and stem and suffixes and not is_leftover:
            yield _Member(str(path.with_name(stem)), suffixes.lower(), entry)
    _check_end(tar)


@contextmanager
def _reading_header() -> Iterator[None]:
    try:
        yield
    except _NO_TAR:
        raise
    except Exception as error:  # of what a header claims, `tarfile` raises nearly anything
        raise ValueError(f"one of its headers is damaged: {error}") from error


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    with _reading_header():
        return tar.next()


@dataclass
class _Claim:
    """The best member of a role so far: its content, or why there is none."""

    rank: int
    name: str
    data: bytes | None = None
    error: str | None = None


def _row(tar: tarfile.TarFile, key: str, members: Iterable[_Member], columns: Mapping[str, str]) -> dict[str, Any]:
    claims: dict[str, _Claim] = {}
    for member in members:
        _claim(tar, member, claims)
    row: dict[str, Any] = {"post_id": key}
    described: dict[str, Any] = {}
    errors = [f"{claim.name}: {claim.error}" for role, claim in claims.items() if claim.error and role != _IMAGE]
    try:
        if (claim := claims.get("JSON")) and claim.data is not None:
            described = renamed(_json_object(claim.data), columns)
        if (claim := claims.get("text")) and claim.data is not None:
            row["text"] = decoded_text(claim.data)
    except (ValueError, RecursionError) as error:
        errors.append(f"{claims['JSON'].name}: {error}")
    if image := claims.get(_IMAGE):
        row["image"] = image.data
        row[IMAGE_ERROR_FIELD] = f"{image.name}: {image.error}" if image.error else None
    post = post_from_row(described | row | {name: described[name] for name in ("post_id", "text") if name in described})
    errors += [problem.message for problem in post.problems if problem.status is Status.REJECTED]
    wrong_image = next((problem.message for problem in post.problems if problem.kind.startswith("image_")), None)
    errors_of_image = {IMAGE_ERROR_FIELD: wrong_image}
    return row_from_post(post) | errors_of_image | {ERROR_FIELD: "; ".join(errors) or None}


def _claim(tar: tarfile.TarFile, member: _Member, claims: dict[str, _Claim]) -> None:
    """Let a member be what its role holds, unless a better one is."""
    role = member.role or _IMAGE
    best = claims.get(role)
    if best and best.rank < member.rank:
        return
    try:
        data = _content(tar, member)
    except ValueError as error:
        claim = _Claim(member.rank, member.entry.name, error=str(error))
    else:
        if data is None:
            return
        claim = _Claim(member.rank, member.entry.name, data)
    if best and best.rank == member.rank:
        names = f"{best.name} and {claim.name}"
        claim = _Claim(member.rank, names, error=f"both could be the {role} of {member.key}")
    claims[role] = claim


def _content(tar: tarfile.TarFile, member: _Member) -> bytes | None:
    """What a member holds; None if its name says nothing of it and it is not an image.

    Raises:
        ValueError: it cannot be read.
    """
    entry = member.entry
    if not entry.isfile():
        if member.role is None:
            return None
        raise ValueError(f"is a link to {entry.linkname}, and links are not followed; pack it with `tar --dereference`")
    most = _MAX_TEXT_BYTES if member.role in _ROLES.values() else _MAX_MEMBER_BYTES
    if entry.size > most:
        if member.role is None:
            return None
        raise ValueError(f"has {entry.size:,} bytes; at most {most:,} are read")
    stream: Any = tar.extractfile(entry)
    file: Any = tar.fileobj
    file.limit = _MAX_MEMBER_BYTES
    try:
        head = stream.read(_HEAD_BYTES)
        if member.role is None and not looks_like_image(head):
            return None
        return head + stream.read()
    finally:
        file.limit = _MAX_HEADER_BYTES


def _json_object(data: bytes) -> dict[str, Any]:
    values = load_json(data)
    if not isinstance(values, dict):
        raise ValueError(f"holds a JSON {type(values).__name__}, not an object")
    return {name: value for name, value in values.items() if value is not None}


def _check_end(tar: tarfile.TarFile) -> None:
    # `tarfile` takes a broken header for the end of the archive; behind a real end there are only zeros.
    rest: Any = tar.fileobj
    if rest.tell() == tar.offset:  # no block of zeros was read
        raise ValueError(
            "it ends without its mark of the end: it was cut off, and rows may be missing. If its writer was only not "
            "closed, `truncate -s +1024 FILE` adds the mark"
        )
    while block := rest.read(_MAX_HEADER_BYTES):
        if block.strip(b"\0"):
            raise ValueError("there are data behind its end, or one of its headers is damaged")
