"""The fine path's tags and logits for every word of many texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gem_ray.records import Post
from gem_ray.tagger.features import SubwordEncoder, by_length, collate
from gem_ray.tagger.model import DualPathTagger


@dataclass
class WordPredictions:
    """The fine path's answer for the words of one text."""

    tags: list[str]
    logits: list[np.ndarray]  # a (C_f,) for each word, after augmentation


@torch.inference_mode()
def predict_words(
    model: DualPathTagger, posts: Sequence[Post], features: SubwordEncoder, batch_size: int = 32
) -> list[WordPredictions]:
    """Tags and logits of every word of every post, in the posts' order; batches hold texts of similar length."""
    model.eval()
    device = model.fine_head.weight.device
    results = [WordPredictions([""] * len(post.tokens), [np.empty(0)] * len(post.tokens)) for post in posts]
    for windows in by_length(features.encode(posts), batch_size):
        batch = collate(windows, features.tokenizer.pad_token_id).to(device)
        emissions = model.emissions(batch)
        paths = model.decode(emissions, batch.word_mask)
        logits = emissions.fine.float().cpu().numpy()  # (B, W, C_f)
        for window, path, rows in zip(windows, paths, logits, strict=True):
            words = slice(window.word_start, window.word_end)
            results[window.post].tags[words] = [model.labels.fine_tags[tag] for tag in path]
            results[window.post].logits[words] = list(rows[: len(path)])
    return results
