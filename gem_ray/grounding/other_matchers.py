"""LLaVA and BLIP-2 in the matcher's place (§5.2): is the entity in the image, and where did that answer look?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoProcessor,
    Blip2ForImageTextRetrieval,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from gem_ray.config import Config, ImageFit, MatcherConfig
from gem_ray.data.square import fitted, in_image
from gem_ray.device import torch_device
from gem_ray.grounding.matcher import Match, MatchQuery
from gem_ray.grounding.trace import MATCH, NO_MATCH, middle_upper_layer, patch_scores
from gem_ray.loading import check_pretrained, load_pretrained
from gem_ray.model_kind import require_words
from gem_ray.model_paths import resolve

_IMAGE_TOKEN = "<image>"
_QUESTION = f"USER: {_IMAGE_TOKEN}\n{{text}} Is it in the image? Answer yes or no."
_CUE = "ASSISTANT:"


class LlavaMatcher:
    """Asks LLaVA whether the entity is seen, and traces the answer's attention to the image's patches.

    P_T is the share of `yes` of the two answers; eq. 11 runs over the language model's attention from the prompt's last
    token to the image tokens.

    Args:
        model: with eager attention, which gives its probabilities out; frozen and put in evaluation mode here.
        processor: its tokenizer and image processor.
        layer: of the language model, to trace; default: the middle-upper one.
        batch_size: questions in a forward pass.
        fit: of images into the model's square.

    Raises:
        ValueError: the tokenizer begins both answers with the same token.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        layer: int | None = None,
        batch_size: int = 8,
        fit: ImageFit = "pad",
    ) -> None:
        depth = model.config.text_config.num_hidden_layers
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.batch_size = batch_size
        self.fit: ImageFit = fit
        self.layer = _checked(layer, depth)
        self._answers = [_first_token(processor.tokenizer, answer) for answer in ("no", "yes")]
        if self._answers[NO_MATCH] == self._answers[MATCH]:
            raise ValueError("the tokenizer begins `yes` and `no` with the same token")

    @classmethod
    def from_config(cls, config: Config) -> LlavaMatcher:
        """Load the model that `grounder.matcher` names; it raises what `load_pretrained` does."""
        return cls.of(_load(config), resolve(config.grounder.matcher.model), config.grounder.matcher)

    @classmethod
    def of(cls, model: LlavaForConditionalGeneration, folder: Path, settings: MatcherConfig) -> LlavaMatcher:
        """As `Matcher.of`."""
        processor = LlavaProcessor.from_pretrained(folder)
        require_words(processor.tokenizer, model.config.text_config.vocab_size, folder)
        return cls(model, processor, settings.layer, settings.batch_size, settings.image_fit)

    def match(self, images: Sequence[np.ndarray], queries: Sequence[MatchQuery]) -> list[Match]:
        """Answer queries about `(h, w, 3)` uint8 images, in the order of the queries."""
        return _in_batches(self._match, images, queries, self.batch_size)

    def _match(self, images: Sequence[np.ndarray], queries: Sequence[MatchQuery]) -> list[Match]:
        texts = [_QUESTION.format(text=query.text.replace(_IMAGE_TOKEN, "image")) + f" {_CUE}" for query in queries]
        images_processor = self.processor.image_processor
        inputs = self.processor(
            images=[fitted(images[query.image], images_processor, self.fit) for query in queries],
            text=texts,
            images_kwargs={"input_data_format": "channels_last"},
            padding=True,
            return_tensors="pt",
        ).to(self.model.device)
        language = self.model.model.language_model
        features = self.model.get_image_features(
            pixel_values=inputs["pixel_values"].to(self.model.dtype), return_dict=True
        ).pooler_output
        ids = inputs["input_ids"]  # (B, L)
        is_image = ids == self.model.config.image_token_id
        embeddings = self.model.get_input_embeddings()(ids)
        embeddings = embeddings.masked_scatter(is_image[..., None], torch.cat(list(features)).to(embeddings.dtype))
        mask = inputs["attention_mask"]
        with torch.enable_grad(), _attention_of(language.layers[self.layer].self_attn) as seen:
            hidden = language(
                inputs_embeds=embeddings.requires_grad_(), attention_mask=mask, use_cache=False
            ).last_hidden_state
            rows = torch.arange(len(queries), device=ids.device)
            last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)  # whichever side is padded
            logits = self.model.lm_head(hidden[rows, last])[:, self._answers].float()  # (B, 2): no, yes
            probability, attention, gradient = _traced(logits, seen)  # (B, H, L, L)
        patches = int(is_image[0].sum())
        at_images = [
            each[rows, :, last].masked_select(is_image[:, None]).view(len(queries), -1, 1, patches)
            for each in (attention, gradient)
        ]
        return [
            replace(match, map=in_image(match.map, images[query.image].shape[:2], images_processor, self.fit))
            for query, match in zip(queries, _matches(probability, *at_images), strict=True)
        ]


class Blip2Matcher:
    """BLIP-2's image–text matching head over its Q-Former, traced over the queries' cross-attention to the patches.

    Args:
        model: with eager attention; frozen and put in evaluation mode here.
        processor: its tokenizer and image processor.
        layer: of the Q-Former's layers with cross-attention, to trace; default: the middle-upper one.
        batch_size: questions in a forward pass.
    """

    def __init__(
        self, model: Blip2ForImageTextRetrieval, processor: Any, layer: int | None = None, batch_size: int = 8
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.batch_size = batch_size
        crossing = [each for each in model.qformer.encoder.layer if each.has_cross_attention]
        self._traced = crossing[_checked(layer, len(crossing))].crossattention.attention

    @classmethod
    def from_config(cls, config: Config) -> Blip2Matcher:
        """Load the model that `grounder.matcher` names; it raises what `load_pretrained` does."""
        return cls.of(_load(config), resolve(config.grounder.matcher.model), config.grounder.matcher)

    @classmethod
    def of(cls, model: Blip2ForImageTextRetrieval, folder: Path, settings: MatcherConfig) -> Blip2Matcher:
        """As `Matcher.of`."""
        processor = AutoProcessor.from_pretrained(folder)
        require_words(processor.tokenizer, model.config.qformer_config.vocab_size, folder)
        return cls(model, processor, settings.layer, settings.batch_size)

    def match(self, images: Sequence[np.ndarray], queries: Sequence[MatchQuery]) -> list[Match]:
        """Answer queries about `(h, w, 3)` uint8 images, in the order of the queries."""
        return _in_batches(self._match, images, queries, self.batch_size)

    def _match(self, images: Sequence[np.ndarray], queries: Sequence[MatchQuery]) -> list[Match]:
        model = self.model
        pixels = self.processor.image_processor(
            [images[query.image] for query in queries], input_data_format="channels_last", return_tensors="pt"
        )["pixel_values"].to(model.device, model.dtype)
        words = self.processor.tokenizer([query.text for query in queries], padding=True, return_tensors="pt")
        words = words.to(model.device)
        with torch.no_grad():
            states = model.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state  # (B, 1 + P, D)
        learned = model.query_tokens.expand(len(queries), -1, -1)  # (B, Q, D)
        mask = torch.cat([words["attention_mask"].new_ones(learned.shape[:2]), words["attention_mask"]], dim=1)
        with torch.enable_grad(), _attention_of(self._traced) as seen:
            output = model.qformer(
                query_embeds=model.embeddings(input_ids=words["input_ids"], query_embeds=learned),
                query_length=learned.shape[1],
                attention_mask=mask,
                encoder_hidden_states=states.requires_grad_(),
                encoder_attention_mask=states.new_ones(states.shape[:2], dtype=torch.long),
            ).last_hidden_state
            logits = model.itm_head(output[:, : learned.shape[1]].to(model.itm_head.weight.dtype)).mean(dim=1).float()
            probability, attention, gradient = _traced(logits, seen)  # (B, H, Q, 1 + P)
        return _matches(probability, attention[..., 1:], gradient[..., 1:])


@dataclass
class _Seen:
    """The attention probabilities of one layer, once it has run."""

    attention: Tensor | None = None


@contextmanager
def _attention_of(module: nn.Module) -> Iterator[_Seen]:
    """Keep the attention probabilities that a module gives out beside its output, in the graph."""
    seen = _Seen()

    def keep(_module: nn.Module, _inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        seen.attention = output[1]

    handle = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _traced(logits: Tensor, seen: _Seen) -> tuple[Tensor, Tensor, Tensor]:
    """P_T `(B,)` of logits `(B, 2)`, the attention, and the derivative of P_T by it."""
    assert seen.attention is not None  # the layer has run
    margin = logits[:, MATCH] - logits[:, NO_MATCH]
    (gradient,) = torch.autograd.grad(margin.sum(), seen.attention)
    margin = margin.detach()
    probability = torch.sigmoid(margin)
    # As in `trace.match_and_trace`: P_T · P_F, apart, is not lost to rounding.
    gradient = gradient.float() * (probability * torch.sigmoid(-margin))[:, None, None, None]
    return probability, seen.attention.detach().float(), gradient


def _matches(probability: Tensor, attention: Tensor, gradient: Tensor) -> list[Match]:
    """Eq. 11 over `(B, H, S, P)` attention to the patches of square images."""
    counted = torch.ones(attention.shape[0], attention.shape[2], dtype=torch.bool, device=attention.device)
    # `patch_scores` leaves the class patch out: there is one again.
    scores = patch_scores(functional.pad(attention, (1, 0)), functional.pad(gradient, (1, 0)), counted)  # (B, P)
    side = round(scores.shape[1] ** 0.5)
    maps = scores.view(-1, side, side).cpu().numpy()
    return [Match(float(p), m) for p, m in zip(probability.tolist(), maps, strict=True)]


def _in_batches(
    match: Callable[[Sequence[np.ndarray], Sequence[MatchQuery]], list[Match]],
    images: Sequence[np.ndarray],
    queries: Sequence[MatchQuery],
    size: int,
) -> list[Match]:
    return [answer for start in range(0, len(queries), size) for answer in match(images, queries[start : start + size])]


_KINDS: dict[str, tuple[Any, Any]] = {
    "llava": (LlavaMatcher, LlavaForConditionalGeneration),
    "blip2": (Blip2Matcher, Blip2ForImageTextRetrieval),
}


def check_other_matcher(settings: MatcherConfig, folder: Path) -> None:
    """Check a matcher without reading its weights; raises what its class does."""
    matcher, model_class = _KINDS[settings.kind]
    matcher.of(check_pretrained(model_class, folder), folder, settings)


def _load(config: Config) -> Any:
    """The model that `grounder.matcher` names, on its device."""
    settings = config.grounder.matcher
    dtype = getattr(torch, settings.dtype)
    model = load_pretrained(_KINDS[settings.kind][1], resolve(settings.model), dtype=dtype, attn_implementation="eager")
    return model.to(torch_device(config.device))


def _checked(layer: int | None, depth: int) -> int:
    if layer is not None and layer >= depth:
        raise ValueError(f"grounder.matcher.layer is {layer}; the model has layers 0 to {depth - 1} to trace")
    return middle_upper_layer(depth) if layer is None else layer


def _first_token(tokenizer: PreTrainedTokenizerBase, answer: str) -> int:
    """The token that begins an answer behind the cue, where SentencePiece puts its space."""
    cue = tokenizer.encode(_CUE, add_special_tokens=False)
    return tokenizer.encode(f"{_CUE} {answer}", add_special_tokens=False)[len(cue)]
