"""Files that appear whole: readers find the old content or the new one, whoever else writes, and nothing is left."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from gem_ray.atomic import atomic_file, name_of_partial


@pytest.mark.parametrize("synced", [False, True])
def test_file_appears_when_the_block_ends_well(tmp_path: Path, synced: bool) -> None:
    file = tmp_path / "folder" / "a.json"
    for content in ("old", "new"):
        with atomic_file(file, synced=synced) as partial:
            partial.write_text(content)
            assert name_of_partial(partial.name) == "a.json"
            assert (file.read_text() if file.exists() else None) == (None if content == "old" else "old")
        assert file.read_text() == content
    assert list(file.parent.iterdir()) == [file]


def test_block_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("old")
    with pytest.raises(RuntimeError):
        write_half(file)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def write_half(file: Path) -> None:
    with atomic_file(file) as partial:
        partial.write_text("half")
        raise RuntimeError


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_without_place_is_said_of_the_file_and_not_of_its_private_name(tmp_path: Path, code: int) -> None:
    for names_the_file in (False, True):
        with pytest.raises(OSError, match=rf"^{tmp_path}/a cannot be written: {os.strerror(code)}$"):
            write_without_place(tmp_path / "a", code, names_the_file)
    assert not list(tmp_path.iterdir())


def write_without_place(file: Path, code: int, names_the_file: bool) -> None:
    with atomic_file(file) as partial:
        partial.touch()
        raise OSError(code, os.strerror(code), *([str(partial)] if names_the_file else []))


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """The one that ends last wins, whole; neither takes the other's half for its own."""
    file = tmp_path / "a"
    with atomic_file(file) as first:
        first.write_text("fir")
        with atomic_file(file) as second:
            second.write_text("second")
        assert file.read_text() == "second"
        first.write_text("first")
    assert file.read_text() == "first"
