"""The folder of a run: `annotations/status=…/`, and `run.json`, which is written last."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pyarrow import fs

from gem_ray.data.files import open_filesystem

_ANNOTATIONS = "annotations"
_SUMMARY = "run.json"


class RunDirectory:
    """Where a run writes. A new result is built aside and takes the old one's place only when it is complete.

    Attributes:
        filesystem: what the folder is on.
        root: the folder's path on it.
    """

    def __init__(self, output: str) -> None:
        self.output = output
        self.filesystem, self.root = open_filesystem(output)

    @property
    def staging(self) -> str:
        """Where a run that is not complete writes its annotations."""
        return f"{self.root}/{_ANNOTATIONS}.partial"

    @property
    def annotations(self) -> str:
        """Where a complete run's annotations are."""
        return f"{self.root}/{_ANNOTATIONS}"

    def check(self, fresh: bool) -> None:
        """Refuse to touch what is there.

        Raises:
            FileExistsError: there are annotations, and `fresh` does not allow to replace them.
            NotADirectoryError: the output is a file.
        """
        if self.filesystem.get_file_info(self.root).type is fs.FileType.File:
            raise NotADirectoryError(f"{self.output} is a file; the output must be a folder")
        if self._exists(self.annotations) and not fresh:
            raise FileExistsError(
                f"{self.output} already holds annotations; choose another output, or pass --fresh to replace them"
            )

    def begin(self) -> None:
        """Clear what an interrupted run left."""
        self._delete(self.staging)
        self.filesystem.create_dir(self.staging, recursive=True)

    def publish(self, summary: Mapping[str, Any]) -> None:
        """Put the finished annotations in their place, then write the summary."""
        old = f"{self.annotations}.old"
        self._delete(old)
        if self._exists(self.annotations):
            self._move(self.annotations, old)
        self._move(self.staging, self.annotations)
        with self.filesystem.open_output_stream(f"{self.root}/{_SUMMARY}") as stream:
            stream.write((json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode())
        self._delete(old)

    def _exists(self, path: str) -> bool:
        return self.filesystem.get_file_info(path).type is not fs.FileType.NotFound

    def _delete(self, path: str) -> None:
        if self._exists(path):
            self.filesystem.delete_dir(path)

    def _move(self, source: str, target: str) -> None:
        if isinstance(self.filesystem, fs.LocalFileSystem):
            self.filesystem.move(source, target)
            return
        # An object store has no folders to rename.
        fs.copy_files(source, target, source_filesystem=self.filesystem, destination_filesystem=self.filesystem)
        self.filesystem.delete_dir(source)
