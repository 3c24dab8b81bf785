from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, BlipForImageTextRetrieval

from gem_ray.grounding.matcher import ImageProcessor, Matcher, Query, TextProcessor
from gem_ray.grounding.trace import middle_upper_layer, peak

QUERIES = [
    Query(0, "Cleveland", "sports_team"),
    Query(1, "The Edge of the Sea", "written_work"),
    Query(0, "Zoë Kravitz @ the Oscars", "actor"),
    Query(1, "x", "city"),
]


def load(folder: Path, **options) -> Matcher:
    model = BlipForImageTextRetrieval.from_pretrained(folder)
    texts = TextProcessor(AutoTokenizer.from_pretrained(folder), model.config.text_config.vocab_size)
    return Matcher(model, texts, ImageProcessor.from_pretrained(folder), **options)


def random_images(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, size=(40 + 9 * i, 50, 3), dtype=np.uint8) for i in range(count)]


def plain_map(matcher: Matcher, image: np.ndarray, query: Query, layer: int, tokens: str, target: str) -> np.ndarray:
    """Eq. 11 as it is written: one entity, full forward and backward passes in double precision, explicit sums."""
    model = BlipForImageTextRetrieval(matcher.model.config).eval().double()
    model.load_state_dict(matcher.model.state_dict())
    encoded = matcher.texts.tokenizer(query.text, return_special_tokens_mask=True, return_tensors="pt")
    encoded["input_ids"][:, 0] = matcher.texts.tokenizer.convert_tokens_to_ids("[ENC]")
    states = model.vision_model(matcher.images([image]).double()).last_hidden_state
    output = model.text_encoder(
        encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        encoder_hidden_states=states,
        output_attentions=True,
    )
    logits = model.itm_head(output.last_hidden_state[:, 0])[0]
    score = logits.softmax(dim=0)[1] if target == "probability" else logits[1]
    attention = output.cross_attentions[layer]
    (gradient,) = torch.autograd.grad(score, attention)
    heads, length, patches = attention.shape[1:]
    scores = np.zeros(patches - 1)
    attention, gradient = attention.detach().numpy(), gradient.numpy()
    for i in range(1, patches):
        for j in range(length):
            if tokens == "inner" and encoded["special_tokens_mask"][0, j]:
                continue
            for h in range(heads):
                scores[i - 1] += max(0.0, gradient[0, h, j, i]) * attention[0, h, j, i] / heads
    side = round(len(scores) ** 0.5)
    return scores.reshape(side, side)


@pytest.mark.parametrize(
    ("depth", "layer", "tokens", "target"),
    [
        (1, 0, "all", "probability"),
        (4, 0, "all", "probability"),
        (4, 2, "inner", "probability"),
        (4, 2, "all", "logit"),
        (4, 3, "all", "probability"),  # only [ENC] has a gradient
        (12, 7, "all", "probability"),
        (12, 7, "inner", "logit"),
    ],
)
def test_maps_of_a_batch_equal_those_computed_one_by_one(build_random_blip, depth, layer, tokens, target):
    matcher = load(build_random_blip(depth), layer=layer, tokens=tokens, target=target)
    images = random_images(2)
    matches = matcher.match(images, QUERIES)
    for query, match in zip(QUERIES, matches, strict=True):
        expected = plain_map(matcher, images[query.image], query, layer, tokens, target)
        assert expected.max() > 0
        assert np.abs(match.map - expected).max() < 1e-5 * expected.max()


def test_map_equals_finite_differences_of_the_probability(build_random_blip):
    layer = 1
    matcher = load(build_random_blip(3, side=16), layer=layer)
    matcher.model.double()
    image, query = random_images(1)[0], QUERIES[0]
    batch = matcher.texts([query.text], torch.device("cpu"))
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
