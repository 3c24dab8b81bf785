"""Tagger model directories: `config.json`, `model.safetensors`, tokenizer files; complete or on a base encoder."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from gem_ray.loading import ENCODER_BODY, load_adapters, load_pretrained, load_strictly
from gem_ray.model_files import faults_of
from gem_ray.model_kind import read_config
from gem_ray.model_paths import resolve
from gem_ray.tagger.features import fit, load_tokenizer
from gem_ray.tagger.model import DualPathTagger
from gem_ray.tagger.recipe import TaggerDesign, TaggerTraining
from gem_ray.taxonomy import LABEL_SETS, LabelSetName

_CONFIG, _WEIGHTS, _ADAPTER = "config.json", "model.safetensors", "adapter"


class TaggerFileConfig(BaseModel):
    """What a tagger's `config.json` holds. Exactly one of `encoder` and `base_encoder` is set."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["dual-path-tagger"] = "dual-path-tagger"
    labels: LabelSetName
    alpha: float
    beta: float
    dropout: float
    design: TaggerDesign = TaggerDesign()
    recipe: dict[str, Any] | None = None  # how it was trained, for the reader
    encoder: dict[str, Any] | None = None  # the complete form: the encoder's own configuration
    base_encoder: str | None = None  # the other: where the encoder and its tokenizer are
    from_base: list[str] = []  # the weights that are not here because they are the base's


def load_encoder(reference: str, attention_dropout: float | None = None) -> PreTrainedModel:
    """A pretrained encoder, in single precision.

    Args:
        reference: what `model_paths.resolve` understands.
        attention_dropout: in place of the encoder's own, for training.

    Raises:
        ValueError: weights are missing, unexpected or of another shape; the message names them.
    """
    config = read_config(resolve(reference))
    if attention_dropout is not None:
        # BERT and most others; DistilBERT and ModernBERT have the second name.
        long = hasattr(config, "attention_probs_dropout_prob")
        setattr(config, "attention_probs_dropout_prob" if long else "attention_dropout", attention_dropout)
    return load_pretrained(AutoModel, resolve(reference), ENCODER_BODY, config=config, dtype=torch.float32)


def save_tagger(
    model: DualPathTagger,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    base_encoder: str | None = None,
    recipe: TaggerTraining | None = None,
) -> None:
    """Write a model directory.

    A LoRA adapter on the encoder is merged into it; on a base encoder, it is kept apart, in `adapter/`.

    Args:
        model: what to save.
        tokenizer: its tokenizer.
        out: the directory, made if need be.
        base_encoder: a reference that `model_paths.resolve` understands: only the weights that differ from it are
            written, in half precision, and neither the tokenizer nor the encoder's configuration. None means that
            everything is written as it is, and the directory needs nothing else.
        recipe: how the model was trained, to be stored with it.
    """
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / _ADAPTER, ignore_errors=True)  # an earlier tagger's
    config = TaggerFileConfig(
        labels=model.labels.name,
        alpha=model.alpha,
        beta=model.beta,
        dropout=model.dropout.p,
        design=model.design,
        recipe=recipe.model_dump(exclude_defaults=True) if recipe else None,
        base_encoder=base_encoder,
    )
    if hasattr(model.encoder, "merge_and_unload"):  # a LoRA adapter
        model = copy.deepcopy(model)
        model.encoder = _without_adapter(model.encoder, out, base_encoder)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if base_encoder is None:
        config.encoder = model.encoder.config.to_dict()
        tokenizer.save_pretrained(out)
    else:
        base = _encoder_weights(load_encoder(base_encoder))
        config.from_base = sorted(name for name in weights if name in base and torch.equal(weights[name], base[name]))
        weights = {name: tensor.half() for name, tensor in weights.items() if name not in config.from_base}
    save_file(weights, out / _WEIGHTS, metadata={"format": "pt"})
    (out / _CONFIG).write_text(config.model_dump_json(indent=2, exclude_none=True) + "\n", encoding="utf-8")


def load_tagger(path: Path) -> tuple[DualPathTagger, PreTrainedTokenizerBase]:
    """A tagger and its tokenizer from a model directory, ready to predict.

    Raises:
        FileNotFoundError: a file of the directory, or its base encoder, is not there.
        ValueError: `config.json` is not a tagger's, weights are missing, unexpected or of another shape, or the
            tokenizer is not the encoder's.
    """
    config = _read_config(path)
    weights = {name: tensor.float() for name, tensor in load_file(path / _WEIGHTS).items()}
    if config.base_encoder is None:
        encoder = AutoModel.from_config(AutoConfig.for_model(**config.encoder or {}), dtype=torch.float32)
    else:
        encoder = load_encoder(config.base_encoder)
        base = _encoder_weights(encoder)
        weights.update({name: base[name] for name in config.from_base if name in base})
    labels = LABEL_SETS[config.labels]
    model = DualPathTagger(encoder, labels, config.alpha, config.beta, config.dropout, design=config.design)
    load_strictly(model, weights, path / _WEIGHTS)
    if (path / _ADAPTER).is_dir():
        model.encoder = load_adapters(model.encoder, {"default": path / _ADAPTER}).merge_and_unload()
    folder = path if config.base_encoder is None else resolve(config.base_encoder)
    return model.eval(), fit(load_tokenizer(folder), encoder, folder)


def _without_adapter(encoder: Any, out: Path, base_encoder: str | None) -> PreTrainedModel:
    """The encoder with its adapter merged, or as it was before it; the adapter is then in a folder of its own."""
    if base_encoder is None:
        return encoder.merge_and_unload()
    encoder.peft_config["default"].base_model_name_or_path = base_encoder  # not where it happens to be here
    encoder.save_pretrained(out / _ADAPTER, save_embedding_layers=False)
    (out / _ADAPTER / "README.md").unlink()  # an empty form
    return encoder.unload()


def _read_config(path: Path) -> TaggerFileConfig:
    if not (path / _CONFIG).is_file():
        raise FileNotFoundError(f"{path} is not a tagger: it has no {_CONFIG}")
    text = (path / _CONFIG).read_text(encoding="utf-8")
    if '"dual-path-tagger"' not in text:  # an encoder, or another model, each of whose keys would be a fault
        raise ValueError(f"{path / _CONFIG} is not a tagger's; `gem-ray train tagger` makes one on an encoder")
    try:
        config = TaggerFileConfig.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"{path / _CONFIG} is not a tagger's: {faults_of(error)}") from None
    if (config.encoder is None) == (config.base_encoder is None):
        raise ValueError(f"{path / _CONFIG} must have either `encoder` or `base_encoder`")
    return config


def _encoder_weights(encoder: PreTrainedModel) -> dict[str, Tensor]:
    return {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
