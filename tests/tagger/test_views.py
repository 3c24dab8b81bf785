"""Views of training posts: a function of seed, epoch and post, and what each setting does to them."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from gem_ray.records import Post
from gem_ray.tagger.features import SubwordEncoder, load_tokenizer
from gem_ray.tagger.recipe import TaggerTraining
from gem_ray.tagger.views import LengthGroupedSampler, TrainingViews
from gem_ray.taxonomy import FMNERG, decode_bio


@pytest.fixture
def settings() -> TaggerTraining:
    return TaggerTraining(word_dropout=0.0, knowledge_dropout=0.0)


def views(posts: list[Post], features: SubwordEncoder, settings: TaggerTraining, **values: object) -> TrainingViews:
    return TrainingViews(posts, features, settings.changed(**values))


def outside(words: list[list[int]], spans: list[tuple[int, int, str]]) -> list[list[int]]:
    """The words that are in no mention."""
    return [word for place, word in enumerate(words) if not any(start <= place < end for start, end, _ in spans)]


def test_a_view_depends_on_seed_epoch_and_post_alone(
    posts: list[Post], features: SubwordEncoder, settings: TaggerTraining
) -> None:
    random = {"word_dropout": 0.3, "knowledge_dropout": 0.5, "mention_replacement": 0.5}
    one, other = (views(posts, features, settings, **random) for _ in range(2))
    keys = [(epoch, number) for epoch in range(3) for number in range(len(posts))]
    assert [one[key] for key in keys] == [other[key] for key in reversed(keys)][::-1]
    assert [one[0, number] for number in range(8)] != [one[1, number] for number in range(8)]
    reseeded = views(posts, features, settings, seed=1, **random)
    assert [one[key] for key in keys] != [reseeded[key] for key in keys]


@pytest.mark.parametrize("batch_size", [3, 4])
def test_an_epoch_has_every_post_once_in_batches_of_similar_length(
    posts: list[Post], features: SubwordEncoder, settings: TaggerTraining, batch_size: int
) -> None:
    data = views(posts * 9, features, settings, knowledge_dropout=0.5)  # 72 posts: one pool of 32 batches
    order = LengthGroupedSampler(data, batch_size, seed=0)
    epochs = []
    for epoch in (0, 1, 0):
        order.set_epoch(epoch)
        keys = list(order)
        assert sorted(keys) == [(epoch, number) for number in range(72)]
        batches = [keys[start : start + batch_size] for start in range(0, 72, batch_size)]
        spans = [[len(data[key].window.input_ids) for key in batch] for batch in batches]
        assert sum(max(lengths) * len(lengths) for lengths in spans) < 1.1 * sum(map(sum, spans))
        epochs.append([number for _, number in keys])
    assert epochs[0] == epochs[2] != epochs[1]


def test_replaced_mentions_keep_their_categories_and_come_from_the_posts(
    posts: list[Post], features: SubwordEncoder, settings: TaggerTraining
) -> None:
    data = views(posts, features, settings, mention_replacement=1.0)
    known = {
        (gold.fine, " ".join(post.tokens[gold.word_start : gold.word_end]))
        for post in posts
        for gold in post.gold or ()
    }
    own = [
        (subwords.words, [(gold.word_start, gold.word_end, gold.fine) for gold in post.gold or ()])
        for post, subwords in zip(posts, features.subwords(posts), strict=True)
    ]
    seen = set()
    for epoch in range(40):
        for number, post in enumerate(posts):
            window = data[epoch, number].window
            spans = decode_bio([FMNERG.fine_tags[tag] for tag in window.tags])
            assert [fine for *_, fine in spans] == [gold.fine for gold in post.gold or ()]
            assert window.input_ids.count(features.tokenizer.sep_token_id) == 1  # the knowledge was about others
            positions = [*window.first_subwords, len(window.input_ids) - 1]
            of_words = [window.input_ids[first:end] for first, end in pairwise(positions)]
            assert outside(of_words, spans) == outside(*own[number])
            for start, end, fine in spans:
                ids = window.input_ids[positions[start] : positions[end]]
                seen.add((fine, features.tokenizer.decode(ids)))
    assert seen == known


def test_the_second_view_is_the_same_post_without_knowledge_or_as_it_is(
    posts: list[Post], features: SubwordEncoder, settings: TaggerTraining
) -> None:
    post = replace(posts[0], caption=None)
    bare = views([post], features, settings, second_view="bare")[0, 0]
    (without,) = features.encode([replace(post, knowledge=None)])
    assert bare.second == replace(without, tags=bare.window.tags)
    same = views([post], features, settings, second_view="same")[0, 0]
    assert same.second == same.window


@pytest.mark.parametrize(
    ("source", "text"), [("none", ""), ("caption", "city"), ("knowledge", "singer"), ("both", "city singer")]
)
def test_knowledge_comes_from_the_columns_that_are_asked_for(encoder_folder: Path, source: str, text: str) -> None:
    settings = TaggerTraining(knowledge=source, knowledge_dropout=0.0, word_dropout=0.0)
    features = SubwordEncoder(load_tokenizer(encoder_folder), 64, settings.design)
    post = Post("p", "london", tokens=["london"], caption="city", knowledge="singer", gold=[])
    ids = TrainingViews([post], features, settings)[0, 0].window.input_ids
    assert features.tokenizer.decode(ids) == f"[CLS] london [SEP] {text} [SEP]".replace("  [SEP]", "").strip()
