"""Every program of examples/ runs, on one Ray, and prints what is true; the notebook's cells run in order."""

from __future__ import annotations

import io
import json
import re
import runpy
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import ray
from pyarrow import fs

from gem_ray.data.generated import generate
from gem_ray.data.shards import write_posts
from gem_ray.ray_private.core import start_local_ray
from gem_ray.stages import STAGES

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
POSTS = 40
ELSEWHERE = {"client.py"}  # with the service of tests/serving/test_client.py


def run(name: str, *arguments: object) -> str:
    """Run a program of examples/ as `python` does, in this process; gives back what it prints."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as said:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return said.getvalue()


@pytest.fixture(scope="module", autouse=True)
def local_ray(s3: Any) -> Iterator[None]:
    """A Ray that knows the S3 server; one of other tests may not."""
    ray.shutdown()
    start_local_ray(num_cpus=6)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def posts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "posts"
    write_posts(generate(POSTS, seed=1), folder)
    return folder


@pytest.fixture(scope="module")
def annotated(s3: Any, posts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What s3.py makes of the posts, copied to a folder, and what it prints."""
    bucket, out = s3.bucket("examples"), tmp_path_factory.mktemp("annotated") / "out"
    fs.copy_files(posts.as_uri(), f"{bucket}/posts")
    said = run("s3.py", f"{bucket}/posts", f"{bucket}/out")
    fs.copy_files(f"{bucket}/out", out.as_uri())
    return out, said


@pytest.fixture(scope="module")
def rows(annotated: tuple[Path, str]) -> list[dict[str, Any]]:
    return ds.dataset(annotated[0] / "annotations", partitioning="hive").to_table().to_pylist()


def test_s3(annotated: tuple[Path, str]) -> None:
    assert re.fullmatch(
        rf"{POSTS} posts, \d+ entities, 0 rejected\n0 posts the second time\n{POSTS} rows, {POSTS} of them ok\n",
        annotated[1],
    )


def test_annotate_in_process(posts: Path) -> None:
    said = run("annotate_in_process.py", posts)
    assert "mine (degraded): Taylor Swift sings in Paris\n  Taylor Swift: person/" in said
    assert "  prepare: the post has neither image nor image_uri\n" in said
    assert said.count("(ok): ") == 8
    assert "Box(x1=" in said


def test_stage_in_ray_data(posts: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    run("stage_in_ray_data.py", posts, tmp_path / "people")
    people = pq.read_table(tmp_path / "people").to_pylist()
    assert {row["coarse"] for row in people} == {"person"}
    found = {(row["post_id"], entity["text"]) for row in rows for entity in row["entities"]}
    assert {(row["post_id"], row["name"]) for row in people} <= found


def test_custom_stage(posts: Path) -> None:
    table = list(STAGES)
    try:
        *others, repeat = run("custom_stage.py", posts).splitlines()
    finally:
        STAGES[:] = table
    assert [line.split()[1] for line in others] == ["ok", "ok"]
    assert repeat == "repeat rejected [] ['the post repeats another one']"


def test_custom_reranker(posts: Path) -> None:
    lines = run("custom_reranker.py", posts).splitlines()
    assert lines
    assert all(re.fullmatch(r".+: \w+ -> \w+, [01]\.\d\d", line) for line in lines)
    assert any(line.split(" -> ")[0].split(": ")[1] != line.split(" -> ")[1].split(",")[0] for line in lines)


def test_read_results(annotated: tuple[Path, str], rows: list[dict[str, Any]]) -> None:
    said = run("read_results.py", annotated[0])
    mentions = Counter(entity["fine"] for row in rows for entity in row["entities"])
    seen = Counter(entity["fine"] for row in rows for entity in row["entities"] if entity["seen"])
    fine = min(mentions, key=lambda fine: (-mentions[fine], fine))  # the first row of both tables
    assert len(re.findall(rf"│ {fine} +[│┆] +{mentions[fine]} +[│┆] +{seen[fine]} +│", said)) == 2, said


def test_review_round_trip(annotated: tuple[Path, str], posts: Path, tmp_path: Path) -> None:
    said = run("review_round_trip.py", annotated[0], posts, tmp_path / "review")
    certificate = json.loads((tmp_path / "review" / "certificate" / "certificate.json").read_text())
    assert certificate["checked"] == 30
    assert certificate["tasks"]["mner"]["f1"]["value"] == pytest.approx(1)  # every prediction was accepted
    assert re.search(r"^30 posts with \d\d gold mentions$", said, re.MULTILINE)


def test_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt

    shown: list[int] = []
    monkeypatch.setattr(plt, "show", lambda: (shown.append(len(plt.gcf().axes)), plt.close()))
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = json.loads((EXAMPLES / "pictures.ipynb").read_text(encoding="utf-8"))["cells"]
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        exec("".join(cell["source"]), names)
        pictures = [output for output in cell["outputs"] if "image/png" in output["data"]]
        assert len(pictures) == ("plt.show()" in cell["source"])  # as it was stored
    assert shown == [6, 3, 1]


def test_every_example_is_listed_and_run_here() -> None:
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    listed = re.findall(r"^\| \[(\S+)\]\(\1\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(files) == sorted(listed)
    assert {name for name in files if f'"{name}"' not in Path(__file__).read_text(encoding="utf-8")} == set()
