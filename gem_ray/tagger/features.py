"""From posts to the encoder's input: `[CLS] words [SEP] knowledge [SEP]` (eq. 3), in batches of similar length."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gem_ray.model_kind import require_words
from gem_ray.records import Post
from gem_ray.tagger.recipe import KnowledgeSource, TaggerDesign
from gem_ray.tagger.shapes import case_of, cases_of, input_shapes

_SPECIAL_TOKENS = 2  # [CLS] and the [SEP] after the text
_MOST_OF_SUBWORD = 100  # characters; the tokenizer takes 130 times the memory of what it is given


@dataclass(frozen=True)
class SubwordPost:
    """A post's subword ids: one list a word, never empty, and those of its knowledge; cases only if asked for."""

    words: list[list[int]]
    knowledge: list[int]
    word_cases: list[list[int]] = field(default_factory=list)
    knowledge_cases: list[int] = field(default_factory=list)


@dataclass
class Window:
    """One input sequence: a post's words from `word_start` on, as many as fit, and knowledge in the room that is left.

    `first_subwords` holds, for each word, the position of its first subword in `input_ids`.
    """

    post: int
    word_start: int
    input_ids: list[int]
    first_subwords: list[int]
    tags: list[int] = field(default_factory=list)  # gold fine tags, when training
    shapes: list[int] = field(default_factory=list)  # one a subword, if the model reads them

    @property
    def word_end(self) -> int:
        """One past the last word."""
        return self.word_start + len(self.first_subwords)


@dataclass(frozen=True)
class Batch:
    """Padded windows, as tensors."""

    input_ids: Tensor  # (B, S)
    attention_mask: Tensor  # (B, S)
    first_subwords: Tensor  # (B, W), 0 past the end
    word_mask: Tensor  # (B, W) bool: the words that have a tag
    tags: Tensor | None = None  # (B, W), 0 past the end
    shapes: Tensor | None = None  # (B, S), 0 past the end

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(*(None if tensor is None else tensor.to(device) for tensor in vars(self).values()))


def fit(tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel, path: Path) -> PreTrainedTokenizerBase:
    """A tokenizer that says how much its encoder reads, which not all published ones do.

    Args:
        tokenizer: as `load_tokenizer` gives it.
        encoder: whose it is.
        path: where it was loaded from.

    Raises:
        ValueError: it cannot be the encoder's.
    """
    require_words(tokenizer, encoder.get_input_embeddings().num_embeddings, path)
    positions = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    if isinstance(positions, nn.Embedding):
        # RoBERTa and its like count from the one past the padding's.
        unused = 0 if positions.padding_idx is None else positions.padding_idx + 1
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions.num_embeddings - unused)
    return tokenizer


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer in a folder, set up for words that are already split.

    Raises:
        ValueError: the tokenizer cannot say which subword belongs to which word.
    """
    # Byte-level tokenizers (RoBERTa) need a space before every word; the others ignore the argument.
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, add_prefix_space=True)
    except Exception as error:  # where some of its files are missing, slow tokenizers raise anything
        raise ValueError(f"{path} has no tokenizer that can be loaded ({type(error).__name__}: {error})") from error
    if not tokenizer.is_fast or tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise ValueError(f"the tagger needs a fast tokenizer with classification and separator tokens, unlike {path}")
    return tokenizer


class SubwordEncoder:
    """Turns posts into input sequences of at most `max_length` subwords.

    The text is never cut for the knowledge's sake: the knowledge gets the room that the text leaves. A text longer than
    `max_length` is read in consecutive windows of whole words, each tagged by itself.

    Args:
        tokenizer: as `load_tokenizer` gives it.
        max_length: subwords of text, knowledge and special tokens together.
        design: which columns are knowledge, and whether shapes are wanted; the paper's if none.

    Raises:
        ValueError: `max_length` leaves no room for a word, or is more than the encoder reads.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, design: TaggerDesign | None = None) -> None:
        if not _SPECIAL_TOKENS < max_length <= tokenizer.model_max_length:
            raise ValueError(
                f"max_length {max_length} must be over 2 and at most {tokenizer.model_max_length} subwords"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.design = design or TaggerDesign()

    def subwords(self, posts: Sequence[Post]) -> list[SubwordPost]:
        """Subword ids of texts and knowledge, one call of the tokenizer for each."""
        if not posts:
            return []
        words = [[encoder_form(token) for token in post.tokens] for post in posts]
        texts = self.tokenizer(
            words,
            is_split_into_words=True,
            add_special_tokens=False,
            return_offsets_mapping=self.design.word_shapes,
            verbose=False,
        )
        most = self.max_length * _MOST_OF_SUBWORD
        sources = [knowledge_text(post, self.design.knowledge)[:most] for post in posts]
        knowledge = self.tokenizer(
            sources,
            add_special_tokens=False,
            return_offsets_mapping=self.design.word_shapes,
            truncation=True,
            max_length=self.max_length,
        )
        subwords = [
            SubwordPost(self._words(ids, texts.word_ids(row), len(post.tokens)), known)
            for row, (post, ids, known) in enumerate(zip(posts, texts.input_ids, knowledge.input_ids, strict=True))
        ]
        if not self.design.word_shapes:
            return subwords
        return [
            replace(
                each,
                word_cases=self._word_cases(words[row], each, texts.word_ids(row), texts.offset_mapping[row]),
                knowledge_cases=cases_of(sources[row], knowledge.offset_mapping[row]),
            )
            for row, each in enumerate(subwords)
        ]

    def windows(self, post: SubwordPost, index: int = 0) -> list[Window]:
        """The input sequences of one post: one, unless its text is longer than `max_length`.

        Args:
            post: its subwords.
            index: what `Window.post` will be.
        """
        windows = [self._open(index, 0)]
        for position, word in enumerate(post.words):
            if len(windows[-1].input_ids) + len(word) > self.max_length - 1:
                windows.append(self._open(index, position))
            windows[-1].first_subwords.append(len(windows[-1].input_ids))
            windows[-1].input_ids.extend(word)
        for window in windows:
            self._close(window, post)
        return windows

    def encode(self, posts: Sequence[Post]) -> list[Window]:
        """The windows of all posts; `Window.post` is the position in `posts`. A post without words has none."""
        return [
            window
            for index, post in enumerate(self.subwords(posts))
            if post.words
            for window in self.windows(post, index)
        ]

    def _words(self, ids: list[int], word_ids: list[int | None], count: int) -> list[list[int]]:
        words: list[list[int]] = [[] for _ in range(count)]
        for subword, word in zip(ids, word_ids, strict=True):
            if word is not None:
                words[word].append(subword)
        longest = self.max_length - _SPECIAL_TOKENS
        # A word without any subword (a zero-width character) still has a place and a tag.
        return [word[:longest] or [self.tokenizer.unk_token_id] for word in words]

    def _word_cases(
        self,
        tokens: Sequence[str],
        post: SubwordPost,
        word_ids: list[int | None],
        offsets: Sequence[tuple[int, int]],
    ) -> list[list[int]]:
        """The case of every subword in `post.words`; offsets count from the beginning of their word."""
        cases: list[list[int]] = [[] for _ in tokens]
        for word, span in zip(word_ids, offsets, strict=True):
            if word is not None:
                cases[word].extend(cases_of(tokens[word], [span]))
        unknown = [case_of("")]
        return [(case or unknown)[: len(word)] for case, word in zip(cases, post.words, strict=True)]

    def _open(self, index: int, position: int) -> Window:
        return Window(index, position, [self.tokenizer.cls_token_id], [])

    def _close(self, window: Window, post: SubwordPost) -> None:
        separator = self.tokenizer.sep_token_id
        text = window.input_ids[1:]
        knowledge = post.knowledge[: max(0, self.max_length - len(text) - _SPECIAL_TOKENS - 1)]
        window.input_ids.append(separator)
        if knowledge:
            window.input_ids.extend([*knowledge, separator])  # eq. 3
        if self.design.word_shapes:
            cases = [case for word in post.word_cases[window.word_start : window.word_end] for case in word]
            window.shapes = input_shapes(text, cases, knowledge, post.knowledge_cases[: len(knowledge)])


def encoder_form(word: str) -> str:
    """A word as the encoder reads it: mathematical, full-width and circled letters are plain, for it knows no others.

    Signs stay as they are, which it has learnt (`…`). Text and offsets keep the word.
    """
    return word if word.isascii() else "".join(map(_plain_letter, word))


def _plain_letter(character: str) -> str:
    plain = unicodedata.normalize("NFKC", character)
    return plain if plain.isascii() and plain.isalnum() else character


def knowledge_text(post: Post, source: KnowledgeSource) -> str:
    """What a post brings beside its text, from the columns that are asked for; empty if it has none."""
    columns = {"caption": [post.caption], "knowledge": [post.knowledge], "both": [post.caption, post.knowledge]}
    return " ".join(text for text in columns.get(source, ()) if text)


def collate(windows: Sequence[Window], pad_token_id: int) -> Batch:
    """Pad windows to the longest of them."""
    subwords = max(len(window.input_ids) for window in windows)
    words = max(len(window.first_subwords) for window in windows)
    lengths = torch.tensor([len(window.first_subwords) for window in windows])
    input_ids = _padded([window.input_ids for window in windows], subwords, pad_token_id)
    sizes = torch.tensor([len(window.input_ids) for window in windows])
    return Batch(
        input_ids=input_ids,
        attention_mask=(torch.arange(subwords) < sizes[:, None]).long(),
        first_subwords=_padded([window.first_subwords for window in windows], words, 0),
        word_mask=torch.arange(words) < lengths[:, None],
        tags=_padded([window.tags for window in windows], words, 0) if windows[0].tags else None,
        shapes=_padded([window.shapes for window in windows], subwords, 0) if windows[0].shapes else None,
    )


def by_token_budget(windows: Sequence[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Batches of windows of similar length, the longest first, each of at most `batch_tokens` subwords with padding.

    A row count would make batches of short texts too small for a GPU, or those of long texts too large for its memory.
    A window that is longer than the budget is a batch of its own.
    """
    batch: list[Window] = []
    for window in sorted(windows, key=lambda window: len(window.input_ids), reverse=True):
        if batch and (len(batch) + 1) * len(batch[0].input_ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _padded(rows: list[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
