"""The fine path's tags and logits for every word of many texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gem_ray.records import Post
from gem_ray.tagger.features import SubwordEncoder, by_token_budget, collate
from gem_ray.tagger.model import DualPathTagger


@dataclass
class WordPredictions:
    """The fine path's answer for the W words of one text."""

    tags: list[str]
    logits: np.ndarray  # (W, C_f), after augmentation


@torch.inference_mode()
def predict_words(
    model: DualPathTagger, posts: Sequence[Post], features: SubwordEncoder, batch_tokens: int = 1024
) -> list[WordPredictions]:
    """Tags and logits of every word of every post, in the posts' order.

    Args:
        model: the tagger; put into evaluation mode.
        posts: with `tokens`.
        features: the model's input format.
        batch_tokens: subwords in one forward pass, padding included; batches hold texts of similar length.
    """
    model.eval()
    device = model.fine_head.weight.device
    tags = np.array(model.labels.fine_tags, dtype=object)
    results = [
        WordPredictions([""] * len(post.tokens), np.empty((len(post.tokens), len(tags)), np.float32)) for post in posts
    ]
    for windows in by_token_budget(features.encode(posts), batch_tokens):
        batch = collate(windows, features.tokenizer.pad_token_id).to(device)
        emissions = model.emissions(batch)
        paths = model.decode(emissions, batch.word_mask)
        logits = emissions.fine.float().cpu().numpy()  # (B, W, C_f)
        for window, path, rows in zip(windows, paths, logits, strict=True):
            words = slice(window.word_start, window.word_end)
            results[window.post].tags[words] = tags[path]
            results[window.post].logits[words] = rows[: len(path)]
    return results
