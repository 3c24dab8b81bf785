"""The stage TAG: entities of each post's text, with their fine logits (§3.2)."""

from __future__ import annotations

import numpy as np
import torch

from gem_ray.cache import keep_compiled_code_private
from gem_ray.config import Config
from gem_ray.data.tokenize import word_spans
from gem_ray.device import torch_device
from gem_ray.model_paths import resolve
from gem_ray.noise import settled
from gem_ray.records import Entity, Post, ProblemKind
from gem_ray.tagger.chains import segment_probabilities
from gem_ray.tagger.checkpoint import load_tagger
from gem_ray.tagger.features import SubwordEncoder
from gem_ray.tagger.model import DualPathTagger
from gem_ray.tagger.predict import WordPredictions, predict_words
from gem_ray.taxonomy import decode_bio


class Tagger:
    """Finds the entities of posts.

    Args:
        model: the dual-path tagger; it is moved to `device` and put into evaluation mode.
        features: its input format.
        batch_tokens: subwords in one forward pass, padding included.
        device: where to run.
        dtype: the encoder's precision; heads and CRFs stay in single precision.
        compile: compile the encoder when it first runs.
    """

    def __init__(
        self,
        model: DualPathTagger,
        features: SubwordEncoder,
        batch_tokens: int = 8192,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
    ) -> None:
        self.model = model.to(device).eval()
        self.model.encoder.to(dtype)
        self.features = features
        self.batch_tokens = batch_tokens
        self._index = {fine: position for position, fine in enumerate(model.labels.fine)}
        if compile:
            keep_compiled_code_private()
            self.model.encoder.compile(dynamic=True)  # of any batch: every one has a shape of its own

    @classmethod
    def from_config(cls, config: Config) -> Tagger:
        """Load `config.tagger.model`; raises what `load_parts` does."""
        settings, device = config.tagger, torch_device(config.device)
        model, features = load_parts(config)
        return cls(model, features, settings.batch_tokens, device, getattr(torch, settings.dtype), settings.compile)

    def __call__(self, posts: list[Post]) -> list[Post]:
        """Fill `entities` of the posts that are not rejected, with `logits` and `marginal`.

        The uncertainty filter sets `score`, and the calibrator `confidence`.
        """
        accepted = [post for post in posts if not post.is_rejected]
        words = predict_words(self.model, accepted, self.features, self.batch_tokens)
        spans = [decode_bio(predictions.tags) for predictions in words]
        places = [[(first, last, self._index[fine]) for first, last, fine in each] for each in spans]
        lattices = [predictions.lattice for predictions in words]
        transitions = self.model.fine_crf.transitions.detach().cpu().numpy()
        marginals = segment_probabilities(lattices, places, transitions)
        for post, *found in zip(accepted, words, spans, marginals, strict=True):
            try:
                post.entities = self._entities(post, *found)
            except ValueError as error:  # tokens that are not the text's, where nobody has checked them
                post.fail("tag", ProblemKind.BAD_RECORD, f"tokens: {error}")
        return posts

    def _entities(
        self, post: Post, predictions: WordPredictions, spans: list[tuple[int, int, str]], marginals: np.ndarray
    ) -> list[Entity]:
        offsets = word_spans(post.text, post.tokens)
        entities = []
        for (first, last, fine), marginal in zip(spans, marginals, strict=True):
            start, end = offsets[first][0], offsets[last - 1][1]
            entities.append(
                Entity(
                    text=post.text[start:end],
                    start=start,
                    end=end,
                    word_start=first,
                    word_end=last,
                    coarse=self.model.labels.parent[fine],
                    fine=fine,
                    score=0.0,
                    logits=predictions.logits[first:last].mean(axis=0),
                    marginal=float(settled(marginal)),
                )
            )
        return entities


def load_parts(config: Config) -> tuple[DualPathTagger, SubwordEncoder]:
    """The model that `config.tagger` names, and its input format.

    Raises:
        FileNotFoundError: there is no model at the reference.
        ValueError: it is not a tagger for `config.labels`, or its encoder is too short for `max_length`.
    """
    model, tokenizer = load_tagger(resolve(config.tagger.model))
    if model.labels.name != config.labels:
        raise ValueError(f"{config.tagger.model} tags {model.labels.name}, the configuration asks {config.labels}")
    return model, SubwordEncoder(tokenizer, config.tagger.max_length, model.design)
