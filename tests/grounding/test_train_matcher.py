import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main
from PIL import Image
from transformers import BlipForImageTextRetrieval
from transformers.models.blip.modeling_blip import BlipVisionEmbeddings

from gem_ray.cli import app
from gem_ray.config import ConfigError, parse_config
from gem_ray.data.shards import write_posts
from gem_ray.grounding.decision import Decision
from gem_ray.grounding.matcher import Matcher, MatchQuery
from gem_ray.grounding.matcher_recipe import MatcherTraining
from gem_ray.grounding.pairs import Pair, PairsOfPosts, build_pairs, gold_pairs
from gem_ray.grounding.train_matcher import train_matcher
from gem_ray.nano.blip import BlipSize, build_blip
from gem_ray.records import Box, GoldEntity, Post
from gem_ray.taxonomy import gmner_category

BOX = (Box(0, 0, 8, 8),)
RED, BLUE = (220, 20, 20), (20, 20, 220)


def post(text: str, color: tuple[int, int, int], *gold: GoldEntity) -> Post:
    data = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(data, "PNG")
    return Post(text, text, text.split(), image_bytes=data.getvalue(), gold=list(gold))


def color_posts() -> list[Post]:
    """Redland is seen where the image is red, Blue Bay where it is blue."""
    text = "Redland or Blue Bay"
    return [
        post(
            text,
            color,
            GoldEntity(0, 1, "country", BOX if color == RED else ()),
            GoldEntity(2, 4, "city", BOX if color == BLUE else ()),
        )
        for color in (RED, BLUE)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    texts = ["Redland is belong country.", "Blue Bay is belong city."]
    build_blip(out, texts, BlipSize(image_side=16, patch=8, width=24, image_layers=1, text_layers=2))
    Decision(layer=1).save(out)
    return out


def no_rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_gold_mentions_are_present_if_they_have_a_box():
    pairs = build_pairs(color_posts(), MatcherTraining(), no_rng())
    assert pairs == [
        [Pair("Redland", "country", True), Pair("Blue Bay", "city", False)],
        [Pair("Redland", "country", False), Pair("Blue Bay", "city", True)],
    ]


def test_names_are_taken_from_the_text_as_the_grounder_takes_them():
    gold = GoldEntity(0, 4, "character")
    written = Post("0", "don't-stop!", ["don", "'", "t-stop", "!"], gold=[gold])
    assert build_pairs([written], MatcherTraining(), no_rng()) == [[Pair("don't-stop!", "character", False)]]


def test_a_name_is_also_asked_with_its_other_category():
    posts = [
        post("Jordan wins", RED, GoldEntity(0, 1, "athlete", BOX)),
        post("Jordan sells", RED, GoldEntity(0, 1, "company", BOX)),
        post("Blue Bay", RED, GoldEntity(0, 2, "city", BOX)),
    ]
    pairs = build_pairs(posts, MatcherTraining(category_negatives=True), no_rng())
    assert [pair for group in pairs for pair in group if not pair.present] == [
        Pair("Jordan", "company", False),
        Pair("Jordan", "athlete", False),
    ]


def test_mentions_of_other_posts_are_absent_unless_named_here_too():
    posts = [*color_posts(), post("Jordan wins", RED, GoldEntity(0, 1, "athlete", BOX))]
    pairs = build_pairs(posts, MatcherTraining(image_negatives=50), no_rng())
    assert {(pair.entity, pair.present) for pair in pairs[0][2:]} == {("Jordan", False)}
    assert {pair.entity for pair in pairs[2][1:]} == {"Redland", "Blue Bay"}
    assert not any(pair.present for pair in pairs[2][1:])


def test_training_learns_which_image_shows_which_name(base, tmp_path):
    settings = MatcherTraining(learning_rate=1e-2, epochs=50, batch_size=2, balance=True)
    result = train_matcher(color_posts(), color_posts(), str(base), tmp_path, settings)
    assert result["loss"][0] > 0.5
    assert result["loss"][-1] < 0.05
    assert (result["pairs"], result["present"], result["skipped"]) == (4, 2, 0)
    assert result["dev"]["accuracy"] == 1
    assert not (tmp_path / "checkpoints").exists()
    matcher = Matcher.from_config(parse_config({"grounder": {"matcher": {"model": str(tmp_path)}}}))
    images = [np.full((30, 40, 3), color, dtype=np.uint8) for color in (RED, BLUE)]
    queries = [MatchQuery(i, *name) for i in (0, 1) for name in (("Redland", "country"), ("Blue Bay", "city"))]
    threshold = Decision.load(tmp_path).threshold
    assert threshold == result["dev"]["threshold"]
    assert Decision.load(tmp_path).layer == 1  # the base model's
    seen = [match.probability > threshold for match in matcher.match(images, queries)]
    assert seen == [True, False, False, True]


def test_same_seed_same_model(base, tmp_path):
    for name in ("one", "two"):
        train_matcher(
            color_posts(), [], str(base), tmp_path / name, MatcherTraining(learning_rate=1e-3, image_negatives=2)
        )
    one, two = (BlipForImageTextRetrieval.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_each_image_is_encoded_once_for_all_pairs_of_its_post(base, tmp_path, monkeypatch):
    encoded = []
    original = BlipVisionEmbeddings.forward

    def counting(self, pixel_values, **options):
        encoded.append(len(pixel_values))
        return original(self, pixel_values, **options)

    monkeypatch.setattr(BlipVisionEmbeddings, "forward", counting)
    train_matcher(color_posts(), [], str(base), tmp_path, MatcherTraining(image_negatives=9))
    assert encoded == [2]


def test_posts_without_a_usable_image_are_counted_not_fatal(base, tmp_path):
    broken = color_posts()
    broken[0].image_bytes = b"not an image"
    result = train_matcher(broken, [], str(base), tmp_path, MatcherTraining(batch_size=1))
    assert result["skipped"] == 1
    assert np.isfinite(result["loss"][0])


def test_nothing_to_learn_from_is_an_error(base, tmp_path):
    with pytest.raises(ValueError, match="no post has a gold mention"):
        train_matcher([Post("0", "hello", ["hello"], gold=[])], [], str(base), tmp_path)


def test_posts_without_any_image_are_an_error_before_anything_is_trained(base, tmp_path):
    posts = color_posts()
    for each in posts:
        each.image_bytes = None
    with pytest.raises(ValueError, match="no post has an image"):
        train_matcher(posts, [], str(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "readable"), [("training", [False, True]), ("dev", [True, False])])
def test_posts_whose_images_cannot_be_read_are_an_error_before_anything_is_trained(base, tmp_path, name, readable):
    train, dev = ([replace(post) for post in color_posts()] for _ in range(2))
    for posts, is_readable in zip((train, dev), readable, strict=True):
        for post in posts:
            post.image_bytes = post.image_bytes if is_readable else b"not an image"
    with pytest.raises(ValueError, match=f"no image of the {name} posts"):
        train_matcher(train, dev, str(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_training_that_diverges_ends_with_an_error(base, tmp_path):
    with pytest.raises(ValueError, match="the training has diverged; lower its learning rate"):
        train_matcher(
            color_posts() * 4, [], str(base), tmp_path, MatcherTraining(learning_rate=1e30, epochs=4, batch_size=1)
        )


class KilledError(Exception):
    pass


def test_a_training_that_was_killed_goes_on_and_ends_with_the_same_weights(base, tmp_path):
    settings = MatcherTraining(learning_rate=1e-3, epochs=4, batch_size=1, image_negatives=3, checkpoint_steps=1)

    def kill(step: int, _loss: float) -> None:
        if step >= 4:  # the end of the second of four epochs
            raise KilledError

    with pytest.raises(KilledError):
        train_matcher(color_posts(), color_posts(), str(base), tmp_path / "killed", settings, report=kill)
    steps: list[int] = []
    resumed = train_matcher(
        color_posts(), color_posts(), str(base), tmp_path / "killed", settings, lambda step, _: steps.append(step)
    )
    assert steps[0] > 2  # what was done is not done again
    whole = train_matcher(color_posts(), color_posts(), str(base), tmp_path / "whole", settings)
    assert resumed["loss"][-1] == pytest.approx(whole["loss"][-1], abs=1e-6)
    one, two = (BlipForImageTextRetrieval.from_pretrained(tmp_path / name).state_dict() for name in ("killed", "whole"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_another_recipe_does_not_go_on_where_one_was_killed(base, tmp_path):
    def kill(step: int, _loss: float) -> None:
        raise KilledError

    with pytest.raises(KilledError):
        train_matcher(color_posts(), [], str(base), tmp_path, MatcherTraining(), report=kill)
    with pytest.raises(ConfigError, match="another recipe"):
        train_matcher(color_posts(), [], str(base), tmp_path, MatcherTraining(epochs=2))


def test_the_epoch_that_is_best_on_dev_is_kept(base, tmp_path):
    # A rate so high that the model is ruined in the end: what is saved is from before.
    settings = MatcherTraining(
        learning_rate=1e-2, epochs=40, batch_size=2, balance=True, schedule="constant_with_warmup"
    )
    result = train_matcher(color_posts() * 5, color_posts(), str(base), tmp_path, settings)
    matcher = Matcher.from_config(parse_config({"grounder": {"matcher": {"model": str(tmp_path)}}}))
    images = [np.full((30, 40, 3), color, dtype=np.uint8) for color in (RED, BLUE)]
    queries = [MatchQuery(i, *name) for i in (0, 1) for name in (("Redland", "country"), ("Blue Bay", "city"))]
    seen = [match.probability > result["dev"]["threshold"] for match in matcher.match(images, queries)]
    assert np.mean(np.array(seen) == [True, False, False, True]) == result["dev"]["accuracy"]


def test_pairs_of_an_epoch_depend_on_seed_and_epoch_alone():
    posts, settings = color_posts() * 4, MatcherTraining(image_negatives=3)
    one, two = PairsOfPosts(posts, settings), PairsOfPosts(posts, settings)
    first = (one.pairs, one.order)
    one.set_epoch(3)
    two.set_epoch(5)
    two.set_epoch(3)
    assert (one.pairs, one.order) == (two.pairs, two.order) != first


def test_balanced_weights_let_present_and_absent_pairs_count_alike():
    data = PairsOfPosts(color_posts(), MatcherTraining(image_negatives=20, balance=True))
    labels = [pair.present for group in data.pairs for pair in group]
    absent, present = data.weights()
    assert absent * labels.count(False) == pytest.approx(present * labels.count(True))


def test_the_command_asks_by_the_categories_of_the_label_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_posts(color_posts(), tmp_path / "posts")
    asked: list[set[str]] = []

    def note(posts: list[Post], dev: list[Post], *_: object, **__: object) -> dict[str, object]:
        asked.append({pair.category for each in (posts, dev) for one in each for pair in gold_pairs(one)})
        return {}

    monkeypatch.setattr("gem_ray.grounding.train_matcher.train_matcher", note)
    arguments = ["train", "matcher", "--data", tmp_path / "posts", "--dev", tmp_path / "posts", "--out", tmp_path / "m"]
    for extra in ([], ["--recipe-set", "labels=gmner"]):
        typer.main.get_command(app).main([str(each) for each in [*arguments, *extra]], standalone_mode=False)
    fine = {gold.fine for one in color_posts() for gold in one.gold or ()}
    assert asked == [fine, {gmner_category(category) for category in fine}]
