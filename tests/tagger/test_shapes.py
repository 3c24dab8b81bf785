"""Subword shapes: what they say, where they stand, and that the model begins without them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gem_ray.records import Post
from gem_ray.tagger.checkpoint import load_encoder
from gem_ray.tagger.features import SubwordEncoder, collate, load_tokenizer
from gem_ray.tagger.model import DualPathTagger
from gem_ray.tagger.recipe import TaggerDesign
from gem_ray.tagger.shapes import SHAPES, case_of
from gem_ray.taxonomy import FMNERG

DESIGN = TaggerDesign(word_shapes=True)
LOWER, TITLE, UPPER, MIXED, DIGIT, OTHER = range(1, 7)
KNOWLEDGE, MATCH = 7, 14


@pytest.fixture
def shaped(encoder_folder: Path) -> SubwordEncoder:
    return SubwordEncoder(load_tokenizer(encoder_folder), 64, DESIGN)


@pytest.mark.parametrize(
    ("surface", "case"),
    [("said", LOWER), ("Paris", TITLE), ("I", TITLE), ("NYC", UPPER), ("iPhone", MIXED), ("McDonald", MIXED),
     ("3pm", DIGIT), ("#", OTHER), ("", OTHER), ("É", TITLE), ("東京", MIXED)],
)  # fmt: skip
def test_cases(surface: str, case: int) -> None:
    assert case_of(surface) == case


def test_shapes_tell_case_side_and_exact_matches(shaped: SubwordEncoder) -> None:
    post = Post("p", "", tokens=["NYork", "sees", "Paris", "\u200b"], knowledge="PARIS is new")
    (window,) = shaped.encode([post])
    pieces = shaped.tokenizer.convert_ids_to_tokens(window.input_ids)
    assert pieces == ["[CLS]", "ny", "##ork", "sees", "paris", "[UNK]", "[SEP]", "paris", "[UNK]", "new", "[SEP]"]
    expected = [0, UPPER, LOWER, LOWER, TITLE + MATCH, OTHER + MATCH, 0]  # unknown on both sides is a match, too
    expected += [UPPER + MATCH + KNOWLEDGE, LOWER + MATCH + KNOWLEDGE, LOWER + KNOWLEDGE, 0]
    assert window.shapes == expected
    assert max(window.shapes) < SHAPES


def test_shapes_fit_their_subwords_in_every_window(encoder_folder: Path, posts: list[Post]) -> None:
    for max_length in (6, 12, 64):
        features = SubwordEncoder(load_tokenizer(encoder_folder), max_length, DESIGN)
        for window in features.encode(posts):
            assert len(window.shapes) == len(window.input_ids)
    assert SubwordEncoder(load_tokenizer(encoder_folder), 64).encode(posts)[0].shapes == []


def test_a_new_model_says_what_it_says_without_shapes(
    encoder_folder: Path, shaped: SubwordEncoder, posts: list[Post]
) -> None:
    encoder = load_encoder(str(encoder_folder))
    torch.manual_seed(1)
    model = DualPathTagger(encoder, FMNERG, design=DESIGN).eval()
    batch = collate(shaped.encode(posts), 0)
    plain = replace(batch, shapes=None)
    with torch.no_grad():
        torch.testing.assert_close(model.emissions(batch).fine, model.emissions(plain).fine)
        torch.nn.init.normal_(model.shape_embeddings.weight)
        assert not torch.allclose(model.emissions(batch).fine, model.emissions(plain).fine)
