"""Add a stage: repeats of somebody else's post are rejected before any model sees them.

python examples/custom_stage.py posts/
"""

import sys

from gem_ray import Annotator, Config, Post, ProblemKind, load_config, read_posts
from gem_ray.stages import STAGES, StageSpec


class RepeatFilter:
    """Rejects posts that begin as a repeated one does."""

    @classmethod
    def from_config(cls, config: Config) -> "RepeatFilter":
        return cls()

    def __call__(self, posts: list[Post]) -> list[Post]:
        for post in posts:
            if post.text.startswith("RT @") and not post.is_rejected:
                post.fail("repeat", ProblemKind.FILTERED, "the post repeats another one")
        return posts


# After `prepare`. For runs on Ray, name the class as "module:Class", so that actors can import it.
STAGES.insert(1, StageSpec("repeat", RepeatFilter.from_config, has_model=False))

posts = list(read_posts(sys.argv[1], limit=2))
posts.append(Post("repeat", f"RT @somebody: {posts[0].text}", image_bytes=posts[0].image_bytes))
for post in Annotator.from_config(load_config("nano")).annotate(posts):
    print(
        post.post_id, post.status, [entity.text for entity in post.entities], [each.message for each in post.problems]
    )
