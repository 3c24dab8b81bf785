"""The same posts in one process and online. That bulk runs give what one process gives is `tests/pipeline`'s."""

from __future__ import annotations

import base64
import copy

from gem_ray.annotator import Annotator
from gem_ray.config import load_config


def row(annotation):
    """The fields that a post's annotation has everywhere."""
    own = ("row_id", "run_id", "models", "seconds", "gamma")
    return {name: value for name, value in annotation.items() if name not in own}


def request(post):
    image = base64.b64encode(post.image_bytes).decode()
    return {"post_id": post.post_id, "text": post.text, "tokens": post.tokens or None, "image": image}


def test_two_hundred_posts_give_the_same_annotations_in_process_and_over_http(service, posts, assert_same):
    online = {}
    for first in range(0, len(posts), 25):
        asked = [request(post) for post in posts[first : first + 25]]
        answer = service.client.post("/v1/annotate/batch", json={"posts": asked})
        assert answer.status_code == 200, answer.text
        online |= {each["post_id"]: each for each in answer.json()["annotations"]}
    in_process = Annotator.from_config(load_config()).annotate([copy.deepcopy(post) for post in posts])

    assert len(online) == len(posts) == 200
    assert sum(entity.reranked for post in in_process for entity in post.entities) > 20
    assert sum(entity.box is not None for post in in_process for entity in post.entities) > 100
    for post in in_process:
        assert_same(row(post.annotation()), row(online[post.post_id]), post.post_id)
