"""The fine path's tags, logits and marginals for every word of many texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gem_ray.records import Post
from gem_ray.tagger.chains import Lattice
from gem_ray.tagger.features import SubwordEncoder, by_token_budget, collate
from gem_ray.tagger.model import DualPathTagger


@dataclass
class WordPredictions:
    """The fine path's answer for the W words of one text."""

    tags: list[str]
    lattice: Lattice

    @property
    def logits(self) -> np.ndarray:
        """(W, C_f), after augmentation."""
        return self.lattice.logits


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
    results = [WordPredictions([""] * len(post.tokens), Lattice.empty(len(post.tokens), len(tags))) for post in posts]
    for windows in by_token_budget(features.encode(posts), batch_tokens):
        batch = collate(windows, features.tokenizer.pad_token_id).to(device)
        emissions = model.emissions(batch)
        paths = model.decode(emissions, batch.word_mask)
        fine = emissions.fine.float()  # (B, W, C_f)
        chains = model.fine_crf.chains(fine, batch.word_mask)
        columns = [tensor.cpu().numpy() for tensor in (fine, *chains)]
        for window, path, *rows in zip(windows, paths, *columns, strict=True):
            words, lattice = slice(window.word_start, window.word_end), results[window.post].lattice
            results[window.post].tags[words] = tags[path]
            lattice.opens[window.word_start] = True
            for stored, row in zip(
                (lattice.logits, lattice.prefixes, lattice.suffixes, lattice.scales), rows, strict=True
            ):
                stored[words] = row[: len(path)]
    return results
