"""Corrections as shards with gold: training and calibration data from then on."""

from __future__ import annotations

from dataclasses import replace

from gem_ray.data.output import input_of_run
from gem_ray.data.shards import read_numbered_posts, write_posts
from gem_ray.data.storage import open_storage
from gem_ray.records import Post
from gem_ray.review.corrections import Corrections
from gem_ray.review.folder import Review


def write_gold(review: Review, corrections: Corrections, out: str, images: str | None = None) -> int:
    """Write the checked posts, in the order of the review.

    Args:
        review: the sample.
        corrections: what people made of it.
        out: a folder without shards.
        images: the shards that were annotated, whose images go into the new ones; posts without one have none.

    Returns:
        How many posts were written.

    Raises:
        FileExistsError: `out` holds shards already.
        FileNotFoundError, ValueError: `images` cannot be read, or its rows are not the posts of the run.
    """
    posts = [corrections.posts[post.row_id] for post in review.posts if post.row_id in corrections.posts]
    return write_posts(_with_images(posts, review, images) if images else posts, out)


def _with_images(posts: list[Post], review: Review, images: str) -> list[Post]:
    wanted = {post.row_id: post for post in posts}
    found: dict[int | None, Post] = {}
    for source in read_numbered_posts(images, input_of_run(open_storage(review.facts.run))):
        post = wanted.get(source.row_id)
        if post is not None:
            if source.post_id != post.post_id:
                raise ValueError(
                    f"row {source.row_id} of {images} is {source.post_id!r}, and {post.post_id!r} in the run"
                )
            found[source.row_id] = replace(post, image_bytes=source.image_bytes, image_uri=source.image_uri)
    return [found.get(post.row_id, post) for post in posts]
