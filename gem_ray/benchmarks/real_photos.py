"""The default preset on real posts with real photos: what it must not change, because it knows nothing of photos."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from PIL import Image

from gem_ray.annotator import Annotator
from gem_ray.config import Config
from gem_ray.data.generated import IMAGE_SIZES
from gem_ray.records import Post, Status


def sample_photos() -> list[bytes]:
    """JPEGs of the photos that scikit-learn and Matplotlib bring, as they are and in the generated images' sizes."""
    from matplotlib.cbook import get_sample_data
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    photos.append(Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB"))
    scaled = [photo.resize(size) for photo, size in zip(cycle(photos), IMAGE_SIZES, strict=False)]
    return [_jpeg(photo) for photo in (*photos, *scaled)]


def compare_with_text_only(posts: Sequence[Post], config: Config) -> dict[str, Any]:
    """Annotate posts without images, and with a photo each, in this process.

    Args:
        posts: their own images are left out.
        config: the whole system.

    Returns:
        `posts`, `entities` of the text-only run, and with photos: `changed_posts`, whose entities, categories or scores
        are others; entities that are `reranked`, `judged` (`seen` is not null), or have a `box`; posts that are not
        `ok`.
    """
    blind = [copy.copy(post) for post in posts]
    for post in blind:
        post.image_bytes = post.image_uri = None
    seeing = copy.deepcopy(blind)
    for post, photo in zip(seeing, cycle(sample_photos()), strict=False):
        post.image_bytes = photo
    annotator = Annotator.from_config(config)
    annotator.annotate(blind)
    annotator.annotate(seeing)
    entities = [entity for post in seeing for entity in post.entities]
    return {
        "posts": len(posts),
        "entities": sum(len(post.entities) for post in blind),
        "changed_posts": sum(_said(one) != _said(other) for one, other in zip(blind, seeing, strict=True)),
        "reranked": sum(entity.reranked for entity in entities),
        "judged": sum(entity.seen is not None for entity in entities),
        "boxes": sum(entity.box is not None for entity in entities),
        "not_ok": sum(post.status is not Status.OK for post in seeing),
    }


def _said(post: Post) -> list[tuple[int, int, str, str, float]]:
    return [(each.start, each.end, each.coarse, each.fine, each.score) for each in post.entities]


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
