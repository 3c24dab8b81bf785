"""The dual-path CRF tagger (§3.2.2, §3.2.3): coarse and fine tags for every word, the coarse ones helping the fine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gem_ray.tagger.crf import LinearChainCRF
from gem_ray.tagger.features import Batch
from gem_ray.tagger.recipe import TaggerDesign
from gem_ray.tagger.shapes import SHAPES
from gem_ray.tagger.softmax import IndependentTags
from gem_ray.taxonomy import LabelSet, bio_tags


@dataclass(frozen=True)
class Emissions:
    """Logits of the text's words, before the CRFs."""

    coarse: Tensor | None  # (B, W, C_c); None if the label set has one level
    fine: Tensor  # (B, W, C_f), after augmentation


class DualPathTagger(nn.Module):
    """An encoder under two linear heads, each refined by its own CRF.

    A label set of one level (GMNER) has the fine path only.

    Args:
        encoder: any Hugging Face encoder with a `last_hidden_state`.
        labels: the category tree; its coarse and fine tags are the outputs, in their order.
        alpha: weight of the coarse loss (eq. 8).
        beta: weight of the coarse logits in the fine ones (eq. 9).
        dropout: on the words' vectors, when training.
        transition: initial M (C_c, C_f), as `initial_transition` gives it; default: zeros, to be loaded over.
        design: which parts there are; all of the paper's if none.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        labels: LabelSet,
        alpha: float = 0.1,
        beta: float = 0.1,
        dropout: float = 0.1,
        transition: Tensor | None = None,
        design: TaggerDesign | None = None,
    ) -> None:
        super().__init__()
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # one vector for a whole sequence: nothing reads it
        self.encoder = encoder
        self.labels, self.alpha, self.beta = labels, alpha, beta
        self.design = design or TaggerDesign()
        self.dropout = nn.Dropout(dropout)
        size, coarse_tags, fine_tags = encoder.config.hidden_size, len(labels.coarse_tags), len(labels.fine_tags)
        self.fine_head = nn.Linear(size, fine_tags)
        self.fine_crf = self._tag_distribution(fine_tags)
        if self.has_coarse_path:
            self.coarse_head = nn.Linear(size, coarse_tags)
            self.coarse_crf = self._tag_distribution(coarse_tags)
            self.register_buffer("coarse_of_fine", coarse_of_fine_tags(labels), persistent=False)
            if self.design.augmentation:
                empty = torch.zeros(coarse_tags, fine_tags)
                self.transition = nn.Parameter(empty if transition is None else transition)
        if self.design.word_shapes:
            self.shape_embeddings = nn.Embedding(SHAPES, encoder.get_input_embeddings().embedding_dim)
            nn.init.zeros_(self.shape_embeddings.weight)  # at first, the encoder reads what it was pretrained on

    @property
    def has_coarse_path(self) -> bool:
        """Multi-granularity prediction: the design has it, and the label set has two levels."""
        return self.design.coarse_path and self.labels.is_hierarchical

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch with tags (eq. 8), a scalar; see `loss`."""
        return self.loss(batch, self.emissions(batch))

    def emissions(self, batch: Batch) -> Emissions:
        """Logits of every word, read at its first subword; knowledge is context only."""
        hidden = self._encode(batch)
        index = batch.first_subwords[:, :, None].expand(-1, -1, hidden.shape[-1])
        words = hidden.gather(1, index)  # eq. 4: (B, S, D) -> (B, W, D)
        words = self.dropout(words.to(self.fine_head.weight.dtype))
        fine = self.fine_head(words)  # (B, W, C_f)
        if not self.has_coarse_path:
            return Emissions(None, fine)
        coarse = self.coarse_head(words)  # (B, W, C_c)
        if not self.design.augmentation:
            return Emissions(coarse, fine)
        return Emissions(coarse, self.beta * coarse @ self.transition + (1 - self.beta) * fine)  # eq. 9

    def loss(self, batch: Batch, emissions: Emissions) -> Tensor:
        """The weighted negative log-likelihood of the gold tags, the mean over the batch's sequences.

        Raises:
            ValueError: the batch has no tags.
        """
        if batch.tags is None:
            raise ValueError("a batch without gold tags has no loss")
        fine = -_log_likelihood(self.fine_crf, emissions.fine, batch.tags, batch.word_mask)  # eq. 7
        if emissions.coarse is None:
            return fine
        coarse_tags = self.coarse_of_fine[batch.tags]
        coarse = -_log_likelihood(self.coarse_crf, emissions.coarse, coarse_tags, batch.word_mask)  # eq. 6
        return self.alpha * coarse + (1 - self.alpha) * fine  # eq. 8

    def decode(self, emissions: Emissions, word_mask: Tensor) -> list[list[int]]:
        """The best fine tags of each sequence, one for each word of its mask (B, W)."""
        return self.fine_crf.decode(emissions.fine.float(), word_mask)

    def _encode(self, batch: Batch) -> Tensor:
        """The encoder's vectors (B, S, D)."""
        if batch.shapes is None:
            output = self.encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        else:
            embeddings = self.encoder.get_input_embeddings()(batch.input_ids)
            embeddings = embeddings + self.shape_embeddings(batch.shapes).to(embeddings.dtype)
            output = self.encoder(inputs_embeds=embeddings, attention_mask=batch.attention_mask)
        return output.last_hidden_state

    def _tag_distribution(self, num_tags: int) -> LinearChainCRF | IndependentTags:
        return LinearChainCRF(num_tags) if self.design.crf else IndependentTags()


def _log_likelihood(crf: nn.Module, emissions: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
    # Sums over many steps: single precision also where the encoder runs in half.
    with torch.autocast(emissions.device.type, enabled=False):
        return crf(emissions.float(), tags, mask, reduction="mean")


def coarse_of_fine_tags(labels: LabelSet) -> Tensor:
    """(C_f,): the index of each fine tag's coarse tag, `B-actor` → `B-person`."""
    parents = bio_tags(tuple(labels.parent[fine] for fine in labels.fine))
    return torch.tensor([labels.coarse_tags.index(tag) for tag in parents])


def tag_cooccurrence(labels: LabelSet, sequences: Iterable[Iterable[int]]) -> Tensor:
    """How often each fine tag goes with each coarse tag, rows normalised: the initial M of eq. 9.

    Args:
        labels: the category tree.
        sequences: fine tags of the training texts, as indices.

    Returns:
        (C_c, C_f); the row of a coarse tag that never occurs is 0.
    """
    counts = torch.zeros(len(labels.coarse_tags), len(labels.fine_tags))
    coarse_of_fine = coarse_of_fine_tags(labels).tolist()
    for sequence in sequences:
        for fine in sequence:
            counts[coarse_of_fine[fine], fine] += 1
    return counts / counts.sum(dim=1, keepdim=True).clamp(min=1)


def initial_transition(kind: str, labels: LabelSet, sequences: Iterable[Iterable[int]]) -> Tensor:
    """M (C_c, C_f) before training.

    Args:
        kind: `cooccurrence` (the paper), `zeros`, or `random`: rows that sum to 1 as the co-occurrences do, and say
            nothing.
        labels: the category tree.
        sequences: fine tags of the training texts, as indices.
    """
    if kind == "cooccurrence":
        return tag_cooccurrence(labels, sequences)
    matrix = torch.zeros(len(labels.coarse_tags), len(labels.fine_tags))
    return matrix if kind == "zeros" else torch.randn_like(matrix).softmax(dim=1)
