"""Trains the tagger: fine-tunes an encoder and keeps the epoch that is best on dev. Resumes from a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from gem_ray.config import ConfigError
from gem_ray.data.shards import fingerprint
from gem_ray.model_paths import content_hash, resolve
from gem_ray.records import Post
from gem_ray.tagger.card import write_card
from gem_ray.tagger.checkpoint import load_encoder, load_tagger, save_tagger
from gem_ray.tagger.features import SubwordEncoder, fit, load_tokenizer
from gem_ray.tagger.model import DualPathTagger, initial_transition
from gem_ray.tagger.objective import TrainingObjective
from gem_ray.tagger.recipe import TaggerTraining
from gem_ray.tagger.scores import one_line, score_with_and_without_knowledge
from gem_ray.tagger.trainer import VALUE, TaggerTrainer, TrainingProgress
from gem_ray.tagger.views import TrainingViews
from gem_ray.taxonomy import LABEL_SETS
from gem_ray.training import CHECKPOINTS, forget_calibration, last_checkpoint, remove_checkpoints

logger = logging.getLogger(__name__)


def train_tagger(
    train: Sequence[Post],
    dev: Sequence[Post],
    out: Path,
    settings: TaggerTraining,
    progress: Callable[[TrainingProgress], None] = lambda _: None,
    prepare: Callable[[Trainer], Trainer] = lambda trainer: trainer,
) -> dict[str, Any]:
    """Fine-tune an encoder into a tagger and save the epoch with the best dev scores (§3.2).

    An epoch's value is the mean of its fine F1 with and without knowledge. After a stop, the same call resumes
    from the last checkpoint, and ends with the same weights.

    Args:
        train: posts with `tokens`, `gold` and perhaps `knowledge`, of any mix of sources.
        dev: the same, to choose the epoch by; empty: the last epoch is kept.
        out: the model directory to write; `out/checkpoints` is there until the training is done.
        settings: the recipe.
        progress: called after every step.
        prepare: what several workers need; `ray.train.huggingface.transformers.prepare_trainer`.

    Returns:
        `epochs`: for each its number, mean loss and dev scores; `best_epoch`; and `dev`: the scores of the saved
        directory, read back. Scores are as `scores.Scores`.

    Raises:
        ConfigError: `patience` without dev posts; or a training with another recipe or encoder, or on other posts, was
            started there.
        ValueError: no training post has both words and `gold`.
    """
    if settings.patience and not dev:
        raise ConfigError("patience counts epochs that are no better on dev posts, and there are none: give dev posts")
    torch.manual_seed(settings.seed)
    folder = resolve(settings.encoder)
    encoder = load_encoder(settings.encoder, settings.attention_dropout)
    features = SubwordEncoder(fit(load_tokenizer(folder), encoder, folder), settings.max_length, settings.design)
    views = TrainingViews(train, features, settings)
    objective = TrainingObjective(_new_model(encoder, settings, views), settings)
    trainer = prepare(TaggerTrainer(objective, views, dev, features, out / CHECKPOINTS, progress))
    inputs = {
        "set of posts": fingerprint(train),
        "set of dev posts": fingerprint(dev),
        "encoder": content_hash(folder),
    }
    begun = last_checkpoint(out / CHECKPOINTS, settings, inputs, trainer.is_world_process_zero())
    trainer.train(resume_from_checkpoint=begun)
    report = _history(trainer)
    if not trainer.is_world_process_zero():
        return report
    base = settings.encoder if settings.on_base_encoder else None
    forget_calibration(out)
    save_tagger(objective.averaged, features.tokenizer, out, base, settings)
    report["dev"] = score_with_and_without_knowledge(load_tagger(out)[0].to(trainer.args.device), dev, features)
    write_card(out, settings, report, len(views), len(dev))
    remove_checkpoints(out / CHECKPOINTS)
    logger.info("kept epoch %d: dev %s", report["best_epoch"], one_line(report["dev"]))
    return report


def _new_model(encoder: PreTrainedModel, settings: TaggerTraining, views: TrainingViews) -> DualPathTagger:
    labels = LABEL_SETS[settings.labels]
    tags = [views.tags(example) for example in views.examples]
    transition = initial_transition(settings.transition_init, labels, tags)
    if settings.device == "cpu" and settings.precision == "bfloat16":
        # The backward pass of torch's fused attention is many times slower than the plain one there.
        encoder.set_attn_implementation("eager")
    if settings.freeze_embeddings:
        encoder.get_input_embeddings().requires_grad_(False)
    model = DualPathTagger(
        encoder, labels, settings.alpha, settings.beta, settings.dropout, transition, settings.design
    )
    if settings.lora:
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(
            r=settings.lora.rank,
            lora_alpha=settings.lora.alpha,
            lora_dropout=settings.lora.dropout,
            target_modules="all-linear",
        )
        model.encoder = get_peft_model(encoder, adapter)
    return model


def _history(trainer: Trainer) -> dict[str, Any]:
    """Each epoch's loss and dev scores, from the trainer's log, which checkpoints carry along."""
    epochs: dict[int, dict[str, Any]] = {}
    for entry in trainer.state.log_history:
        number = round(entry["epoch"])
        if "loss" in entry:
            epochs.setdefault(number, {"epoch": number})["loss"] = entry["loss"]
        if VALUE in entry:
            scores: dict[str, dict[str, float]] = {}
            for name, f1 in entry.items():
                kind, dot, level = name.removeprefix("eval_").partition(".")
                if dot:
                    scores.setdefault(kind, {})[level] = f1
            epochs.setdefault(number, {"epoch": number}).update(dev=scores, value=entry[VALUE])
    history = list(epochs.values())
    return {
        "epochs": history,
        "best_epoch": max(history, key=lambda epoch: epoch.get("value", epoch["epoch"]))["epoch"],
    }
