"""Annotate posts in this process: no Ray, no service.

python examples/annotate_in_process.py posts/
"""

import sys

from gem_ray import Annotator, Post, load_config, read_posts

annotator = Annotator.from_config(load_config("nano"))
posts = [Post("mine", "Taylor Swift sings in Paris"), *read_posts(sys.argv[1], limit=8)]
for post in annotator.annotate(posts):
    print(f"{post.post_id} ({post.status}): {post.text}")
    for entity in post.entities:
        print(f"  {entity.text}: {entity.coarse}/{entity.fine}, {entity.score:.2f}, {entity.box or 'no box'}")
    for problem in post.problems:
        print(f"  {problem.stage}: {problem.message}")
