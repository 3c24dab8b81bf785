"""What `check` says of an input is what `annotate` will meet."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow.fs import LocalFileSystem
from typer.testing import CliRunner

from gem_ray.cli import app
from gem_ray.config import Config
from gem_ray.data.check import check_input
from gem_ray.data.listing import list_shards
from gem_ray.data.shards import write_posts
from gem_ray.pipeline.inputs import InputReader, count_input
from gem_ray.records import Post


def picture(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), color).save(buffer, "PNG")
    return buffer.getvalue()


def run_check(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["check", *map(str, arguments)])
    return done.exit_code, done.output


def test_a_good_input_is_described(tmp_path):
    posts = [
        Post("1", "Vexley in Lyon", image_bytes=picture("red")),
        Post("2", "Vexley in Lyon", image_bytes=picture("red")),
        Post("3", "Привет, Лион", image_uri="s3://bucket/a.jpg"),
        Post("3", "東京タワー", image_uri="a.jpg"),
        Post("5", "plain", image_bytes=b"no image"),
        Post("6", "none"),
    ]
    write_posts(posts, tmp_path / "posts", per_shard=4)
    found = check_input(tmp_path / "posts", Config())
    assert (found.files, found.rows, found.refused, found.remarks) == (2, 6, [], [])
    sample = found.sample
    assert sample is not None
    assert sample.images == {"in the file": 3, "s3://": 1, "path": 1, "none": 1}
    assert sorted(sample.unusable)[0].startswith("set image.root to the folder")
    assert sum(sample.unusable.values()) == 2
    assert found.columns["post_id"] == "string"
    assert found.unread_columns == []
    assert +sample.repeated == {"post_id": 1, "text": 1, "image": 1}
    assert sample.scripts == {"Latin": 4, "Cyrillic": 1, "Han": 1} or sample.scripts["Latin"] == 4
    assert not sample.rejected


def test_exit_codes_say_what_annotate_would_do(tmp_path):
    good, bad, wrong = tmp_path / "good", tmp_path / "bad", tmp_path / "wrong.parquet"
    write_posts([Post("1", "Lyon")], good)
    write_posts([Post("1", "Lyon"), Post("2", "")], bad)
    pq.write_table(pa.table({"id": ["1"], "tweet": ["Lyon"]}), wrong)
    assert run_check(good, "--json", tmp_path / "good.json")[0] == 0
    written = json.loads((tmp_path / "good.json").read_text())
    assert written["sample"]["images"] == {"none": 1}
    assert json.loads(run_check(good, "--json", "-")[1]) == written
    code, output = run_check(bad)
    assert code == 3
    assert "text is" in output
    code, output = run_check(wrong, "--json", tmp_path / "check.json")
    assert code == 2
    assert "perhaps `--map post_id=id,text=tweet`" in output
    assert json.loads((tmp_path / "check.json").read_text())["refused"]
    assert run_check(wrong, "--map", "text=tweet,post_id=id")[0] == 0
    assert run_check(tmp_path / "nowhere")[0] == 2


def test_ten_kinds_of_trouble_are_ten_sentences(tmp_path):
    def put(name: str, data: bytes) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)

    def table(name: str, **columns: object) -> None:
        pq.write_table(pa.table(columns), tmp_path / name)

    table("good.parquet", post_id=["1"], text=["Lyon"])
    put("notes.txt", b"x")
    put("_temporary/0.parquet", b"x")
    put("strange.bin", b"x")
    table("a.parquet", id=["1"], tweet=["Lyon"])
    table("b.parquet", post_id=[1.5], text=["Lyon"])
    table("c.parquet", post_id=["1"], text=["Lyon"], image=["a.jpg"])
    table("d.parquet", post_id=["1"], text=pa.nulls(1))
    put("e.parquet", b"cut off")
    put("f.tar", b"no tar")
    pq.write_table(pa.Table.from_arrays([pa.array(["1"]), pa.array(["a"]), pa.array(["b"])],
                                        ["post_id", "text", "text"]), tmp_path / "g.parquet")  # fmt: skip
    found = check_input(tmp_path, Config())
    assert len(found.refused) == 7
    assert len(found.remarks) == 3
    for name in "abcdefg":
        [sentence] = [sentence for sentence in found.refused if f"/{name}." in sentence]
        assert "Traceback" not in sentence
    code, output = run_check(tmp_path)
    assert code == 2
    assert output.count("refused: ") == 7


def test_a_check_of_many_files_in_s3_is_quick(s3, faulty_s3):
    """A listing, and two requests for each footer; the sample reads ten of the files."""
    bucket, buffer = s3.bucket("posts"), io.BytesIO()
    pq.write_table(pa.table({"post_id": ["1"] * 10, "text": ["Lyon"] * 10}), buffer)
    for number in range(100):
        s3.put(f"{bucket}/posts/{number:03}.parquet", buffer.getvalue())
    found = check_input(f"{bucket}/posts", Config())
    assert (found.files, found.rows, found.refused) == (100, 1000, [])
    assert faulty_s3.counts["passed"] <= 5 + 2 * 100 + 5 * 10 + 5


@pytest.mark.parametrize("mapping", ["text", "text=", "txt=a", "text=a,text=b"])
def test_a_wrong_mapping_is_refused(mapping):
    done = CliRunner().invoke(app, ["check", "posts", "--map", mapping])
    assert "--map" in str(done.exception)


def test_ten_files_at_most_are_sampled_over_the_whole_input(tmp_path: Path):
    write_posts([Post(f"{number}", "Lyon") for number in range(50)], tmp_path / "p", per_shard=1)
    found = check_input(tmp_path / "p", Config(), sample=20)
    assert found.sample is not None
    assert found.sample.posts == 10


def test_files_with_other_columns_than_the_first_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = {"post_id": ["1"], "text": ["Lyon"], "image_uri": ["a.jpg"], "lang": ["en"]}
    pq.write_table(pa.table(first), tmp_path / "a.parquet")
    pq.write_table(pa.table({"post_id": [2], "text": ["Lyon"], "Image_URI": ["b.jpg"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"post_id": ["3"], "tokens": [["Lyon"]], "likes": [3]}), tmp_path / "c.parquet")
    (tmp_path / "d.tar").write_bytes(tar_of_one_post())
    found = check_input(tmp_path, Config())
    assert found.refused == []
    assert found.columns == {
        "post_id": "string", "text": "string", "image_uri": "string", "tokens": "list<element: string>"
    }  # fmt: skip
    assert found.unread_columns == ["lang", "Image_URI", "likes"]
    assert found.remarks == [
        "column Image_URI is not read; `--map image_uri=Image_URI` reads it",
        f"1 of 3 Parquet files has no column text: {tmp_path}/c.parquet",
        f"2 of 3 Parquet files have no column image_uri: {tmp_path}/b.parquet and 1 more",
        f"2 of 3 Parquet files have no column tokens: {tmp_path}/a.parquet and 1 more",
    ]
    reader = InputReader(LocalFileSystem())
    with caplog.at_level("WARNING"):
        count_input(reader, list_shards(tmp_path).shards)
    assert [record.message for record in caplog.records][-4:] == found.remarks


def tar_of_one_post() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        entry = tarfile.TarInfo("4.txt")
        entry.size = 4
        tar.addfile(entry, io.BytesIO(b"Lyon"))
    return buffer.getvalue()


def test_columns_are_described_and_what_is_skipped_is_an_exit_code(tmp_path: Path):
    pq.write_table(pa.table({"id": [1], "tweet": ["Lyon"], "lang": ["en"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"cut off")
    columns = {"post_id": "id", "text": "tweet"}
    found = check_input(tmp_path, Config(), columns, skip_bad_files=True)
    assert found.columns == {"post_id": "int64 from id", "text": "string from tweet"}
    assert (found.unread_columns, len(found.skipped)) == (["lang"], 1)
    code, output = run_check(tmp_path, "--skip-bad-files", "--map", "post_id=id,text=tweet")
    assert code == 3
    assert "1 post in 1 file\ncolumns: post_id int64 from id, text string from tweet; not read: lang\n" in output


@pytest.mark.parametrize(
    ("uri", "setting", "reason"),
    [
        ("a.jpg", {"root": "."}, "set image.root"),
        ("https://example.org/a.jpg", {"allow_http": True}, "set image.allow_http"),
        ("data:image/png;base64,xx", None, "data: addresses are not read"),
    ],
)
def test_images_that_no_run_would_fetch_are_counted(tmp_path: Path, uri, setting, reason):
    write_posts([Post("1", "Lyon", image_uri=uri)], tmp_path / "p")
    found = check_input(tmp_path / "p", Config())
    assert found.sample is not None
    [(said, count)] = found.sample.unusable.items()
    assert (said.startswith(reason), count) == (True, 1)
    if setting:
        allowed = check_input(tmp_path / "p", Config(image=setting))
        assert allowed.sample is not None
        assert not allowed.sample.unusable


def test_shards_name_the_images_that_cannot_be_used(tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    (tmp_path / "in" / "a.txt").write_text("Lyon")
    done = CliRunner().invoke(app, ["shards", "folder", str(tmp_path / "in"), str(tmp_path / "out")])
    assert (done.exit_code, "a: this is a HEIC image, which is not supported" in done.output) == (0, True)
    assert "1 post with a problem; 0 cannot be annotated" in done.output


def test_what_is_shown_of_an_image_in_base64_is_short(tmp_path: Path):
    (tmp_path / "posts.jsonl").write_text(f'{{"post_id": "1", "text": "Lyon", "image": "{"/9j/4AAQ" * 9999}"}}')
    done = CliRunner().invoke(app, ["shards", "jsonl", str(tmp_path / "posts.jsonl"), str(tmp_path / "out")])
    assert ("there is no image at /9j/4AAQ" in done.output, len(done.output) < 1000) == (True, True)


def test_a_file_is_no_folder_without_images(tmp_path: Path):
    (tmp_path / "images.zip").write_bytes(b"PK")
    done = CliRunner().invoke(app, ["shards", "folder", str(tmp_path / "images.zip"), str(tmp_path / "out")])
    assert (done.exit_code, (tmp_path / "out").exists()) == (2, False)


def test_what_annotate_would_give_up_is_said(tmp_path: Path):
    write_posts([Post("1", "Lyon"), Post("2", " "), Post("3", " ")], tmp_path / "p")
    assert "67% of the sample cannot be annotated: see --max-problem-share of annotate" in run_check(tmp_path / "p")[1]
    write_posts([Post("1", "Lyon"), Post("2", "Paris"), Post("3", "Oslo")], tmp_path / "texts")
    assert "--max-problem-share" not in run_check(tmp_path / "texts")[1]


def test_a_text_over_the_limit_cannot_be_annotated(tmp_path: Path):
    write_posts([Post("1", "Lyon"), Post("2", "Lyon " * 2001)], tmp_path / "p")
    code, said = run_check(tmp_path / "p")
    assert code == 3
    assert "text has 10,005 characters; text.max_chars allows 10,000" in said
    assert run_check(tmp_path / "p", "--set", "text.max_chars=20000")[0] == 0
