"""What the reranker is trained on: every gold entity once an epoch, as tokens, image and answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from gem_ray.config import ImageFit
from gem_ray.data.images import ImageLoader
from gem_ray.records import GoldEntity, Post
from gem_ray.rerank.encoding import EncodedRequest, RequestEncoder, expand_image_token
from gem_ray.rerank.engine import Request, RequestError
from gem_ray.rerank.llava import pixel_values
from gem_ray.rerank.prompts import LLAVA, PromptFormat, build_prompt
from gem_ray.rerank.recipe import RerankerTraining

CandidateRule = Callable[[Post, GoldEntity, random.Random], Sequence[str]]

IGNORED = -100  # labels of positions that are not learned


@dataclass(frozen=True)
class TrainingSample:
    """An image, `(h, w, 3)` uint8, and a question about it whose only choice is the right answer."""

    image: np.ndarray
    question: EncodedRequest


class SampleEncoder:
    """Makes batches that `LlavaForConditionalGeneration` is trained on.

    Args:
        model: whose configuration counts.
        processor: the model's.
        max_length: positions that prompt, image and answer may take together.
        prompt_format: the model's.
        fit: of images into the model's square.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        max_length: int = 1024,
        prompt_format: PromptFormat = LLAVA,
        fit: ImageFit = "pad",
    ) -> None:
        self._fit: ImageFit = fit
        self.prompt_format = prompt_format
        self._processor = processor
        self._image_token = model.config.image_token_id
        self._encoder = RequestEncoder(processor.tokenizer, model.config, max_length, prompt_format)

    def sample(self, image: np.ndarray, prompt: str, answer: str) -> TrainingSample | None:
        """A sample ready for `collate`; None if it is too long."""
        question = self._encoder.encode(Request(image, prompt, (answer,)))
        return None if isinstance(question, RequestError) else TrainingSample(image, question)

    def collate(self, samples: Sequence[TrainingSample]) -> dict[str, torch.Tensor | int]:
        """Arguments of the model's `forward`, and `labels`.

        Padding comes last, so the causal mask alone keeps it out of sight. Only the last `logits_to_keep` positions can
        hold answers, or what predicts them.
        """
        count = self._encoder.image_tokens
        prompts = [expand_image_token(sample.question.prompt, self._image_token, count) for sample in samples]
        answers = [sample.question.tree.tokens for sample in samples]
        length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        ids = torch.zeros(len(samples), length, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor([*prompt, *answer])
            labels[row, len(prompt) : end] = torch.tensor(answer)
        kept = length - min(map(len, prompts)) + 1
        pixels = pixel_values(self._processor, [sample.image for sample in samples], self._fit)
        return {"input_ids": ids, "pixel_values": pixels, "labels": labels[:, -kept:], "logits_to_keep": kept}


class EntitySamples(Dataset):
    """Every gold entity once an epoch, each epoch in another order and with other candidates.

    A sample depends on its index and the recipe's seed alone, so that a resumed training continues with the
    samples that it would have seen. Images are decoded as they are needed: all of them would not fit into memory.

    Args:
        posts: those without gold, or without an image that can be read, are passed over, and entities whose question is
            too long even without other candidates.
        encoder: of samples.
        rule: what is offered for an entity.
        settings: the recipe.

    Raises:
        ValueError: no post has both a gold entity and an image that can be read.
    """

    def __init__(
        self, posts: Sequence[Post], encoder: SampleEncoder, rule: CandidateRule, settings: RerankerTraining
    ) -> None:
        self._encoder, self._rule, self._settings = encoder, rule, settings
        self._loader = ImageLoader(settings.image)
        self.entities = [(post, gold) for post in posts if post.gold for gold in self._readable(post)]
        if not self.entities:
            raise ValueError(
                "no post has both a gold entity and an image that can be read; questions of more positions than "
                f"max_length={settings.max_length} are left out"
            )
        self._order = [
            index
            for epoch in range(settings.epochs)
            for index in random.Random(f"{settings.seed} {epoch}").sample(range(len(self.entities)), len(self.entities))
        ]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> TrainingSample:
        post, gold = self.entities[self._order[index]]
        image = self._image(post)
        assert image is not None  # it could be read before
        rng = random.Random(f"{self._settings.seed} candidates {index}")
        sample = self._sample(post, gold, image, rng) or self._shortest(post, gold, image)
        assert sample is not None
        return sample

    def _readable(self, post: Post) -> list[GoldEntity]:
        image = self._image(post)
        return [] if image is None else [gold for gold in post.gold or () if self._shortest(post, gold, image)]

    def _shortest(self, post: Post, gold: GoldEntity, image: np.ndarray) -> TrainingSample | None:
        """With the right answer as the only candidate."""
        prompt = build_prompt(post.tokens, gold.word_start, gold.word_end, [gold.fine], self._encoder.prompt_format)
        return self._encoder.sample(image, prompt, gold.fine)

    def _sample(self, post: Post, gold: GoldEntity, image: np.ndarray, rng: random.Random) -> TrainingSample | None:
        candidates = self._rule(post, gold, rng)
        words = post.tokens, gold.word_start, gold.word_end
        return self._encoder.sample(image, build_prompt(*words, candidates, self._encoder.prompt_format), gold.fine)

    def _image(self, post: Post) -> np.ndarray | None:
        # A copy takes the image or the problem; the caller's post stays as it was.
        self._loader.load(loaded := replace(post, problems=list(post.problems)))
        return loaded.image
