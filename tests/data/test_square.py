"""Where a point of an image lies in a model's square, and where a map of the square lies in the image."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPImageProcessor

from gem_ray.data.square import fitted, in_image

SIDE, GRID = 48, 12
PUBLISHED = CLIPImageProcessor(
    size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_center_crop=True
)
SQUEEZING = CLIPImageProcessor(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
SIZES = st.tuples(st.integers(60, 240), st.integers(60, 240))


def bright_patches(pixels: np.ndarray) -> np.ndarray:
    """What an ideal model would see: how bright each patch of a processed image is, `(g, g)`."""
    brightness = pixels.mean(axis=0).reshape(GRID, SIDE // GRID, GRID, SIDE // GRID).mean(axis=(1, 3))
    return np.where(brightness == brightness.max(), brightness - brightness.min(), 0).astype(np.float32)


def peak_of(scores: np.ndarray, height: int, width: int) -> tuple[float, float]:
    row, column = np.unravel_index(int(scores.argmax()), scores.shape)
    rows, columns = scores.shape
    return (column + 0.5) * width / columns, (row + 0.5) * height / rows


@settings(max_examples=60)
@given(size=SIZES, place=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)), fit=st.sampled_from(["pad", "crop"]))
def test_a_known_point_of_the_image_is_where_the_map_of_the_square_has_its_peak(size, place, fit):
    height, width = size
    x, y = int(place[0] * width), int(place[1] * height)
    image = np.full((height, width, 3), [int(255 * mean) for mean in PUBLISHED.image_mean], np.uint8)  # as the padding
    side = max(size) if fit == "pad" else min(size)
    spot = max(1, side // GRID)
    image[max(0, y - spot // 2) : y + spot // 2 + 1, max(0, x - spot // 2) : x + spot // 2 + 1] = 255
    shown = all(abs(at - length / 2) < side / 2 - spot for at, length in ((x, width), (y, height)))
    if not shown and fit == "crop":
        return  # the processor has cut it off
    pixels = PUBLISHED(fitted(image, PUBLISHED, fit), input_data_format="channels_last", return_tensors="np")
    found = in_image(bright_patches(pixels["pixel_values"][0]), size, PUBLISHED, fit)
    found_x, found_y = peak_of(found, height, width)
    patch = side / GRID
    assert abs(found_x - x) <= 1.5 * patch + 1
    assert abs(found_y - y) <= 1.5 * patch + 1


@pytest.mark.parametrize("size", [(40, 160), (160, 40), (50, 50)])
def test_padding_keeps_all_of_an_image_in_the_middle_of_its_mean_colour(size):
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    square = fitted(image, PUBLISHED, "pad")
    side = max(size)
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    assert square.shape == (side, side, 3)
    np.testing.assert_array_equal(square[top : top + size[0], left : left + size[1]], image)
    outside = np.ones((side, side), bool)
    outside[top : top + size[0], left : left + size[1]] = False
    assert (square[outside] == [int(255 * mean) for mean in PUBLISHED.image_mean]).all()


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_a_processor_that_squeezes_gets_images_as_they_are(fit):
    image = np.random.default_rng(0).integers(0, 255, (30, 90, 3), dtype=np.uint8)
    assert fitted(image, SQUEEZING, fit) is image
    scores = np.random.default_rng(0).random((GRID, GRID), dtype=np.float32)
    assert in_image(scores, (30, 90), SQUEEZING, fit) is scores


def test_what_a_crop_does_not_show_has_no_score():
    found = in_image(np.ones((GRID, GRID), np.float32), (50, 200), PUBLISHED, "crop")
    assert found.shape == (GRID, 4 * GRID)
    assert found[:, GRID + 6 : -GRID - 6].all()
    assert not found[:, : GRID + 5].any()
    assert not found[:, -GRID - 5 :].any()


def test_padding_is_in_no_map():
    scores = np.zeros((GRID, GRID), np.float32)
    scores[0], scores[GRID // 2, 3] = 9, 1  # the first row is nothing but padding
    found = in_image(scores, (50, 200), PUBLISHED, "pad")
    assert found.shape == (3, GRID)
    assert found.max() == 1


@pytest.mark.parametrize("size", [(1, 900), (900, 1), (4, 400), (301, 7)])
def test_a_strip_is_cropped_to_what_a_crop_of_all_of_it_shows(size):
    """Scaled as a whole, its shorter side to 336 pixels, it would take gigabytes."""
    height, width = size
    image = np.zeros((*size, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, height)[:, None].astype(np.uint8)
    image[..., 1] = (np.linspace(0, 20 * np.pi, width)[None] // 1).astype(np.uint8) * 4
    strip = fitted(image, PUBLISHED, "crop")
    assert max(strip.shape[:2]) <= 3 * min(size) + 1
    whole, part = (
        PUBLISHED(each, input_data_format="channels_last", return_tensors="np")["pixel_values"]
        for each in (image, strip)
    )
    np.testing.assert_allclose(part, whole, atol=0.1)


@pytest.mark.parametrize("size", [(1, 900), (900, 1), (1, 1)])
@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_maps_of_strips_cover_their_images(size, fit):
    found = in_image(np.ones((GRID, GRID), np.float32), size, PUBLISHED, fit)
    rows, columns = found.shape
    assert found[rows // 2, columns // 2] == 1  # the middle is always shown
    assert fit == "crop" or found.min() == 1
