"""One small Ray for all tests of the pipeline, a data set with everything that goes wrong, and one run over it."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from gem_ray.annotator import GuardedStage, build_stage
from gem_ray.config import Config, load_config
from gem_ray.data.generated import generate
from gem_ray.data.shards import write_posts
from gem_ray.pipeline.graph import PoolActor
from gem_ray.pipeline.run import annotate_dataset
from gem_ray.pipeline.summary import RunSummary
from gem_ray.pipeline.watching import WatchedStage
from gem_ray.ray_private.core import start_local_ray
from gem_ray.records import Entity, Post, Status
from gem_ray.stages import StageSpec

GOOD_POSTS = 24


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    start_local_ray(num_cpus=4)
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
def quick_actor() -> type[PoolActor]:
    """The actor of `text_config` without its models, which take most of a short run to load.

    In place of the tagger, words with a capital letter are people.
    """

    def find_capitals(posts: list[Post]) -> None:
        for post in posts:
            if post.status is Status.REJECTED:
                continue
            found = enumerate(re.finditer(r"\b[A-Z]\w*", post.text))
            post.entities = [
                Entity(word[0], *word.span(), number, number + 1, "person", "other", score=0.5)
                for number, word in found
            ]

    class QuickActor(PoolActor):  # in a function, so that it travels to other processes by value
        def _load(self, models: dict[str, str]) -> list[WatchedStage]:
            def stage(spec: StageSpec) -> GuardedStage:
                is_tagger = spec.name == "tag"
                return GuardedStage("tag", find_capitals) if is_tagger else build_stage(spec, self._config, models)

            return [WatchedStage(stage(spec), self._ledger, is_shared=True) for spec in self._pool.stages]

    return QuickActor


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
