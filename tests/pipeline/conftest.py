"""One small Ray for all tests of the pipeline, a data set with everything that goes wrong, and one run over it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from gem_ray.config import Config, load_config
from gem_ray.data.generated import generate
from gem_ray.data.shards import write_posts
from gem_ray.noise import GRAIN
from gem_ray.pipeline.run import annotate_dataset
from gem_ray.pipeline.summary import RunSummary
from gem_ray.records import Post

GOOD_POSTS = 24


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Any, Any], None]:
    """Equal up to the float noise of other batches, which may move a rounded number by a step."""
    return _assert_same


def _assert_same(left: Any, right: Any, where: str = "") -> None:
    """Equal up to the float noise of other batches, which may move a rounded number by a step."""
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            _assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), where
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            _assert_same(a, b, f"{where}[{index}]")
    elif isinstance(left, float):
        assert left == pytest.approx(right, abs=1e-4, rel=2.001 * GRAIN), where
    else:
        assert left == right, where


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def config() -> Config:
    """Small blocks and batches, so that a few posts pass through several actors' batches."""
    sizes = ["pipeline.pools.tag.batch_size=7", "pipeline.pools.tag.max_actors=2"]
    return load_config(overrides=["pipeline.rows_per_block=8", *sizes])


@pytest.fixture(scope="session")
def text_config(config: Config) -> Config:
    """The stages that need no image, in one process: quick to start."""
    disabled = {"enabled": False}
    pools = [pool.model_copy(update={"max_actors": 1}) for pool in config.pipeline.pools]
    return config.model_copy(
        update={
            "reranker": config.reranker.model_copy(update=disabled),
            "grounder": config.grounder.model_copy(update=disabled),
            "pipeline": config.pipeline.model_copy(update={"pools": pools}),
        }
    )


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good posts in shards and in a tar, rows that break something, and files in which columns are empty."""
    folder = tmp_path_factory.mktemp("posts")
    posts = list(generate(GOOD_POSTS, seed=3))
    write_posts(posts[:16], folder / "generated", per_shard=10)
    write_tar(posts[16:], folder / "more.tar")
    text, image = posts[0].text, posts[0].image_bytes
    bad = {
        "post_id": ["twice", "twice", "empty text", None, "no image", "broken image", "no such file"],
        "text": [text, text, "  ", text, text, text, text],
        "image": [image, image, image, image, None, b"not an image", None],
        "image_uri": [None, None, None, None, None, None, "/there/is/none.jpg"],
    }
    pq.write_table(pa.table(bad), folder / "bad_rows.parquet")
    pq.write_table(pa.table({"post_id": [7, 8], "text": [text, "Lyon"], "likes": [1, 2]}), folder / "numbers.parquet")
    nothing = pa.nulls(3, pa.string())
    pq.write_table(pa.table({"post_id": ["a", "b"], "text": nothing[:2]}), folder / "text_is_null.parquet")
    pq.write_table(pa.table({"post_id": nothing, "text": nothing}), folder / "all_is_null.parquet")
    return folder


def write_tar(posts: list[Post], path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for index, post in enumerate(posts):
            values = json.dumps({"post_id": post.post_id, "text": post.text, "tokens": post.tokens}).encode()
            for name, data in ((f"{index}.jpg", post.image_bytes or b""), (f"{index}.json", values)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="session")
def run(
    local_ray: None, dataset: Path, config: Config, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, RunSummary]:
    """The whole system over the data set, once for all tests that look at its output."""
    output = tmp_path_factory.mktemp("run") / "out"
    return output, annotate_dataset(dataset, output, config)
