import multiprocessing
import os

import pytest

from gem_ray.knowledge.cache import AnswerCache


def _entries(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_text_is_found_again_by_another_instance(tmp_path):
    AnswerCache(tmp_path / "new").put("line\n“é” \x00", "text", None, "model")
    assert AnswerCache(tmp_path / "new").get("text", None, "model") == "line\n“é” \x00"


def test_an_empty_text_is_kept_and_is_not_a_miss(tmp_path):
    cache = AnswerCache(tmp_path)
    assert cache.get("text") is None
    cache.put("", "text")
    assert cache.get("text") == ""


def test_every_part_of_the_key_counts(tmp_path):
    cache = AnswerCache(tmp_path)
    keys = [("a", "b", "c"), ("a", "b", "d"), ("ab", "", "c"), ("a", None, "bc"), ("a", "None", "bc"), ("a", "", "bc")]
    for number, key in enumerate(keys):
        cache.put(str(number), *key)
    assert [cache.get(*key) for key in keys] == [str(number) for number in range(len(keys))]


@pytest.mark.parametrize("damage", [b"", b'{"key": ["te', b"\x00" * 64, b"\xff\xfe", b"[]", b'{"value": 3}'])
def test_a_file_that_a_crash_left_damaged_is_a_miss_and_is_mended(tmp_path, damage):
    cache = AnswerCache(tmp_path)
    cache.put("first", "text")
    (path,) = _entries(tmp_path)
    path.write_bytes(damage)
    assert cache.get("text") is None
    cache.put("second", "text")
    assert cache.get("text") == "second"


def test_a_crash_before_the_rename_leaves_the_old_text(tmp_path, monkeypatch):
    cache = AnswerCache(tmp_path)
    cache.put("old", "text")

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.put("new", "text")
    assert cache.get("text") == "old"


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    cache = AnswerCache(blocked)
    cache.put("value", "text")
    assert "could not be kept" in caplog.text
    assert cache.get("text") is None


def _write_and_read(folder, worker):
    cache = AnswerCache(folder)
    for number in range(200):
        key = f"key {number % 10}"
        cache.put(f"{key} " * 500, key)  # large enough to be torn, were it not renamed into place
        seen = cache.get(key)
        assert seen == f"{key} " * 500, f"worker {worker} read a torn text"


def test_processes_that_write_at_once_never_see_a_torn_text(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write_and_read, args=(tmp_path, worker)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(_entries(tmp_path)) == 10  # and nothing half-written stays behind
