"""A shard full of bad rows among good ones, through the command line, as an operator would meet it."""

from __future__ import annotations

import copy
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gem_ray.annotator import Annotator
from gem_ray.config import load_config
from gem_ray.data.generated import generate
from gem_ray.data.prepare import row_from_post
from gem_ray.evaluation.predictions import read_predictions
from gem_ray.records import INPUT_SCHEMA, Post, ProblemKind, Status

pytestmark = pytest.mark.alone

GOOD = list(generate(24, seed=12))
TEXT = "look at Tessa Brandl 😍"  # an entity, so that the image is needed
MAX_BYTES = 400_000


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG whose header promises 60,000 × 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    png = encoded(Image.new("RGB", (1, 1)), "PNG")
    return png[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 500, 3), dtype=np.uint8))
JPEG = encoded(NOISE, "JPEG")

# Name -> (the row, apart from its id, and the problem that it must have).
BAD: dict[str, tuple[dict[str, Any], ProblemKind]] = {
    "text is null": ({"image": JPEG}, ProblemKind.BAD_RECORD),
    "text is empty": ({"text": "", "image": JPEG}, ProblemKind.BAD_RECORD),
    "text is white space": ({"text": " \n\t", "image": JPEG}, ProblemKind.BAD_RECORD),
    "text is too long": ({"text": "long " * 3000, "image": JPEG}, ProblemKind.TEXT_TOO_LONG),
    "tokens are not in the text": ({"text": TEXT, "tokens": ["not", "there"], "image": JPEG}, ProblemKind.BAD_RECORD),
    "a token is null": ({"text": TEXT, "tokens": ["look", None], "image": JPEG}, ProblemKind.BAD_RECORD),
    "no image at all": ({"text": TEXT}, ProblemKind.IMAGE_MISSING),
    "file is not there": ({"text": TEXT, "image_uri": "none.jpg"}, ProblemKind.IMAGE_MISSING),
    "file is outside": ({"text": TEXT, "image_uri": "../../../etc/passwd"}, ProblemKind.IMAGE_FORBIDDEN),
    "absolute path": ({"text": TEXT, "image_uri": "/etc/passwd"}, ProblemKind.IMAGE_FORBIDDEN),
    "web address": ({"text": TEXT, "image_uri": "https://example.org/a.jpg"}, ProblemKind.IMAGE_FORBIDDEN),
    "zero bytes": ({"text": TEXT, "image": b""}, ProblemKind.IMAGE_UNREADABLE),
    "html": ({"text": TEXT, "image": b"<!DOCTYPE html><html>gone</html>"}, ProblemKind.IMAGE_UNREADABLE),
    "svg": ({"text": TEXT, "image": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}, ProblemKind.IMAGE_UNREADABLE),
    "pdf": ({"text": TEXT, "image": b"%PDF-1.7 " + bytes(100)}, ProblemKind.IMAGE_UNREADABLE),
    "noise": ({"text": TEXT, "image": bytes(range(256)) * 4}, ProblemKind.IMAGE_UNREADABLE),
    "cut jpeg": ({"text": TEXT, "image": JPEG[: len(JPEG) // 2]}, ProblemKind.IMAGE_UNREADABLE),
    "cut png": ({"text": TEXT, "image": encoded(NOISE.resize((60, 50)), "PNG")[:2000]}, ProblemKind.IMAGE_UNREADABLE),
    "cut webp": ({"text": TEXT, "image": encoded(NOISE, "WEBP")[:900]}, ProblemKind.IMAGE_UNREADABLE),
    "damaged gif": ({"text": TEXT, "image": encoded(NOISE, "GIF")[:30]}, ProblemKind.IMAGE_UNREADABLE),
    "bomb": ({"text": TEXT, "image": bomb()}, ProblemKind.IMAGE_TOO_LARGE),
    "too many bytes": ({"text": TEXT, "image": encoded(NOISE, "BMP")}, ProblemKind.IMAGE_TOO_LARGE),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("bad")
    rows = [{"post_id": name, **row} for name, (row, _) in BAD.items()]
    good = [row_from_post(post) for post in GOOD]
    mixed = [row for pair in zip(good, rows, strict=False) for row in pair] + good[len(rows) :]
    (folder / "posts").mkdir()
    pq.write_table(pa.Table.from_pylist(mixed, schema=INPUT_SCHEMA), folder / "posts" / "part.parquet")
    settings = [f"image.root={folder / 'posts'}", f"image.max_bytes={MAX_BYTES}"]
    command = [sys.executable, "-m", "gem_ray", "annotate", folder / "posts", folder / "out"]
    options = [part for setting in settings for part in ("--set", setting)]
    # As batch systems have it: too long for the sockets that Ray would make in it.
    temporary = folder / ("t" * 60)
    temporary.mkdir()
    variables = os.environ | {"TMPDIR": str(temporary)}
    run = subprocess.run([*command, *options], capture_output=True, text=True, timeout=400, env=variables)
    return run, folder / "out"


@pytest.fixture(scope="module")
def annotated(finished: tuple[subprocess.CompletedProcess[str], Path]) -> dict[str, Post]:
    posts = read_predictions(finished[1])
    assert len(posts) == len(GOOD) + len(BAD)
    return {post.post_id: post for post in posts}


def test_exit_code_says_that_rows_were_rejected_and_the_last_line_how_many(
    finished: tuple[subprocess.CompletedProcess[str], Path], annotated: dict[str, Post]
) -> None:
    rejected = sum(post.status is Status.REJECTED for post in annotated.values())
    assert finished[0].returncode == 3, finished[0].stderr
    assert f"rejected {rejected}" in finished[0].stdout.splitlines()[-1]
    assert "core_worker" not in finished[0].stderr  # Ray's own complaints
    assert json.loads((finished[1] / "run.json").read_text())["statuses"]["rejected"] == rejected


@pytest.mark.parametrize("name", BAD)
def test_bad_row_leaves_with_its_problem(name: str, annotated: dict[str, Post]) -> None:
    post, kind = annotated[name], BAD[name][1]
    assert [problem.kind for problem in post.problems] == [kind]
    assert post.status is (Status.DEGRADED if kind.startswith("image_") else Status.REJECTED)
    assert bool(post.entities) is kind.startswith("image_")


def test_good_rows_are_annotated_as_in_process_without_the_bad_ones(annotated: dict[str, Post]) -> None:
    alone = Annotator.from_config(load_config()).annotate(copy.deepcopy(GOOD))
    assert any(entity.box for post in alone for entity in post.entities)
    for one in alone:
        other = annotated[one.post_id]
        assert (one.status, one.problems) == (other.status, other.problems)
        assert [exact(entity) for entity in one.entities] == [exact(entity) for entity in other.entities]
        for name in ("score", "entropy", "match_score"):
            expected = [getattr(entity, name) for entity in one.entities]
            np.testing.assert_allclose([getattr(entity, name) for entity in other.entities], expected, atol=1e-4)


def exact(entity: Any) -> tuple[Any, ...]:
    return (
        entity.text,
        entity.start,
        entity.end,
        entity.fine,
        entity.reranked,
        entity.point,
        entity.box,
        entity.box_source,
    )
