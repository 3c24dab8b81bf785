from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, BlipForImageTextRetrieval

from gem_ray.grounding.matcher import ImageProcessor, Matcher, MatchQuery, TextProcessor
from gem_ray.grounding.trace import middle_upper_layer, peak

QUERIES = [
    MatchQuery(0, "Cleveland", "sports_team"),
    MatchQuery(1, "The Edge of the Sea", "written_work"),
    MatchQuery(0, "Zoë Kravitz @ the Oscars", "actor"),
    MatchQuery(1, "x", "city"),
]


def load(folder: Path, **options) -> Matcher:
    model = BlipForImageTextRetrieval.from_pretrained(folder)
    texts = TextProcessor(AutoTokenizer.from_pretrained(folder), model.config.text_config.vocab_size)
    return Matcher(model, texts, ImageProcessor.from_pretrained(folder), **options)


def random_images(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, size=(40 + 9 * i, 50, 3), dtype=np.uint8) for i in range(count)]


def plain_maps(
    matcher: Matcher, image: np.ndarray, query: MatchQuery, options: list[tuple[int, str, str]]
) -> list[np.ndarray]:
    """Eq. 11 as it is written, for each layer, token set and target: full passes in double precision, explicit sums."""
    model = BlipForImageTextRetrieval(matcher.model.config).eval().double()
    model.load_state_dict(matcher.model.state_dict())
    encoded = matcher.texts.tokenizer(
        query.text, return_special_tokens_mask=True, return_offsets_mapping=True, return_tensors="pt"
    )
    encoded["input_ids"][:, 0] = matcher.texts.tokenizer.convert_tokens_to_ids("[ENC]")
    states = model.vision_model(matcher.images([image]).double()).last_hidden_state
    output = model.text_encoder(
        encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        encoder_hidden_states=states,
        output_attentions=True,
    )
    logits = model.itm_head(output.last_hidden_state[:, 0])[0]
    score = {"probability": logits.softmax(dim=0)[1], "logit": logits[1]}
    gradients = {
        target: torch.autograd.grad(value, output.cross_attentions, retain_graph=True)
        for target, value in score.items()
    }
    maps = []
    for layer, tokens, target in options:
        attention = output.cross_attentions[layer][0].detach().numpy()
        gradient = gradients[target][layer][0].numpy()
        heads, length, patches = attention.shape
        scores = np.zeros(patches - 1)
        for j in range(length):
            special, start = encoded["special_tokens_mask"][0, j], encoded["offset_mapping"][0, j, 0]
            if (tokens != "all" and special) or (tokens == "words" and start >= len(query.entity)):
                continue
            for h in range(heads):
                for i in range(1, patches):
                    scores[i - 1] += max(0.0, gradient[h, j, i]) * attention[h, j, i] / heads
        side = round(len(scores) ** 0.5)
        maps.append(scores.reshape(side, side))
    return maps


@pytest.mark.parametrize("depth", range(1, 13))
def test_maps_of_a_batch_equal_those_computed_one_by_one_for_every_option(build_random_blip, depth):
    matcher = load(build_random_blip(depth))
    images = random_images(2)
    options = list(product(range(depth), ["all", "inner", "words"], ["probability", "logit"]))
    expected = [plain_maps(matcher, images[query.image], query, options) for query in QUERIES]
    for row, (layer, tokens, target) in enumerate(options):
        matcher.layer, matcher.tokens, matcher.target = layer, tokens, target
        for match, maps in zip(matcher.match(images, QUERIES), expected, strict=True):
            # In the last layer only [ENC] has a gradient, and so without it there is none.
            assert (maps[row].max() > 0) == (tokens == "all" or layer < depth - 1)
            assert np.abs(match.map - maps[row]).max() <= 1e-5 * maps[row].max()


def test_map_equals_finite_differences_of_the_probability(build_random_blip):
    layer = 1
    matcher = load(build_random_blip(3, side=16), layer=layer)
    matcher.model.double()
    image, query = random_images(1)[0], QUERIES[0]
    batch = matcher.texts([query], torch.device("cpu"))
    states = matcher.model.vision_model(matcher.images([image]).double()).last_hidden_state

    def probability(nudge: torch.Tensor | float) -> tuple[float, torch.Tensor]:
        seen = []
        dropout = matcher.model.text_encoder.encoder.layer[layer].crossattention.self.dropout
        handle = dropout.register_forward_hook(lambda _m, _i, output: seen.append(output) or output + nudge)
        hidden = matcher.model.text_encoder(batch.input_ids, encoder_hidden_states=states).last_hidden_state
        handle.remove()
        return float(matcher.model.itm_head(hidden[:, 0]).softmax(dim=-1)[0, 1]), seen[0]

    _, attention = probability(0.0)
    gradient = torch.zeros_like(attention)
    for index in np.ndindex(*attention.shape):
        nudge = torch.zeros_like(attention)
        nudge[index] = 1e-5
        gradient[index] = (probability(nudge)[0] - probability(-nudge)[0]) / 2e-5
    expected = (gradient.clamp(min=0) * attention).sum(dim=2).mean(dim=1)[0, 1:].view(2, 2).numpy()
    (match,) = matcher.match([image], [query])
    np.testing.assert_allclose(match.map, expected, rtol=1e-4)


def test_map_survives_a_probability_that_rounds_to_one(random_blip):
    matcher = load(random_blip)
    before = matcher.match(random_images(2), QUERIES)
    with torch.no_grad():
        matcher.model.itm_head.bias[1] += 40
    for plain, sure in zip(before, matcher.match(random_images(2), QUERIES), strict=True):
        assert sure.probability == 1.0
        np.testing.assert_allclose(sure.map / sure.map.max(), plain.map / plain.map.max(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("layer", "with_gradient"), [(0, [0, 1, 2, 3]), (2, [2, 3]), (3, [3])])
def test_gradient_reaches_neither_lower_layers_nor_the_image_encoder(random_blip, layer, with_gradient):
    matcher = load(random_blip, layer=layer)
    needs: dict[object, bool] = {}
    for index, block in enumerate(matcher.model.text_encoder.encoder.layer):
        block.register_forward_hook(lambda _m, _i, output, index=index: needs.update({index: output.requires_grad}))
    matcher.model.vision_model.encoder.register_forward_hook(
        lambda _m, _i, output: needs.update(image=output.last_hidden_state.requires_grad)
    )
    matcher.match(random_images(2), QUERIES)
    assert [key for key, value in needs.items() if value] == with_gradient
    assert all(parameter.grad is None for parameter in matcher.model.parameters())


@pytest.mark.parametrize(("depth", "layer"), [(12, 7), (4, 2), (6, 4), (2, 1), (1, 0)])
def test_default_layer_is_the_middle_upper_one(depth, layer):
    assert middle_upper_layer(depth) == layer


@pytest.mark.parametrize("factor", [(1, 1), (3, 3), (15, 7), (1, 31)])
@pytest.mark.parametrize("shape", [(24, 24), (1, 1), (3, 5), (12, 12)])
def test_peak_is_the_highest_pixel_of_the_resized_map(factor, shape):
    rng = np.random.default_rng(0)
    height, width = shape[0] * factor[0], shape[1] * factor[1]  # odd factors: a pixel lies at each patch's centre
    for _ in range(5):
        scores = rng.random(shape).astype(np.float32)
        resized = F.interpolate(torch.from_numpy(scores)[None, None], (height, width), mode="bilinear")[0, 0]
        x, y = peak(scores, height, width)
        assert float(resized[y, x]) == pytest.approx(float(resized.max()), rel=1e-6)


@pytest.mark.parametrize(
    ("patch", "height", "width", "expected"),
    [
        ((0, 0), 480, 480, (20, 20)),
        ((11, 11), 480, 480, (460, 460)),
        ((2, 9), 240, 1200, (950, 50)),
        ((6, 3), 3, 20_000, (5833, 1)),
        ((6, 3), 20_000, 3, (0, 10_833)),
        ((11, 11), 3, 2, (1, 2)),
        ((5, 5), 1, 1, (0, 0)),
        ((8, 1), 9_000, 12_000, (1500, 6375)),
    ],
)
def test_peak_is_the_pixel_at_the_centre_of_the_only_lit_patch(patch, height, width, expected):
    scores = np.zeros((12, 12), dtype=np.float32)
    scores[patch] = 1
    assert peak(scores, height, width) == expected


def test_subpatch_peak_is_the_top_of_a_paraboloid():
    rows, columns = np.mgrid[:6, :8]
    for down, across in [(2.0, 3.0), (2.3, 4.8), (3.49, 1.51)]:  # in patches, from the first one's centre
        scores = 5 - 0.7 * (rows - down) ** 2 - 0.4 * (columns - across) ** 2
        x, y = peak(scores, 600, 800, subpatch=True)
        assert abs(x - 100 * (across + 0.5)) <= 1
        assert abs(y - 100 * (down + 0.5)) <= 1


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (5, 5)])
def test_subpatch_peak_lies_in_the_highest_patch_and_in_the_image(shape):
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores = rng.random(shape) * rng.integers(0, 2, size=shape)
        row, column = np.unravel_index(scores.argmax(), shape)
        x, y = peak(scores, 50, 100, subpatch=True)
        assert 0 <= x < 100
        assert 0 <= y < 50
        assert abs(x - (column + 0.5) * 100 / shape[1]) <= 50 / shape[1] + 1
        assert abs(y - (row + 0.5) * 50 / shape[0]) <= 25 / shape[0] + 1
