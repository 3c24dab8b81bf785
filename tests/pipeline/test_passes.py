"""What an earlier pass left is found again, whichever files its rows came to lie in."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_ray.data.shards import ROWS_BITS
from gem_ray.data.storage import LocalStorage
from gem_ray.pipeline.inputs import InputFile
from gem_ray.pipeline.passes import PassResults
from gem_ray.pipeline.staging import StagedRows
from gem_ray.pipeline.tables import PASS_SCHEMA, pass_table, posts_to_table
from gem_ray.records import Post, ProblemKind


def left(row_id: int) -> Post:
    """A post as a pass leaves it, with a problem of a stage that is run again."""
    post = Post(f"{row_id}", "text", tokens=[f"{row_id}"], row_id=row_id)
    post.fail("load_image", ProblemKind.IMAGE_MISSING, "gone")
    return post


def write(folder: Path, blocks: list[list[int]]) -> None:
    for number, ids in enumerate(blocks):
        table = pass_table(posts_to_table([left(row_id) for row_id in ids]))
        pq.write_table(table.cast(PASS_SCHEMA), folder / f"{number}.parquet")


@settings(max_examples=30)
@given(
    rows=st.integers(1, 300),
    blocks=st.integers(1, 12),
    chance=st.randoms(use_true_random=False),
    in_order=st.booleans(),
    wanted=st.floats(0.1, 1),
)
def test_every_row_is_found_in_whatever_files_and_order_the_rows_lie(
    rows: int, blocks: int, chance, in_order: bool, wanted: float
) -> None:
    """Also rows that are there twice, as after a task that was taken for dead."""
    file = InputFile("posts", 1, rows, 1, 1)
    ids = [*range(5), *file.row_ids.tolist(), *range(2 << ROWS_BITS, (2 << ROWS_BITS) + 5)]  # and other files' rows
    if not in_order:
        chance.shuffle(ids)
    cut = [ids[number::blocks] if not in_order else ids[number * 40 : number * 40 + 40] for number in range(blocks)]
    cut = [*cut, ids[len(cut) * 40 :] if in_order else [], chance.sample(ids, 3)]
    asked = [row_id for row_id in file.row_ids.tolist() if chance.random() < wanted]
    with TemporaryDirectory() as folder:
        write(Path(folder), [block for block in cut if block])
        storage = LocalStorage(folder)
        results = PassResults.of(storage, StagedRows(storage, "").files(), again={"load_image"})
        posts = (Post(f"{row_id}", "text", row_id=row_id, image_bytes=b"%d" % row_id) for row_id in asked)
        merged = list(results.merged(file, posts))
    assert [post.row_id for post in merged] == asked
    assert all(post.tokens == [post.post_id] for post in merged)
    assert all(post.image_bytes == post.post_id.encode() for post in merged)
    assert not any(post.problems for post in merged)


def test_a_damaged_file_of_an_earlier_pass_is_named_and_gone(tmp_path: Path) -> None:
    """Only some of its columns are damaged, so that its ids say that its rows are done."""
    write(tmp_path, [list(range(200))])
    path = tmp_path / "0.parquet"
    storage = LocalStorage(str(tmp_path))
    staged = StagedRows(storage, "").files()
    column = pq.read_metadata(path).row_group(0).column(1)  # `text`
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)
    assert len(StagedRows(storage, "").ids()) == 200
    results = PassResults.of(storage, staged, again=())
    with pytest.raises(OSError, match=r"0\.parquet was damaged, and is deleted; start again"):
        list(results.merged(InputFile("posts", 0, 200, 1, 1), iter([Post("0", "text", row_id=0)])))
    assert not path.exists()
