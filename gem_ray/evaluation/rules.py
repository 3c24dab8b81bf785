"""When a predicted mention is right: spans, categories and regions, compared mention by mention."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gem_ray.data.tokenize import tokenize, word_spans
from gem_ray.records import Box, GoldEntity, Post
from gem_ray.taxonomy import FMNERG, GMNER, LabelSet, gmner_category

Protocol = Literal["strict", "text-key"]


class EvaluationError(ValueError):
    """Gold and predictions that cannot be compared; the message says which post and why."""


@dataclass(frozen=True)
class Mention:
    """What is compared: `place` is the half-open word interval, or the entity's text under `text-key`."""

    post_id: str
    place: tuple[int, int] | str
    category: str
    boxes: tuple[Box, ...] = ()
    score: float = 1.0


@dataclass(frozen=True)
class Rules:
    """When a predicted mention is right.

    Args:
        labels: with GMNER, FMNERG's fine categories are mapped to the four.
        protocol: `strict` compares word intervals; `text-key` compares texts, as older work does.
        iou: a predicted region is right above this overlap with any gold box.
    """

    labels: LabelSet = FMNERG
    protocol: Protocol = "strict"
    iou: float = 0.5

    def gold_mention(self, post: Post, gold: GoldEntity) -> Mention:
        """A gold entity of a post as a mention.

        Raises:
            EvaluationError: it is not within the post's words, or its category is not in the label set.
        """
        words, interval = words_of(post), (gold.word_start, gold.word_end)
        if words and (reason := gold.why_outside(post.post_id, len(words))):
            raise EvaluationError(reason)
        return Mention(post.post_id, self._place(words, interval), self.category(gold.fine), gold.boxes)

    def predicted_mentions(self, post: Post, tokens: Sequence[str]) -> list[Mention]:
        """The entities of a post as mentions over the gold's words, in the same order.

        Raises:
            EvaluationError: the words do not occur in the post's text.
        """
        if not post.entities:
            return []
        try:
            words = word_spans(post.text, list(tokens))
        except ValueError as error:
            raise EvaluationError(
                f"post {post.post_id!r}: the predicted text does not hold the gold's words ({error})"
            ) from error
        return [
            Mention(
                post.post_id,
                self._place(tokens, touched_words(entity.start, entity.end, words)),
                self.category(entity.fine),
                (entity.box,) if entity.box else (),
                entity.score,
            )
            for entity in post.entities
        ]

    def category(self, fine: str) -> str:
        """The category that is compared.

        Raises:
            EvaluationError: `fine` does not belong to the label set.
        """
        if fine in self.labels.parent:
            return fine
        if self.labels.name == GMNER.name and fine in FMNERG.parent:
            return gmner_category(fine)
        raise EvaluationError(f"category {fine!r} is not one of {self.labels.name}'s {len(self.labels.fine)}")

    def key(self, mention: Mention) -> tuple[object, ...]:
        """What makes two mentions of one side the same."""
        key = (mention.post_id, mention.place)
        return key if self.protocol == "strict" else (*key, mention.category)

    def same_category(self, predicted: Mention, gold: Mention) -> bool:
        """MNER's condition, beyond the span."""
        return predicted.category == gold.category

    def same_coarse(self, predicted: Mention, gold: Mention) -> bool:
        """The coarse category is right."""
        return self.labels.parent[predicted.category] == self.labels.parent[gold.category]

    def same_region(self, predicted: Mention, gold: Mention) -> bool:
        """EEG's condition, beyond the span: both unseen, or the box overlaps a gold box by more than the threshold."""
        if not gold.boxes or not predicted.boxes:
            return not gold.boxes and not predicted.boxes
        return overlap(predicted, gold) > self.iou

    def same_mention(self, predicted: Mention, gold: Mention) -> bool:
        """MNERG's condition, beyond the span."""
        return self.same_category(predicted, gold) and self.same_region(predicted, gold)

    def _place(self, tokens: Sequence[str], interval: tuple[int, int]) -> tuple[int, int] | str:
        return interval if self.protocol == "strict" else " ".join(tokens[slice(*interval)])


@dataclass(frozen=True)
class Verdict:
    """What the rules say of one predicted entity: each part that is right, and the gold of its span if there is one.

    `iou` is that of its region with gold's; None where one of both sees nothing.
    """

    span: bool
    category: bool
    region: bool
    gold: Mention | None = None
    iou: float | None = None


def judge(post: Post, gold: Sequence[GoldEntity], rules: Rules) -> tuple[list[Verdict], list[GoldEntity]]:
    """Judge every entity of an annotated post by itself, under the strict protocol.

    Args:
        post: an annotated post, with the tokens that the gold counts in.
        gold: its gold mentions.
        rules: label set and overlap.

    Returns:
        A verdict for each of `post.entities`, and the gold mentions whose span was not predicted.
    """
    rules = replace(rules, protocol="strict")
    mentions = [rules.gold_mention(post, entity) for entity in gold]
    expected = {mention.place: mention for mention in mentions}
    verdicts, found = [], set()
    for mention in rules.predicted_mentions(post, words_of(post)):
        other = expected.get(mention.place)
        found.add(mention.place)
        if other is None:
            verdicts.append(Verdict(span=False, category=False, region=False))
        else:
            right = rules.same_category(mention, other), rules.same_region(mention, other)
            iou = overlap(mention, other) if mention.boxes and other.boxes else None
            verdicts.append(Verdict(True, *right, gold=other, iou=iou))
    return verdicts, [entity for entity, mention in zip(gold, mentions, strict=True) if mention.place not in found]


def overlap(predicted: Mention, gold: Mention) -> float:
    """The greatest intersection over union of a predicted box with a gold one; 0 where there are none."""
    return max((box.iou(other) for box in predicted.boxes for other in gold.boxes), default=0.0)


def words_of(post: Post) -> list[str]:
    """The words that a post's gold counts in: its own tokens, or those that the system would cut."""
    return post.tokens or tokenize(post.text)


def touched_words(start: int, end: int, words: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The half-open interval of the words that characters `[start, end)` touch; empty where they touch none.

    Args:
        start: first character.
        end: one past the last character.
        words: character offsets of the words, in order.
    """
    first = bisect_right(words, start, key=lambda word: word[1])  # words before it end at or before `start`
    last = bisect_left(words, end, key=lambda word: word[0])  # words from it on start at or after `end`
    return first, max(first, last)
