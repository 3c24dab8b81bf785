"""Training data of the matcher: names, categories, and whether an image shows them (§3.4.1)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from gem_ray.data.images import ImageLoader
from gem_ray.data.tokenize import word_spans
from gem_ray.grounding.matcher import ImageProcessor, MatchQuery, TextProcessor
from gem_ray.grounding.matcher_recipe import MatcherTraining
from gem_ray.records import Post


@dataclass(frozen=True)
class Pair:
    """A name, its category, and whether the image shows it."""

    entity: str
    category: str
    present: bool


def build_pairs(posts: Sequence[Post], settings: MatcherTraining, rng: np.random.Generator) -> list[list[Pair]]:
    """The pairs of every post: its gold mentions, present if they have a box, and the negatives asked for."""
    gold = [gold_pairs(post) for post in posts]
    categories: dict[str, set[str]] = defaultdict(set)
    for pair in (pair for group in gold for pair in group):
        categories[pair.entity].add(pair.category)
    mentions = [Pair(pair.entity, pair.category, present=False) for group in gold for pair in group]
    pairs = []
    for group in gold:
        known = {(pair.entity, pair.category) for pair in group}
        negatives = []
        if settings.category_negatives:
            negatives += [
                Pair(entity, category, present=False)
                for entity in dict.fromkeys(pair.entity for pair in group)
                for category in sorted(categories[entity])
                if (entity, category) not in known
            ]
        names = {pair.entity for pair in group}
        others = (mentions[index] for index in rng.integers(len(mentions), size=settings.image_negatives))
        negatives += [pair for pair in others if pair.entity not in names]
        pairs.append([*group, *negatives])
    return pairs


def gold_pairs(post: Post) -> list[Pair]:
    """A post's gold mentions, written as the text writes them."""
    spans = word_spans(post.text, post.tokens)
    return [
        Pair(post.text[spans[gold.word_start][0] : spans[gold.word_end - 1][1]], gold.fine, bool(gold.boxes))
        for gold in post.gold or ()
    ]


class PairsOfPosts(Dataset):
    """Posts with their pairs of one epoch, which depend on the seed and the epoch alone.

    Args:
        posts: with `gold`, `tokens` and an image.
        settings: the recipe.
    """

    def __init__(self, posts: Sequence[Post], settings: MatcherTraining) -> None:
        self.posts, self.settings = posts, settings
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order and the negatives of an epoch, counted from 0."""
        rng = np.random.default_rng([self.settings.seed, epoch])
        self.pairs = build_pairs(self.posts, self.settings, rng)
        self.order = rng.permutation(len(self.posts)).tolist()

    def __len__(self) -> int:
        return len(self.posts)

    def __getitem__(self, number: int) -> tuple[Post, list[Pair]]:
        return self.posts[number], self.pairs[number]

    def weights(self) -> tuple[float, float]:
        """Of absent and present pairs: inverse to their numbers if they shall be balanced, else 1."""
        if not self.settings.balance:
            return 1.0, 1.0
        present = sum(pair.present for group in self.pairs for pair in group)
        absent = sum(map(len, self.pairs)) - present
        return (absent + present) / (2 * max(absent, 1)), (absent + present) / (2 * max(present, 1))


class EpochOrder(Sampler[int]):
    """The order of the data's current epoch."""

    def __init__(self, data: PairsOfPosts) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[int]:
        return iter(self.data.order)


class PairCollator:
    """Batches of posts as the model takes them; images are decoded batch by batch and not kept.

    Args:
        data: where the weights of the epoch's pairs are.
        texts, images: the model's processors.
        loader: of images.
    """

    def __init__(self, data: PairsOfPosts, texts: TextProcessor, images: ImageProcessor, loader: ImageLoader) -> None:
        self.data, self.texts, self.images, self.loader = data, texts, images, loader
        self.unusable: set[str] = set()

    def __call__(self, items: Sequence[tuple[Post, list[Pair]]]) -> dict[str, Tensor]:
        """Squares `(N, side, side, 3)` of the posts whose image can be used, and for each pair its tokens `(B, T)`, its
        square `(B,)`, its label `(B,)` and its weight `(B,)`."""
        squares: list[Tensor] = []
        asked: list[Pair] = []
        square_of_pair: list[int] = []
        for post, pairs in items:
            pixels = self._pixels(post)
            if pixels is None:
                self.unusable.add(post.post_id)
                continue
            square_of_pair += [len(squares)] * len(pairs)
            squares.append(self.images.squares([pixels]))
            asked += pairs
        side = self.images.side
        texts = self.texts(
            [MatchQuery(0, pair.entity, pair.category) for pair in asked] or [MatchQuery(0, "", "")], _CPU
        )
        labels = torch.tensor([int(pair.present) for pair in asked], dtype=torch.long)
        return {
            "squares": torch.cat(squares) if squares else torch.zeros((0, side, side, 3), dtype=torch.uint8),
            "input_ids": texts.input_ids[: len(asked)],
            "attention_mask": texts.attention_mask[: len(asked)],
            "square_of_pair": torch.tensor(square_of_pair, dtype=torch.long),
            "labels": labels,
            "weights": torch.tensor(self.data.weights())[labels],
        }

    def _pixels(self, post: Post) -> np.ndarray | None:
        if post.image is not None:
            return post.image
        # A copy carries what the loader fills in, so that pixels are freed with the batch.
        copy = Post(post.post_id, post.text, image_bytes=post.image_bytes, image_uri=post.image_uri)
        self.loader.load(copy)
        return copy.image


_CPU = torch.device("cpu")
