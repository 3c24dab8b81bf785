"""The reranker's training on two workers of a real Ray, over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gem_ray.cluster.train_on_workers import train_reranker_on_workers
from gem_ray.data.generated import generate
from gem_ray.nano.llava_model import build_llava
from gem_ray.records import Post
from gem_ray.rerank.prompts import build_prompt
from gem_ray.rerank.recipe import RerankerTraining
from gem_ray.rerank.tokenizer import train_tokenizer
from gem_ray.rerank.train_reranker import train_reranker


@pytest.fixture
def posts() -> list[Post]:
    """Twelve entities: an even number of batches, so that two workers need no sample twice to end together."""
    posts = list(generate(7, seed=3))
    assert sum(len(post.gold or ()) for post in posts) == 12
    return posts


@pytest.fixture
def base(posts: list[Post], tmp_path: Path) -> Path:
    texts = [build_prompt(post.tokens, 0, 1, ["city", "park"]) for post in posts]
    sizes = {"vision_layers": 1, "vision_width": 32, "language_layers": 1, "language_width": 32}
    build_llava(tmp_path / "base", train_tokenizer(texts, 500), image_size=24, patch_size=12, **sizes)
    return tmp_path / "base"


@pytest.mark.usefixtures("local_ray")
def test_two_workers_do_what_one_does_with_accumulated_gradients(base: Path, posts: list[Post], tmp_path: Path) -> None:
    settings = RerankerTraining(
        epochs=2, batch_size=2, rank=4, dropout=0.0, learning_rate=1e-2, device="cpu", checkpoint_steps=2
    )
    alone = train_reranker(
        posts, str(base), tmp_path / "alone", settings.model_copy(update={"gradient_accumulation": 2})
    )
    shared = train_reranker_on_workers(posts, str(base), tmp_path / "shared", settings, 2)
    assert shared["steps"] == alone["steps"]
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "shared"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-4, rtol=1e-3)
    names = [{file.name for file in (tmp_path / name).iterdir()} for name in ("alone", "shared")]
    assert names[0] == names[1]
