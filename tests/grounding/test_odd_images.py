from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gem_ray.config import ImageConfig, parse_config
from gem_ray.data.images import ImageLoader
from gem_ray.grounding.boxes import BoxMaker
from gem_ray.grounding.grounder import Grounder
from gem_ray.grounding.matcher import Matcher
from gem_ray.grounding.sam import SamSegmenter
from gem_ray.grounding.sam_build import SamSizes, build_sam
from gem_ray.records import Entity, Post

SIZES = SamSizes(image_size=64, width=16, depth=1, heads=2, window=3, global_layers=(), prompt_width=16)


@pytest.fixture(scope="module")
def grounder(random_blip: Path) -> Grounder:
    """Random models that find everything somewhere; what matters here is whose pixels it is told in."""
    torch.manual_seed(0)
    matcher = Matcher.from_config(parse_config({"grounder": {"matcher": {"model": str(random_blip)}}}))
    return Grounder(matcher, BoxMaker(SamSegmenter(build_sam(SIZES).eval()), None, ()), threshold=0.0)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Coarse noise: the same at any size."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.NEAREST).convert(mode)


def ground(grounder: Grounder, image: Image.Image, **options) -> Post:
    data = io.BytesIO()
    image.save(data, **{"format": "PNG", **options})
    entities = [Entity(name, 0, 1, 0, 1, "location", "city", 0.9) for name in ("Cleveland", "Sea")]
    post = Post("0", "Cleveland Sea", entities=entities, image_bytes=data.getvalue())
    ImageLoader(ImageConfig(max_side=256))([post])
    assert post.problems == []
    grounder([post])
    return post


@pytest.fixture(scope="module")
def huge(grounder: Grounder) -> Post:
    return ground(grounder, picture(12_000, 9_000), format="JPEG")


@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (20_000, 3), (3, 20_000), (12_000, 9_000), (1, 500), (257, 256), (40, 30)]
)
def test_boxes_are_whole_pixels_inside_the_original(grounder, huge, width, height):
    post = huge if width == 12_000 else ground(grounder, picture(width, height))
    assert (post.image_width, post.image_height) == (width, height)
    for entity in post.entities:
        assert 0 <= entity.point.x < width
        assert 0 <= entity.point.y < height
        box = entity.box
        assert 0 <= box.x1 < box.x2 <= width
        assert 0 <= box.y1 < box.y2 <= height
        assert all(float(edge).is_integer() for edge in (box.x1, box.y1, box.x2, box.y2))


def test_a_huge_image_has_the_boxes_of_its_reduction_scaled_up(grounder, huge):
    assert huge.image.shape == (192, 256, 3)
    small = Post("1", huge.text, entities=[replace(e, box=None) for e in huge.entities], image=huge.image)
    grounder([small])
    for one, other in zip(huge.entities, small.entities, strict=True):
        edges = [(one.box.x1, other.box.x1), (one.box.y1, other.box.y1), (one.box.x2, other.box.x2)]
        assert all(abs(edge - reduced * 12_000 / 256) <= 1 for edge, reduced in edges)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_an_image_rotated_by_exif_has_the_boxes_of_the_upright_one(grounder, orientation):
    upright = picture(90, 60)
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # stored so, it is shown turned back
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x112] = orientation
    post = ground(grounder, upright.transpose(turns[orientation]), exif=exif)
    expected = ground(grounder, upright)
    assert (post.image_width, post.image_height) == (90, 60)
    assert [e.box for e in post.entities] == [e.box for e in expected.entities]


def test_a_grayscale_image_is_grounded_as_its_three_equal_channels(grounder):
    gray = picture(80, 60, "L")
    post, expected = ground(grounder, gray), ground(grounder, gray.convert("RGB"))
    assert [e.box for e in post.entities] == [e.box for e in expected.entities]
