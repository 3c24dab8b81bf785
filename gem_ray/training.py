"""What trainings on `transformers.Trainer` share: arguments, the checkpoint to resume from, loss reports."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from gem_ray.atomic import atomic_file
from gem_ray.config import ConfigError
from gem_ray.device import torch_device
from gem_ray.model_files import CONFIDENCE_FILE
from gem_ray.recipes import Recipe

CHECKPOINTS = "checkpoints"
"""Folder in the model's directory, until the training is done."""

_BEGUN, _CHECKPOINT = "begun.json", "checkpoint-*"
# Of every checkpoint, in the order in which `transformers.Trainer` writes them; it finishes none in one step.
_PARTS = ("*model*.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainer_state.json")

OnLoss = Callable[[int, float], None]
"""Is told a step, and the mean loss since the last report."""


def training_arguments(recipe: Recipe, checkpoints: Path, **particular: Any) -> TrainingArguments:
    """Arguments of a training that keeps its last and its best checkpoint, and prints nothing.

    Args:
        recipe: of the training.
        checkpoints: folder for checkpoints.
        particular: further arguments of `TrainingArguments`.

    Raises:
        ConfigError: `device` is `cuda`, and there is no GPU, which the library passes over in silence.
    """
    device = torch_device(recipe.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: torch finds no GPU here for cuda; set device=cpu, or train where there is one")
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
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        logging_nan_inf_filter=False,  # it shows the last loss that was a number in the place of one that is none
        **particular,
    )
    # One process drives one device: on several, processes are started by Ray Train or torchrun, not threads by torch.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def last_checkpoint(folder: Path, recipe: Recipe, inputs: Mapping[str, str], may_begin: bool) -> str | None:
    """Find the last checkpoint; for a new training, record its recipe and inputs.

    What a kill has left half written or half removed is no checkpoint, and is removed.

    Args:
        folder: of `transformers.Trainer`'s checkpoints.
        recipe: of the training.
        inputs: what else decides on its outcome, by name: hashes of posts and of the model that it begins with.
        may_begin: this process is the one that writes.

    Raises:
        ConfigError: a training with another recipe or of other inputs is there, or checkpoints of something else.
    """
    file = folder / _BEGUN
    this = {"recipe": recipe.model_dump(mode="json"), **inputs}
    if file.is_file():
        begun = json.loads(file.read_text(encoding="utf-8"))
        if different := [name for name in this if begun.get(name) != this[name]]:
            raise ConfigError(
                f"{folder} holds a training that was started with another {' and '.join(different)} ({file.name}): use "
                "the same, another output folder, or remove the checkpoints"
            )
    elif may_begin:
        if any(folder.glob(_CHECKPOINT)):
            raise ConfigError(
                f"{folder} holds checkpoints, but no {file.name} that says of which training: use another output "
                "folder, or remove them"
            )
        with atomic_file(file) as partial:
            partial.write_text(json.dumps(this, indent=2), encoding="utf-8")
    else:
        return None
    whole = []
    for checkpoint in folder.glob(_CHECKPOINT):
        if _is_whole(checkpoint):
            whole.append(checkpoint)
        elif may_begin:
            shutil.rmtree(checkpoint)
    last = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return None if last is None else str(last)


def _is_whole(checkpoint: Path) -> bool:
    """Every part is there; the last one, which others are written before, to its end."""
    if not all(any(checkpoint.glob(part)) for part in _PARTS):
        return False
    try:
        json.loads((checkpoint / _PARTS[-1]).read_bytes())
    except (OSError, ValueError):  # another worker may be removing it
        return False
    return True


def remove_checkpoints(folder: Path) -> None:
    """Remove those of a training that is done, and what `last_checkpoint` recorded; what else is there stays."""
    for checkpoint in folder.glob(_CHECKPOINT):
        shutil.rmtree(checkpoint)
    (folder / _BEGUN).unlink()  # last: until then they are known for this training's
    with suppress(OSError):  # not empty
        folder.rmdir()


def forget_calibration(out: Path) -> None:
    """Remove what an earlier model of a directory was told of its confidence: it is not that of the new weights."""
    (out / CONFIDENCE_FILE).unlink(missing_ok=True)


class FiniteLoss(TrainerCallback):
    """Ends a training whose loss is no number any more: its weights are lost."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """As `TrainerCallback`.

        Raises:
            ValueError: as said.
        """
        if logs and not math.isfinite(logs.get("loss", 0.0)):
            raise ValueError(
                f"the loss is {logs['loss']} at step {state.global_step}: the training has diverged; lower its "
                "learning rate, and use another output folder or remove the checkpoints"
            )


class LossReports(FiniteLoss):
    """Tells a function every loss that is logged, in one process only."""

    def __init__(self, report: OnLoss) -> None:
        self._report = report

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """As `FiniteLoss`."""
        super().on_log(args, state, control, logs)
        if state.is_world_process_zero and logs and "loss" in logs:
            self._report(state.global_step, logs["loss"])
