"""Where the images of posts are, for tools that look for them in files or at addresses."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pyarrow import fs

from gem_ray.config import ImageConfig
from gem_ray.data.files import whole_file
from gem_ray.data.images import ImageError, image_suffix

IMAGES = "images"  # the folder of image files beside an export


class ImageReferences:
    """Post id -> where its image is: its `image_uri`, or the path of a file relative to a folder.

    They are kept in a temporary file, so that memory does not grow with the posts.

    Args:
        images: post id, and the encoded image or its URI. URIs are passed on and never followed. Encoded images become
            files, named by their content: nothing in a post decides about a path. Those of no known format are
            left out.
        folder: gets the files, in its folder `images`.
    """

    def __init__(self, images: Iterable[tuple[str, bytes | str]], folder: Path):
        self._table = sqlite3.connect("")  # a private file, which is gone with the connection
        self._table.execute("CREATE TABLE found (post_id TEXT PRIMARY KEY, reference TEXT) WITHOUT ROWID")
        for post_id, image in images:
            with suppress(ImageError, UnicodeEncodeError):  # a file's name may be no text, and then no post's id
                self._add(post_id, image if isinstance(image, str) else _save(image, folder))

    def find(self, post_id: str) -> str | None:
        """Where the post's image is; None without one, or where posts of the same id have several."""
        row = self._table.execute("SELECT reference FROM found WHERE post_id = ?", (post_id,)).fetchone()
        return row[0] if row else None

    def _add(self, post_id: str, reference: str) -> None:
        self._table.execute(
            "INSERT INTO found VALUES (?, ?) ON CONFLICT DO UPDATE SET reference = NULL"
            " WHERE reference IS NOT excluded.reference",
            (post_id, reference),
        )


def _save(data: bytes, folder: Path) -> str:
    name = hashlib.sha256(data).hexdigest()[:32] + image_suffix(data, ImageConfig())
    file = folder / IMAGES / name
    if not file.exists():
        with whole_file(fs.LocalFileSystem(), str(file.absolute())) as partial:
            Path(partial).write_bytes(data)
    return f"{IMAGES}/{name}"
