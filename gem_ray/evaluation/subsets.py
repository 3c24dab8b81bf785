"""Scores of a part of the mentions: the rest is left out of gold and of what was predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from gem_ray.data.tokenize import word_spans
from gem_ray.evaluation.rules import words_of
from gem_ray.records import GoldEntity, Post


def keep_mentions(
    gold: Sequence[Post], predicted: Sequence[Post], is_wanted: Callable[[str], bool]
) -> tuple[list[Post], list[Post]]:
    """Gold and predictions without the gold mentions that are not wanted, and without what touches these.

    What is predicted where gold has nothing stays, whichever part is scored.

    Args:
        gold: posts with `gold`.
        predicted: of the same posts; others stay as they are.
        is_wanted: told a gold mention's words, with a space between each two.
    """
    kept, unwanted = [], {}
    for post in gold:
        words = words_of(post)
        spans = word_spans(post.text, list(words))

        def wanted(mention: GoldEntity, words: Sequence[str] = words) -> bool:
            return is_wanted(" ".join(words[mention.word_start : mention.word_end]))

        mentions = post.gold or []
        kept.append(replace(post, gold=[mention for mention in mentions if wanted(mention)]))
        unwanted[post.post_id] = [
            (spans[mention.word_start][0], spans[mention.word_end - 1][1])
            for mention in mentions
            if not wanted(mention)
        ]
    return kept, [_without(post, unwanted.get(post.post_id, [])) for post in predicted]


def _without(post: Post, places: Sequence[tuple[int, int]]) -> Post:
    entities = [
        entity
        for entity in post.entities
        if not any(entity.start < end and start < entity.end for start, end in places)
    ]
    return replace(post, entities=entities)
