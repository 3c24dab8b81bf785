"""Trains the reranker: LoRA on LLaVA's language model, loss on the answer only (§3.3.2)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, LlavaProcessor, get_linear_schedule_with_warmup

from gem_ray.checkpoints import resolve
from gem_ray.config import DType, ImageConfig
from gem_ray.data.images import ImageLoader
from gem_ray.device import torch_device
from gem_ray.records import GoldEntity, Post
from gem_ray.rerank.candidates import training_candidates
from gem_ray.rerank.encoding import EncodedRequest, RequestEncoder, expand_image_token
from gem_ray.rerank.engine import Request, RequestError
from gem_ray.rerank.llava import hidden_states, image_features, load_llava, pixel_values
from gem_ray.rerank.prompts import build_prompt
from gem_ray.taxonomy import FMNERG, LabelSet

# A plain list of names would also match the vision tower, whose adapters vLLM does not serve.
LORA_MODULES = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

_IGNORED = -100  # labels of positions that are not learned

T = TypeVar("T")
CandidateRule = Callable[[Post, GoldEntity, random.Random], Sequence[str]]
Report = Callable[[int, float], None]


@dataclass(frozen=True)
class RerankerTraining:
    """How the reranker is trained. The defaults are the paper's recipe; its rate is very small for LoRA.

    Args:
        rank: of the adapter.
        alpha: its scale: updates count `alpha / rank` times.
        dropout: on the adapter's input.
        learning_rate: the peak; after the warm-up it falls linearly to 0.
        warmup: share of the steps in which the rate rises.
        weight_decay: AdamW's.
        clip: largest norm of the gradient.
        epochs: passes over the entities; candidates are drawn anew in each.
        batch_size: entities in a step.
        k: candidates of an entity.
        max_length: positions of prompt, image and answer; longer samples are left out.
        dtype: of the frozen base model.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
        seed: of the adapter, the candidates and the order.
        image: limits of the posts' images.
        report_every: steps between reports.
    """

    rank: int = 64
    alpha: int = 128
    dropout: float = 0.05
    learning_rate: float = 5e-6
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    epochs: int = 3
    batch_size: int = 4
    k: int = 5
    max_length: int = 1024
    dtype: DType = "float32"
    device: str = "auto"
    seed: int = 0
    image: ImageConfig = field(default_factory=ImageConfig)
    report_every: int = 50


@dataclass(frozen=True)
class Sample:
    """An image, `(h, w, 3)` uint8, a question about it, and the right answer as the question's only choice."""

    image: np.ndarray
    question: EncodedRequest


class AnswerLoss:
    """Cross-entropy of the answers and their end tokens, given image and prompt.

    Args:
        model: LLaVA; gradients reach whatever weights ask for them.
        processor: the model's.
        max_length: positions that prompt, image and answer may take together.
    """

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor, max_length: int = 1024):
        self._model = model
        self._processor = processor
        self._encoder = RequestEncoder(processor.tokenizer, model.config, max_length)

    def sample(self, image: np.ndarray, prompt: str, answer: str) -> Sample | None:
        """A sample ready for `__call__`; None if it is too long."""
        question = self._encoder.encode(Request(image, prompt, (answer,)))
        return None if isinstance(question, RequestError) else Sample(image, question)

    def __call__(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Mean over the answers' tokens. Samples that hold the same array share its features."""
        images = {id(sample.image): sample.image for sample in samples}
        features = image_features(self._model, pixel_values(self._processor, images.values()))  # (I, P, D)
        row_of = {key: row for row, key in enumerate(images)}
        rows = torch.tensor([row_of[id(sample.image)] for sample in samples], device=features.device)
        ids, labels = (array.to(features.device) for array in self._pack(samples))  # (B, L)
        # Padding comes last, so the causal mask alone keeps it out of sight.
        hidden = hidden_states(self._model, ids, features[rows])  # (B, L, D)
        predicts = labels[:, 1:] != _IGNORED  # the position before an answer's token predicts it
        logits = self._model.lm_head(hidden[:, :-1][predicts]).float()  # (answers' tokens, V)
        return F.cross_entropy(logits, labels[:, 1:][predicts])

    def _pack(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        image_token, count = self._model.config.image_token_id, self._encoder.image_tokens
        prompts = [expand_image_token(sample.question.prompt, image_token, count) for sample in samples]
        answers = [sample.question.tree.tokens for sample in samples]
        length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        ids = torch.zeros(len(samples), length, dtype=torch.long)
        labels = torch.full_like(ids, _IGNORED)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor([*prompt, *answer])
            labels[row, len(prompt) : end] = torch.tensor(answer)
        return ids, labels


def train_reranker(
    posts: Sequence[Post],
    base: str,
    out: Path,
    settings: RerankerTraining,
    labels: LabelSet = FMNERG,
    candidates: CandidateRule | None = None,
    report: Report = lambda step, loss: None,
) -> dict[str, float]:
    """Fit an adapter to the gold entities of posts with images, and write it as peft does.

    Args:
        posts: those without gold, or without an image that can be read, are passed over.
        base: the LLaVA checkpoint, as `checkpoints.resolve` takes it.
        out: the adapter's folder.
        settings: how to train.
        labels: the category tree.
        candidates: what is offered for an entity; none: the paper's rule.
        report: called with the step and the mean loss since the last report.

    Returns:
        `steps`, and the mean loss over the first and over the last tenth of them.

    Raises:
        ValueError: no post has both a gold entity and an image that can be read.
    """
    rule = candidates or (lambda post, gold, rng: training_candidates(gold.fine, labels, settings.k, rng))
    torch.manual_seed(settings.seed)
    folder = resolve(base)
    model = load_llava(folder, getattr(torch, settings.dtype)).to(torch_device(settings.device))
    adapted = get_peft_model(model, _lora(settings)).train()
    # What a reader of the adapter can look for; the path on this machine would tell them nothing.
    adapted.peft_config["default"].base_model_name_or_path = folder.name if Path(base).exists() else base
    loss = AnswerLoss(model, LlavaProcessor.from_pretrained(folder), settings.max_length)
    entities = [(post, gold) for post in posts for gold in post.gold or ()]
    samples = _samples(entities, loss, rule, settings)
    steps = -(-len(entities) * settings.epochs // settings.batch_size)
    losses = fit(loss, batched(samples, settings.batch_size), adapted.parameters(), steps, settings, report)
    if not losses:
        raise ValueError("no post has both a gold entity and an image that can be read")
    adapted.save_pretrained(str(out), save_embedding_layers=False)
    (out / "README.md").unlink()  # peft's empty model card
    tenth = -(-len(losses) // 10)
    return {
        "steps": len(losses),
        "first_loss": float(np.mean(losses[:tenth])),
        "last_loss": float(np.mean(losses[-tenth:])),
    }


def fit(
    loss: Callable[[list[T]], torch.Tensor],
    batches: Iterable[list[T]],
    parameters: Iterable[torch.nn.Parameter],
    steps: int,
    settings: RerankerTraining,
    report: Report = lambda step, loss: None,
) -> list[float]:
    """AdamW with a linear schedule.

    Args:
        loss: of a batch.
        batches: what to fit; ends the training if it ends before `steps`.
        parameters: those that ask for gradients are trained.
        steps: length of the schedule, and most batches taken.
        settings: rate, warm-up, weight decay, clipping and reports.
        report: called with the step and the mean loss since the last report.

    Returns:
        The loss of each step.
    """
    weights = [weight for weight in parameters if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, round(settings.warmup * steps), steps)
    losses: list[float] = []
    for batch in islice(batches, steps):
        value = loss(batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, settings.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
        if len(losses) % settings.report_every == 0:
            report(len(losses), float(np.mean(losses[-settings.report_every :])))
    return losses


def batched(samples: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` samples; the last one may be shorter."""
    iterator = iter(samples)
    while batch := list(islice(iterator, size)):
        yield batch


def _samples(
    entities: Sequence[tuple[Post, GoldEntity]], loss: AnswerLoss, rule: CandidateRule, settings: RerankerTraining
) -> Iterator[Sample]:
    """Every entity once an epoch, images decoded as they are needed: a data set of them would not fit into memory."""
    rng = random.Random(settings.seed)
    loader = ImageLoader(settings.image)
    for _ in range(settings.epochs):
        for post, gold in rng.sample(entities, len(entities)):
            # A copy takes the image or the problem; the caller's post stays as it was.
            loader.load(loaded := replace(post, problems=list(post.problems)))
            if loaded.image is None:
                continue
            prompt = build_prompt(post.tokens, gold.word_start, gold.word_end, rule(post, gold, rng))
            if sample := loss.sample(loaded.image, prompt, gold.fine):
                yield sample


def _lora(settings: RerankerTraining) -> LoraConfig:
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=LORA_MODULES,
    )
