"""`transformers.Trainer` for taggers: three learning rates, dev F1, and a data order that survives interruption."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)

from gem_ray.records import Post
from gem_ray.tagger.features import SubwordEncoder
from gem_ray.tagger.objective import TrainingObjective
from gem_ray.tagger.recipe import TaggerTraining
from gem_ray.tagger.scores import score_with_and_without_knowledge, value_of
from gem_ray.tagger.views import LengthGroupedSampler, TrainingViews, collate_views
from gem_ray.training import FiniteLoss, training_arguments

VALUE = "eval_value"
"""The metric that chooses the epoch, as `Trainer` logs it."""

_LAYER = re.compile(r"\.(?:layer|layers|h|block)\.(\d+)\.")


@dataclass(frozen=True)
class TrainingProgress:
    """Where the training is, for a progress bar."""

    epoch: int  # from 1
    step: int
    steps: int
    loss: float  # the epoch's running mean


class TaggerTrainer(Trainer):
    """Trains a `TrainingObjective`.

    Args:
        objective: the tagger in training.
        views: the training data.
        dev: posts to score every epoch by; `None` means that the last epoch counts as the best.
        features: the input format.
        checkpoints: folder for checkpoints.
        progress: called after every step.
    """

    control: TrainerControl

    def __init__(
        self,
        objective: TrainingObjective,
        views: TrainingViews,
        dev: Sequence[Post],
        features: SubwordEncoder,
        checkpoints: Path,
        progress: Callable[[TrainingProgress], None],
    ) -> None:
        self.objective, self.settings, self.features = objective, objective.settings, features
        self.order = LengthGroupedSampler(views, self.settings.batch_size, self.settings.seed)
        self.step_loss = 0.0
        super().__init__(
            model=objective,
            args=_arguments(self.settings, checkpoints, has_dev=bool(dev)),
            data_collator=partial(collate_views, pad_token_id=features.tokenizer.pad_token_id),
            train_dataset=views,
            eval_dataset=dev,
            callbacks=[_EpochOrder(self), _WeightAverage(self), _ProgressReport(self, progress), FiniteLoss()],
        )
        self.remove_callback(PrinterCallback)
        if self.settings.checkpoint_steps:
            self.add_callback(_ExtraCheckpoints(self.settings.checkpoint_steps))
        if self.settings.patience:
            self.add_callback(EarlyStoppingCallback(self.settings.patience))

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """AdamW over encoder, heads with M, and CRFs, each with its learning rate."""
        kind, options = self.get_optimizer_cls_and_kwargs(self.args)
        self.optimizer = kind(parameter_groups(self.objective.model, self.settings), **options)
        return self.optimizer

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Dev F1, as flat metrics; every worker scores all of dev, so that all decide the same."""
        scores = score_with_and_without_knowledge(self.objective.averaged, self.eval_dataset, self.features)
        metrics = {f"eval_{kind}.{level}": f1 for kind, levels in scores.items() for level, f1 in levels.items()}
        metrics[VALUE] = value_of(scores)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The loss of a batch; remembered for the progress report."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.step_loss = loss.item()
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        return self.order


def parameter_groups(model: nn.Module, settings: TaggerTraining) -> list[dict[str, Any]]:
    """Encoder, heads with M, and CRFs, each with its learning rate; matrices with weight decay, the rest without."""
    rates = {"head": settings.head_lr, "crf": settings.crf_lr}
    layers = model.encoder.config.num_hidden_layers
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = "encoder" if name.startswith("encoder.") else "crf" if "_crf." in name else "head"
        rate = rates.get(part) or settings.encoder_lr * settings.layer_decay ** _layers_above(name, layers)
        decays = parameter.ndim > 1 and part != "crf"
        groups.setdefault((rate, decays), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": settings.weight_decay if decays else 0.0}
        for (rate, decays), parameters in groups.items()
    ]


def _layers_above(name: str, layers: int) -> int:
    """How many encoder layers are above a parameter's; above the embeddings, all of them."""
    found = _LAYER.search(name)
    return layers - 1 - int(found.group(1)) if found else layers


def _arguments(settings: TaggerTraining, checkpoints: Path, has_dev: bool) -> TrainingArguments:
    return training_arguments(
        settings,
        checkpoints,
        num_train_epochs=settings.epochs,
        eval_strategy="epoch" if has_dev else "no",
        save_strategy="epoch",
        logging_strategy="epoch",
        metric_for_best_model=VALUE if has_dev else None,
        greater_is_better=True,
        load_best_model_at_end=has_dev,
        restore_callback_states_from_checkpoint=True,
    )


class _EpochOrder(TrainerCallback):
    """Tells the sampler the epoch, also in the middle of one, where the library's wrappers may not reach it."""

    def __init__(self, trainer: TaggerTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.order.set_epoch(int(state.epoch or 0))


class _WeightAverage(TrainerCallback):
    """Keeps the moving average of the weights."""

    def __init__(self, trainer: TaggerTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.objective.update_average()


class _ProgressReport(TrainerCallback):
    """Calls a function after every step, in one process only."""

    def __init__(self, trainer: TaggerTrainer, report: Callable[[TrainingProgress], None]) -> None:
        self.trainer, self.report = trainer, report
        self.total, self.seen = 0.0, 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.total, self.seen = 0.0, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.total, self.seen = self.total + self.trainer.step_loss, self.seen + 1
        if state.is_world_process_zero:
            # The step has already been counted in: at an epoch's last one, `state.epoch` is a whole number.
            epoch = -int(-state.epoch // 1)
            self.report(TrainingProgress(epoch, state.global_step, state.max_steps, self.total / self.seen))


class _ExtraCheckpoints(TrainerCallback):
    """Checkpoints between those at the ends of epochs."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.steps == 0:
            control.should_save = True
