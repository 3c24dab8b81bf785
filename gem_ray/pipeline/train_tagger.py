"""The tagger's training on several workers, by Ray Train; the training itself is `gem_ray.tagger.train`'s."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from gem_ray.records import Post
from gem_ray.tagger.recipe import TaggerTraining

_MAX_FAILURES = 3  # of workers or nodes; each time, the training goes on from its last checkpoint


def train_tagger_on_workers(
    train: Sequence[Post], dev: Sequence[Post], out: Path, settings: TaggerTraining, workers: int
) -> dict[str, Any]:
    """`train_tagger` on several workers; each takes its share of the batches, `settings.batch_size` posts at a time.

    Uses the Ray of this process, else the cluster that `RAY_ADDRESS` names, else a local Ray.

    Args:
        train: posts to learn from.
        dev: posts to choose the epoch by.
        out: the model directory to write: a folder that every worker sees at the same path.
        settings: the recipe; unless `device` is `cpu`, each worker has a GPU of its own.
        workers: processes with one thread each; each holds a copy of the model.

    Returns:
        What `train_tagger` gives back.

    Raises:
        RuntimeError: workers failed more often than is tolerated.
    """
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    storage = out.resolve() / "ray-train"  # Ray's own state; models and checkpoints go to `out` directly
    trainer = TorchTrainer(
        _train_on_worker,
        train_loop_config={"posts": ray.put((train, dev)), "out": out.resolve(), "settings": settings},
        torch_config=TorchConfig(backend="gloo" if settings.device == "cpu" else "nccl"),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=settings.device != "cpu"),
        run_config=RunConfig(
            name="tagger", storage_path=str(storage), failure_config=FailureConfig(max_failures=_MAX_FAILURES)
        ),
    )
    try:
        return trainer.fit().return_value
    except TrainingFailedError as error:
        reason = str(error).strip().splitlines()[-1]
        raise RuntimeError(f"the workers failed, and the same command goes on from {out}: {reason}") from error
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _train_on_worker(config: dict[str, Any]) -> dict[str, Any]:
    import torch
    from ray.train.huggingface.transformers import prepare_trainer

    from gem_ray.tagger.train import train_tagger

    if config["settings"].device == "cpu":
        torch.set_num_threads(1)  # workers of one machine would contend
    train, dev = ray.get(config["posts"])
    return train_tagger(train, dev, config["out"], config["settings"], prepare=prepare_trainer)
