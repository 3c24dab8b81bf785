"""Annotations beside the posts that they are of: by `post_id`, and by row where ids are not unique.

A post whose id stands twice is called `ID (row N)` on both sides, with its `row_id`. Everything else may then go by id.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from gem_ray.evaluation.rules import EvaluationError
from gem_ray.records import Post


def with_distinct_ids(posts: Iterable[Post]) -> list[Post]:
    """The posts; those whose id stands twice are named by their rows as well.

    Raises:
        EvaluationError: an id stands twice, and the posts come without rows.
    """
    posts = list(posts)
    repeated = repeated_ids(posts)
    return [_named_by_row(post) if post.post_id in repeated else post for post in posts]


def matched(annotated: Iterable[Post], inputs: Sequence[Post]) -> Iterator[Post]:
    """Annotations with the ids that their posts have among `inputs`.

    Args:
        annotated: as they were written, with their `row_id`.
        inputs: posts with distinct ids, some of them named by row.

    Raises:
        EvaluationError: several annotations could be of one post.
    """
    rows = {post.row_id: post for post in inputs}
    repeated = {_plain_id(post) for post in inputs if is_named_by_row(post)}
    single = {post.post_id for post in inputs} - repeated
    seen: set[str] = set()
    for post in annotated:
        if post.post_id in repeated:
            own = rows.get(post.row_id)
            if own is None or _plain_id(own) != post.post_id:
                raise EvaluationError(
                    f"post_id {post.post_id!r} stands twice, and row {post.row_id} of the annotations is none of its "
                    "rows: give the files that were annotated, all of them"
                )
            post = replace(post, post_id=own.post_id)
        elif post.post_id in single and post.post_id in seen:
            raise EvaluationError(
                f"post_id {post.post_id!r} stands twice in the annotations and not in the posts beside them: give the "
                "files that were annotated, all of them"
            )
        seen.add(post.post_id)
        yield post


def repeated_ids(posts: Iterable[Post]) -> set[str]:
    """The ids that more than one post has."""
    return {post_id for post_id, count in Counter(post.post_id for post in posts).items() if count > 1}


def id_by_row(post_id: str, row_id: int | None) -> str:
    """What a post is called whose id stands twice."""
    return f"{post_id} (row {row_id})"


def _named_by_row(post: Post) -> Post:
    if post.row_id is None:
        raise EvaluationError(f"post_id {post.post_id!r} stands twice, and nothing tells the two posts apart")
    return replace(post, post_id=id_by_row(post.post_id, post.row_id))


def is_named_by_row(post: Post) -> bool:
    """Whether its id alone would not tell it apart."""
    return post.post_id.endswith(id_by_row("", post.row_id))


def _plain_id(post: Post) -> str:
    return post.post_id.removesuffix(id_by_row("", post.row_id))
