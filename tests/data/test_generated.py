"""The generated corpus: reproducible, and its gold says what its texts and images show."""

from __future__ import annotations

import hashlib
import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from gem_ray.data.emblems import EMBLEMS, draw_emblem
from gem_ray.data.generated import generate, make_scene
from gem_ray.data.tokenize import word_spans
from gem_ray.data.unseen_names import is_unseen
from gem_ray.records import Box, Post
from gem_ray.taxonomy import FMNERG


@pytest.fixture(scope="module")
def posts() -> list[Post]:
    return list(generate(150, seed=5))


def names_of(post: Post) -> list[tuple[str, str]]:
    return [(" ".join(post.tokens[gold.word_start : gold.word_end]), gold.fine) for gold in post.gold or ()]


def test_same_seed_gives_the_same_posts_and_a_longer_corpus_begins_with_the_shorter(posts: list[Post]) -> None:
    assert list(generate(10, seed=5)) == posts[:10]
    assert [post.text for post in generate(10, seed=6)] != [post.text for post in posts[:10]]


def test_gold_spans_are_names_of_known_entities_with_their_category(posts: list[Post]) -> None:
    known = {(surface, emblem.fine) for emblem in EMBLEMS for surface in emblem.surfaces}
    mentions = [mention for post in posts for mention in names_of(post)]
    assert mentions
    assert set(mentions) <= known


def test_tokens_occur_in_the_text_in_order(posts: list[Post]) -> None:
    for post in posts:
        spans = word_spans(post.text, post.tokens)
        assert [post.text[start:end] for start, end in spans] == post.tokens


def test_scene_boxes_are_the_tight_bounds_of_masks_and_never_overlap() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = make_scene(rng, [EMBLEMS[index] for index in rng.choice(len(EMBLEMS), 3, replace=False)])
        for instance in scene.instances:
            rows, columns = np.nonzero(instance.mask)
            assert instance.box == Box(columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert all(not (part & ~instance.mask).any() for part in instance.parts)
        masks = [instance.mask for instance in scene.instances]
        assert not any((one & other).any() for i, one in enumerate(masks) for other in masks[:i])


def test_emblems_stand_out_where_the_gold_box_is() -> None:
    """Painting over the box with what the scene shows without the emblem changes the picture there alone."""
    emblem = EMBLEMS[20]
    with_emblem, without = (make_scene(np.random.default_rng(3), shown) for shown in ([emblem], []))
    box = with_emblem.boxes_of(emblem)[0]
    outside = np.abs(with_emblem.pixels.astype(int) - without.pixels.astype(int)).sum(axis=2) > 120
    outside[int(box.y1) : int(box.y2), int(box.x1) : int(box.x2)] = False
    assert outside.mean() < 0.01


def test_all_kinds_of_posts_and_boxes_occur() -> None:
    seen: Counter[str] = Counter()
    for post in generate(300, seed=2):
        with Image.open(io.BytesIO(post.image_bytes or b"")) as image:
            area = image.width * image.height
            seen[image.format or "?"] += 1
        boxes = [box for gold in post.gold or () for box in gold.boxes]
        names = [name for name, _ in names_of(post)]
        seen["no entity"] += not post.gold
        seen["unseen"] += any(not gold.boxes for gold in post.gold or ())
        seen["several"] += len(set(names)) > 1
        seen["one text twice"] += len(names) > len(set(names))
        seen["two boxes"] += any(len(gold.boxes) > 1 for gold in post.gold or ())
        seen["small"] += any(box.area < area / 50 for box in boxes)
        seen["large"] += any(box.area > area / 2 for box in boxes)
        for sign in ("#", "@", "http://", "😍"):
            seen[sign] += sign in post.text
    expected = (
        "JPEG",
        "PNG",
        "WEBP",
        "no entity",
        "unseen",
        "several",
        "one text twice",
        "two boxes",
        "small",
        "large",
    )
    assert all(seen[kind] for kind in (*expected, "large", "#", "@", "http://", "😍")), seen


def test_every_category_in_use_has_a_name_of_its_own_and_a_shared_one() -> None:
    by_category: dict[str, list[bool]] = {}
    for emblem in EMBLEMS:
        by_category.setdefault(emblem.fine, []).append(emblem.is_ambiguous)
    assert all(sorted(kinds) == [False, True] for kinds in by_category.values())
    assert {FMNERG.parent[fine] for fine in by_category} == set(FMNERG.coarse)


def test_no_two_emblems_look_alike() -> None:
    rng = np.random.default_rng(0)
    tiles = [Image.fromarray(draw_emblem(emblem, 64, rng).pixels).resize((32, 32)) for emblem in EMBLEMS]
    pictures = np.stack([np.asarray(tile, dtype=float) for tile in tiles])
    apart = np.abs(pictures[:, None] - pictures[None]).mean(axis=(2, 3, 4)) + 1e3 * np.eye(len(EMBLEMS))
    assert apart.min() > 4


@pytest.fixture(scope="module")
def posts_with_unseen_names() -> list[Post]:
    return list(generate(200, seed=5, unseen_names=0.4))


def test_training_posts_stay_as_they_were() -> None:
    """The embedded models were trained on them: a change of the generator must not change them by a bit."""
    digest = hashlib.sha256()
    for post in generate(20, 10_000):
        digest.update(repr((post.text, post.gold)).encode())
    assert digest.hexdigest()[:16] == "4d61ee549e724d21"


def test_a_third_of_the_mentions_have_names_that_training_never_saw(posts_with_unseen_names: list[Post]) -> None:
    mentions = [mention for post in posts_with_unseen_names for mention in names_of(post)]
    unseen = [name for name, _ in mentions if is_unseen(name)]
    assert len(unseen) >= len(mentions) / 3
    trained_on = {word.casefold() for post in generate(300, 10_000) for word in post.tokens}
    assert not {name.casefold() for name in unseen} & trained_on
    assert any(name.islower() for name in unseen)
    assert any(name.isupper() for name in unseen)


def test_unseen_names_are_in_the_text_and_never_in_the_image(posts_with_unseen_names: list[Post]) -> None:
    for post in posts_with_unseen_names:
        for (name, _), gold in zip(names_of(post), post.gold or (), strict=True):
            assert not (is_unseen(name) and gold.boxes)
        spans = word_spans(post.text, post.tokens)
        assert [post.text[start:end] for start, end in spans] == post.tokens
    assert any(gold.boxes for post in posts_with_unseen_names for gold in post.gold or ())


def test_posts_without_an_unseen_name_are_those_of_the_seed(
    posts: list[Post], posts_with_unseen_names: list[Post]
) -> None:
    pairs = list(zip(posts, posts_with_unseen_names, strict=False))
    same = [one == other for one, other in pairs if not any(is_unseen(name) for name, _ in names_of(other))]
    assert len(same) > 20
    assert all(same)
