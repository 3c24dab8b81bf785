"""Training on several workers, by Ray Train; the trainings themselves are those of the tagger and of the reranker."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from gem_ray.ray_private.core import connect_to_ray, start_local_ray
from gem_ray.records import Post

if TYPE_CHECKING:
    from gem_ray.rerank.recipe import RerankerTraining
    from gem_ray.rerank.samples import CandidateRule
    from gem_ray.tagger.recipe import TaggerTraining

_MAX_FAILURES = 3  # of workers or nodes; each time, the training resumes from its last checkpoint


def train_tagger_on_workers(
    train: Sequence[Post], dev: Sequence[Post], out: Path, settings: TaggerTraining, workers: int
) -> dict[str, Any]:
    """`train_tagger` on several workers; each takes its share of the batches, `settings.batch_size` posts at a time.

    Args:
        train: posts to learn from.
        dev: posts to choose the epoch by.
        out: the model directory to write: a folder that every worker sees at the same path.
        settings: the recipe; unless `device` is `cpu`, each worker has a GPU of its own.
        workers: processes with one thread each; each holds a copy of the model.

    Returns:
        What `train_tagger` gives back.

    Raises:
        ValueError: as for one process, a `ConfigError` among others.
        RuntimeError: workers failed more often than is tolerated.
    """
    arguments = {"train": train, "dev": dev, "settings": settings}
    return _on_workers(_train_tagger, arguments, out, workers, on_cpu=settings.device == "cpu")


def train_reranker_on_workers(
    posts: Sequence[Post],
    base: str,
    out: Path,
    settings: RerankerTraining,
    workers: int,
    candidates: CandidateRule | None = None,
) -> dict[str, Any]:
    """`train_reranker` on several workers; each takes its share of the batches.

    Args:
        posts: to learn from.
        base: the LLaVA checkpoint.
        out: the adapter's folder, which every worker sees at the same path.
        settings: the recipe; unless `device` is `cpu`, each worker has a GPU of its own.
        workers: processes; each holds a copy of the model.
        candidates: what is offered for an entity; default: the paper's rule.

    Returns:
        What `train_reranker` gives back.

    Raises:
        ValueError: as for one process, a `ConfigError` among others.
        RuntimeError: workers failed more often than is tolerated.
    """
    arguments = {"posts": posts, "base": base, "settings": settings, "candidates": candidates}
    return _on_workers(_train_reranker, arguments, out, workers, on_cpu=settings.device == "cpu")


def _on_workers(
    train: Callable[..., dict[str, Any]], arguments: dict[str, Any], out: Path, workers: int, on_cpu: bool
) -> dict[str, Any]:
    """Uses the Ray of this process, else the cluster that `RAY_ADDRESS` names, else a local Ray."""
    if not ray.is_initialized():
        if address := os.environ.get("RAY_ADDRESS"):
            connect_to_ray(address)
        else:
            start_local_ray()
    storage = out.resolve() / "ray-train"  # Ray's own state; models and checkpoints go to `out` directly
    trainer = TorchTrainer(
        _train_on_worker,
        train_loop_config={
            "train": train,
            "arguments": ray.put(arguments | {"out": out.resolve()}),
            "on_cpu": on_cpu,
        },
        torch_config=TorchConfig(backend="gloo" if on_cpu else "nccl"),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=not on_cpu),
        run_config=RunConfig(
            name="train", storage_path=str(storage), failure_config=FailureConfig(max_failures=_MAX_FAILURES)
        ),
    )
    try:
        report = trainer.fit().return_value
    except TrainingFailedError as error:
        reason = str(error).strip().splitlines()[-1]
        raise RuntimeError(f"the workers failed; run the same command to resume from {out}: {reason}") from error
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    if isinstance(report, ValueError):
        raise report
    return report


def _train_on_worker(config: dict[str, Any]) -> dict[str, Any] | ValueError:
    """The report; or what is wrong with recipe or posts, which is handed back: an error would be tried again."""
    import torch
    from ray.train.huggingface.transformers import prepare_trainer

    if config["on_cpu"]:
        torch.set_num_threads(1)  # workers of one machine would contend
    try:
        return config["train"](**ray.get(config["arguments"]), prepare=prepare_trainer)
    except ValueError as error:
        return error


def _train_tagger(**arguments: Any) -> dict[str, Any]:
    from gem_ray.tagger.train_tagger import train_tagger

    return train_tagger(**arguments)


def _train_reranker(**arguments: Any) -> dict[str, Any]:
    from gem_ray.rerank.train_reranker import train_reranker

    return train_reranker(**arguments)
