import io
import tarfile
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gem_ray.data.files import open_filesystem
from gem_ray.data.generated import generate
from gem_ray.data.prepare import post_from_row
from gem_ray.data.shards import read_labelled, read_posts, shard_rows, write_posts
from gem_ray.records import INPUT_SCHEMA, Box, GoldEntity, Post
from gem_ray.taxonomy import FMNERG, GMNER


def posts_of(count):
    return [
        Post(
            f"{number}",
            f"Rihanna {number} 😂",
            tokens=["Rihanna", str(number), "😂"],
            caption="a stage" if number % 2 else None,
            knowledge=None,
            image_bytes=bytes([number % 256]) * 10,
            gold=[GoldEntity(0, 1, "musician", (Box(1, 2, 3.5, 4),) if number % 3 else ())],
        )
        for number in range(count)
    ]


def test_posts_come_back_as_they_were_written(tmp_path):
    posts = posts_of(301)
    assert write_posts(posts, tmp_path / "shards", per_shard=150) == 301
    files = sorted((tmp_path / "shards").glob("part-*"))
    assert [file.name for file in files] == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert [pq.ParquetFile(file).metadata.num_rows for file in files] == [150, 150, 1]
    assert list(read_posts(tmp_path / "shards")) == posts
    assert list(read_posts(files[1])) == posts[150:300]
    assert list(read_posts(str(tmp_path / "shards"), limit=7)) == posts[:7]


def test_generated_posts_survive_the_round_trip(tmp_path):
    write_posts(generate(8, seed=1), tmp_path / "shards")
    for read, made in zip(read_posts(tmp_path / "shards"), generate(8, seed=1), strict=True):
        assert (read.text, read.tokens, read.image_bytes) == (made.text, made.tokens, made.image_bytes)
        assert [(g.word_start, g.word_end, g.fine, len(g.boxes)) for g in read.gold] == [
            (g.word_start, g.word_end, g.fine, len(g.boxes)) for g in made.gold
        ]


def test_the_same_posts_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_posts(posts_of(300), tmp_path / name, per_shard=200)
    for file in ("part-00000.parquet", "part-00001.parquet"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_shards_are_cut_into_small_groups_and_compressed(tmp_path):
    write_posts(posts_of(300), tmp_path / "s", per_shard=1000)
    metadata = pq.ParquetFile(tmp_path / "s" / "part-00000.parquet").metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [128, 128, 44]
    assert metadata.row_group(0).column(0).compression == "ZSTD"


def test_a_full_last_shard_is_not_followed_by_an_empty_one(tmp_path):
    assert write_posts(posts_of(20), tmp_path / "s", per_shard=10) == 20
    assert len(list((tmp_path / "s").glob("part-*"))) == 2


def test_no_posts_give_one_empty_shard(tmp_path):
    assert write_posts([], tmp_path / "s") == 0
    assert list(read_posts(tmp_path / "s")) == []


def test_shards_are_not_mixed_with_those_that_are_there(tmp_path):
    write_posts(posts_of(1), tmp_path / "s")
    with pytest.raises(FileExistsError, match="already holds shards"):
        write_posts(posts_of(1), tmp_path / "s")


def test_a_rejected_post_is_rejected_again(tmp_path):
    rows = [{"post_id": "1", "text": "bad \udc80", "image": b"x"}, {"post_id": "2", "text": 3}, {"text": "no id"}]
    write_posts(map(post_from_row, rows), tmp_path / "s")
    back = list(read_posts(tmp_path / "s"))
    assert [post.is_rejected for post in back] == [True] * 3
    assert (back[0].post_id, back[0].image_bytes, back[2].text) == ("1", b"x", "no id")


def test_tables_of_others_are_read_column_by_column(tmp_path):
    table = pa.table({"post_id": [1, 2], "text": ["a b", None], "likes": [3, 4], "tokens": [["a", "b"], None]})
    pq.write_table(table, tmp_path / "theirs.parquet")
    first, second = read_posts(tmp_path)
    assert (first.post_id, first.tokens, first.problems) == ("1", ["a", "b"], [])
    assert second.is_rejected


def test_hidden_files_are_no_shards(tmp_path):
    write_posts(posts_of(2), tmp_path / "sub" / "s")
    for hidden in ("_temporary", ".cache"):
        write_posts(posts_of(3), tmp_path / hidden)
    (tmp_path / "_metadata.parquet").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not a shard")
    assert len(list(read_posts(tmp_path))) == 2


@pytest.mark.parametrize("name", ["none", "empty", "notes.txt"])
def test_where_there_are_no_shards_the_message_says_what_to_do(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no shard")
    with pytest.raises(FileNotFoundError, match=rf"{name}.*shard"):
        list(read_posts(tmp_path / name))


@pytest.mark.parametrize("damage", ["empty", "truncated", "text"])
@pytest.mark.parametrize("suffix", ["parquet", "tar"])
def test_a_damaged_shard_is_named(tmp_path, suffix, damage):
    write_posts(posts_of(200), tmp_path / "s")
    good = tmp_path / "s" / "part-00000.parquet"
    if suffix == "tar":
        with tarfile.open(tmp_path / "good.tar", "w") as tar:
            tar.add(good, "a.jpg")
        good = tmp_path / "good.tar"
    data = {"empty": b"", "truncated": good.read_bytes()[:1500], "text": b"hello " * 300}[damage]
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / f"bad.{suffix}").write_bytes(data)
    with pytest.raises(ValueError, match=rf"bad\.{suffix} is not a readable"):
        list(read_posts(folder))


@pytest.mark.parametrize("suffix", ["parquet", "tar"])
def test_a_pointer_of_git_lfs_is_called_that(tmp_path, suffix):
    file = tmp_path / f"posts.{suffix}"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")
    with pytest.raises(ValueError, match=rf"posts\.{suffix} is a Git LFS pointer: `git lfs pull` brings"):
        list(read_posts(file))


def test_a_damaged_row_group_rejects_its_own_rows_and_the_rest_is_read(tmp_path):
    posts = posts_of(300)
    write_posts(posts, tmp_path)
    file = tmp_path / "part-00000.parquet"
    group = pq.ParquetFile(file).metadata.row_group(1)
    texts = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "text")
    start = texts.dictionary_page_offset or texts.data_page_offset
    damaged = bytearray(file.read_bytes())
    damaged[start : start + texts.total_compressed_size] = b"\xff" * texts.total_compressed_size
    file.write_bytes(damaged)

    read = list(read_posts(tmp_path))
    end = 128 + group.num_rows
    assert (read[:128], read[end:]) == (posts[:128], posts[end:])
    assert all(post.is_rejected for post in read[128:end])
    assert {post.problems[0].message for post in read[128:end]} == {read[128].problems[0].message}
    assert read[128].problems[0].message.startswith("row group 1 of the file is damaged: ")
    filesystem, _ = open_filesystem(tmp_path)
    some = [position for position, _ in shard_rows(filesystem, str(file), np.array([3, 130, 290]))]
    assert some == [3, 130, 290]


class Unplugged(io.BytesIO):
    """A file whose storage answers for its end, where the footer is, and then no more."""

    reads = 0

    def read(self, size=-1):
        self.reads += 1
        if self.reads > 3:
            raise OSError("connection lost")
        return super().read(size)


def test_a_storage_that_stops_answering_is_no_damage_of_rows(tmp_path):
    write_posts(posts_of(300), tmp_path)
    content = (tmp_path / "part-00000.parquet").read_bytes()
    filesystem = SimpleNamespace(open_input_file=lambda path: pa.PythonFile(Unplugged(content), "r"))
    with pytest.raises(ValueError, match=r"posts\.parquet is not a readable Parquet file: .*connection lost"):
        list(shard_rows(filesystem, "posts.parquet"))


def test_text_that_is_not_utf8_spoils_only_its_own_row(tmp_path):
    text = pa.array([b"ok", b"\xff"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"post_id": ["good", "bad"], "text": text}), tmp_path / "latin1.parquet")
    good, bad = read_posts(tmp_path)
    assert (good.post_id, good.text, good.is_rejected) == ("good", "ok", False)
    assert (bad.post_id, bad.is_rejected) == ("bad", True)
    assert "text cannot be read" in bad.problems[0].message


def test_shards_live_in_s3_too(s3, faulty_s3):
    bucket = s3.bucket("corpus")
    posts = posts_of(5)
    faulty_s3.share, faulty_s3.kinds = 0.2, ["slow_down", "reset", "cut"]
    write_posts(posts, f"{bucket}/shards/", per_shard=3)
    assert list(read_posts(f"{bucket}/shards")) == posts
    assert list(read_posts(f"{bucket}/shards/part-00001.parquet")) == posts[3:]
    with pytest.raises(FileExistsError):
        write_posts(posts, f"{bucket}/shards")
    with pytest.raises(FileNotFoundError, match="there is nothing at"):
        list(read_posts(f"{bucket}/none"))
    with pytest.raises(FileNotFoundError, match="there is no bucket"):
        list(read_posts("s3://no-such-bucket/none"))
    assert faulty_s3.faults >= 3


def test_a_bucket_itself_holds_shards_and_tars(s3, tmp_path):
    bucket = s3.bucket("corpus")
    write_posts(posts_of(2), bucket)
    assert list(read_posts(bucket)) == posts_of(2)
    (tmp_path / "z.txt").write_text("Lyon")
    with tarfile.open(tmp_path / "z.tar", "w") as tar:
        tar.add(tmp_path / "z.txt", "z.txt")
    s3.put(f"{bucket}/tars/z.tar", (tmp_path / "z.tar").read_bytes())
    assert [post.post_id for post in read_posts(bucket)][-1] == "z"


def test_columns_are_those_of_the_contract(tmp_path):
    write_posts(posts_of(1), tmp_path / "s")
    assert pq.read_schema(tmp_path / "s" / "part-00000.parquet").equals(INPUT_SCHEMA)


def test_a_failure_takes_back_what_it_has_written_and_nothing_else(tmp_path):
    out = tmp_path / "new" / "shards"

    def posts(others):
        yield from posts_of(3)
        for name in others:
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_text("somebody else's")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_posts(posts([]), out, per_shard=1)
    assert list(tmp_path.iterdir()) == []
    others = ["notes.txt", "sub/data.csv", "other.parquet"]
    with pytest.raises(KeyboardInterrupt):
        write_posts(posts(others), out, per_shard=1)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == sorted(others)


def test_labelled_posts_are_those_with_gold_cut_into_words(tmp_path):
    gold = [GoldEntity(0, 2, "musician")]
    write_posts([Post("a", "Taylor Swift sings", gold=gold), Post("b", "who?"), Post("c", "nobody", gold=[])], tmp_path)
    first, second = read_labelled(tmp_path, FMNERG)
    assert (first.tokens, first.gold) == (["Taylor", "Swift", "sings"], gold)
    assert (second.post_id, second.gold) == ("c", [])


@pytest.mark.parametrize(
    ("gold", "labels", "message"),
    [
        ([(0, 1, "firm")], FMNERG, r"post 'a': .* is 'firm', which is no category of fmnerg$"),
        ([(0, 1, "ORG")], FMNERG, r"'ORG', which is no category of fmnerg; that is one of gmner: set labels=gmner"),
        ([(0, 1, "firm")], GMNER, r"'firm', which is no category of gmner"),
        ([(1, 4, "city")], FMNERG, r"words 1 to 4 is not within the post's 3 words"),
        ([(1, 1, "city")], FMNERG, r"words 1 to 1 is not within"),
        ([(-1, 1, "city")], FMNERG, r"words -1 to 1 is not within"),
        ([(1, 3, "city"), (0, 2, "musician")], FMNERG, r"words 1 to 3 overlaps another"),
    ],
)
def test_gold_that_does_not_fit_its_post_is_named(tmp_path, gold, labels, message):
    write_posts([Post("a", "Taylor Swift sings", gold=[GoldEntity(*each) for each in gold])], tmp_path)
    with pytest.raises(ValueError, match=message):
        read_labelled(tmp_path, labels)


def test_shards_without_gold_are_no_labelled_posts(tmp_path):
    write_posts([Post("a", "Taylor Swift sings")], tmp_path)
    with pytest.raises(ValueError, match=r"has no gold: its rows need a `gold` column"):
        read_labelled(tmp_path, FMNERG)
