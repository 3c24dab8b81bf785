import io
import os
import random
from pathlib import Path

import numpy as np
import pytest
import replicas
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from gem_ray.config import Config, load_config
from gem_ray.records import GoldEntity, Post
from gem_ray.rerank.engine import Request
from gem_ray.rerank.llava import load_llava, save_llava
from gem_ray.rerank.prompts import IMAGE_TOKEN, build_prompt
from gem_ray.rerank.recipe import RerankerTraining
from gem_ray.rerank.tokenizer import train_tokenizer
from gem_ray.rerank.train_reranker import train_reranker
from gem_ray.taxonomy import FMNERG

_TOKENS = ["RT", "@", "someone", ":", "so", "this", "is", "Ardenza", ",", "always"]
_PLACE = (7, 8)


def _texts() -> list[str]:
    prompts = [build_prompt(_TOKENS, *_PLACE, FMNERG.fine[start : start + 5]) for start in range(47)]
    return prompts + [f" {fine}" for fine in FMNERG.fine for _ in range(3)]


@pytest.fixture(scope="session")
def sentencepiece() -> PreTrainedTokenizerFast:
    """As LLaMA's: a space is part of the word after it, and one is put before the whole text, even if it has one."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", behavior="merged_with_next"),
            pre_tokenizers.Split(Regex(":"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", "<pad>", IMAGE_TOKEN]
    trainer = trainers.BpeTrainer(
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))], vocab_size=1100, show_progress=False
    )
    answers = [f"ASSISTANT: {fine}" for fine in FMNERG.fine for _ in range(9)]
    tokenizer.train_from_iterator([*_texts(), *answers], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A tiny LLaVA with random weights and a byte-level tokenizer."""
    return _tiny_llava(tmp_path_factory.mktemp("llava"), train_tokenizer(_texts(), 700))


@pytest.fixture(scope="session")
def sentencepiece_base(sentencepiece, tmp_path_factory) -> Path:
    """The same with a tokenizer like LLaMA's."""
    return _tiny_llava(tmp_path_factory.mktemp("sentencepiece-llava"), sentencepiece)


def _tiny_llava(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    replicas.llava(folder, tokenizer)
    model = load_llava(folder)
    # With a fresh head all words are about as likely whatever the adapter, which does not reach it, makes of them.
    model.lm_head.weight.data *= 30
    save_llava(model, LlavaProcessor.from_pretrained(folder), folder)
    return folder


@pytest.fixture(scope="session")
def adapter(base, tmp_path_factory) -> Path:
    """An adapter that calls the entity of a red image a city and of a blue one a sports team."""
    return _train_colors(base, tmp_path_factory.mktemp("adapter"), red="city", blue="sports_team")


@pytest.fixture(scope="session")
def sentencepiece_adapters(sentencepiece_base, tmp_path_factory) -> dict[str, str]:
    """The same for the other base, and one that was taught the opposite."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "right": str(_train_colors(sentencepiece_base, folder / "right", red="city", blue="sports_team")),
        "opposite": str(_train_colors(sentencepiece_base, folder / "opposite", red="sports_team", blue="city")),
    }


def _train_colors(base: Path, out: Path, red: str, blue: str) -> Path:
    posts = [_colored_post(index, *case) for index in range(8) for case in ((200, 0, red), (0, 200, blue))]
    train_reranker(posts, str(base), out, _COLORS, lambda post, gold, rng: rng.sample(_CHOICES, len(_CHOICES)))
    return out


_COLORS = RerankerTraining(learning_rate=4e-3, warmup=0.1, epochs=15, batch_size=16, dropout=0.0, device="cpu")
_CHOICES = ["city", "sports_team", "music", "musician", "sports_event"]


@pytest.fixture(scope="session")
def trained(base, adapter) -> Config:
    """Configuration of the tiny LLaVA with its adapter."""
    return load_config(reranker={"model": str(base), "adapter": str(adapter), "batch_size": 3})


@pytest.fixture(scope="session")
def many_colored_requests() -> list[Request]:
    """Sixty reds and blues, each with the choices in another order."""
    rng = random.Random(0)
    requests = []
    for index in range(60):
        order = rng.sample(_CHOICES, len(_CHOICES))
        strong, weak = rng.randrange(170, 240), rng.randrange(40)
        image = _image(strong, weak) if index % 2 else _image(weak, strong)
        requests.append(Request(image, build_prompt(_TOKENS, *_PLACE, order), tuple(order)))
    return requests


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
