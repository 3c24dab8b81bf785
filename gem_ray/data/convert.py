"""Posts out of the files that people have: JSONL, CSV, folders of images, WebDataset; `write_posts` makes shards."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import lzma
import os
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, TextIO

import pyarrow as pa

from gem_ray.config import ImageConfig
from gem_ray.data.fetch import ImageError, read_local
from gem_ray.data.formats import IMAGE_SUFFIXES, compression_of, is_hidden, looks_like_image
from gem_ray.data.parquet import Columns
from gem_ray.data.prepare import ERROR_FIELD, decoded_text, post_from_row, renamed
from gem_ray.plurals import counted
from gem_ray.records import INPUT_SCHEMA, Post
from gem_ray.strict import load_json

_MAX_CELL_CHARACTERS = 2**31 - 1  # texts have their own limit; below the module's, records are cut in pieces
_SEPARATORS = ",;\t|"
CSV_MARKS = _SEPARATORS + '"\r\n '  # no characters to escape others with
_HEAD_BYTES = 64
_UNPACKERS: dict[str | None, Callable[[IO[bytes]], Any]] = {
    None: lambda stream: stream,
    "gzip": gzip.open,
    "bz2": bz2.open,
    "xz": lzma.open,
    "zstd": lambda stream: pa.CompressedInputStream(pa.PythonFile(stream, "r"), "zstd"),
}
_MARK = "\ufeff"  # of byte order; in the middle of a file, where files were joined
# In place of a carriage return in a cell, at which `csv` would end the record; no decoder gives this character.
_RETURN = "\udc0d"


def from_jsonl(file: Path, embed_images: bool = True, columns: Columns | None = None) -> Iterator[Post]:
    """One post a line: an object with the fields of an input row, `image` or `image_uri` holding a path or URI.

    A line that is wrong becomes a post that is rejected, with what could be read of it; a post without an id that can
    be used is named after its line. A file that is one JSON array of objects is read as its items.

    Args:
        file: UTF-8 text, or UTF-16 with a byte order mark; also compressed.
        embed_images: put the bytes of images below the file's folder into the posts.
        columns: field of an input row -> the name that it has in the file.

    Raises:
        ValueError: the file is not text, begins as an array and is not one, or has objects over several lines.
    """
    with _text(file) as lines:
        posts = (_post(renamed(row, columns or {}), file, number) for number, row in _json_rows(lines, file))
        yield from embedded(posts, file.parent) if embed_images else posts


def from_csv(
    file: Path,
    embed_images: bool = True,
    columns: Columns | None = None,
    has_quotes: bool = True,
    escape: str | None = None,
) -> Iterator[Post]:
    """One post a record under a header with the names of an input row's columns; `tokens` are separated by spaces.

    Columns are separated by what makes the header one of posts: `,`, `;`, tab or `|`. An empty cell is a missing value.
    Wrong records and images are treated as by `from_jsonl`.

    Args:
        file, embed_images, columns: as for `from_jsonl`.
        has_quotes: `"` encloses cells; otherwise it is a character as any other.
        escape: a character, as pandas' `escapechar`, that stands before others which have no meaning then.

    Raises:
        ValueError: the header has no `post_id`, or neither `text` nor `tokens`, or a name twice; or a quote is out of
            its place, so that nobody can tell where records end.
    """
    with _text(file, newline="") as text:
        posts = (_post(row, file, line) for line, row in _csv_rows(text, file, columns or {}, has_quotes, escape))
        yield from embedded(posts, file.parent) if embed_images else posts


def from_folder(folder: Path, left_out: list[str] | None = None) -> Iterator[Post]:
    """One post for each image in a folder and below, with the `.txt` beside it, and for each `.txt` without an image.

    The text of `a.jpg` is in `a.txt` or `a.jpg.txt`. The id is the path in the folder without its suffix; of several
    images with the same name, the first has it, and the others, with the same text, their paths as they are. An image
    is one by its suffix or its first bytes.

    Args:
        folder: links in it that lead out of it are not followed, nor links to folders.
        left_out: gets the paths of the files that are neither text nor image; hidden ones and links to folders too.

    Raises:
        OSError: a folder cannot be listed.
    """
    images: dict[str, list[str]] = {}
    texts: dict[str, list[Path]] = {}
    for path in _entries(folder):
        relative = path.relative_to(folder)
        name = _composed(relative.with_suffix("").as_posix())
        if path.is_dir() or is_hidden(PurePosixPath(*(part for part in relative.parts if not part.startswith("_")))):
            _note(left_out, relative)
        elif path.suffix.lower() == ".txt":
            texts.setdefault(name, []).append(path)
        elif path.suffix.lower() in IMAGE_SUFFIXES or _is_image(path, folder):
            images.setdefault(name, []).append(relative.as_posix())
        else:
            _note(left_out, relative)
    files = {_composed(uri) for uris in images.values() for uri in uris}
    posts = (
        post_from_row({"post_id": uri if number else name, "image_uri": uri, **_text_of(name, uri, texts, folder)})
        for name in sorted(images.keys() | (texts.keys() - files))
        for number, uri in enumerate(images.get(name, [None]))
    )
    return embedded(posts, folder)


def _composed(name: str) -> str:
    """A file's name with its accents in the letters; macOS writes them apart."""
    return unicodedata.normalize("NFC", name)


def _entries(folder: Path) -> list[Path]:
    """Files in a folder and below, and links to folders; `rglob` would pass over folders that it may not list."""

    def give_up(error: OSError) -> None:
        raise error

    return sorted(
        Path(parent, name)
        for parent, folders, files in os.walk(folder, onerror=give_up)
        for name in [*files, *(name for name in folders if Path(parent, name).is_symlink())]
    )


def embedded(posts: Iterable[Post], folder: Path, config: ImageConfig | None = None) -> Iterator[Post]:
    """The posts with the bytes of the images whose paths lie in a folder, in place of the paths.

    Other URIs, and paths that cannot be read, stay as they are: annotation will say what is wrong with them.

    Args:
        posts: with `image_uri` relative to `folder`.
        folder: where the paths are confined to.
        config: limits of the images; by default those of the default configuration.
    """
    config = (config or ImageConfig()).model_copy(update={"root": folder})
    for post in posts:
        if post.image_uri is None or post.image_bytes is not None:
            yield post
            continue
        try:
            yield replace(post, image_bytes=read_local(post.image_uri, config), image_uri=None)
        except ImageError:
            yield post


@contextmanager
def _text(file: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A file's text, unpacked if it is compressed, without a byte order mark.

    The file is opened once: what a pipe has given it does not give again.

    Raises:
        ValueError: the file is binary, or damaged.
    """
    try:
        with file.open("rb") as packed:
            binary = io.BufferedReader(_UNPACKERS[compression_of(packed.peek(_HEAD_BYTES))](packed))
            head = binary.peek(_HEAD_BYTES)[:_HEAD_BYTES]
            is_utf16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            if head.startswith(b"PK\3\4"):
                raise ValueError(f"{file} is a ZIP archive; unpack it, and give what is in it")
            if b"\0" in head and not is_utf16:
                raise ValueError(f"{file} is not a text file: its first {len(head)} bytes hold zeros")
            encoding, errors = ("utf-16", "strict") if is_utf16 else ("utf-8-sig", "surrogateescape")
            yield io.TextIOWrapper(binary, encoding, errors, newline=newline)
    except (UnicodeDecodeError, OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def _json_rows(lines: TextIO, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with the numbers of their lines, or of their places in the array."""
    is_first = True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if is_first and _begins_array(line):
            yield from _array_rows(line + lines.read(), file)
            return
        if is_first and line.strip() == "{":
            raise ValueError(f"{file} has objects over several lines; write one object a line (`jq -c .` does)")
        is_first = False
        yield number, _json_row(line)


def _begins_array(line: str) -> bool:
    """Whether a file's first line opens an array of objects, or of nothing yet."""
    begin = line.strip()
    return begin.startswith("[") and begin[1:].lstrip()[:1] in ("", "{", "]")


def _array_rows(text: str, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        items = load_json(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} begins as a JSON array, but is not one: {error}") from None
    return ((number, _object(item)) for number, item in enumerate(items, start=1))


def _json_row(line: str) -> dict[str, Any]:
    try:
        return _object(load_json(line.removeprefix(_MARK)), "the line")
    except (ValueError, RecursionError) as error:
        return {ERROR_FIELD: f"the line is not valid JSON: {error}"}


def _object(value: Any, what: str = "the item") -> dict[str, Any]:
    return (
        value if isinstance(value, dict) else {ERROR_FIELD: f"{what} is a JSON {type(value).__name__}, not an object"}
    )


def _csv_rows(
    text: TextIO, file: Path, columns: Columns, has_quotes: bool, escape: str | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Records with the numbers of their last lines."""
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    lines = _Quotes(_lines(text), escape)
    header, separator = _header(next(lines, ""), file, columns)
    lines.taken()
    quoting: Any = csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE
    reader = csv.reader(lines, delimiter=separator, strict=has_quotes, quoting=quoting, escapechar=escape)
    begin = 2
    while True:
        try:
            cells = next(reader)
            if has_quotes and lines.taken() % 2:
                raise csv.Error("it has an odd number of quotes")
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{file}: the record that begins in line {begin} is not valid CSV ({error}). Is a quote open there, or "
                'not doubled inside a cell (`""`)? Nothing after it can be told apart. Spark doubles them with the '
                'option escape=\'"\', R with qmethod="double"; what pandas wrote with escapechar="\\" is read with '
                "--escape '\\'. --no-quotes takes quotes for characters"
            ) from None
        if cells:
            is_header = _names(cells) == header
            row = {ERROR_FIELD: "it is the header again"} if is_header else _record(header, cells, columns)
            yield reader.line_num + 1, row
        begin = reader.line_num + 2


def _lines(text: TextIO) -> Iterator[str]:
    """A file's lines, which end as the first does: with a line feed, or where that has none, a carriage return.

    pandas and others write a carriage return in a cell without quotes where lines end with a line feed.
    """
    first = text.readline()
    yield first
    begin = ""
    for line in text:
        if line.endswith("\r") and not first.endswith("\r"):
            begin += line[:-1] + _RETURN
        else:
            yield begin + line
            begin = ""
    if begin:
        yield begin.removesuffix(_RETURN)


class _Quotes:
    """Lines, with a count of the quotes in them: an odd one in a record means that one is out of its place.

    Those behind the character `escape` are not counted.
    """

    def __init__(self, lines: Iterable[str], escape: str | None) -> None:
        self._lines = iter(lines)
        self._escaped = escape and re.compile(re.escape(escape) + ".", re.DOTALL)
        self._quotes = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._quotes += (self._escaped.sub("", line) if self._escaped else line).count('"')
        return line

    def taken(self) -> int:
        """The quotes since this was asked last."""
        quotes, self._quotes = self._quotes, 0
        return quotes


def _header(line: str, file: Path, columns: Columns) -> tuple[list[str], str]:
    """The names in a header, and what separates them."""
    for separator in _SEPARATORS:
        try:
            cells = next(csv.reader([line], delimiter=separator, strict=True), [])
        except csv.Error:
            continue
        names = _names(cells)
        fields = renamed(dict.fromkeys(names), columns)
        if "post_id" not in fields or not {"text", "tokens"} & fields.keys():
            continue
        read = {columns.get(field, field) for field in INPUT_SCHEMA.names}
        twice = sorted({name for name in names if name in read and names.count(name) > 1})
        if twice:
            raise ValueError(f"{file}: column {', '.join(twice)} stands twice in the header")
        return names, separator
    raise ValueError(
        f"{file} holds no posts: its header needs post_id and text (or tokens), separated by `,`, `;`, a tab or `|`; "
        f"it is {line.strip()[:200]!r}. `--map text=COLUMN,post_id=COLUMN` takes other names"
    )


def _names(cells: list[str]) -> list[str]:
    return [cell.removeprefix(_MARK).strip() for cell in cells]


def _record(header: list[str], cells: list[str], columns: Columns) -> dict[str, Any]:
    named = {name: cell.replace(_RETURN, "\r") for name, cell in zip(header, cells, strict=False) if cell}
    values = renamed(named, columns)
    if len(cells) > len(header) or any(header[len(cells) :]):
        return {ERROR_FIELD: f"the record has {counted(len(cells), 'cell')}, and the header {len(header)}", **values}
    if values.get("tokens", "").startswith(("['", '["')):
        return {ERROR_FIELD: "tokens are separated by spaces, and these are a written list", **values, "tokens": None}
    if "tokens" in values:
        values["tokens"] = values["tokens"].split()
    return values


def _post(row: Mapping[str, Any], file: Path, line: int) -> Post:
    values = dict(row)
    if isinstance(values.get("image"), str):
        values["image_uri"] = values.pop("image") or values.get("image_uri")
    post = post_from_row(values)
    post.post_id = post.post_id or f"{file.name}:{line}"
    return post


def _text_of(name: str, uri: str | None, texts: Mapping[str, list[Path]], folder: Path) -> dict[str, Any]:
    """The text of a post, among all by their names without `.txt`: that of its name, or of its image's file."""
    names = dict.fromkeys([name, _composed(uri or name)])
    files = [file for each in names for file in texts.get(each, [])]
    if len(files) > 1:
        return {ERROR_FIELD: f"both could be the text: {', '.join(file.name for file in files)}"}
    if not files:
        return {}
    [file] = files
    if not file.resolve().is_relative_to(folder.resolve()):
        return {ERROR_FIELD: f"{file.name} is a link that leads out of the folder"}
    if file.exists() and not file.is_file():
        return {ERROR_FIELD: f"{file.name} is a pipe, socket or device"}
    try:
        return {"text": decoded_text(file.read_bytes())}
    except OSError as error:
        return {ERROR_FIELD: f"{file.name} cannot be read: {error.strerror}"}


def _is_image(path: Path, folder: Path) -> bool:
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        return False
    with path.open("rb") as stream:
        return looks_like_image(stream.read(_HEAD_BYTES))


def _note(left_out: list[str] | None, path: Path) -> None:
    if left_out is not None:
        left_out.append(path.as_posix())
