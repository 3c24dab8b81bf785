"""Posts out of the files that people have: JSONL, CSV, folders of images, WebDataset; `write_posts` makes shards."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gem_ray.config import ImageConfig
from gem_ray.data.fetch import ImageError, read_local
from gem_ray.data.formats import IMAGE_SUFFIXES
from gem_ray.data.prepare import ERROR_FIELD, post_from_row
from gem_ray.data.shards import read_posts
from gem_ray.records import Post


def from_jsonl(file: Path, embed_images: bool = True) -> Iterator[Post]:
    """One post a line: an object with the fields of an input row, `image` or `image_uri` holding a path or URI.

    A line that is wrong becomes a post that is rejected, with what could be read of it; a post without an id that can
    be used is named after its line.

    Args:
        file: UTF-8 text.
        embed_images: put the bytes of images below the file's folder into the posts.
    """
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        posts = (_post(_json_row(line), file, number) for number, line in enumerate(lines, start=1) if line.strip())
        yield from embedded(posts, file.parent) if embed_images else posts


def from_csv(file: Path, embed_images: bool = True) -> Iterator[Post]:
    """One post a record under a header with the names of an input row's columns; `tokens` are separated by spaces.

    An empty cell is a missing value. Wrong records and images are treated as by `from_jsonl`.
    """
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        reader = csv.DictReader(text)
        posts = (_post(row, file, reader.line_num) for row in _csv_rows(reader))
        yield from embedded(posts, file.parent) if embed_images else posts


def from_folder(folder: Path) -> Iterator[Post]:
    """One post for each image in a folder and below and each `.txt` beside it; both have the same name.

    The id is the path in the folder without its suffix; of several images with the same name, the first has it, and the
    others, with the same text, their paths as they are.
    """
    images: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        name = relative.with_suffix("").as_posix()
        if path.suffix.lower() in IMAGE_SUFFIXES:
            images.setdefault(name, []).append(relative.as_posix())
        elif path.suffix.lower() == ".txt":
            texts[name] = path.read_text(encoding="utf-8", errors="surrogateescape").strip()
    posts = (
        post_from_row({"post_id": uri if number else name, "text": texts.get(name), "image_uri": uri})
        for name in sorted(images.keys() | texts.keys())
        for number, uri in enumerate(images.get(name, [None]))
    )
    return embedded(posts, folder)


def from_webdataset(path: str | Path) -> Iterator[Post]:
    """One post for each key of a tar, or of every tar in a folder; see `webdataset.rows_from_tar`."""
    return read_posts(path)


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


def _json_row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {ERROR_FIELD: f"the line is not valid JSON: {error}"}
    return row if isinstance(row, dict) else {ERROR_FIELD: f"the line is a JSON {type(row).__name__}, not an object"}


def _csv_rows(reader: csv.DictReader[str]) -> Iterator[dict[str, Any]]:
    while True:
        try:
            row: dict[Any, Any] = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield {ERROR_FIELD: f"the record is not valid CSV: {error}"}
            continue
        values = {name: cell for name, cell in row.items() if cell}
        if None in values:  # where `DictReader` puts cells without a header
            values = {ERROR_FIELD: "the record has more cells than the header", **values}
        if "tokens" in values:
            values["tokens"] = values["tokens"].split()
        yield values


def _post(row: Mapping[str, Any], file: Path, line: int) -> Post:
    values = dict(row)
    if isinstance(values.get("image"), str):
        values["image_uri"] = values.pop("image")
    post = post_from_row(values)
    post.post_id = post.post_id or f"{file.name}:{line}"
    return post
