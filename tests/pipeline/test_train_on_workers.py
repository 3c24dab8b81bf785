"""The tagger's training on two workers of a real Ray, over gloo."""

import json
from pathlib import Path

import pytest
import torch

from gem_ray.cluster.train_on_workers import train_tagger_on_workers
from gem_ray.config import ConfigError
from gem_ray.records import GoldEntity, Post
from gem_ray.tagger.checkpoint import load_tagger
from gem_ray.tagger.recipe import TaggerTraining
from gem_ray.tagger.train_tagger import train_tagger


@pytest.fixture
def posts() -> list[Post]:
    texts = ["google visits paris", "the google said", "london", "paris sees london", "said the google", "paris sees"]
    fine = {"google": "company", "paris": "city", "london": "city"}
    return [
        Post(
            str(number),
            text,
            tokens=text.split(),
            gold=[GoldEntity(at, at + 1, fine[word]) for at, word in enumerate(text.split()) if word in fine],
        )
        for number, text in enumerate([*texts, *texts[:2]])
    ]


@pytest.fixture
def settings(tiny_encoder: Path) -> TaggerTraining:
    rates = {"encoder_lr": 1e-2, "head_lr": 1e-2, "crf_lr": 1e-2}
    return TaggerTraining(
        encoder=str(tiny_encoder), epochs=3, batch_size=2, max_length=32, dropout=0.0, ema_decay=0.5, **rates
    )


@pytest.mark.usefixtures("local_ray")
def test_two_workers_do_what_one_does_with_accumulated_gradients(
    settings: TaggerTraining, posts: list[Post], tmp_path: Path
) -> None:
    """Two batches of two posts make a step, either way."""
    alone = train_tagger(posts, posts, tmp_path / "alone", settings.changed(gradient_accumulation=2))
    shared = train_tagger_on_workers(posts, posts, tmp_path / "shared", settings, 2)
    one, other = (load_tagger(tmp_path / name)[0].state_dict() for name in ("alone", "shared"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-4)
    assert shared["dev"] == alone["dev"]
    names = [{file.name for file in (tmp_path / name).iterdir()} for name in ("alone", "shared")]
    assert names[0] == names[1]


@pytest.mark.usefixtures("local_ray")
def test_workers_that_fail_are_explained_in_a_sentence(
    settings: TaggerTraining, posts: list[Post], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gem_ray.cluster.train_on_workers._MAX_FAILURES", 0)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "begun.json").mkdir()  # in the way of what rank 0 writes
    with pytest.raises(RuntimeError, match="the workers failed; run the same command to resume") as error:
        train_tagger_on_workers(posts, posts, tmp_path, settings, 2)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ray-train").exists()


@pytest.mark.usefixtures("local_ray")
def test_what_workers_refuse_is_refused_as_by_one_process(
    settings: TaggerTraining, posts: list[Post], tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").mkdir()
    begun = {"recipe": settings.changed(epochs=9).model_dump(mode="json")}
    (tmp_path / "checkpoints" / "begun.json").write_text(json.dumps(begun))
    with pytest.raises(ConfigError, match="started with another recipe") as error:
        train_tagger_on_workers(posts, posts, tmp_path, settings, 2)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ray-train").exists()
