from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gem_ray.config import parse_config
from gem_ray.grounding.batches import Batches
from gem_ray.grounding.matcher import Matcher, MatchQuery
from gem_ray.grounding.sam import SamSegmenter
from gem_ray.grounding.sam_build import build_sam
from gem_ray.grounding.text_segmenter import CLIPSeg
from gem_ray.nano.segmenters import SAM_SIZES, build_clipseg
from gem_ray.noise import GRAIN


class Card:
    """A card on which an item takes so many bytes."""

    def __init__(self, size: int, per_item: int) -> None:
        self.size, self.per_item, self.items = size, per_item, 0

    def free(self) -> int:
        return self.size

    def begin(self) -> None:
        self.items = 0

    def taken(self) -> int:
        return self.items * self.per_item

    def work(self, batch: Sequence[int]) -> list[int]:
        self.items = len(batch)
        if self.taken() > self.size:
            raise torch.OutOfMemoryError
        return [-item for item in batch]


def sizes_of(batches: Batches, card: Card, items: int) -> list[int]:
    sizes: list[int] = []
    answers = batches.run(lambda batch: sizes.append(len(batch)) or card.work(batch), range(items))
    assert answers == [-item for item in range(items)]
    return sizes


def test_batches_grow_to_what_the_card_has_free_and_no_further():
    card = Card(1000, per_item=20)
    assert sizes_of(Batches(100, card), card, 100) == [4, 40, 40, 16]
    assert sizes_of(Batches(10, card), card, 24) == [4, 10, 10]


def test_batches_shrink_when_the_card_fills():
    card = Card(1000, per_item=20)
    batches = Batches(100, card)
    assert sizes_of(batches, card, 44) == [4, 40]
    card.size = 200  # another process has come
    assert sizes_of(batches, card, 30) == [30, 15, 7, 7, 7, 7, 2]


def test_a_batch_that_runs_out_is_halved_until_it_fits_and_every_item_is_answered_once():
    card = Card(100, per_item=10)
    batches = Batches(64)
    assert sizes_of(batches, card, 40) == [40, 20, 10, 10, 10, 10]
    assert sizes_of(batches, card, 12) == [10, 2]


def test_an_item_that_does_not_fit_alone_is_an_error():
    card = Card(100, per_item=200)
    with pytest.raises(torch.OutOfMemoryError):
        Batches(8).run(card.work, range(8))


def test_no_items_are_no_work():
    assert Batches(4).run(pytest.fail, []) == []


def run_out(module: nn.Module, limit: int, position: int = 0) -> list[int]:
    """Let a module run out of memory with more than `limit` items; the sizes that it was called with."""
    sizes: list[int] = []

    def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        sizes.append(len(inputs[position]))
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError

    module.register_forward_pre_hook(hook)
    return sizes


def images(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (40 + 5 * index, 50, 3), dtype=np.uint8) for index in range(count)]


def test_matches_are_the_same_when_memory_runs_out(random_blip: Path):
    queries = [
        MatchQuery(index % 5, name, "city") for index, name in enumerate(["Cleveland", "x", "The Edge", "Sea"] * 3)
    ]

    def load() -> Matcher:
        return Matcher.from_config(parse_config({"grounder": {"matcher": {"model": str(random_blip)}}}))

    expected = load().match(images(5), queries)
    matcher = load()
    encoded = run_out(matcher.model.vision_model.post_layernorm, 2)
    layer = matcher.model.text_encoder.encoder.layer[-1]  # in the middle of a pass, whose hooks must not stay behind
    asked = run_out(layer.attention.self.query, 3)
    matches = matcher.match(images(5), queries)
    assert encoded == [5, 2, 2, 1]
    assert asked == [12, 6, 3, 3, 3, 3]
    for match, other in zip(matches, expected, strict=True):
        assert match.probability == pytest.approx(other.probability, rel=1e-5)
        np.testing.assert_allclose(match.map, other.map, atol=1e-5 * other.map.max())


def test_masks_are_the_same_when_memory_runs_out():
    torch.manual_seed(0)
    model = build_sam(SAM_SIZES).eval()
    points = [[(3.0, 4.0), (30.0, 20.0)], [], [(1.0, 1.0)], [(9.0, 9.0)]]
    expected = SamSegmenter(model).masks(images(4), points)
    sizes = run_out(model.image_encoder, 1)
    answers = SamSegmenter(model).masks(images(4), points)
    assert sizes == [3, 1, 1, 1]
    for row, other in zip(answers, expected, strict=True):
        assert len(row) == len(other)
        for one, two in zip(row, other, strict=True):
            np.testing.assert_allclose(one.iou, two.iou, atol=1e-5)
            assert (one.masks != two.masks).mean() < 1e-3


def test_instances_are_the_same_when_memory_runs_out():
    torch.manual_seed(0)
    model, processor = build_clipseg()
    prompts = [(1, "sports team"), (0, "person"), (2, "city"), (0, "city"), (2, "person")]

    def instances() -> list[list[tuple[object, float]]]:
        found = CLIPSeg(model.eval(), processor, threshold=0.4, batch_size=8).instances(images(3), prompts)
        return [[(each.box, pytest.approx(each.score, rel=2.001 * GRAIN)) for each in row] for row in found]

    expected = instances()
    assert any(expected)
    encoded = run_out(model.clip.vision_model.pre_layrnorm, 2)
    decoded = run_out(model.decoder.layers[0].layer_norm1, 1)
    assert instances() == expected
    assert encoded == [3, 1, 1, 1]
    assert decoded == [2, 1, 1, 1, 1, 1]
