"""What `annotate` will find in an input, before anything is paid for: files, rows, columns, and a sample of posts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import regex

from gem_ray.config import Config
from gem_ray.data.columns import InputColumns
from gem_ray.data.counting import Unreadable, count_shards
from gem_ray.data.fetch import why_never_read
from gem_ray.data.images import ImageError, decode_image
from gem_ray.data.listing import Listing, find_shards
from gem_ray.data.parquet import Columns, Counted
from gem_ray.data.prepare import Preparer, post_from_row
from gem_ray.data.shards import shard_rows
from gem_ray.records import Post, Status

_SAMPLED_FILES = 10
_READ_CHARACTERS = 10_000
_SCRIPTS = ("Latin", "Cyrillic", "Arabic", "Han", "Hiragana", "Katakana", "Hangul", "Devanagari", "Greek", "Hebrew",
            "Thai", "Bengali", "Tamil")  # fmt: skip


@dataclass
class InputSample:
    """What some posts of the input are like.

    Attributes:
        posts: how many were read.
        rejected: reasons for which posts cannot be annotated, with their numbers.
        images: where images come from (`in the file`, `s3://`, `path`, … or `none`), with the numbers of posts.
        unusable: reasons for which images that are in the file cannot be decoded, and other ones are not fetched, with
            their numbers.
        repeated: ids, texts and images that more than one post has, as numbers of further posts.
        scripts: the writing system of most letters, with the numbers of posts.
    """

    posts: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)
    unusable: Counter[str] = field(default_factory=Counter)
    repeated: Counter[str] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `asdict` of Python 3.11 would count the pairs of a Counter."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}


@dataclass(frozen=True)
class InputCheck:
    """What an input holds.

    Attributes:
        input: as the user named it.
        files: how many can be read.
        rows: in these.
        columns: as `InputColumns.read`.
        unread_columns: as `InputColumns.unread`.
        refused: why `annotate` refuses the input; empty if it does not.
        skipped: damaged files that `annotate --skip-bad-files` skips, and why.
        remarks: sentences on other files and columns that are not read.
        sample: of its posts; None if the input is refused.
    """

    input: str
    files: int
    rows: int
    columns: dict[str, str]
    unread_columns: list[str]
    refused: list[str]
    skipped: list[str]
    remarks: list[str]
    sample: InputSample | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return vars(self) | {"sample": self.sample and self.sample.to_dict()}


def check_input(
    path: str | Path,
    config: Config,
    columns: Columns | None = None,
    sample: int = 200,
    skip_bad_files: bool = False,
) -> InputCheck:
    """Look at an input as `annotate` will; no model is loaded and no image is fetched.

    Every file is opened: a Parquet file for its footer, a tar to its end.

    Args:
        path: what `annotate` takes.
        config: limits of texts and images.
        columns: field of an input row -> the name that it has in the files.
        sample: how many posts to look at, from files that are spread over the input.
        skip_bad_files: as for `annotate_dataset`.
    """
    try:
        listing = find_shards(path)
    except (OSError, ValueError) as error:
        return InputCheck(str(path), 0, 0, {}, [], [str(error)], [], [], None)
    columns = columns or {}
    found = InputColumns(columns)
    counts = list(found.noting(listing.paths, count_shards(listing.filesystem, listing.paths, columns)))
    bad = [count for count in counts if isinstance(count, Unreadable)]
    refused = [each.reason for each in bad if not (skip_bad_files and each.is_damaged)]
    skipped = [each.reason for each in bad if skip_bad_files and each.is_damaged]
    rows = sum(count.rows for count in counts if isinstance(count, Counted))
    if not refused and not rows:
        refused = [f"the input holds no posts: {path}"]
    good = [shard for shard, count in zip(listing.shards, counts, strict=True) if isinstance(count, Counted)]
    remarks = [*listing.remarks(), *found.remarks()]
    posts = None if refused else _sample(replace(listing, shards=good), columns, config, sample)
    return InputCheck(str(path), len(good), rows, found.read, found.unread, refused, skipped, remarks, posts)


def _sample(listing: Listing, columns: Columns, config: Config, size: int) -> InputSample:
    found, prepare = InputSample(), Preparer.from_config(config)
    seen: dict[str, set[str]] = {"post_id": set(), "text": set(), "image": set()}
    for post in islice(spread_posts(listing, columns, size), size):
        found.posts += 1
        found.scripts[_script(post.text[:_READ_CHARACTERS])] += 1
        found.images[_source(post)] += 1
        for what, value in _identities(post):
            found.repeated[what] += value in seen[what]
            seen[what].add(value)
        if post.image_bytes is not None:
            try:
                decode_image(post.image_bytes, config.image)
            except ImageError as error:
                found.unusable[str(error)] += 1
        elif post.image_uri is not None and (reason := why_never_read(post.image_uri, config.image)):
            found.unusable[reason] += 1
        prepare([post])
        if post.is_rejected:
            found.rejected[next(each.message for each in post.problems if each.status is Status.REJECTED)] += 1
    return found


def spread_posts(listing: Listing, columns: Columns, size: int) -> Iterator[Post]:
    """About so many posts, from the beginnings of files that are spread over the input."""
    files = np.unique(np.linspace(0, len(listing.paths) - 1, _SAMPLED_FILES).astype(int))
    of_each = -(-size // len(files))
    for number in files:
        rows = shard_rows(listing.filesystem, listing.paths[number], columns=columns)
        yield from (post_from_row(row) for _, row in islice(rows, of_each))


def _identities(post: Post) -> Sequence[tuple[str, str]]:
    values = [("post_id", post.post_id), ("text", post.text)]
    if post.image_bytes:
        values.append(("image", hashlib.sha256(post.image_bytes).hexdigest()))
    elif post.image_uri:
        values.append(("image", post.image_uri))
    return [(what, value) for what, value in values if value]


def _source(post: Post) -> str:
    if post.image_bytes is not None:
        return "in the file"
    if post.image_uri is None:
        return "none"
    scheme, separator, _ = post.image_uri.partition("://")
    return f"{scheme.lower()}://" if separator else "path"


def _script(text: str) -> str:
    """The writing system that most letters belong to: a rough sign of the language."""
    letters = Counter({script: len(regex.findall(rf"\p{{{script}}}", text)) for script in _SCRIPTS})
    script, count = letters.most_common(1)[0]
    return script if count else "no letters"
