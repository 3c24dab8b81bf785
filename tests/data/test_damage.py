"""A storage that fails once damages nothing; bytes that are wrong are damage, whatever Arrow raises of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gem_ray.data.counting import Unreadable, count_shards
from gem_ray.data.damage import DamagedError, parsed
from gem_ray.data.parquet import count_parquet_rows, parquet_rows
from gem_ray.data.prepare import ERROR_FIELD


class FailingOnce(io.BytesIO):
    """A file of which one read fails, the first time that it is made."""

    def __init__(self, content: bytes, fails_at: int) -> None:
        super().__init__(content)
        self.reads, self._fails_at = 0, fails_at

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        if self.reads == self._fails_at:
            raise OSError("AWS Error NETWORK_CONNECTION")
        return super().read(size)


class Flaky:
    """A file system on which one call fails; the others give the same content."""

    def __init__(self, content: bytes, fails_at: int) -> None:
        self._content, self._fails_at, self.opened = content, fails_at, 0

    def open_input_file(self, path: str) -> pa.NativeFile:
        self.opened += 1
        if self.opened == self._fails_at:
            raise OSError("AWS Error SLOW_DOWN (503)")
        return pa.BufferReader(self._content)

    def open_input_stream(self, path: str, **_: Any) -> pa.NativeFile:
        return self.open_input_file(path)


@pytest.fixture(scope="module")
def content() -> bytes:
    rows = [f"{n:05d}" for n in range(3000)]
    stream = io.BytesIO()
    table = pa.table({"post_id": rows, "text": [f"text {row}" * 9 for row in rows]})
    pq.write_table(table, stream, compression="none", use_dictionary=False, data_page_size=8192, row_group_size=1500)
    return stream.getvalue()


def rows_of(file: FailingOnce) -> list[tuple[int, dict[str, Any]]]:
    return list(parquet_rows(pa.PythonFile(file, mode="r"), None, {}))


def test_a_read_that_fails_once_makes_no_row_wrong(content: bytes) -> None:
    undisturbed = FailingOnce(content, 0)
    expected = rows_of(undisturbed)
    ends = []
    for fails_at in range(1, undisturbed.reads + 1):
        with suppress(OSError):  # then the file is read again as a whole
            ends.append(rows_of(FailingOnce(content, fails_at)) == expected)
    assert ends
    assert all(ends)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_file_that_opens_at_the_second_attempt_is_not_damaged(content: bytes, fails_at: int) -> None:
    [count] = count_shards(Flaky(content, fails_at), ["a.parquet"], {})
    assert getattr(count, "rows", None) == 3000 or (isinstance(count, Unreadable) and not count.is_damaged)


@pytest.mark.parametrize(
    "error", [OSError("Couldn't deserialize thrift"), pa.ArrowInvalid("x"), UnicodeDecodeError("utf-8", b"", 0, 1, "x")]
)
def test_what_fails_twice_though_its_bytes_are_there_is_damaged(content: bytes, error: Exception) -> None:
    def failing(times: int) -> Callable[[], int]:
        left = [error] * times

        def parse() -> int:
            if left:
                raise left.pop()
            return 7

        return parse

    assert parsed(Flaky(content, 0), "a", failing(1)) == 7
    with pytest.raises(DamagedError):
        parsed(Flaky(content, 0), "a", failing(2))
    with pytest.raises(OSError, match="SLOW_DOWN"):
        parsed(Flaky(content, 1), "a", failing(2))


def test_with_any_bit_wrong_a_file_is_refused_or_has_every_row_once() -> None:
    """Pages that end early are rows that cannot be read, and no footer ends the process."""
    stream = io.BytesIO()
    table = pa.table({"post_id": ["1", "2", "3"], "text": ["a", None, "c"]})
    pq.write_table(table, stream, compression="none", use_dictionary=False, row_group_size=2)
    content = stream.getvalue()
    refused, early = 0, 0
    for place in range(4, len(content) - 8):
        damaged = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        try:
            count = count_parquet_rows(pa.BufferReader(damaged), {}).rows
        except (pa.ArrowException, OSError, ValueError):
            refused += 1
            continue
        rows = list(parquet_rows(pa.BufferReader(damaged), None, {}))
        assert [position for position, _ in rows] == list(range(count))
        early += any("fewer rows than its footer" in row.get(ERROR_FIELD, "") for _, row in rows)
    assert refused
    assert early
