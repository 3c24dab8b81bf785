"""What trainings on `transformers.Trainer` share: arguments, the checkpoint to resume from, loss reports."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from gem_ray.config import ConfigError
from gem_ray.recipes import Recipe

OnLoss = Callable[[int, float], None]
"""Is told a step, and the mean loss since the last report."""


def training_arguments(recipe: Recipe, checkpoints: Path, **particular: Any) -> TrainingArguments:
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


def last_checkpoint(folder: Path, recipe: Recipe, inputs: Mapping[str, str], may_begin: bool) -> str | None:
    """Find the last checkpoint; for a new training, record its recipe and inputs.

    Args:
        folder: of `transformers.Trainer`'s checkpoints.
        recipe: of the training.
        inputs: what else decides on its outcome, by name: hashes of posts and of the model that it begins with.
        may_begin: this process is the one that writes.

    Raises:
        ConfigError: a training with another recipe, or of other inputs, is there.
    """
    file = folder / "begun.json"
    this = {"recipe": recipe.model_dump(mode="json"), **inputs}
    if file.is_file():
        begun = json.loads(file.read_text(encoding="utf-8"))
        if different := [name for name in this if begun.get(name) != this[name]]:
            raise ConfigError(
                f"{folder} holds a training that was started with another {' and '.join(different)} ({file.name}): use "
                "the same, another output folder, or remove the checkpoints"
            )
    elif may_begin:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(this, indent=2), encoding="utf-8")
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


class LossReports(TrainerCallback):
    """Tells a function every loss that is logged, in one process only."""

    def __init__(self, report: OnLoss) -> None:
        self._report = report

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """As `TrainerCallback`."""
        if state.is_world_process_zero and logs and "loss" in logs:
            self._report(state.global_step, logs["loss"])
