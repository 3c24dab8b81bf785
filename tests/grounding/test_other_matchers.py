"""LLaVA and BLIP-2 in the matcher's place: P_T is the model's own, the map is eq. 11 written out."""

from pathlib import Path

import numpy as np
import pytest
import replicas
import torch
from transformers import (
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from gem_ray.config import load_config
from gem_ray.grounding.grounder import load_matcher
from gem_ray.grounding.matcher import MatchQuery

QUERIES = [
    MatchQuery(0, "Cleveland", "city"),
    MatchQuery(1, "Taylor Swift and her band", "musician"),
    MatchQuery(0, "a dog", "animal"),
]


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (30, 50, 3), dtype=np.uint8), rng.integers(0, 255, (50, 30, 3), dtype=np.uint8)]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    replicas.llava(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    return _sharpened(model, folder)


@pytest.fixture(scope="module")
def blip2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blip2")
    torch.manual_seed(0)
    replicas.blip2_itm(folder)
    model = Blip2ForImageTextRetrieval.from_pretrained(folder)
    model.query_tokens.data.normal_()
    model.save_pretrained(folder)
    return folder


def _sharpened(model: torch.nn.Module, folder: Path) -> Path:
    """Weights so large that attention is far from uniform."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(6)
    model.save_pretrained(folder)
    return folder


def matcher(kind: str, folder: Path, batch_size: int = 8):
    return load_matcher(
        load_config(grounder={"matcher": {"kind": kind, "model": str(folder), "layer": 1, "batch_size": batch_size}})
    )


def test_llava_is_the_models_own_answer_and_eq_11_over_its_attention(llava: Path, images: list[np.ndarray]) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(llava, attn_implementation="eager").eval()
    processor = LlavaProcessor.from_pretrained(llava)
    cue = processor.tokenizer.encode("ASSISTANT:", add_special_tokens=False)
    yes, no = (
        processor.tokenizer.encode(f"ASSISTANT: {word}", add_special_tokens=False)[len(cue)] for word in ("yes", "no")
    )
    for query, match in zip(QUERIES, matcher("llava", llava).match(images, QUERIES), strict=True):
        prompt = f"USER: <image>\n{query.text} Is it in the image? Answer yes or no. ASSISTANT:"
        inputs = processor(
            images=images[query.image],
            text=prompt,
            images_kwargs={"input_data_format": "channels_last"},
            return_tensors="pt",
        )
        output = model(**inputs, output_attentions=True)
        probability = output.logits[0, -1, [no, yes]].softmax(0)[1]
        assert match.probability == pytest.approx(probability.item(), abs=1e-4)
        attention = output.attentions[1]
        (gradient,) = torch.autograd.grad(probability, attention)
        places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
        expected = [
            sum(max(0.0, float(gradient[0, h, -1, i])) * float(attention[0, h, -1, i]) for h in range(2)) / 2
            for i in places
        ]
        np.testing.assert_allclose(match.map.ravel(), expected, rtol=1e-2, atol=1e-8)
        assert match.map.shape == (4, 4)


def test_blip2_is_the_models_own_head_and_eq_11_over_its_queries(blip2: Path, images: list[np.ndarray]) -> None:
    model = Blip2ForImageTextRetrieval.from_pretrained(blip2, attn_implementation="eager").eval()
    processor = Blip2Processor.from_pretrained(blip2)
    for query, match in zip(QUERIES, matcher("blip2", blip2).match(images, QUERIES), strict=True):
        pixels = processor.image_processor(images[query.image], input_data_format="channels_last", return_tensors="pt")[
            "pixel_values"
        ]
        words = processor.tokenizer(query.text, return_tensors="pt")
        kept = []
        layer = model.qformer.encoder.layer[2].crossattention.attention  # the second of those that look at the image
        handle = layer.register_forward_hook(lambda module, args, output: kept.append(output[1]))  # noqa: B023
        logits = model(
            pixels, words["input_ids"], words["attention_mask"], use_image_text_matching_head=True
        ).logits_per_image
        handle.remove()
        probability = logits[0].softmax(0)[1]
        assert match.probability == pytest.approx(probability.item(), abs=1e-4)
        (gradient,) = torch.autograd.grad(probability, kept[0])
        weighted = gradient[0].clamp(min=0) * kept[0][0]  # (H, Q, 1 + P)
        expected = [sum(weighted[h, j, i].item() for h in range(2) for j in range(4)) / 2 for i in range(1, 17)]
        np.testing.assert_allclose(match.map.ravel(), expected, rtol=1e-2, atol=1e-8)


@pytest.mark.parametrize("kind", ["llava", "blip2"])
def test_answers_do_not_depend_on_the_rest_of_the_batch(
    kind: str, request: pytest.FixtureRequest, images: list[np.ndarray]
) -> None:
    folder = request.getfixturevalue(kind)
    together = matcher(kind, folder).match(images, QUERIES)
    for one, other in zip(together, matcher(kind, folder, batch_size=1).match(images, QUERIES), strict=True):
        assert one.probability == pytest.approx(other.probability, abs=1e-4)
        np.testing.assert_allclose(one.map, other.map, rtol=1e-2, atol=1e-8)


def test_a_layer_that_is_not_there_is_refused(llava: Path) -> None:
    with pytest.raises(ValueError, match="layers 0 to 1"):
        load_matcher(load_config(grounder={"matcher": {"kind": "llava", "model": str(llava), "layer": 2}}))
