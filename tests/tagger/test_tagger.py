"""The stage TAG: entities of posts, whatever batch they come in."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gem_ray.config import Config, load_config
from gem_ray.noise import GRAIN
from gem_ray.records import Post, ProblemKind
from gem_ray.tagger.checkpoint import load_encoder, save_tagger
from gem_ray.tagger.features import SubwordEncoder, collate, load_tokenizer
from gem_ray.tagger.model import DualPathTagger
from gem_ray.tagger.tagger import Tagger
from gem_ray.taxonomy import FMNERG, decode_bio


@pytest.fixture
def model(encoder_folder: Path) -> DualPathTagger:
    """Random, but far from indifferent: it finds many entities."""
    torch.manual_seed(5)
    model = DualPathTagger(load_encoder(str(encoder_folder)), FMNERG, transition=torch.randn(17, 103))
    torch.nn.init.normal_(model.fine_head.weight)
    return model


@pytest.fixture
def tagger(model: DualPathTagger, features: SubwordEncoder) -> Tagger:
    return Tagger(model, features, batch_tokens=40)


def copies(posts: list[Post]) -> list[Post]:
    return [replace(post, entities=[], problems=[]) for post in posts]


def test_entities_are_the_best_paths_spans(tagger: Tagger, model: DualPathTagger, posts: list[Post]) -> None:
    assert tagger(posts) is posts
    assert sum(len(post.entities) for post in posts) > 10
    for post in posts:
        batch = collate(tagger.features.encode([post]), 0)
        with torch.no_grad():
            emissions = model.emissions(batch)
        (path,) = model.fine_crf.decode(emissions.fine, batch.word_mask)
        spans = decode_bio([FMNERG.fine_tags[tag] for tag in path])
        assert [(entity.word_start, entity.word_end, entity.fine) for entity in post.entities] == spans
        for entity in post.entities:
            assert post.text[entity.start : entity.end] == entity.text
            assert entity.text == " ".join(post.tokens[entity.word_start : entity.word_end])
            assert entity.coarse == FMNERG.parent[entity.fine]
            mean = emissions.fine[0, entity.word_start : entity.word_end].mean(dim=0).numpy()
            assert entity.logits is not None
            assert entity.logits.dtype == np.float32
            np.testing.assert_allclose(entity.logits, mean, atol=1e-4)


def test_offsets_follow_the_text_and_not_the_tokens(tagger: Tagger) -> None:
    post = Post("p", "  google,paris   london", tokens=["google", ",", "paris", "london"])
    tagger([post])
    assert post.entities
    for entity in post.entities:
        assert post.text[entity.start : entity.end] == entity.text
        assert entity.text.startswith(post.tokens[entity.word_start])
        assert entity.text.endswith(post.tokens[entity.word_end - 1])


def test_a_post_alone_is_tagged_as_in_a_batch(tagger: Tagger, posts: list[Post]) -> None:
    together, alone = copies(posts), copies(posts)
    tagger(together)
    for post in alone:
        tagger([post])
    for one, other in zip(together, alone, strict=True):
        assert one.entities == other.entities
        for mine, theirs in zip(one.entities, other.entities, strict=True):
            np.testing.assert_allclose(mine.logits, theirs.logits, atol=1e-4)
            assert mine.marginal == pytest.approx(theirs.marginal, rel=2 * GRAIN)


def test_knowledge_is_read_but_never_tagged(tagger: Tagger, posts: list[Post]) -> None:
    informed, plain = copies(posts[:1]), [replace(post, knowledge=None) for post in copies(posts[:1])]
    tagger(informed)
    tagger(plain)
    assert all(entity.word_end <= len(informed[0].tokens) for entity in informed[0].entities)
    assert not np.allclose(informed[0].entities[0].logits, plain[0].entities[0].logits, atol=1e-3)


def test_every_word_of_a_long_text_is_tagged(model: DualPathTagger, encoder_folder: Path) -> None:
    words = ["google", "paris", "said", "taylor"] * 100
    post = Post("long", " ".join(words), tokens=words)
    Tagger(model, SubwordEncoder(load_tokenizer(encoder_folder), max_length=20))([post])
    assert max(entity.word_end for entity in post.entities) > 390
    assert all(post.text[entity.start : entity.end] == entity.text for entity in post.entities)
    assert all(0 < entity.marginal <= 1 for entity in post.entities)


def test_what_a_window_says_of_its_entities_does_not_hang_on_the_windows_beside_it(tagger: Tagger) -> None:
    words = ["google", "paris", "said", "taylor", "swift"]
    alone, long = Post("a", " ".join(words), tokens=words), Post("b", " ".join(words * 9), tokens=words * 9)
    tagger([alone])
    size = len(tagger.features.windows(tagger.features.subwords([alone])[0])[0].input_ids)
    Tagger(tagger.model, SubwordEncoder(tagger.features.tokenizer, max_length=size))([long])
    inner = [entity for entity in alone.entities if entity.word_start > 0 and entity.word_end < len(words)]
    assert inner
    found = {(entity.word_start % 5, entity.fine): entity.marginal for entity in long.entities}
    for entity in inner:
        assert found[entity.word_start, entity.fine] == pytest.approx(entity.marginal, rel=2 * GRAIN)


def test_rejected_and_empty_posts_are_left_alone(tagger: Tagger, posts: list[Post]) -> None:
    posts[0].fail("prepare", ProblemKind.BAD_RECORD, "not a row")
    empty = Post("empty", "")
    tagger([posts[0], empty, posts[1]])
    assert posts[0].entities == empty.entities == []
    assert posts[1].entities
    assert not empty.problems
    assert tagger([]) == []


def test_tokens_that_are_not_the_texts_fail_that_post_only(tagger: Tagger, posts: list[Post]) -> None:
    stranger = Post("stranger", "london", tokens=["google", "paris"])
    tagger([stranger, posts[1]])
    assert stranger.is_rejected
    assert "google" in stranger.problems[0].message
    assert posts[1].entities
    assert not posts[1].problems


def test_from_config_loads_what_it_names(
    model: DualPathTagger, tagger: Tagger, posts: list[Post], tmp_path: Path
) -> None:
    save_tagger(model, tagger.features.tokenizer, tmp_path)
    config = load_config(overrides=[f"tagger.model={tmp_path}", "tagger.max_length=64", "device=cpu"])
    loaded, expected = copies(posts), copies(posts)
    Tagger.from_config(config)(loaded)
    tagger(expected)
    assert [post.entities for post in loaded] == [post.entities for post in expected]


def test_a_model_for_other_labels_is_refused(model: DualPathTagger, tagger: Tagger, tmp_path: Path) -> None:
    save_tagger(model, tagger.features.tokenizer, tmp_path)
    config = Config.model_validate({"labels": "gmner", "tagger": {"model": str(tmp_path), "max_length": 64}})
    with pytest.raises(ValueError, match="gmner"):
        Tagger.from_config(config)


def test_the_encoder_runs_in_half_precision_if_asked(
    model: DualPathTagger, features: SubwordEncoder, posts: list[Post]
) -> None:
    full = Tagger(model, features)(copies(posts[:1]))[0]
    half = Tagger(model, features, dtype=torch.bfloat16)(copies(posts[:1]))[0]
    assert next(model.encoder.parameters()).dtype is torch.bfloat16
    assert half.entities[0].logits is not None
    assert half.entities[0].logits.dtype == np.float32
    np.testing.assert_allclose(half.entities[0].logits, full.entities[0].logits, atol=0.5)
