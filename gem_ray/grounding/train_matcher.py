"""Trains the matcher: fine-tunes BLIP's matching head on pairs of a name and an image. Resumes from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from gem_ray.data.images import ImageLoader
from gem_ray.data.shards import fingerprint
from gem_ray.grounding.blip import encode_images, encode_texts, load_blip
from gem_ray.grounding.decision import Decision, best_threshold
from gem_ray.grounding.matcher import ImageProcessor, TextProcessor, load_processors
from gem_ray.grounding.matcher_recipe import MatcherTraining
from gem_ray.grounding.pairs import EpochOrder, PairCollator, PairsOfPosts
from gem_ray.grounding.trace import MATCH
from gem_ray.model_paths import content_hash, resolve
from gem_ray.records import Post
from gem_ray.training import (
    CHECKPOINTS,
    LossReports,
    OnLoss,
    forget_calibration,
    last_checkpoint,
    remove_checkpoints,
    training_arguments,
)

_ACCURACY = "eval_accuracy"


def train_matcher(
    train: Sequence[Post],
    dev: Sequence[Post],
    base: str,
    out: Path,
    settings: MatcherTraining | None = None,
    report: OnLoss = lambda step, loss: None,
) -> dict[str, Any]:
    """Fine-tune a BLIP matching model and save the epoch that is right about most dev mentions.

    The threshold of that epoch is stored with the model, beside the base model's layer to trace. Call it again to
    resume after a stop: it ends with the same weights.

    Args:
        train: posts with `gold`, `tokens` and an image; images are decoded batch by batch and not kept.
        dev: the same; empty: the last epoch is kept, with a threshold of ½.
        base: the model to start from, as `model_paths.resolve` takes it.
        out: Hugging Face directory to write; `out/checkpoints` is there until the training is done.
        settings: the recipe.
        report: called with step and loss now and then.

    Returns:
        `loss` of each epoch, `pairs` and `present` (in the last epoch), `skipped` (posts without a usable image), and
        with dev posts `dev`: the `accuracy` of present-or-not and the `threshold` at which it is reached.

    Raises:
        ConfigError: a training with another recipe, base or other posts was started there.
        ValueError: no post has a gold mention, or none an image that can be read; or the loss is no number any more.
    """
    settings = settings or MatcherTraining()
    folder = resolve(base)
    train, dev = ([post for post in posts if post.gold] for posts in (train, dev))
    if not train:
        raise ValueError("no post has a gold mention: there is nothing to train the matcher on")
    if not any(post.image is not None or post.image_bytes or post.image_uri for post in train):
        raise ValueError("no post has an image: shards need an image or image_uri column, a Twitter10000 root --images")
    for name, posts in (("training", train), ("dev", dev)):
        if posts and not _has_readable(posts, ImageLoader(settings.image)):
            raise ValueError(f"no image of the {name} posts with a gold mention can be read")
    torch.manual_seed(settings.seed)
    model = load_blip(folder)
    texts, images = load_processors(folder, model)
    data = PairsOfPosts(train, settings)
    # Dev asks for gold mentions alone, each counting once.
    dev_data = PairsOfPosts(dev, MatcherTraining()) if dev else None
    trainer = _MatcherTrainer(model, images, data, dev_data, texts, out / CHECKPOINTS, settings, report)
    inputs = {
        "set of posts": fingerprint(train),
        "set of dev posts": fingerprint(dev),
        "base": content_hash(folder),
    }
    trainer.train(resume_from_checkpoint=last_checkpoint(out / CHECKPOINTS, settings, inputs, may_begin=True))
    forget_calibration(out)
    model.save_pretrained(out)
    texts.tokenizer.save_pretrained(out)
    BlipImageProcessorPil.from_pretrained(folder).save_pretrained(out)
    result = trainer.summary()
    threshold = result["dev"]["threshold"] if dev else 0.5
    Decision(threshold=threshold, layer=Decision.load(folder).layer).save(out)
    remove_checkpoints(out / CHECKPOINTS)
    return result


def _has_readable(posts: Sequence[Post], images: ImageLoader) -> bool:
    """Some post has an image that can be read; posts stay as they are."""
    for post in posts:
        images.load(loaded := replace(post, problems=list(post.problems)))
        if loaded.image is not None:
            return True
    return False


class _Objective(nn.Module):
    """The model with its loss: cross-entropy of present and absent pairs."""

    def __init__(self, model: BlipForImageTextRetrieval, images: ImageProcessor) -> None:
        super().__init__()
        self.model, self._images = model, images

    def forward(
        self,
        squares: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        square_of_pair: Tensor,
        labels: Tensor,
        weights: Tensor,
    ) -> dict[str, Tensor]:
        """Loss and logits `(B, 2)` of a batch; each image is encoded once for all its pairs."""
        if not len(labels):  # no image of the batch can be used
            nothing = self.model.itm_head.bias
            return {"loss": 0 * nothing.sum(), "logits": nothing.new_zeros((0, 2))}
        states = encode_images(self.model, self._images.normalize(squares))
        hidden = encode_texts(self.model, input_ids, attention_mask, states, square_of_pair)
        logits = self.model.itm_head(hidden[:, 0]).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        return {"loss": (losses * weights).sum() / weights.sum(), "logits": logits}


class _MatcherTrainer(Trainer):
    """`transformers.Trainer` whose pairs are drawn anew each epoch, in an order that survives interruption."""

    def __init__(
        self,
        model: BlipForImageTextRetrieval,
        images: ImageProcessor,
        data: PairsOfPosts,
        dev: PairsOfPosts | None,
        texts: TextProcessor,
        checkpoints: Path,
        settings: MatcherTraining,
        report: OnLoss,
    ) -> None:
        self.data = data
        self.collate = PairCollator(data, texts, images, ImageLoader(settings.image))
        super().__init__(
            model=_Objective(model, images),
            args=_arguments(settings, checkpoints, has_dev=dev is not None),
            data_collator=self.collate,
            train_dataset=data,
            eval_dataset=dev,
            compute_metrics=_accuracy,
            callbacks=[_Epochs(data, settings.checkpoint_steps), LossReports(report)],
        )
        self.remove_callback(PrinterCallback)

    def summary(self) -> dict[str, Any]:
        """What the training came to."""
        history = self.state.log_history
        pairs = [pair for group in self.data.pairs for pair in group]
        posts = {post.post_id for post in self.data.posts}
        result: dict[str, Any] = {
            "loss": [entry["loss"] for entry in history if "loss" in entry],
            "pairs": len(pairs),
            "present": sum(pair.present for pair in pairs),
            "skipped": len(posts & self.collate.unusable),
        }
        dev = [entry for entry in history if _ACCURACY in entry]
        if dev:
            best = max(dev, key=lambda entry: entry[_ACCURACY])  # the first of equals, as the library keeps
            result["dev"] = {"accuracy": best[_ACCURACY], "threshold": best["eval_threshold"]}
        return result

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        return EpochOrder(self.data)


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of dev mentions that are rightly called present or absent, at the threshold that is best for it."""
    logits, labels = (np.asarray(values) for values in (prediction.predictions, prediction.label_ids))
    probabilities = torch.from_numpy(logits).softmax(dim=-1)[:, MATCH].tolist()
    threshold, accuracy = best_threshold(probabilities, labels.astype(bool).tolist())
    return {"accuracy": accuracy, "threshold": threshold}


def _arguments(settings: MatcherTraining, checkpoints: Path, has_dev: bool) -> TrainingArguments:
    return training_arguments(
        settings,
        checkpoints,
        num_train_epochs=settings.epochs,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        eval_strategy="epoch" if has_dev else "no",
        save_strategy="epoch",
        logging_strategy="epoch",
        label_names=["labels"],
        metric_for_best_model=_ACCURACY if has_dev else None,
        greater_is_better=True,
        load_best_model_at_end=has_dev,
    )


class _Epochs(TrainerCallback):
    """Has pairs and order drawn for each epoch, also when one is resumed in its middle, and checkpoints within it."""

    def __init__(self, data: PairsOfPosts, checkpoint_steps: int | None) -> None:
        self.data, self.checkpoint_steps = data, checkpoint_steps

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.data.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.checkpoint_steps and state.global_step % self.checkpoint_steps == 0:
            control.should_save = True
