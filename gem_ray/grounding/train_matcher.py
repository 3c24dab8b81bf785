"""Fine-tuning of BLIP's matching head on (entity, category, image, present?) pairs (§3.4.1)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, BlipForImageTextRetrieval, BlipImageProcessorPil

from gem_ray.checkpoints import resolve
from gem_ray.config import ImageConfig
from gem_ray.data.images import ImageLoader
from gem_ray.data.tokenize import word_spans
from gem_ray.device import torch_device
from gem_ray.grounding.matcher import ImageProcessor, Query, TextProcessor
from gem_ray.records import Post


@dataclass(frozen=True)
class MatcherTraining:
    """How the matcher is trained. The defaults are the paper's.

    Args:
        learning_rate: at the start; it falls in a line to 0.
        epochs: passes over the posts.
        batch_size: posts, each with all its pairs, in a step.
        weight_decay: of AdamW.
        image_negatives: mentions of other posts asked of each image, as absent.
        category_negatives: ask a name that elsewhere has another category with that one too, as absent.
        balance: weigh present and absent pairs so that both count alike.
        seed: of the order and of the negatives.
        device: `auto`, `cpu`, `cuda`.
        image: limits of images, and where they may come from.
    """

    learning_rate: float = 5e-5
    epochs: int = 1
    batch_size: int = 16
    weight_decay: float = 0.05
    image_negatives: int = 0
    category_negatives: bool = False
    balance: bool = False
    seed: int = 0
    device: str = "auto"
    image: ImageConfig = field(default_factory=ImageConfig)


@dataclass(frozen=True)
class Pair:
    """A name, its category, and whether the image shows it."""

    entity: str
    category: str
    present: bool


def train_matcher(
    posts: Sequence[Post],
    base: str,
    out: Path,
    settings: MatcherTraining | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Fine-tune a BLIP matching model on posts with gold mentions and images.

    Args:
        posts: with `gold`, `tokens` and an image; images are decoded batch by batch and not kept.
        base: the model to start from, as `checkpoints.resolve` takes it.
        out: Hugging Face directory to write.
        settings: rates, length and negatives.
        report: called with a line of progress at each epoch's end.

    Returns:
        `loss` (of each epoch), `pairs` and `present` (in the last epoch) and `skipped` (posts without a usable image).

    Raises:
        ValueError: no post has a gold mention.
    """
    settings = settings or MatcherTraining()
    posts = [post for post in posts if post.gold]
    if not posts:
        raise ValueError("no post has a gold mention: there is nothing to train the matcher on")
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    folder = resolve(base)
    model = BlipForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32).to(torch_device(settings.device))
    trainer = _Trainer(model.train(), folder, settings, steps=settings.epochs * -(-len(posts) // settings.batch_size))
    result: dict[str, Any] = {"loss": []}
    for epoch in range(settings.epochs):
        pairs = build_pairs(posts, settings, rng)
        losses = list(trainer.epoch(posts, pairs, rng.permutation(len(posts))))
        result["loss"].append(float(np.mean(losses)) if losses else float("nan"))
        result["pairs"] = sum(map(len, pairs))
        result["present"] = sum(pair.present for group in pairs for pair in group)
        report(f"matcher epoch {epoch + 1} of {settings.epochs}: loss {result['loss'][-1]:.4f}")
    trainer.save(out)
    return {**result, "skipped": trainer.skipped}


def build_pairs(posts: Sequence[Post], settings: MatcherTraining, rng: np.random.Generator) -> list[list[Pair]]:
    """The pairs of every post: its gold mentions, present if they have a box, and the negatives asked for."""
    gold = [_gold_pairs(post) for post in posts]
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


def _gold_pairs(post: Post) -> list[Pair]:
    spans = word_spans(post.text, post.tokens)
    return [
        Pair(post.text[spans[gold.word_start][0] : spans[gold.word_end - 1][1]], gold.fine, bool(gold.boxes))
        for gold in post.gold or ()
    ]


class _Trainer:
    """The model, its optimizer and its files."""

    def __init__(self, model: BlipForImageTextRetrieval, folder: Path, settings: MatcherTraining, steps: int) -> None:
        self.model = model
        self.settings = settings
        self.texts = TextProcessor(AutoTokenizer.from_pretrained(folder), model.config.text_config.vocab_size)
        self.images = ImageProcessor.from_pretrained(folder)
        self.image_files = BlipImageProcessorPil.from_pretrained(folder)
        self.loader = ImageLoader(settings.image)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, total_iters=steps)
        self.skipped = 0

    def epoch(self, posts: Sequence[Post], pairs: Sequence[Sequence[Pair]], order: np.ndarray) -> Iterator[float]:
        """One pass over the posts in the given order; yields each step's loss."""
        weight = self._class_weight(pairs)
        self.skipped = 0
        for start in range(0, len(order), self.settings.batch_size):
            chosen = order[start : start + self.settings.batch_size]
            images = {index: image for index in chosen if (image := self._pixels(posts[index])) is not None}
            self.skipped += len(chosen) - len(images)
            if images:
                loss = self._loss(list(images.values()), [pairs[index] for index in images], weight)
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                yield loss.item()

    def save(self, out: Path) -> None:
        """Write the model, its tokenizer with `[ENC]`, and its image preprocessing."""
        self.model.save_pretrained(out)
        self.texts.tokenizer.save_pretrained(out)
        self.image_files.save_pretrained(out)

    def _loss(self, images: list[np.ndarray], pairs: list[Sequence[Pair]], weight: Tensor | None) -> Tensor:
        device = self.model.device
        # One pass through the image encoder serves all the pairs of a post.
        states = self.model.vision_model(self.images(images).to(device), interpolate_pos_encoding=True)
        image_of_pair = [image for image, group in enumerate(pairs) for _ in group]
        asked = [pair for group in pairs for pair in group]
        batch = self.texts([Query(0, pair.entity, pair.category) for pair in asked], device)
        hidden = self.model.text_encoder(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            encoder_hidden_states=states.last_hidden_state[image_of_pair],
        ).last_hidden_state  # (N, T, D)
        labels = torch.tensor([int(pair.present) for pair in asked], device=device)
        return F.cross_entropy(self.model.itm_head(hidden[:, 0]), labels, weight=weight)

    def _class_weight(self, pairs: Sequence[Sequence[Pair]]) -> Tensor | None:
        """Weights of absent and present pairs, inverse to their numbers."""
        if not self.settings.balance:
            return None
        present = sum(pair.present for group in pairs for pair in group)
        absent = sum(map(len, pairs)) - present
        counts = torch.tensor([max(absent, 1), max(present, 1)], device=self.model.device)
        return counts.sum() / (2 * counts)

    def _pixels(self, post: Post) -> np.ndarray | None:
        if post.image is not None:
            return post.image
        # A copy carries what the loader fills in, so that pixels are freed with the batch.
        copy = Post(post.post_id, post.text, image_bytes=post.image_bytes, image_uri=post.image_uri)
        self.loader.load(copy)
        return copy.image
