from __future__ import annotations

import itertools
from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import replicas
import torch
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling.image_encoder import Attention
from transformers import SamImageProcessorPil, SamModel, SamProcessor

from gem_ray.config import parse_config
from gem_ray.grounding import sam as sam_module
from gem_ray.grounding import sam_attention
from gem_ray.grounding.one_cycle import OneCycle
from gem_ray.grounding.sam import SamSegmenter, load_sam, save_sam
from gem_ray.grounding.sam_attention import FusedAttention
from gem_ray.grounding.sam_build import SamSizes, build_sam
from gem_ray.grounding.train_sam import PointTarget, SamSample, batch_loss, point_loss
from gem_ray.records import Box

TINY = SamSizes(
    image_size=64,
    patch_size=8,
    width=16,
    depth=2,
    heads=2,
    window=3,
    global_layers=(1,),
    prompt_width=16,
    decoder_heads=2,
    decoder_hidden=32,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = build_sam(TINY)
    for parameter in model.parameters():  # relative positions start at zero, which would hide mistakes with them
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def images_of(*sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def test_masks_of_a_batch_equal_the_predictor_of_the_package_point_by_point(model):
    images = images_of((48, 80), (90, 60), (64, 64), (20, 30))
    points = [[(3.0, 4.0), (70.5, 40.0)], [(10.0, 80.0)], [], [(29.0, 0.0), (5.0, 5.0), (15.0, 19.0)]]
    predictor = SamPredictor(deepcopy(model))
    answers = SamSegmenter(model, batch_size=2).masks(images, points)
    assert all(type(block.attn) is FusedAttention for block in model.image_encoder.blocks)
    assert all(type(block.attn) is Attention for block in predictor.model.image_encoder.blocks)

    assert [len(row) for row in answers] == [2, 1, 0, 3]
    for image, row, found in zip(images, points, answers, strict=True):
        predictor.set_image(image)
        for point, answer in zip(row, found, strict=True):
            masks, iou, _ = predictor.predict(np.array([point]), np.array([1]))
            assert answer.masks.shape == (3, *image.shape[:2])
            assert answer.masks.dtype == bool
            assert 0 < answer.masks.mean() < 1
            np.testing.assert_allclose(answer.iou, iou, atol=1e-5)
            assert (answer.masks != masks).mean() < 1e-3
            assert answer.best == iou.argmax()


@pytest.mark.parametrize("masked", [0, 10**6], ids=["positions as channels", "positions as a mask"])
@pytest.mark.parametrize("size", [(5, 5), (3, 7), (8, 6), (1, 4)])
def test_fused_attention_and_its_gradients_are_those_of_the_package(size, masked, monkeypatch):
    monkeypatch.setattr(sam_attention, "_MASKED", masked)
    torch.manual_seed(0)
    attention = Attention(12, 3, use_rel_pos=True, input_size=size).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    inputs = torch.randn(2, *size, 12, dtype=torch.double)
    answers = []
    for kind in (Attention, FusedAttention):
        attention.__class__ = kind
        attention.zero_grad()
        output = attention(inputs)
        output.square().sum().backward()
        answers.append([output.detach(), *(parameter.grad for parameter in attention.parameters())])
    for expected, found in zip(*answers, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_layers_of_the_encoder_keep_channels_last_in_memory(model):
    layouts = []
    for block in model.image_encoder.blocks:
        block.register_forward_hook(lambda block, inputs, output: layouts.append(output.is_contiguous()))
    embeddings = SamSegmenter(model).encode(torch.randn(2, 3, 64, 64))
    assert layouts == [True] * len(model.image_encoder.blocks)
    assert embeddings.is_contiguous()


def test_the_best_mask_alone_is_the_best_of_all(model):
    images = images_of((48, 80), (90, 60))
    points = [[(3.0, 4.0), (70.5, 40.0)], [(10.0, 80.0)]]
    segmenter = SamSegmenter(model)
    every, best = segmenter.masks(images, points), segmenter.masks(images, points, best_only=True)
    for row, alone in zip(itertools.chain(*every), itertools.chain(*best), strict=True):
        np.testing.assert_array_equal(alone.masks, row.masks[[row.best]])
        np.testing.assert_array_equal(alone.iou, row.iou[[row.best]])


def test_masks_of_boxes_equal_the_predictor_of_the_package_box_by_box(model):
    images = images_of((48, 80), (90, 60))
    boxes = [[Box(3, 4, 40, 30), Box(0, 0, 80, 48)], [Box(10, 20, 50, 90)]]
    predictor = SamPredictor(deepcopy(model))
    answers = SamSegmenter(model, batch_size=2).masks_in_boxes(images, boxes)
    for image, row, found in zip(images, boxes, answers, strict=True):
        predictor.set_image(image)
        for box, answer in zip(row, found, strict=True):
            corners = np.array([box.x1, box.y1, box.x2, box.y2])
            masks, iou, _ = predictor.predict(box=corners, multimask_output=False)
            assert answer.masks.shape == (1, *image.shape[:2])
            np.testing.assert_allclose(answer.iou, iou, atol=1e-5)
            assert (answer.masks != masks).mean() < 1e-3


@pytest.fixture(scope="module")
def hub_sam(tmp_path_factory):
    """A tiny SAM as the hub's `facebook/sam-vit-*`."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sam-vit")
    replicas.sam_vit(folder)
    return folder


def test_masks_of_the_hubs_layout_equal_those_of_transformers_pixel_for_pixel(hub_sam):
    images = images_of((48, 80), (90, 60), (64, 64))
    points = [[(3.0, 4.0), (70.5, 40.0)], [(10.0, 80.0)], [(31.0, 9.0)]]
    published = SamModel.from_pretrained(hub_sam).eval()
    segmenter = SamSegmenter(load_sam(hub_sam))
    processor = SamProcessor(
        SamImageProcessorPil(
            size={"longest_edge": 64},
            mask_size={"longest_edge": 32},
            pad_size={"height": 64, "width": 64},
            mask_pad_size={"height": 32, "width": 32},
        )
    )
    for image, row, found in zip(images, points, segmenter.masks(images, points), strict=True):
        inputs = processor(image, input_points=[[[list(point)] for point in row]], return_tensors="pt")
        with torch.no_grad():
            outputs = published(**inputs)
        (masks,) = processor.image_processor.post_process_masks(
            outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
        )
        for answer, mask, iou in zip(found, masks.numpy(), outputs.iou_scores[0].numpy(), strict=True):
            assert 0 < mask.mean() < 1
            np.testing.assert_array_equal(answer.masks, mask)
            np.testing.assert_allclose(answer.iou, iou, atol=1e-4)


def test_each_image_with_points_is_encoded_once_and_others_never(model):
    seen = []
    handle = model.image_encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    decoded = []
    other = model.mask_decoder.register_forward_hook(lambda module, inputs, output: decoded.append(len(output[0])))
    SamSegmenter(model, batch_size=2).masks(
        images_of((32, 32), (40, 30), (8, 9), (50, 60)), [[(1, 1)] * 5, [], [(2, 2)], [(3, 3)]]
    )
    handle.remove()
    other.remove()
    assert seen == [2, 1]
    assert decoded == [6, 1]  # all points of a batch in one pass


def test_a_model_directory_gives_back_the_same_model(model, tmp_path):
    save_sam(model, TINY, tmp_path / "sam")
    config = parse_config({"device": "cpu", "grounder": {"boxes": {"sam": {"model": str(tmp_path / "sam")}}}})
    loaded = SamSegmenter.from_config(config)
    assert not loaded.model.training
    image, points = images_of((30, 50)), [[(20.0, 10.0)]]
    expected, found = SamSegmenter(model).masks(image, points)[0][0], loaded.masks(image, points)[0][0]
    np.testing.assert_array_equal(found.masks, expected.masks)
    np.testing.assert_array_equal(found.iou, expected.iou)


@pytest.mark.parametrize("as_directory", [False, True])
def test_a_published_checkpoint_is_loaded_through_the_registry(model, tmp_path, monkeypatch, as_directory):
    """The real ones weigh 375 MB and more, so a small size is registered in their place."""
    monkeypatch.setitem(sam_model_registry, "vit_tiny", lambda checkpoint=None: build_sam(TINY))
    monkeypatch.setattr(sam_module, "_PUBLISHED", {TINY.width: "vit_tiny"})
    file = tmp_path / "sam_vit_tiny_0123.pth"
    torch.save(model.state_dict(), file)
    loaded = load_sam(tmp_path if as_directory else file)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_the_published_widths_are_those_of_the_registry():
    for width, name in sam_module._PUBLISHED.items():
        with torch.device("meta"):
            try:
                built = sam_model_registry[name]().image_encoder.pos_embed.shape[-1]
            except NotImplementedError:  # pragma: no cover
                pytest.skip("this torch cannot build on the meta device")
        assert built == width


def test_a_checkpoint_that_is_no_weights_is_not_unpickled(tmp_path):
    file = tmp_path / "sam_vit_b.pth"
    torch.save({"image_encoder.pos_embed": print}, file)
    with pytest.raises(Exception, match=r"[Ww]eights"):
        load_sam(file)


def test_a_directory_without_a_model_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_sam(tmp_path)


def test_an_image_encoder_of_an_unknown_width_is_refused(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "sam_vit_x.pth")
    with pytest.raises(ValueError, match="16 wide"):
        load_sam(tmp_path / "sam_vit_x.pth")


def test_the_loss_gives_every_right_mask_an_output_of_its_own():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 8, 8, generator=generator)
    masks = (torch.rand(2, 2, 8, 8, generator=generator) > 0.6).float()
    exists = torch.tensor([[True, True], [True, False]])
    predicted = torch.rand(2, 3, generator=generator)

    def one(output: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        p = output.sigmoid()
        right = torch.where(mask > 0, p, 1 - p)
        alpha = torch.where(mask > 0, 0.25, 0.75)
        focal = (-alpha * (1 - right) ** 2 * right.log()).mean()
        return 20 * focal + 1 - (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1)

    def iou(output: torch.Tensor, mask: torch.Tensor) -> float:
        on, gold = output > 0, mask > 0
        return float((on & gold).sum() / (on | gold).sum())

    expected, error = [], []
    for row, right in enumerate((masks[0], masks[1, :1])):
        choices = itertools.permutations(logits[row], len(right))
        expected.append(min(sum(map(one, outputs, right)) for outputs in choices) / len(right))
        for output, guess in zip(logits[row], predicted[row], strict=True):
            error.append((float(guess) - max(iou(output, mask) for mask in right)) ** 2)
    assert point_loss(logits, predicted, masks, exists).item() == pytest.approx(
        float(sum(expected)) / 2 + sum(error) / 6, rel=1e-4
    )


def test_training_teaches_a_square_to_be_cut_out_at_its_point():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)

    def samples():
        while True:
            x, y = rng.integers(0, 40, size=2)
            pixels = rng.integers(0, 40, (64, 64, 3), dtype=np.uint8)
            mask = np.zeros((64, 64), dtype=bool)
            mask[y : y + 20, x : x + 20] = True
            pixels[mask] += 200
            yield SamSample(pixels, (PointTarget(x + 10, y + 10, mask[None]),))

    model = build_sam(replace(TINY, width=32, prompt_width=32, decoder_hidden=64))
    reports = []
    settings = OneCycle(steps=100, batch_size=8, learning_rate=3e-3)
    losses = settings.fit(model, samples(), partial(batch_loss, model), lambda step, loss: reports.append((step, loss)))
    assert [step for step, _ in reports] == [50, 100]
    assert reports[-1][1] == pytest.approx(np.mean(losses[50:]))

    fresh = [next(samples()) for _ in range(10)]
    answers = SamSegmenter(model).masks(
        [sample.pixels for sample in fresh], [[(t.x, t.y) for t in sample.targets] for sample in fresh]
    )
    ious = []
    for sample, (answer,) in zip(fresh, answers, strict=True):
        mask, gold = answer.masks[answer.best], sample.targets[0].masks[0]
        ious.append((mask & gold).sum() / (mask | gold).sum())
    assert np.mean(ious) > 0.6
