import json

import pytest
from PIL import Image

from gem_ray.data.convert import from_csv, from_folder, from_jsonl, from_webdataset
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
    assert posts[7].is_rejected  # over the csv module's limit for a cell
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


def test_a_folder_of_shards_can_be_written_again(folder, tmp_path):
    (folder / "posts.jsonl").write_text('{"post_id": "1", "text": "a", "image": "images/a.png"}')
    written = after_shards(from_jsonl(folder / "posts.jsonl"), tmp_path)
    assert list(from_webdataset(tmp_path / "shards")) == written
