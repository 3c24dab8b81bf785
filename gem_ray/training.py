"""What trainings on `transformers.Trainer` share: arguments out of a recipe, and where an interrupted one goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from gem_ray.config import ConfigError, DType


class CommonSettings(Protocol):
    """What every recipe has."""

    @property
    def batch_size(self) -> int: ...  # noqa: D102
    @property
    def gradient_accumulation(self) -> int: ...  # noqa: D102
    @property
    def schedule(self) -> str: ...  # noqa: D102
    @property
    def warmup(self) -> float: ...  # noqa: D102
    @property
    def max_grad_norm(self) -> float: ...  # noqa: D102
    @property
    def precision(self) -> DType: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102


def training_arguments(recipe: CommonSettings, checkpoints: Path, **particular: Any) -> TrainingArguments:
    """Arguments of a training that keeps its last and its best checkpoint, and prints nothing.

    Args:
        recipe: of the training.
        checkpoints: folder for checkpoints.
        particular: further arguments of `TrainingArguments`.
    """
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup,  # below 1: a share of all steps
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.precision == "bfloat16",
        fp16=recipe.precision == "float16",
        seed=recipe.seed,
        save_total_limit=1,  # the last, and the best
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        **particular,
    )
    # One process drives one device: on several, processes are started by Ray Train or torchrun, not threads by torch.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def last_checkpoint(folder: Path, recipe: BaseModel, may_begin: bool) -> str | None:
    """Where a training goes on; where none was begun, its recipe is put there.

    Args:
        folder: of `transformers.Trainer`'s checkpoints.
        recipe: of the training.
        may_begin: this process is the one that writes.

    Raises:
        ConfigError: another recipe is there.
    """
    file = folder / "recipe.json"
    if file.is_file():
        if type(recipe).model_validate_json(file.read_text(encoding="utf-8")) != recipe:
            raise ConfigError(
                f"{folder} holds a training that was begun with another recipe ({file.name}): use the same one, "
                "another output folder, or remove the checkpoints"
            )
    elif may_begin:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(recipe.model_dump_json(indent=2), encoding="utf-8")
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None
