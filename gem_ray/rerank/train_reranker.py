"""Trains the reranker: LoRA on LLaVA's language model, loss on the answer only (§3.3.2). Resumes from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import (
    BitsAndBytesConfig,
    LlavaForConditionalGeneration,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from gem_ray.config import ConfigError
from gem_ray.data.shards import fingerprint
from gem_ray.device import torch_device
from gem_ray.loading import check_pretrained
from gem_ray.model_paths import content_hash, resolve
from gem_ray.records import Post
from gem_ray.rerank.candidates import StoredCandidates, training_candidates
from gem_ray.rerank.llava import load_processor
from gem_ray.rerank.prompts import PromptFormat
from gem_ray.rerank.recipe import RerankerTraining
from gem_ray.rerank.samples import IGNORED, CandidateRule, EntitySamples, SampleEncoder
from gem_ray.taxonomy import LABEL_SETS
from gem_ray.training import (
    CHECKPOINTS,
    LossReports,
    OnLoss,
    forget_calibration,
    last_checkpoint,
    remove_checkpoints,
    training_arguments,
)

# A plain list of names would also match the vision tower, whose adapters vLLM does not serve.
LORA_MODULES = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


_IN_FULL_PRECISION = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


def train_reranker(
    posts: Sequence[Post],
    base: str,
    out: Path,
    settings: RerankerTraining,
    candidates: CandidateRule | None = None,
    report: OnLoss = lambda step, loss: None,
    prepare: Callable[[Trainer], Trainer] = lambda trainer: trainer,
) -> dict[str, float]:
    """Fit an adapter to the gold entities of posts with images, and write it as peft does.

    After a stop, the same call resumes from the last checkpoint, and ends with the same weights.

    Args:
        posts: those without gold, or without an image that can be read, are passed over.
        base: the LLaVA checkpoint, as `model_paths.resolve` takes it.
        out: the adapter's folder; `out/checkpoints` is there until the training is done.
        settings: the recipe.
        candidates: what is offered for an entity; default: the paper's rule. Stored ones are compared on resume.
        report: called with the step and the mean loss since the last report.
        prepare: what several workers need; `ray.train.huggingface.transformers.prepare_trainer`.

    Returns:
        `entities`, `steps`, and the mean loss of the first and of the last report.

    Raises:
        ConfigError: a training with another recipe, base, posts or candidates was started there, or bitsandbytes is
            asked for and not installed.
        ValueError: no post has both a gold entity and an image that can be read; or stored candidates are of none of
            them; or the base's weights are missing, unexpected or of another shape.
    """
    labels = LABEL_SETS[settings.labels]
    rule = candidates or (lambda post, gold, rng: training_candidates(gold.fine, labels, settings.k, rng))
    folder = resolve(base)
    model = _adapted(folder, settings)
    processor = load_processor(folder, model)
    prompt_format = PromptFormat.of_model(folder, settings.template)
    encoder = SampleEncoder(model.get_base_model(), processor, settings.max_length, prompt_format, settings.image_fit)
    samples = EntitySamples(posts, encoder, rule, settings)
    if isinstance(candidates, StoredCandidates):
        candidates.check_knows(samples.entities)
    trainer = prepare(_trainer(model, encoder, samples, settings, out / CHECKPOINTS, report))
    inputs = {
        "set of posts": fingerprint(posts),
        "base": content_hash(folder),
        "set of candidates": candidates.hash if isinstance(candidates, StoredCandidates) else "not stored",
    }
    begun = last_checkpoint(out / CHECKPOINTS, settings, inputs, trainer.is_world_process_zero())
    trainer.train(resume_from_checkpoint=begun)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        # What a reader of the adapter can look for; the path on this machine would tell them nothing.
        model.peft_config["default"].base_model_name_or_path = folder.name if Path(base).exists() else base
        forget_calibration(out)
        model.save_pretrained(str(out), save_embedding_layers=False)
        (out / "README.md").unlink()  # peft's empty model card
        remove_checkpoints(out / CHECKPOINTS)
    return {
        "entities": len(samples.entities),
        "steps": trainer.state.global_step,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def answer_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of the answers and their end tokens, given image and prompt.

    Args:
        outputs: of the model, with the logits of the last positions `(B, n, V)`.
        labels: `(B, n)` of the same positions.
        num_items_in_batch: labels of all batches of a step, by which the sum is divided; default: the mean.
    """
    logits, expected = outputs.logits[:, :-1], labels[:, 1:]  # the position before an answer's token predicts it
    learned = expected != IGNORED
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(logits[learned].float(), expected[learned], reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def _adapted(folder: Path, settings: RerankerTraining) -> PeftModel:
    """The frozen base under a fresh adapter."""
    torch.manual_seed(settings.seed)
    device = torch_device(settings.device)
    arguments: dict[str, Any] = {"dtype": getattr(torch, settings.precision)}
    if settings.four_bit:
        arguments |= {"quantization_config": _four_bits(settings), "device_map": {"": device}}
    # Not by `load_pretrained`: in 4 bits, shapes are not those of the file.
    check_pretrained(LlavaForConditionalGeneration, folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, **arguments)
    checkpointing = {"use_reentrant": False}
    if settings.four_bit:
        model = prepare_model_for_kbit_training(model, settings.gradient_checkpointing, checkpointing)
    adapter = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=LORA_MODULES
    )
    return get_peft_model(model, adapter)


def _four_bits(settings: RerankerTraining) -> BitsAndBytesConfig:
    if find_spec("bitsandbytes") is None:
        raise ConfigError('four_bit: needs bitsandbytes, which is not installed: pip install "gem-ray[quantize]"')
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, settings.precision),
        llm_int8_skip_modules=_IN_FULL_PRECISION,
    )


def _trainer(
    model: PeftModel,
    encoder: SampleEncoder,
    samples: EntitySamples,
    settings: RerankerTraining,
    checkpoints: Path,
    report: OnLoss,
) -> Trainer:
    trainer = _InOrder(
        model=model,
        args=_arguments(settings, checkpoints),
        data_collator=encoder.collate,
        train_dataset=samples,
        compute_loss_func=answer_loss,
        callbacks=[LossReports(report)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _InOrder(Trainer):
    """Takes the samples as they come: they are in random order already, one epoch after the other."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def _arguments(settings: RerankerTraining, checkpoints: Path) -> TrainingArguments:
    return training_arguments(
        settings,
        checkpoints,
        num_train_epochs=1,  # the samples hold all epochs
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="steps",
        save_steps=settings.checkpoint_steps,
        logging_steps=settings.report_every,
        logging_first_step=True,
    )
