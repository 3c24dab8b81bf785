"""A small run whose posts have what reviews stumble over: emoji, boxes, ids that stand twice, rejected posts."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gem_ray.data.tokenize import tokenize, word_spans
from gem_ray.records import ANNOTATION_SCHEMA, Box, Entity, Post, ProblemKind
from gem_ray.review.sample import sample_for_certificate
from gem_ray.taxonomy import FMNERG

POSTS = 40
_CITIES = ("Lyon", "New York", "Porto", "São Paulo", "Ōsaka")
_NAMES = ("Ada Byron", "NASA", "Manu Chao")
_FINE = ("intellectual", "government_agency", "musician")


def make_post(number: int) -> Post:
    """A post with two or three mentions, the first of them seen in the image of every second post."""
    city, name = _CITIES[number % len(_CITIES)], _NAMES[number % len(_NAMES)]
    text = f"👩‍🚀 {name} is in <b>{city}</b> 🗽 &amp; {city} waits\r\nno {number}"
    post = Post(f"post-{number // 2 if number < 8 else number}", text, tokenize(text), row_id=(number << 32) + 7)
    if number % 13 == 12:
        post.fail("prepare", ProblemKind.BAD_RECORD, "rejected on purpose")
        return post
    post.entities = [_entity(post, name, _FINE[number % 3], 0.9 - number / 100)]
    post.entities.append(_entity(post, city, "city", 0.95))
    if number % 2:
        post.image_width, post.image_height = 400, 200
        post.entities[1].box, post.entities[1].box_score, post.entities[1].seen = Box(100, 50, 300, 150), 0.5, True
    return post


def _entity(post: Post, text: str, fine: str, score: float) -> Entity:
    start = post.text.index(text)
    end = start + len(text)
    words = [place for place, (s, e) in enumerate(word_spans(post.text, post.tokens)) if s < end and e > start]
    return Entity(text, start, end, words[0], words[-1] + 1, FMNERG.parent[fine], fine, score)


def _write_run(out: Path, posts: list[Post], run_id: str = "run-1") -> str:
    """A run's output with these posts."""
    (out / "annotations").mkdir(parents=True)
    rows = [post.annotation() | {"run_id": run_id, "models": []} for post in posts]
    pq.write_table(pa.Table.from_pylist(rows, ANNOTATION_SCHEMA), out / "annotations" / "part-0.parquet")
    (out / "run.json").write_text(json.dumps({"run_id": run_id, "config": {"labels": "fmnerg"}}))
    return str(out)


@pytest.fixture(scope="session")
def write_run():
    """(folder, posts, run id) -> the output of a run with these posts."""
    return _write_run


@pytest.fixture(scope="session")
def posts() -> list[Post]:
    return [make_post(number) for number in range(POSTS)]


@pytest.fixture(scope="session")
def run(posts, tmp_path_factory) -> str:
    return _write_run(tmp_path_factory.mktemp("review") / "run", posts)


@pytest.fixture(scope="session")
def review_path(run, tmp_path_factory) -> Path:
    """The review that the stored export of Label Studio is of: 24 of 40 posts, those with an image shown with it."""
    folder = tmp_path_factory.mktemp("reviewed")
    (folder / "images").mkdir()
    for number in range(1, POSTS, 2):
        Image.new("RGB", (400, 200), (number, 0, 0)).save(folder / "images" / f"{make_post(number).post_id}.png")
    sample_for_certificate(run, folder / "review", 24, seed=3, images=str(folder / "images"))
    return folder / "review"
