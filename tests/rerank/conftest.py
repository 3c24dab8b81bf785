import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import LlavaProcessor

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from gem_ray.config import Config, load_config
from gem_ray.nano.llava_model import build_llava
from gem_ray.records import GoldEntity, Post
from gem_ray.rerank.engine import Request
from gem_ray.rerank.llava import load_llava, save_llava
from gem_ray.rerank.prompts import build_prompt
from gem_ray.rerank.recipe import RerankerTraining
from gem_ray.rerank.tokenizer import train_tokenizer
from gem_ray.rerank.train import train_reranker
from gem_ray.taxonomy import FMNERG

_TOKENS = ["RT", "@", "someone", ":", "so", "this", "is", "Ardenza", ",", "always"]
_PLACE = (7, 8)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A tiny LLaVA with random weights."""
    folder = tmp_path_factory.mktemp("llava")
    prompts = [build_prompt(_TOKENS, *_PLACE, FMNERG.fine[start : start + 5]) for start in range(47)]
    build_llava(
        folder,
        train_tokenizer(prompts + [f" {fine}" for fine in FMNERG.fine for _ in range(3)], 700),
        image_size=32,
        patch_size=8,
        vision_layers=1,
        vision_width=32,
        language_layers=2,
        language_width=64,
    )
    model = load_llava(folder)
    # With a fresh head all words are about as likely whatever the adapter, which does not reach it, makes of them.
    model.lm_head.weight.data *= 30
    save_llava(model, LlavaProcessor.from_pretrained(folder), folder)
    return folder


@pytest.fixture(scope="session")
def adapter(base, tmp_path_factory) -> Path:
    """An adapter that calls the entity of a red image a city and of a blue one a sports team."""
    folder = tmp_path_factory.mktemp("adapter")
    posts = [_colored_post(index, *case) for index in range(8) for case in ((200, 0, "city"), (0, 200, "sports_team"))]
    train_reranker(posts, str(base), folder, _COLORS, lambda post, gold, rng: rng.sample(_CHOICES, len(_CHOICES)))
    return folder


_COLORS = RerankerTraining(learning_rate=4e-3, warmup=0.1, epochs=15, batch_size=16, dropout=0.0, device="cpu")
_CHOICES = ["city", "sports_team", "music", "musician", "sports_event"]


@pytest.fixture(scope="session")
def trained(base, adapter) -> Config:
    """Configuration of the tiny LLaVA with its adapter."""
    return load_config(reranker={"model": str(base), "adapter": str(adapter), "batch_size": 3})


@pytest.fixture(scope="session")
def colored_requests() -> list[Request]:
    """Red and blue images, not those of the training, with the choices in other orders; two requests an image."""
    return [
        Request(image, build_prompt(_TOKENS, *_PLACE, order), tuple(order))
        for image in (_image(180, 10), _image(10, 190), _image(230, 20))
        for order in (_CHOICES, _CHOICES[::-1])
    ]


@pytest.fixture(scope="session")
def requests() -> list[Request]:
    """Noise images, prompts of different lengths and choices of which some begin alike."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (40, 60, 3), dtype=np.uint8) for _ in range(3)]
    choices = [
        ("music", "musician", "sports_team", "sports_event", "city"),
        ("person_other", "art_other", "artist", "actor", "park"),
        FMNERG.fine[20:25],
    ]
    return [
        Request(image, build_prompt([*_TOKENS, *["word"] * index], *_PLACE, chosen), tuple(chosen))
        for index, image in enumerate(images)
        for chosen in choices
    ]


def _image(red: int, blue: int) -> np.ndarray:
    return np.full((48, 64, 3), (red, 30, blue), np.uint8)


def _colored_post(index: int, red: int, blue: int, fine: str) -> Post:
    stream = io.BytesIO()
    Image.fromarray(_image(red + 5 * index, blue + 5 * index)).save(stream, "PNG")
    gold = [GoldEntity(*_PLACE, fine)]
    return Post(f"{fine}-{index}", " ".join(_TOKENS), _TOKENS, image_bytes=stream.getvalue(), gold=gold)
