from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import replicas
import torch
from transformers import (
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
)

from gem_ray.config import parse_config
from gem_ray.grounding.text_segmenter import (
    Instance,
    TextSegmenter,
    category_prompt,
    image_activations,
    load_text_segmenter,
    mask_box,
    mask_logits,
    prompt_conditions,
)
from gem_ray.grounding.text_segmenter_recipe import TextSegmenterTraining
from gem_ray.grounding.train_text_segmenter import (
    PromptSample,
    fit_clipseg,
    mask_loss,
    samples_from_posts,
    train_text_segmenter,
)
from gem_ray.nano.segmenters import build_clipseg
from gem_ray.noise import GRAIN
from gem_ray.records import Box, GoldEntity, Post
from gem_ray.taxonomy import FMNERG

KINDS = ("clipseg", "sam3", "grounding-dino", "owlv2")
PROMPTS = [(1, "sports team"), (0, "person"), (2, "film and television works"), (0, "city"), (2, "person")]


def images_of(*sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


IMAGES = images_of((48, 80), (90, 60), (64, 64), (40, 40))  # the last has no prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model directory of each kind: tiny, untrained, with a processor, as their `save_pretrained` writes it."""
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        torch.manual_seed(0)
        getattr(replicas, kind.replace("-", "_"))(root / kind)
    return root


def load(folder: Path, kind: str, threshold: float, batch_size: int = 16) -> TextSegmenter:
    text = {"kind": kind, "model": str(folder / kind), "threshold": threshold, "batch_size": batch_size}
    return load_text_segmenter(parse_config({"device": "cpu", "grounder": {"boxes": {"text": text}}}))


def middle_threshold(folder: Path, kind: str) -> float:
    """A threshold that keeps some instances and drops others: the median of all scores."""
    if kind == "clipseg":
        return 0.5
    answers = load(folder, kind, 0.0).instances(IMAGES, PROMPTS)
    return float(np.median([each.score for answer in answers for each in answer]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_instances_inside_the_image(folder, kind):
    answers = load(folder, kind, middle_threshold(folder, kind)).instances(IMAGES, PROMPTS)
    assert len(answers) == len(PROMPTS)
    assert any(answers)
    for (image, _), answer in zip(PROMPTS, answers, strict=True):
        height, width = IMAGES[image].shape[:2]
        for each in answer:
            assert 0 <= each.box.x1 < each.box.x2 <= width
            assert 0 <= each.box.y1 < each.box.y2 <= height
            assert 0 <= each.score <= 1
            if kind in ("clipseg", "sam3"):
                assert each.mask is not None
                assert each.mask.shape == (height, width)
                assert mask_box(each.mask) == each.box
            else:
                assert each.mask is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_one_prompt_at_a_time(folder, kind):
    threshold = middle_threshold(folder, kind) + 1e-4  # off the median itself, which float noise may move either way
    together = load(folder, kind, threshold, batch_size=2).instances(IMAGES, PROMPTS)
    single = load(folder, kind, threshold)
    for (image, prompt), answer in zip(PROMPTS, together, strict=True):
        (alone,) = single.instances([IMAGES[image]], [(0, prompt)])
        assert len(alone) == len(answer)
        for one, other in zip(alone, answer, strict=True):
            assert one.score == pytest.approx(other.score, rel=2.001 * GRAIN)
            np.testing.assert_allclose(dataclasses.astuple(one.box), dataclasses.astuple(other.box), atol=1e-3 * 90)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_encoded_once_for_all_its_prompts(folder, kind, monkeypatch):
    segmenter = load(folder, kind, 0.5)
    encoded: list[int] = []
    encode = segmenter.encode
    monkeypatch.setattr(segmenter, "encode", lambda images: (encoded.append(len(images)), encode(images))[1])
    segmenter.instances(IMAGES, PROMPTS)
    assert sum(encoded) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_higher_threshold_leaves_no_instances(folder, kind):
    assert load(folder, kind, 1.0).instances(IMAGES, PROMPTS) == [[]] * len(PROMPTS)


def test_clipseg_in_three_steps_equals_its_own_forward_pass(folder):
    model = CLIPSegForImageSegmentation.from_pretrained(folder / "clipseg").eval()
    processor = CLIPSegProcessor.from_pretrained(folder / "clipseg")
    texts = [prompt for _, prompt in PROMPTS]
    inputs = processor(text=texts, images=[IMAGES[row] for row, _ in PROMPTS], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits
        pixels = processor.image_processor(IMAGES, return_tensors="pt")["pixel_values"]
        rows = torch.tensor([row for row, _ in PROMPTS])
        conditions = prompt_conditions(model, processor.tokenizer, texts)
        found = mask_logits(model, image_activations(model, pixels), rows, conditions)
    assert found.std() > 0.01
    assert (found[1] - found[3]).abs().max() > 1e-3  # prompts of one image are told apart
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_an_instance_holds_points_of_its_mask_or_of_its_box():
    mask = np.zeros((4, 6), dtype=bool)
    mask[1:3, 2:5] = True
    mask[1, 2] = False
    masked = Instance(Box(2, 1, 5, 3), 0.5, mask)
    assert not masked.holds(2, 1)
    assert masked.holds(2.9, 2.9)
    assert Instance(Box(2, 1, 5, 3), 0.5).holds(2, 1)
    assert not masked.holds(5, 2)
    heat = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert masked.mass(heat) == 9 + 10 + 14 + 15 + 16
    assert Instance(Box(2, 1, 5, 3), 0.5).mass(heat) == 8 + 9 + 10 + 14 + 15 + 16


def test_categories_in_words():
    expected = {"sports_team": "sports team", "person_other": "person", "actor": "actor", "PER": "person"}
    assert {fine: category_prompt(fine) for fine in expected} == expected


def test_the_words_of_all_categories_are_single_tokens_of_the_embedded_tokenizer():
    tokenizer = replicas.clip_tokenizer()
    for fine in FMNERG.fine:
        words = category_prompt(fine).split()
        assert len(tokenizer(" ".join(words))["input_ids"]) == len(words) + 2
    unseen = tokenizer("xylophone é")["input_ids"]
    assert unseen[1:-1].count(tokenizer.unk_token_id) == 0
    assert replicas.clip_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_the_embedded_clipseg_has_less_than_a_million_parameters():
    assert sum(parameter.numel() for parameter in build_clipseg()[0].parameters()) < 1_000_000


def test_gold_boxes_become_masks_in_the_pixels_of_the_decoded_image():
    post = Post("p", "text", image=np.zeros((50, 100, 3), dtype=np.uint8), image_width=200, image_height=100)
    post.gold = [
        GoldEntity(0, 1, "actor", (Box(20, 10, 40, 30), Box(100, 50, 200, 100))),
        GoldEntity(1, 2, "city"),
        GoldEntity(2, 3, "sports_team", (Box(0, 0, 2, 2),)),
    ]
    without_image, without_boxes = Post("q", "text", gold=post.gold), Post("r", "text", image=post.image, gold=[])
    (sample,) = samples_from_posts([post, without_image, without_boxes])
    assert set(sample.masks) == {"actor", "sports team"}
    expected = np.zeros((50, 100), dtype=bool)
    expected[5:15, 10:20] = expected[25:50, 50:100] = True
    np.testing.assert_array_equal(sample.masks["actor"], expected)
    assert sample.masks["sports team"].sum() == 1


def test_the_loss_is_cross_entropy_of_all_and_dice_of_what_is_seen():
    logits, masks = torch.randn(3, 5, 5), (torch.rand(3, 5, 5) > 0.5).float()
    masks[2] = 0
    p = logits.sigmoid()
    entropy = -(masks * p.log() + (1 - masks) * (1 - p).log()).mean()
    dice = [1 - (2 * (p[i] * masks[i]).sum() + 1) / (p[i].sum() + masks[i].sum() + 1) for i in (0, 1)]
    assert mask_loss(logits, masks).item() == pytest.approx(float(entropy + sum(dice) / 2), rel=1e-5)
    assert mask_loss(logits[2:], masks[2:]).item() == pytest.approx(float(-(1 - p[2]).log().mean()), rel=1e-5)


def squares(count: int) -> list[PromptSample]:
    """A red square is a person, a green one a city."""
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(count):
        pixels, masks = rng.integers(0, 80, (80, 80, 3), dtype=np.uint8), {}
        for channel, (prompt, low) in enumerate((("person", 0), ("city", 40))):
            if not masks or rng.random() < 0.7:
                x, y = rng.integers(0, 55), rng.integers(low, low + 15)
                masks[prompt] = np.zeros((80, 80), dtype=bool)
                masks[prompt][y : y + 25, x : x + 25] = True
                pixels[masks[prompt], channel] = 250
        samples.append(PromptSample(pixels, masks))
    return samples


def test_training_the_decoder_lowers_the_loss_and_leaves_clip_as_it_was(folder, tmp_path):
    base, out = str(folder / "clipseg"), tmp_path / "trained"
    settings = TextSegmenterTraining(steps=12, batch_size=1, absent=1, report_every=4, device="cpu")
    reports: list[float] = []
    losses = train_text_segmenter(squares(20), base, out, settings, lambda step, loss: reports.append(loss))
    assert len(losses) == 12
    assert reports[0] == pytest.approx(np.mean(losses[:4]))
    assert reports[-1] < reports[0]

    before = CLIPSegForImageSegmentation.from_pretrained(base).state_dict()
    after = CLIPSegForImageSegmentation.from_pretrained(out).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("decoder.") for name in changed)
    assert CLIPSegProcessor.from_pretrained(out).tokenizer("person")["input_ids"]


def test_training_from_scratch_changes_clip_too():
    torch.manual_seed(0)
    model, processor = build_clipseg()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = TextSegmenterTraining(steps=1, batch_size=1, train_backbone=True)
    fit_clipseg(model, processor, iter(squares(4)), settings, prompts=("person", "city", "park"))
    for part in ("clip.vision_model.encoder.layers.0", "clip.text_model", "clip.text_projection", "decoder"):
        assert any(
            not torch.equal(before[name], parameter)
            for name, parameter in model.named_parameters()
            if name.startswith(part)
        ), part


def test_training_without_samples_says_what_is_needed(folder, tmp_path):
    with pytest.raises(ValueError, match="gold boxes"):
        train_text_segmenter([], str(folder / "clipseg"), tmp_path, TextSegmenterTraining(device="cpu"))
