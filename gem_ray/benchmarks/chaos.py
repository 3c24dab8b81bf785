"""A run that is killed again and again: its driver, an actor's process, a whole node. What is lost, what is kept?"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from gem_ray.benchmarks.driver import committed_rows, start_driver, wait_for
from gem_ray.data.files import open_filesystem
from gem_ray.data.generated import generate
from gem_ray.data.shards import write_posts
from gem_ray.evaluation.predictions import iterate_predictions
from gem_ray.ray_private.core import forked_workers
from gem_ray.records import Post

_SEED = 7
_NODES, _CPUS_PER_NODE = 3, 4
_KILLS = ("driver", "actor", "node")


def measure_chaos(location: str, posts: int, shards: int, settings: tuple[str, ...], seed: int = 0) -> dict[str, Any]:
    """Annotate the same posts undisturbed and under kills at random moments, and compare.

    Half of the images are in the shards, half are objects that the posts name.

    Args:
        location: a folder, local or `s3://`; gets posts, images and both outputs.
        posts: generated posts.
        shards: files that hold them.
        settings: overrides of the configuration, as `filter.gamma=0.3`.
        seed: of the moments.

    Returns:
        For each kill the posts done before it and the share of them that was kept; and whether every row is there once,
        as in the undisturbed run.
    """
    _write_input(location, posts, shards)
    settings = ("pipeline.pools.tag.max_actors=2", *settings)  # not one for each of the CPUs that are pretended
    rng = random.Random(seed)
    node = {"num_cpus": _CPUS_PER_NODE, **forked_workers()}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    nodes = [cluster.add_node(**node) for _ in range(_NODES - 1)]
    try:
        started = time.perf_counter()
        _drive(cluster, location, "undisturbed", settings).wait()
        undisturbed = time.perf_counter() - started
        kills = []
        for kill in _KILLS:
            driver = _drive(cluster, location, "killed", settings)
            kills.append(_kill(kill, driver, cluster, nodes, location, rng.uniform(0.12, 0.2) * posts))
        started = time.perf_counter()
        _drive(cluster, location, "killed", settings).wait()
    finally:
        cluster.shutdown()
    first, second = (_annotations(f"{location}/{name}") for name in ("undisturbed", "killed"))
    return {
        "posts": posts,
        "kills": kills,
        "every_row_once": sorted(first) == sorted(second) and len(second) == posts,
        "different_rows": sum(not _same(first[row], second[row]) for row in first.keys() & second.keys()),
        "seconds_undisturbed": undisturbed,
        "seconds_of_last_start": time.perf_counter() - started,
    }


def _write_input(location: str, posts: int, shards: int) -> None:
    filesystem, root = open_filesystem(f"{location}/images")
    filesystem.create_dir(root, recursive=True)
    is_remote = location.startswith("s3://")

    def with_uri(post: Post, number: int) -> Post:
        if number % 2 or post.image_bytes is None:
            return post
        with filesystem.open_output_stream(f"{root}/{number}.jpg") as stream:
            stream.write(post.image_bytes)
        uri = f"{location}/images/{number}.jpg" if is_remote else f"{number}.jpg"
        return replace(post, image_bytes=None, image_uri=uri)

    given = (with_uri(post, number) for number, post in enumerate(generate(posts, _SEED)))
    write_posts(given, f"{location}/posts", per_shard=-(-posts // shards))


def _drive(cluster: Cluster, location: str, name: str, settings: tuple[str, ...]) -> subprocess.Popen[bytes]:
    images = () if location.startswith("s3://") else (f"image.root={location}/images",)
    settings = (*settings, *images)
    environment = {"RAY_ADDRESS": cluster.address}
    return start_driver(f"{location}/posts", f"{location}/{name}", settings, environment=environment)


def _kill(
    kill: str, driver: subprocess.Popen[bytes], cluster: Cluster, nodes: list[Any], location: str, after: float
) -> dict[str, Any]:
    """Wait until so many posts more are done, kill, and see what is left; a driver that continues is stopped then."""
    before = committed_rows(f"{location}/killed")
    done = wait_for(driver, before + after)
    if driver.poll() is not None:
        raise RuntimeError(f"the run ended at {done} posts, before it was killed")
    if kill == "node":
        cluster.remove_node(nodes.pop(), allow_graceful=False)
    elif kill == "actor":
        os.kill(_an_actor(), signal.SIGKILL)
    if kill != "driver":
        done = max(done, wait_for(driver, done + after / 2))  # it continues without
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(5)  # what the cluster still had in hand ends
    kept = committed_rows(f"{location}/killed")
    return {"killed": kill, "done": done, "kept": kept, "kept_share": min(1.0, kept / done)}


def _an_actor() -> int:
    """The process of an actor that runs a stage with a model, in a Ray that this process has started."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            if any("PoolActor" in part for part in process.cmdline()):
                return process.pid
    raise RuntimeError("no actor's process was found")


def _annotations(output: str) -> dict[int, Post]:
    rows: dict[int, Post] = {}
    for post in iterate_predictions(output):
        assert post.row_id is not None  # `annotate` writes it
        if post.row_id in rows:
            raise RuntimeError(f"row {post.row_id} is there twice in {output}")
        rows[post.row_id] = post
    return rows


def _same(left: Post, right: Post) -> bool:
    """Whether two rows say the same; other batches change the last digits of probabilities, which are left out."""
    return _said(left) == _said(right)


def _said(post: Post) -> tuple[Any, ...]:
    entities = [(e.start, e.end, e.fine, e.reranked, e.box, e.box_source) for e in post.entities]
    return post.post_id, post.status, post.tokens, entities, post.problems
