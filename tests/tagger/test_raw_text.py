"""Raw texts, whatever they hold, from the row to the output's entities."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gem_ray.config import TextConfig
from gem_ray.data.prepare import Preparer, post_from_row
from gem_ray.data.tokenize import tokenize
from gem_ray.records import ANNOTATION_SCHEMA, Post
from gem_ray.rerank.uncertainty import UncertaintyFilter
from gem_ray.tagger.checkpoint import load_encoder
from gem_ray.tagger.features import SubwordEncoder, load_tokenizer
from gem_ray.tagger.model import DualPathTagger
from gem_ray.tagger.tagger import Tagger
from gem_ray.taxonomy import FMNERG

CHARACTERS = st.one_of(
    st.characters(),  # every code point but halves of surrogate pairs
    st.characters(categories=["Cs", "Cc", "Cf", "Mn", "Me", "Co"]),  # halves, controls, joiners, combining marks
    st.sampled_from("\0\t\u00a0\u200b\u200d\u202e\ufe0f\ufeffאبक्षи́👩🏽🚀🇺🇸#@&;…'’"),
    st.sampled_from(["london", "taylor swift ", "&amp;", "https://t.co/x", "RT @", "👩🏽‍🚀", "🏳️‍🌈", "e\u0301"]),
)
TEXTS = st.lists(CHARACTERS, max_size=40).map("".join)
NO_SUBWORD = ["\x00", "\ufffd", "\x7f"]
NO_WORD = ["\u200b", "\u202e", "\ufeff\u00ad"]


@pytest.fixture(scope="module")
def tagger(encoder_folder: Path) -> Tagger:
    """Random, but far from indifferent: it finds entities in anything."""
    torch.manual_seed(5)
    model = DualPathTagger(load_encoder(str(encoder_folder)), FMNERG, transition=torch.randn(17, 103))
    torch.nn.init.normal_(model.fine_head.weight)
    return Tagger(model, SubwordEncoder(load_tokenizer(encoder_folder), max_length=64), batch_tokens=256)


def annotate(tagger: Tagger, texts: list[str]) -> list[Post]:
    posts = [post_from_row({"post_id": str(number), "text": text}) for number, text in enumerate(texts)]
    return UncertaintyFilter(FMNERG)(tagger(Preparer(TextConfig())(posts)))


def letters(text: str) -> str:
    return "".join(character for character in text if not character.isspace() and tokenize(character))


def check(post: Post, text: str) -> None:
    """Offsets give back the entities, and the row can be written."""
    accepted = bool(tokenize(text)) and not any("\ud800" <= character <= "\udfff" for character in text)
    assert post.is_rejected is not accepted
    assert post.problems or accepted
    if accepted:
        assert post.text == text
    last = 0
    for entity in post.entities:
        assert last <= entity.word_start < entity.word_end <= len(post.tokens)
        last = entity.word_end
        assert text[entity.start : entity.end] == entity.text
        assert letters(entity.text) == letters("".join(post.tokens[entity.word_start : entity.word_end]))
        assert np.isfinite([entity.entropy, entity.score]).all()
    row = {**post.annotation(), "run_id": "", "models": []}
    assert pa.Table.from_pylist([json.loads(json.dumps(row))], ANNOTATION_SCHEMA).num_rows == 1


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(TEXTS, min_size=1, max_size=4))
@example(NO_SUBWORD)
@example(NO_WORD)
@example(["\ud83d", "\ude00\ud83d", "london"])
@example(["\u0301\u0301", "\u202eswift", "a\0b", "‏لندن‎"])
def test_any_text_is_annotated_or_rejected_and_its_neighbours_are_not_touched(tagger: Tagger, texts: list[str]) -> None:
    for post, text in zip(annotate(tagger, texts), texts, strict=True):
        check(post, text)


def test_a_word_that_gives_no_subword_has_a_place_and_a_tag(tagger: Tagger) -> None:
    text = " ".join(["london", *NO_SUBWORD, "paris"])
    (post,) = annotate(tagger, [text])
    words = tagger.features.subwords([post])[0].words
    assert len(words) == len(post.tokens) == 5
    assert words[1:-1] == [[tagger.features.tokenizer.unk_token_id]] * 3
    check(post, text)


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        "london ",
        "😀",
        "a\u0301",
        "www.",
        "https://t.co/",
        "&amp;",
        "-",
        "- ",
        "日本",
        "\u200b",
        "x" * 99 + " ",
        ":(",
    ],
)
def test_a_post_of_ten_thousand_characters_is_read_to_its_end(tagger: Tagger, piece: str) -> None:
    text = (piece * 10_000)[:9_994] + " paris"
    (post,) = annotate(tagger, [text])
    check(post, text)
    assert post.tokens[-1] == "paris"
    windows = tagger.features.encode([post])
    assert [window.word_start for window in windows] == [0, *(window.word_end for window in windows[:-1])]
    assert windows[-1].word_end == len(post.tokens)


def test_a_longer_post_is_rejected_with_its_length(tagger: Tagger) -> None:
    (post,) = annotate(tagger, ["a" * 10_001])
    assert "10,001 characters" in post.problems[0].message
    assert post.entities == []
