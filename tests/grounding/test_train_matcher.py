import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BlipForImageTextRetrieval
from transformers.models.blip.modeling_blip import BlipVisionModel

from gem_ray.config import parse_config
from gem_ray.grounding.matcher import Matcher, Query
from gem_ray.grounding.train_matcher import MatcherTraining, Pair, build_pairs, train_matcher
from gem_ray.nano.blip import BlipSize, build_blip
from gem_ray.records import Box, GoldEntity, Post

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
    settings = MatcherTraining(learning_rate=1e-2, epochs=80, batch_size=2, balance=True)
    result = train_matcher(color_posts(), str(base), tmp_path, settings)
    assert result["loss"][0] > 0.5
    assert result["loss"][-1] < 0.05
    assert (result["pairs"], result["present"], result["skipped"]) == (4, 2, 0)
    matcher = Matcher.from_config(parse_config({"grounder": {"matcher": {"model": str(tmp_path)}}}))
    images = [np.full((30, 40, 3), color, dtype=np.uint8) for color in (RED, BLUE)]
    queries = [Query(i, *name) for i in (0, 1) for name in (("Redland", "country"), ("Blue Bay", "city"))]
    seen = [match.probability > 0.5 for match in matcher.match(images, queries)]
    assert seen == [True, False, False, True]


def test_same_seed_same_model(base, tmp_path):
    for name in ("one", "two"):
        train_matcher(color_posts(), str(base), tmp_path / name, MatcherTraining(learning_rate=1e-3, image_negatives=2))
    one, two = (BlipForImageTextRetrieval.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_each_image_is_encoded_once_for_all_pairs_of_its_post(base, tmp_path, monkeypatch):
    encoded = []
    original = BlipVisionModel.forward

    def counting(self, pixel_values, **options):
        encoded.append(len(pixel_values))
        return original(self, pixel_values, **options)

    monkeypatch.setattr(BlipVisionModel, "forward", counting)
    train_matcher(color_posts(), str(base), tmp_path, MatcherTraining(image_negatives=9))
    assert encoded == [2]


def test_posts_without_a_usable_image_are_counted_not_fatal(base, tmp_path):
    broken = color_posts()
    broken[0].image_bytes = b"not an image"
    result = train_matcher(broken, str(base), tmp_path, MatcherTraining(batch_size=1))
    assert result["skipped"] == 1
    assert np.isfinite(result["loss"][0])


def test_nothing_to_learn_from_is_an_error(base, tmp_path):
    with pytest.raises(ValueError, match="no post has a gold mention"):
        train_matcher([Post("0", "hello", ["hello"], gold=[])], str(base), tmp_path)
