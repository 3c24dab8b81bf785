"""A training that is killed goes on as if nothing had been."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gem_ray.config import ConfigError
from gem_ray.records import Post
from gem_ray.tagger.checkpoint import load_tagger
from gem_ray.tagger.recipe import TaggerTraining
from gem_ray.tagger.train_tagger import train_tagger
from gem_ray.tagger.trainer import TrainingProgress


class KilledError(Exception):
    """What stands for a kill."""


def kill_at(step: int) -> Callable[[TrainingProgress], None]:
    def report(progress: TrainingProgress) -> None:
        if progress.step == step:
            raise KilledError

    return report


@pytest.fixture
def settings(encoder_folder: Path) -> TaggerTraining:
    """Everything that is random, in 4 steps an epoch."""
    return TaggerTraining(
        encoder=str(encoder_folder),
        epochs=3,
        batch_size=2,
        max_length=64,
        encoder_lr=1e-3,
        dropout=0.3,
        word_dropout=0.2,
        knowledge_dropout=0.4,
        mention_replacement=0.3,
        word_shapes=True,
        second_view="same",
        consistency=0.3,
        ema_decay=0.8,
        patience=3,
        checkpoint_steps=3,
    )


# Killed in the first epoch, after an extra checkpoint; just after an epoch's end; in the second epoch; and twice.
@pytest.mark.parametrize("kills", [(4,), (5,), (8,), (5, 11)])
def test_resumed_training_gives_the_same_weights(
    settings: TaggerTraining, posts: list[Post], tmp_path: Path, kills: tuple[int, ...]
) -> None:
    whole = train_tagger(posts, posts, tmp_path / "whole", settings)
    for step in kills:
        with pytest.raises(KilledError):
            train_tagger(posts, posts, tmp_path / "resumed", settings, kill_at(step))
    torch.manual_seed(99)  # another process would not go on with this one's random numbers
    torch.rand(17)
    steps: list[int] = []
    resumed = train_tagger(posts, posts, tmp_path / "resumed", settings, lambda progress: steps.append(progress.step))
    assert min(steps) > 3  # it did not begin anew
    one, other = (load_tagger(tmp_path / name)[0].state_dict() for name in ("whole", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert resumed["dev"] == whole["dev"]
    assert [epoch["dev"] for epoch in resumed["epochs"]] == [epoch["dev"] for epoch in whole["epochs"]]


def _last_checkpoint(out: Path) -> Path:
    return max((out / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def _cut_the_last_part(checkpoint: Path) -> None:
    file = checkpoint / "trainer_state.json"
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda checkpoint: [(checkpoint / part).unlink() for part in ("trainer_state.json", "rng_state.pth")],
        _cut_the_last_part,
        lambda checkpoint: (checkpoint / "optimizer.pt").unlink(),  # killed while it is removed
    ],
)
def test_a_kill_while_a_checkpoint_is_written_or_removed_costs_that_one_alone(
    settings: TaggerTraining, posts: list[Post], tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    train_tagger(posts, posts, tmp_path / "whole", settings)
    with pytest.raises(KilledError):
        train_tagger(posts, posts, tmp_path / "resumed", settings, kill_at(8))
    spoil(_last_checkpoint(tmp_path / "resumed"))
    steps: list[int] = []
    train_tagger(posts, posts, tmp_path / "resumed", settings, lambda progress: steps.append(progress.step))
    assert min(steps) == 5  # after the one before
    one, other = (load_tagger(tmp_path / name)[0].state_dict() for name in ("whole", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_kill_while_the_checkpoints_of_a_training_are_removed_leaves_nothing_of_unknown_origin(
    settings: TaggerTraining, posts: list[Post], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rmtree = shutil.rmtree

    def killed(path: Path, **options: Any) -> None:
        rmtree(path, **options)
        if not options:  # not one of those that `transformers.Trainer` removes as it goes on
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KilledError):
            train_tagger(posts, posts, tmp_path, settings)
    with pytest.raises(ConfigError, match="started with another recipe"):
        train_tagger(posts, posts, tmp_path, settings.changed(epochs=1))
    train_tagger(posts, posts, tmp_path, settings)
    assert not (tmp_path / "checkpoints").exists()


def test_checkpoints_of_something_else_are_neither_resumed_nor_removed(
    settings: TaggerTraining, posts: list[Post], tmp_path: Path
) -> None:
    other = tmp_path / "checkpoints" / "checkpoint-7" / "model.bin"
    other.parent.mkdir(parents=True)
    other.write_text("of another project")
    with pytest.raises(ConfigError, match=r"holds checkpoints, but no begun\.json"):
        train_tagger(posts, posts, tmp_path, settings)
    assert other.read_text() == "of another project"
    other.unlink()
    other.parent.rmdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    train_tagger(posts, posts, tmp_path, settings)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["notes.txt"]


def test_training_with_accumulated_gradients_is_resumed_too(
    settings: TaggerTraining, posts: list[Post], tmp_path: Path
) -> None:
    settings = settings.changed(gradient_accumulation=2, checkpoint_steps=1)  # 2 steps an epoch
    train_tagger(posts, posts, tmp_path / "whole", settings)
    with pytest.raises(KilledError):
        train_tagger(posts, posts, tmp_path / "resumed", settings, kill_at(4))
    train_tagger(posts, posts, tmp_path / "resumed", settings)
    one, other = (load_tagger(tmp_path / name)[0].state_dict() for name in ("whole", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_checkpoints_are_there_until_the_training_is_done(
    settings: TaggerTraining, posts: list[Post], tmp_path: Path
) -> None:
    with pytest.raises(KilledError):
        train_tagger(posts, posts, tmp_path, settings, kill_at(11))
    assert len(list((tmp_path / "checkpoints").glob("checkpoint-*"))) in (1, 2)  # the last, and the best if another
    train_tagger(posts, posts, tmp_path, settings)
    assert not (tmp_path / "checkpoints").exists()


def test_a_training_with_another_recipe_is_not_gone_on_with(
    settings: TaggerTraining, posts: list[Post], tmp_path: Path
) -> None:
    with pytest.raises(KilledError):
        train_tagger(posts, posts, tmp_path, settings, kill_at(4))
    with pytest.raises(ConfigError, match="started with another recipe"):
        train_tagger(posts, posts, tmp_path, settings.changed(epochs=4))
    others = [replace(post, text=f"{post.text} !") for post in posts]
    with pytest.raises(ConfigError, match=r"started with another set of posts \(begun\.json\)"):
        train_tagger(others, posts, tmp_path, settings)
