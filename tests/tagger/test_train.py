"""The training loop: it learns, repeats itself, and its parts do what their settings say."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gem_ray.records import GoldEntity, Post
from gem_ray.tagger.checkpoint import load_encoder, load_tagger
from gem_ray.tagger.features import SubwordEncoder
from gem_ray.tagger.model import DualPathTagger
from gem_ray.tagger.predict import predict_words
from gem_ray.tagger.recipe import TaggerTraining
from gem_ray.tagger.scores import score_with_and_without_knowledge
from gem_ray.tagger.tagger import Tagger
from gem_ray.tagger.train import train_tagger
from gem_ray.tagger.trainer import Progress
from gem_ray.taxonomy import FMNERG, decode_bio

PERFECT = {name: {"fine": 1.0, "coarse": 1.0, "span": 1.0} for name in ("with_knowledge", "without_knowledge")}


@pytest.fixture
def settings(encoder_folder: Path) -> TaggerTraining:
    return TaggerTraining(
        encoder=str(encoder_folder),
        epochs=2,
        batch_size=4,
        max_length=64,
        encoder_lr=3e-3,
        head_lr=1e-2,
        crf_lr=1e-2,
        dropout=0.0,
        word_dropout=0.0,
    )


def test_it_learns_eight_posts_by_heart(settings: TaggerTraining, posts: list[Post], tmp_path: Path) -> None:
    """One model, right with and without knowledge, and still right when read back in half precision."""
    settings = settings.model_copy(update={"epochs": 40, "on_base_encoder": True})
    report = train_tagger(posts, posts, tmp_path, settings)
    assert report["epochs"][-1]["loss"] < 0.2 * report["epochs"][0]["loss"]
    assert report["dev"] == PERFECT
    model, tokenizer = load_tagger(tmp_path)
    Tagger(model, SubwordEncoder(tokenizer, 64))(posts)
    for post in posts:
        found = [(entity.word_start, entity.word_end, entity.fine) for entity in post.entities]
        assert found == [(gold.word_start, gold.word_end, gold.fine) for gold in post.gold or ()]


def test_the_same_seed_gives_the_same_training(settings: TaggerTraining, posts: list[Post], tmp_path: Path) -> None:
    settings = settings.model_copy(update={"word_dropout": 0.3, "dropout": 0.2})
    runs = [train_tagger(posts, posts, tmp_path, settings) for _ in range(2)]
    losses = [[epoch["loss"] for epoch in run["epochs"]] for run in runs]
    assert losses[0] == losses[1]
    other = train_tagger(posts, posts, tmp_path, settings.model_copy(update={"seed": 1}))
    assert [epoch["loss"] for epoch in other["epochs"]] != losses[0]


def test_frozen_embeddings_stay_the_bases(
    settings: TaggerTraining, posts: list[Post], encoder_folder: Path, tmp_path: Path
) -> None:
    name = "embeddings.word_embeddings.weight"
    before = load_encoder(str(encoder_folder)).state_dict()[name]
    for freeze in (True, False):
        train_tagger(posts, posts, tmp_path, settings.model_copy(update={"freeze_embeddings": freeze}))
        after = load_tagger(tmp_path)[0].encoder.state_dict()[name]
        assert torch.equal(before, after) is freeze


def test_moving_average_is_what_is_saved(settings: TaggerTraining, posts: list[Post], tmp_path: Path) -> None:
    """A quick average is the model itself, a slow one stays behind it."""
    weights = []
    for decay in (0.0, 1e-6, 0.9999):
        # One epoch: which one is kept must not matter.
        train_tagger(posts, posts, tmp_path, settings.model_copy(update={"epochs": 1, "ema_decay": decay}))
        weights.append(load_tagger(tmp_path)[0].fine_head.weight)
    plain, quick, slow = weights
    torch.testing.assert_close(quick, plain, atol=1e-5, rtol=0)
    assert (slow - plain).abs().max() > 1e-3


def test_dropped_knowledge_is_not_seen(settings: TaggerTraining, posts: list[Post], tmp_path: Path) -> None:
    settings = settings.model_copy(update={"epochs": 1, "knowledge_dropout": 1.0})
    bare = [replace(post, knowledge=None) for post in posts]
    losses = [train_tagger(some, [], tmp_path, settings)["epochs"][0]["loss"] for some in (posts, bare)]
    assert losses[0] == losses[1]


def test_dropped_words_are_not_seen(settings: TaggerTraining, posts: list[Post], tmp_path: Path) -> None:
    settings = settings.model_copy(update={"epochs": 1, "word_dropout": 1.0})
    other = [replace(post, tokens=[{"paris": "london"}.get(word, word) for word in post.tokens]) for post in posts]
    losses = [train_tagger(some, [], tmp_path, settings)["epochs"][0]["loss"] for some in (posts, other)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("part", ["encoder", "head", "crf"])
def test_each_part_has_its_own_learning_rate(
    settings: TaggerTraining, posts: list[Post], tmp_path: Path, part: str
) -> None:
    rates = {f"{name}_lr": 1e-2 if name == part else 1e-12 for name in ("encoder", "head", "crf")}
    settings = settings.model_copy(update={**rates, "epochs": 1})
    train_tagger(posts, [], tmp_path / "moved", settings)
    train_tagger(posts, [], tmp_path / "still", settings.model_copy(update={f"{part}_lr": 1e-12}))
    moved, still = (load_tagger(tmp_path / name)[0].state_dict() for name in ("moved", "still"))
    different = {name for name in moved if not torch.allclose(moved[name], still[name], atol=1e-6)}
    kinds = {"crf" if "_crf." in name else "encoder" if name.startswith("encoder.") else "head" for name in different}
    assert kinds == {part}


def test_progress_counts_every_step(settings: TaggerTraining, posts: list[Post], tmp_path: Path) -> None:
    reports: list[Progress] = []
    train_tagger(posts, posts, tmp_path, settings, reports.append)
    assert [(report.epoch, report.step) for report in reports] == [(1, 1), (1, 2), (2, 3), (2, 4)]
    assert all(report.steps == 4 and report.loss > 0 for report in reports)


def test_one_level_labels_train_too(settings: TaggerTraining, tmp_path: Path) -> None:
    posts = [Post("a", "google said", tokens=["google", "said"], gold=[GoldEntity(0, 1, "ORG")])] * 4
    report = train_tagger(posts, posts, tmp_path, settings.model_copy(update={"labels": "gmner", "epochs": 20}))
    assert report["dev"] == PERFECT


def test_scores_are_f1_over_sets_of_mentions(encoder_folder: Path, features: SubwordEncoder, posts: list[Post]) -> None:
    """Gold is what an untrained model says, then bent by known amounts."""
    torch.manual_seed(7)
    model = DualPathTagger(load_encoder(str(encoder_folder)), FMNERG)
    torch.nn.init.normal_(model.fine_head.weight)
    for post, words in zip(posts, predict_words(model, posts, features), strict=True):
        post.gold = [GoldEntity(*span) for span in decode_bio(words.tags)]
    mentions = sum(len(post.gold or ()) for post in posts)
    assert score_with_and_without_knowledge(model, posts, features)["with_knowledge"] == PERFECT["with_knowledge"]
    first, *others = posts[0].gold or []
    posts[0].gold = [replace(first, fine=FMNERG.siblings(first.fine)[0]), *others]
    posts[1].gold = (posts[1].gold or [])[1:]  # one prediction too many
    scores = score_with_and_without_knowledge(model, posts, features)["with_knowledge"]
    assert scores["fine"] == pytest.approx(2 * (mentions - 2) / (2 * mentions - 1))
    assert scores["coarse"] == scores["span"] == pytest.approx(2 * (mentions - 1) / (2 * mentions - 1))


def test_nothing_to_learn_from_is_an_error(settings: TaggerTraining, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no training post"):
        train_tagger([Post("a", "google", tokens=["google"])], [], tmp_path, settings)
