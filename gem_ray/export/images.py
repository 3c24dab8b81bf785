"""Where the images of posts are, for tools that look for them in files or at addresses."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from gem_ray.atomic import atomic_file
from gem_ray.config import ImageConfig
from gem_ray.data.images import ImageError, image_suffix
from gem_ray.records import Post

IMAGES = "images"  # the folder of image files beside an export


class ImageReferences:
    """Post -> where its image is: its `image_uri`, or the path of a file relative to a folder.

    They are kept in a temporary file, so that memory does not grow with the posts.

    Args:
        images: post id, row id if there is one, and the encoded image or its URI. URIs are passed on and never
            followed. Encoded images become files, named by their content: nothing in a post decides about a path.
            Those of no known format are left out.
        folder: gets the files, in its folder `images`.
    """

    def __init__(self, images: Iterable[tuple[str, int | None, bytes | str]], folder: Path):
        self._table = sqlite3.connect("")  # a private file, which is gone with the connection
        self._table.execute("CREATE TABLE found (post_id TEXT, row_id INTEGER, reference TEXT)")
        for post_id, row_id, image in images:
            with suppress(ImageError, UnicodeEncodeError):  # a file's name may be no text, and then no post's id
                reference = image if isinstance(image, str) else _save(image, folder)
                self._table.execute("INSERT INTO found VALUES (?, ?, ?)", (post_id, row_id, reference))
        self._table.execute("CREATE INDEX by_post ON found (post_id)")

    def find(self, post: Post) -> str | None:
        """Where the post's image is; None without one, or where several are of its id and none is of its row."""
        rows = self._table.execute("SELECT row_id, reference FROM found WHERE post_id = ?", (post.post_id,)).fetchall()
        own = {reference for row_id, reference in rows if row_id is not None and row_id == post.row_id}
        found = own or {reference for _, reference in rows}
        return found.pop() if len(found) == 1 else None


def _save(data: bytes, folder: Path) -> str:
    name = hashlib.sha256(data).hexdigest()[:32] + image_suffix(data, ImageConfig())
    file = folder / IMAGES / name
    if not file.exists():
        with atomic_file(file) as partial:
            partial.write_bytes(data)
    return f"{IMAGES}/{name}"
