import numpy as np
import pytest
import replicas
import torch
from PIL import Image
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2Processor,
)

from gem_ray.config import parse_config
from gem_ray.knowledge.captioner import Captioner

QUERIES = 4
SIDE = 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random BLIP-2, saved as published ones are."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("blip2")
    replicas.blip2_opt(folder)
    return folder


@pytest.fixture(scope="module")
def captioner(checkpoint):
    return Captioner.from_config(
        parse_config({"device": "cpu", "knowledge": {"captioner": str(checkpoint), "captioner_batch_size": 3}})
    )


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    sizes = [(20, 30), (64, 64), (3, 50), (1, 1), (200, 10), (32, 32), (48, 40)]
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def _reference(checkpoint, image):
    """The caption step by step: the language model's best next token, chosen by hand from full forward passes."""
    model = Blip2ForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = Blip2Processor.from_pretrained(checkpoint)
    pixels = processor(images=Image.fromarray(image), return_tensors="pt")["pixel_values"]
    ids = [model.config.image_token_index] * QUERIES + [model.config.text_config.bos_token_id]
    words = []
    for _ in range(30):
        tokens = torch.tensor([ids])
        with torch.no_grad():
            logits = model(pixel_values=pixels, input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        best = int(logits[0, -1].argmax())
        if best == model.config.text_config.eos_token_id:
            break
        ids.append(best)
        words.append(best)
    return processor.tokenizer.decode(words, skip_special_tokens=True).strip()


def test_captions_are_the_greedy_continuation(captioner, checkpoint, images):
    captions = captioner.caption(images[:2])
    assert captions == [_reference(checkpoint, image) for image in images[:2]]
    assert all(set(caption.split()) <= set(replicas.WORDS) for caption in captions)
    assert any(captions)


def test_a_caption_does_not_depend_on_the_batch(captioner, images):
    together = captioner.caption(images)
    assert len(together) == len(images)
    assert together == [captioner.caption([image])[0] for image in images]
    assert together[::-1] == captioner.caption(images[::-1])
    assert len(set(together)) > 1


def test_channels_of_a_flat_image_are_not_taken_for_rows(captioner):
    """(3, w, 3) could be read as channels first; the same strip turned into a PIL image cannot."""
    rng = np.random.default_rng(1)
    strip = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    enlarged = np.asarray(Image.fromarray(strip).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    assert captioner.caption([strip]) == captioner.caption([enlarged])


def test_no_images_give_no_captions(captioner):
    assert captioner.caption([]) == []


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Captioner.from_config(parse_config({"knowledge": {"captioner": str(tmp_path / "nowhere")}}))
