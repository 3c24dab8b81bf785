"""Training posts as they are seen in each epoch: with words hidden, without knowledge, with other mentions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from torch.utils.data import Dataset, Sampler

from gem_ray.records import Post
from gem_ray.tagger.features import SubwordEncoder, SubwordPost, Window, collate
from gem_ray.tagger.recipe import TaggerTraining
from gem_ray.taxonomy import LABEL_SETS, encode_bio

_POOL = 32  # batches sorted by length together: little padding, and still a different mix every epoch

ViewKey = tuple[int, int]
"""An epoch and the number of a post."""


@dataclass(frozen=True)
class TrainingPost:
    """A training post: its subwords and its gold mentions, `(word start, word end, fine category)`."""

    subwords: SubwordPost
    spans: list[tuple[int, int, str]]


@dataclass(frozen=True)
class View:
    """A post as it is seen once, and as it is seen beside that in the same step."""

    window: Window
    second: Window | None = None


class TrainingViews(Dataset):
    """The views of all posts in all epochs.

    A view depends on the seed and its key alone, so that a training which was interrupted, or runs on several workers,
    sees what any other sees.

    Args:
        posts: those without words or gold are left out.
        features: the input format.
        settings: the recipe.

    Raises:
        ValueError: no post has both words and `gold`.
    """

    def __init__(self, posts: Sequence[Post], features: SubwordEncoder, settings: TaggerTraining) -> None:
        posts = [post for post in posts if post.tokens and post.gold is not None]
        if not posts:
            raise ValueError("no training post has both tokens and gold entities")
        self.features, self.settings = features, settings
        self.examples = [
            TrainingPost(subwords, [(entity.word_start, entity.word_end, entity.fine) for entity in post.gold or ()])
            for post, subwords in zip(posts, features.subwords(posts), strict=True)
        ]
        self._tag = {tag: number for number, tag in enumerate(LABEL_SETS[settings.labels].fine_tags)}
        self._mentions = _mentions_by_category(self.examples)
        tokenizer = features.tokenizer
        self._hidden = tokenizer.mask_token_id or tokenizer.unk_token_id

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, key: ViewKey) -> View:
        epoch, number = key
        random, settings = Random(f"view {self.settings.seed} {epoch} {number}"), self.settings
        example = self.examples[number]
        if random.random() < settings.mention_replacement:
            example = self._with_other_mentions(example, random)
        example = self._with_hidden_words(example, random)
        without = random.random() < settings.knowledge_dropout
        first = self._window(example, with_knowledge=not without)
        if settings.second_view == "none":
            return View(first)
        return View(first, self._window(example, with_knowledge=settings.second_view == "same" and not without))

    def tags(self, example: TrainingPost) -> list[int]:
        """The gold fine tag of each word, as an index."""
        return [self._tag[tag] for tag in encode_bio(example.spans, len(example.subwords.words))]

    def _window(self, example: TrainingPost, with_knowledge: bool) -> Window:
        post = example.subwords
        if not with_knowledge:
            post = replace(post, knowledge=[], knowledge_cases=[])
        window = self.features.windows(post)[0]  # a text that is longer than a window is learnt from its beginning
        window.tags = self.tags(example)[: window.word_end]
        return window

    def _with_hidden_words(self, example: TrainingPost, random: Random) -> TrainingPost:
        post = example.subwords
        hidden = [random.random() < self.settings.word_dropout for _ in post.words]
        words = [[self._hidden] * len(word) if hide else word for word, hide in zip(post.words, hidden, strict=True)]
        return replace(example, subwords=replace(post, words=words))

    def _with_other_mentions(self, example: TrainingPost, random: Random) -> TrainingPost:
        """No knowledge, and every mention replaced by another of its category (Dai and Adel 2020)."""
        words, cases, spans = [], [], []
        position = 0
        for start, end, fine in sorted(example.spans):
            words += example.subwords.words[position:start]
            cases += example.subwords.word_cases[position:start]
            other_words, other_cases = random.choice(self._mentions[fine])
            spans.append((len(words), len(words) + len(other_words), fine))
            words += other_words
            cases += other_cases
            position = end
        words += example.subwords.words[position:]
        cases += example.subwords.word_cases[position:]
        return TrainingPost(SubwordPost(words, [], cases, []), spans)


class LengthGroupedSampler(Sampler[ViewKey]):
    """Every post once an epoch, in random order, posts of similar length after each other.

    Lengths are those of the epoch's views. The order depends on the seed and the epoch alone.

    Args:
        views: the data.
        batch_size: posts in a batch.
        seed: of the order.
    """

    def __init__(self, views: TrainingViews, batch_size: int, seed: int) -> None:
        self.views, self.batch_size, self.seed = views, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.views)

    def __iter__(self) -> Iterator[ViewKey]:
        random = Random(f"order {self.seed} {self.epoch}")
        lengths = [len(self.views[self.epoch, number].window.input_ids) for number in range(len(self.views))]
        order = list(range(len(lengths)))
        random.shuffle(order)
        size = self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), _POOL * size):
            pool = sorted(order[start : start + _POOL * size], key=lengths.__getitem__, reverse=True)
            batches += [pool[first : first + size] for first in range(0, len(pool), size)]
        random.shuffle(batches)
        batches.sort(key=len, reverse=True)  # a batch that is not full comes last, or those after it would be shifted
        return iter([(self.epoch, number) for batch in batches for number in batch])


def collate_views(views: Sequence[View], pad_token_id: int) -> dict[str, dict[str, Any]]:
    """Tensors of a batch: `first`, and `second` if there is a second view; each holds a `Batch`'s fields."""
    batches = {"first": collate([view.window for view in views], pad_token_id)}
    seconds = [view.second for view in views if view.second is not None]
    if seconds:
        batches["second"] = collate(seconds, pad_token_id)
    return {name: dict(vars(batch)) for name, batch in batches.items()}


def _mentions_by_category(examples: Sequence[TrainingPost]) -> dict[str, list[tuple[list[list[int]], list[list[int]]]]]:
    """Words and cases of all gold mentions."""
    mentions: dict[str, list[tuple[list[list[int]], list[list[int]]]]] = {}
    for example in examples:
        post = example.subwords
        for start, end, fine in example.spans:
            mentions.setdefault(fine, []).append((post.words[start:end], post.word_cases[start:end]))
    return mentions
