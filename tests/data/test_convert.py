import bz2
import csv
import gzip
import io
import json
import lzma
import os
import zipfile
from threading import Thread

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gem_ray.data.convert import from_csv, from_folder, from_jsonl
from gem_ray.data.shards import read_posts, write_posts


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(images / "a.png")
    (tmp_path / "secret.png").write_bytes(b"secret")
    return tmp_path / "data"


def after_shards(posts, tmp_path):
    """What annotate reads of it."""
    write_posts(posts, tmp_path / "shards")
    return list(read_posts(tmp_path / "shards"))


def test_jsonl_lines_become_posts_and_bad_ones_stay_in_their_place(folder, tmp_path):
    lines = [
        json.dumps({"post_id": "1", "text": "Beyoncé", "image": "images/a.png", "caption": "a stage"}),
        '{"post_id": "2", "text": ',
        "",
        '["3"]',
        json.dumps({"post_id": "4", "text": 4, "image_uri": "images/a.png"}),
        json.dumps({"text": "no id"}),
        json.dumps({"post_id": "6", "text": "gone", "image_uri": "images/none.png"}),
        json.dumps({"post_id": "7", "text": "thief", "image_uri": "../secret.png"}),
        json.dumps({"post_id": "8", "text": "web", "image_uri": "https://example.org/a.png"}),
    ]
    file = folder / "posts.jsonl"
    file.write_bytes("\n".join(lines).encode() + b'\n{"post_id": "9", "text": "\xff"}')
    png = (folder / "images" / "a.png").read_bytes()
    posts = after_shards(from_jsonl(file), tmp_path)
    assert [(p.post_id, p.is_rejected) for p in posts] == [
        ("1", False), ("posts.jsonl:2", True), ("posts.jsonl:4", True), ("4", True), ("posts.jsonl:6", True),
        ("6", False), ("7", False), ("8", False), ("9", True),
    ]  # fmt: skip
    assert (posts[0].text, posts[0].caption, posts[0].image_bytes, posts[0].image_uri) == (
        "Beyoncé",
        "a stage",
        png,
        None,
    )
    assert [p.image_bytes for p in posts[5:8]] == [None] * 3
    assert [p.image_uri for p in posts[5:8]] == ["images/none.png", "../secret.png", "https://example.org/a.png"]


def test_paths_stay_paths_when_images_are_not_embedded(folder):
    (folder / "posts.jsonl").write_text('{"post_id": "1", "text": "a", "image": "images/a.png"}')
    [post] = from_jsonl(folder / "posts.jsonl", embed_images=False)
    assert (post.image_uri, post.image_bytes) == ("images/a.png", None)


def test_bad_lines_say_what_is_wrong(folder):
    (folder / "posts.jsonl").write_text('{"a"\n[' + "[" * 100_000)
    first, second = from_jsonl(folder / "posts.jsonl")
    assert first.problems[0].message.startswith("the line is not valid JSON")
    assert second.is_rejected


def test_csv_records_become_posts(folder, tmp_path):
    file = folder / "posts.csv"
    file.write_bytes(
        "\ufeffpost_id,text,tokens,image,caption,likes\r\n"
        '1,"two\nlines, ""quoted""",,images/a.png,,5\r\n'
        "2,Nick Jonas!,Nick Jonas !,,two men,\r\n"
        "3\r\n"
        "4,a,,,,5,too,many\r\n"
        "5,,,,,\r\n"
        ",text,,,,\r\n".encode()
        + b"7,\xff,,,,\r\n"
        + b"8,"
        + b"x" * 200_000
        + b",,,,\r\n9,end,,,,\r\n"
    )
    posts = after_shards(from_csv(file), tmp_path)
    assert [(p.post_id, p.is_rejected) for p in posts][:7] == [
        ("1", False), ("2", False), ("3", True), ("4", True), ("5", True), ("posts.csv:8", True), ("7", True),
    ]  # fmt: skip
    assert posts[0].text == 'two\nlines, "quoted"'
    assert posts[0].image_bytes == (folder / "images" / "a.png").read_bytes()
    assert (posts[1].tokens, posts[1].caption) == (["Nick", "Jonas", "!"], "two men")
    assert len(posts[7].text) == 200_000  # over the csv module's own limit for a cell
    assert (posts[-1].post_id, posts[-1].text) == ("9", "end")


def test_a_folder_of_images_and_texts(folder):
    (folder / "images" / "a.txt").write_text("Rihanna\n")
    (folder / "images" / "b.txt").write_text("no picture")
    (folder / "images" / "c.JPG").write_bytes(b"jpeg")
    (folder / "images" / "c.png").write_bytes(b"png")
    (folder / "images" / "notes.md").write_text("ignored")
    (folder / "images" / "out.png").symlink_to(folder.parent / "secret.png")
    posts = {post.post_id: post for post in from_folder(folder)}
    assert list(posts) == ["images/a", "images/b", "images/c", "images/c.png", "images/out"]
    assert posts["images/a"].text == "Rihanna"
    assert posts["images/a"].image_bytes.startswith(b"\x89PNG")
    assert (posts["images/b"].text, posts["images/b"].image_bytes) == ("no picture", None)
    assert (posts["images/c"].is_rejected, posts["images/c"].image_bytes) == (True, b"jpeg")
    assert posts["images/c.png"].image_bytes == b"png"
    assert posts["images/out"].image_bytes is None


def test_a_column_may_be_two_fields(folder, tmp_path):
    """As the file's name in the metadata of Hugging Face's image folders: id and path in one."""
    row = {"file_name": "images/a.png", "title": "Lyon"}
    (folder / "posts.jsonl").write_text(json.dumps(row))
    (folder / "posts.csv").write_text("file_name,title\nimages/a.png,Lyon\n")
    columns = {"post_id": "file_name", "image_uri": "file_name", "text": "title"}
    pq.write_table(pa.Table.from_pylist([row]), folder / "posts.parquet")
    for posts in (
        from_jsonl(folder / "posts.jsonl", columns=columns),
        from_csv(folder / "posts.csv", columns=columns),
        read_posts(folder / "posts.parquet", columns=columns),
    ):
        [post] = posts
        assert (post.post_id, post.text, post.problems) == ("images/a.png", "Lyon", [])
        assert post.image_bytes or post.image_uri == "images/a.png"


def test_a_text_may_be_called_after_the_whole_name_of_its_image(tmp_path):
    """As gallery-dl calls what it writes beside an image."""
    for name in ("a.jpg", "b.jpg", "b.png", "Zu\u0308rich.JPG", "c.jpg"):
        (tmp_path / name).write_bytes(b"jpeg")
    for name in ("a.jpg.txt", "b.jpg.txt", "b.png.TXT", "Z\u00fcrich.JPG.txt", "c.txt", "c.jpg.txt", "d.jpg.txt"):
        (tmp_path / name).write_text(f"in {name}")
    posts = {post.post_id: post for post in from_folder(tmp_path)}
    assert {post_id: post.text for post_id, post in posts.items() if not post.is_rejected} == {
        "a": "in a.jpg.txt",
        "b": "in b.jpg.txt",
        "b.png": "in b.png.TXT",
        "Z\u00fcrich": "in Z\u00fcrich.JPG.txt",
        "d.jpg": "in d.jpg.txt",
    }
    assert all((post.image_bytes is None) == (post_id == "d.jpg") for post_id, post in posts.items())
    assert posts["c"].problems[0].message == "both could be the text: c.txt, c.jpg.txt"


def test_a_folder_of_shards_can_be_written_again(folder, tmp_path):
    (folder / "posts.jsonl").write_text('{"post_id": "1", "text": "a", "image": "images/a.png"}')
    written = after_shards(from_jsonl(folder / "posts.jsonl"), tmp_path)
    assert list(read_posts(tmp_path / "shards")) == written


CELLS = st.text(st.sampled_from('ab",;\n\r\t|é '), max_size=6).map(lambda text: f"x{text}x")
RECORDS = st.lists(CELLS, min_size=1, max_size=5)


def csv_of(texts, separator=",", quoting=csv.QUOTE_MINIMAL, ends="\r\n"):
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=separator, quoting=quoting, lineterminator=ends)
    writer.writerows([("post_id", "text"), *enumerate(texts)])
    return buffer.getvalue()


@settings(max_examples=100)
@given(RECORDS, st.sampled_from(",;\t|"), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
       st.sampled_from(["\n", "\r\n"]), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
       st.sampled_from([bytes, gzip.compress, bz2.compress,
       lzma.compress, lambda data: pa.compress(data, "zstd", asbytes=True)]))  # fmt: skip
def test_records_come_back_whatever_separates_encodes_and_packs_them(
    tmp_path_factory, texts, separator, quoting, ends, encoding, pack
):
    file = tmp_path_factory.mktemp("csv") / "posts.csv"
    file.write_bytes(pack(csv_of(texts, separator, quoting, ends).encode(encoding)))
    posts = list(from_csv(file))
    assert [(post.post_id, post.text) for post in posts] == [(str(n), text) for n, text in enumerate(texts)]


@settings(max_examples=150)
@given(RECORDS, st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), st.data())
def test_a_stray_quote_forges_and_swallows_no_record(tmp_path_factory, texts, quoting, data):
    content = csv_of(texts, quoting=quoting)
    begin = content.index("\n") + 1
    place = data.draw(st.integers(begin, len(content)))
    file = tmp_path_factory.mktemp("csv") / "posts.csv"
    file.write_text(content[:place] + '"' + content[place:], newline="")
    try:
        posts = [(post.post_id.replace('"', ""), post.text.replace('"', "")) for post in from_csv(file)]
    except ValueError:
        with pytest.raises(ValueError, match=r"posts\.csv: the record that begins in line"):
            list(from_csv(file))
    else:
        assert posts == [(str(number), text.replace('"', "")) for number, text in enumerate(texts)]


def test_records_may_end_with_carriage_returns_alone(tmp_path):
    (tmp_path / "posts.csv").write_bytes(b'post_id,text\r1,"a\rb"\r2,c')
    assert [post.text for post in from_csv(tmp_path / "posts.csv")] == ["a\rb", "c"]


def test_a_record_with_fewer_cells_than_names_is_rejected(tmp_path):
    (tmp_path / "posts.csv").write_text("post_id,text,image_uri,\n1,Lyon,\n2,cut o")
    whole, cut = from_csv(tmp_path / "posts.csv")
    assert whole.problems == []
    assert cut.problems[0].message == "the record has 2 cells, and the header 4"


def test_an_empty_image_hides_no_address(tmp_path):
    (tmp_path / "posts.jsonl").write_text('{"post_id": "1", "text": "a", "image": "", "image_uri": "https://b/c.jpg"}')
    [post] = from_jsonl(tmp_path / "posts.jsonl")
    assert post.image_uri == "https://b/c.jpg"


def test_damaged_utf_16_is_named(tmp_path):
    (tmp_path / "posts.jsonl").write_bytes('{"post_id": "1", "text": "a"}'.encode("utf-16") + b"\0")
    with pytest.raises(ValueError, match=r"/posts\.jsonl is damaged: "):
        list(from_jsonl(tmp_path / "posts.jsonl"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"doublequote": False},
        {"quoting": csv.QUOTE_ALL, "doublequote": False},
        {"quoting": csv.QUOTE_NONE, "sep": ";"},
    ],
)
def test_what_pandas_escapes_is_read_as_it_was(tmp_path, options):
    texts = ['5" and "hi"', r"c:\new\dir", 'a, b; "c"', '\\"', "\\", 'ends with \\"\\', 'two\nlines, "one" record']
    pd.DataFrame({"post_id": range(len(texts)), "text": texts}).to_csv(
        tmp_path / "posts.csv", index=False, escapechar="\\", **options
    )
    has_quotes = options.get("quoting") != csv.QUOTE_NONE
    posts = list(from_csv(tmp_path / "posts.csv", has_quotes=has_quotes, escape="\\"))
    assert [post.text for post in posts] == texts


def test_quotes_can_be_characters(tmp_path):
    (tmp_path / "posts.tsv").write_text('post_id\ttext\n1\t"The 5" screen\n2\tLyon\n')
    with pytest.raises(ValueError, match=r"line 2 .*--no-quotes"):
        list(from_csv(tmp_path / "posts.tsv"))
    posts = list(from_csv(tmp_path / "posts.tsv", has_quotes=False))
    assert [post.text for post in posts] == ['"The 5" screen', "Lyon"]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("id,tweet", r"its header needs post_id and text .*it is 'id,tweet'.*--map"),
        ("", "its header needs"),
        ("post_id,text,text", "column text stands twice"),
        ("post_id:text", "its header needs"),
    ],
)
def test_a_csv_without_the_columns_is_refused_by_its_header(tmp_path, header, message):
    (tmp_path / "posts.csv").write_text(f"{header}\n1,Lyon\n")
    with pytest.raises(ValueError, match=rf"posts\.csv.*{message}"):
        list(from_csv(tmp_path / "posts.csv"))


def test_columns_and_fields_are_renamed(tmp_path):
    (tmp_path / "posts.csv").write_text("id;tweet;text\n1;Lyon;no\n")
    (tmp_path / "posts.jsonl").write_text('{"id": 1, "tweet": "Lyon", "text": "no"}')
    for read, name in ((from_csv, "posts.csv"), (from_jsonl, "posts.jsonl")):
        [post] = read(tmp_path / name, columns={"post_id": "id", "text": "tweet"})
        assert (post.post_id, post.text) == ("1", "Lyon")


ITEMS = [{"post_id": "1", "text": "a"}, {"post_id": "2", "text": "b"}, 3]


@pytest.mark.parametrize("indent", [None, 2])
def test_one_json_array_is_read_as_its_items(tmp_path, indent):
    (tmp_path / "posts.json").write_text(json.dumps(ITEMS, indent=indent))
    posts = list(from_jsonl(tmp_path / "posts.json"))
    assert [(post.post_id, post.is_rejected) for post in posts] == [("1", False), ("2", False), ("posts.json:3", True)]


@pytest.mark.parametrize("content", [b"[\n{}\n", b"[{}] [{}]"])
def test_what_begins_as_an_array_and_is_none_is_refused(tmp_path, content):
    (tmp_path / "posts.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"posts\.json begins as a JSON array, but is not one"):
        list(from_jsonl(tmp_path / "posts.json"))


@pytest.mark.parametrize(
    "content", [b"PAR1\0\0", gzip.compress(b"PAR1\0\0", mtime=0), gzip.compress(b"long" * 99, mtime=0)[:-9]]
)
def test_what_is_no_text_is_refused(tmp_path, content):
    (tmp_path / "posts.jsonl").write_bytes(content)
    for read in (from_jsonl, from_csv):
        with pytest.raises((ValueError, EOFError), match=r"posts\.jsonl|end"):
            list(read(tmp_path / "posts.jsonl"))


def test_files_may_be_joined(tmp_path):
    csv_file = "\ufeffid,text\r\n1,Lyon\r\n"
    (tmp_path / "posts.csv").write_text(csv_file * 2, newline="")
    first, header, second = from_csv(tmp_path / "posts.csv", columns={"post_id": "id"})
    assert (first.text, second.text, header.problems[0].message) == ("Lyon", "Lyon", "it is the header again")
    (tmp_path / "posts.jsonl").write_text('\ufeff{"post_id": "1", "text": "Lyon"}\n' * 2)
    assert [post.text for post in from_jsonl(tmp_path / "posts.jsonl")] == ["Lyon", "Lyon"]


def test_a_zip_archive_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "posts.csv.zip", "w") as archive:
        archive.writestr("posts.csv", "post_id,text\n1,a\n")
    with pytest.raises(ValueError, match=r"posts\.csv\.zip is a ZIP archive; unpack it"):
        list(from_csv(tmp_path / "posts.csv.zip"))


def test_backslashes_before_quotes_are_refused_with_what_makes_spark_double_them(tmp_path):
    (tmp_path / "posts.csv").write_text('post_id,text\n1,"He said \\"hi\\" there"\n')
    with pytest.raises(ValueError, match="Spark doubles them with the option escape"):
        list(from_csv(tmp_path / "posts.csv"))


def test_a_key_that_stands_twice_rejects_its_line(tmp_path):
    (tmp_path / "posts.jsonl").write_text('{"post_id": "1", "text": "a", "text": "b"}\n{"post_id": "2", "text": "c"}')
    first, second = from_jsonl(tmp_path / "posts.jsonl")
    assert (first.is_rejected, second.is_rejected) == (True, False)
    assert "`text` stands twice" in first.problems[0].message


def test_gold_of_another_meaning_leaves_the_text(tmp_path):
    (tmp_path / "posts.jsonl").write_text('{"post_id": "1", "text": "Lyon", "gold": "a film"}')
    [post] = after_shards(from_jsonl(tmp_path / "posts.jsonl"), tmp_path)
    assert (post.text, post.gold, post.problems) == ("Lyon", None, [])


LEFTOVERS = ["._a.txt", ".ipynb_checkpoints/a-checkpoint.txt", "__MACOSX/._a.txt", ".DS_Store", "sub/.hidden/b.jpg"]


def test_leftovers_of_other_tools_are_no_posts(tmp_path):
    for name in ["a.txt", *LEFTOVERS]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"Lyon")
    left_out = []
    assert [post.post_id for post in from_folder(tmp_path, left_out)] == ["a"]
    assert sorted(left_out) == sorted(LEFTOVERS)


def test_a_linked_folder_is_named_and_one_that_cannot_be_listed_refused(tmp_path, monkeypatch):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.txt").write_text("Paris")
    (tmp_path / "in" / "a.txt").write_text("Lyon")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "more")
    left_out = []
    assert ([post.post_id for post in from_folder(tmp_path / "in", left_out)], left_out) == (["a"], ["more"])
    scandir = os.scandir

    def deny(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(PermissionError, match="in/sub"):
        list(from_folder(tmp_path / "in"))


def test_entries_of_a_folder_that_are_no_files_or_lead_out_of_it(tmp_path):
    folder = tmp_path / "in"
    (folder / "album.jpg").mkdir(parents=True)
    (folder / "notes.txt").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "out.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "gone.txt").symlink_to(folder / "nowhere.txt")
    (folder / "a.txt").write_text("Lyon")
    (folder / "A.TXT").write_text("Paris")
    (folder / "b.txt").write_text("one")
    (folder / "b.TXT").write_text("two")
    posts = {post.post_id: post for post in from_folder(folder)}
    assert [name for name, post in posts.items() if not post.is_rejected] == ["A", "a"]
    assert "secret" not in posts["out"].text
    assert posts["out"].problems[0].message == "out.txt is a link that leads out of the folder"
    assert posts["gone"].problems[0].message == "gone.txt cannot be read: No such file or directory"
    assert posts["b"].problems[0].message == "both could be the text: b.TXT, b.txt"


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "jpg_large", "heic", ""])
def test_an_image_in_a_folder_is_one_by_its_bytes(tmp_path, suffix):
    data = b"\0\0\0\x18ftypheic" if suffix == "heic" else b"\xff\xd8\xff\xe0"
    (tmp_path / f"a.{suffix}".rstrip(".")).write_bytes(data)
    (tmp_path / "a.txt").write_bytes("\ufeffLyon".encode())
    (tmp_path / "a.psd").write_bytes(b"8BPS")
    [post] = from_folder(tmp_path)
    assert (post.text, post.image_bytes) == ("Lyon", data)


PACKERS = [gzip.compress, bz2.compress, lzma.compress, lambda data: pa.compress(data, "zstd", asbytes=True)]
PACKED = {
    from_jsonl: "".join(f'{{"post_id": "{n}", "text": "{n * 7919 % 9973}"}}\n' for n in range(9000)),
    from_csv: "post_id,text\n" + "".join(f"{n},{n * 7919 % 9973}\n" for n in range(9000)),
}


@pytest.mark.parametrize("read", PACKED)
@pytest.mark.parametrize("pack", PACKERS)
def test_a_packed_file_that_is_cut_is_refused_by_name(tmp_path, read, pack):
    packed = pack(PACKED[read].encode())
    (tmp_path / "posts").write_bytes(packed)
    assert len(list(read(tmp_path / "posts"))) == 9000
    (tmp_path / "posts").write_bytes(packed[: len(packed) - 20])
    with pytest.raises(ValueError, match=r"/posts is damaged: "):
        list(read(tmp_path / "posts"))


@pytest.mark.parametrize("read", PACKED)
@pytest.mark.parametrize("pack", [bytes, *PACKERS])
def test_a_pipe_gives_all_its_rows(tmp_path, read, pack):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = Thread(target=pipe.write_bytes, args=(pack(PACKED[read].encode()),), daemon=True)
    writer.start()
    assert [post.post_id for post in read(pipe)] == list(map(str, range(9000)))
    writer.join(timeout=10)


def test_an_array_may_follow_empty_lines(tmp_path):
    (tmp_path / "posts.json").write_text('\n\n[{"post_id": "1", "text": "a"}]')
    assert [post.text for post in from_jsonl(tmp_path / "posts.json")] == ["a"]


def test_objects_over_several_lines_are_refused(tmp_path):
    (tmp_path / "posts.jsonl").write_text('{\n "post_id": "1",\n "text": "a"\n}\n{\n "post_id": "2"\n}\n')
    with pytest.raises(ValueError, match="objects over several lines; write one object a line"):
        list(from_jsonl(tmp_path / "posts.jsonl"))


@pytest.mark.parametrize("tokens", ["['Vexley', 'in', 'Lyon']", '[""Vexley"", ""in""]', "['Vexley' 'in']"])
def test_a_written_list_is_not_taken_for_tokens(tmp_path, tokens):
    (tmp_path / "posts.csv").write_text(f'post_id,text,tokens\n1,Vexley in,"{tokens}"\n2,a [b],a [ b ]\n')
    first, second = from_csv(tmp_path / "posts.csv")
    assert "a written list" in first.problems[0].message
    assert (second.tokens, second.problems) == (["a", "[", "b", "]"], [])


def test_a_pipe_is_not_waited_for_and_accents_may_be_written_apart(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "cafe\u0301.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    (tmp_path / "caf\xe9.txt").write_text("Lyon")
    cafe, pipe = from_folder(tmp_path)
    assert (cafe.text, cafe.image_bytes) == ("Lyon", b"\xff\xd8\xff\xe0")
    assert pipe.problems[0].message == "pipe.txt is a pipe, socket or device"
