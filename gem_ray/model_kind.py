"""What a model's directory must be before its weights are looked at: of the architecture, with a whole tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)


def read_config(folder: Path) -> PreTrainedConfig:
    """A checkpoint's `config.json`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: transformers does not know such a model.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json, which every checkpoint of transformers has")
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)  # else it would ask at the terminal


def config_for(model_class: Any, folder: Path) -> PreTrainedConfig:
    """A checkpoint's configuration, if a class of transformers can read its weights.

    A class takes any configuration for its own, and says of it that an attribute is missing, or nothing.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is another architecture's, or its weights are quantized.
    """
    config = read_config(folder)
    wanted = getattr(model_class, "config_class", None)  # the automatic classes have none
    # SAM 3 is published as a tracker with the detector in it.
    if wanted and not isinstance(config, wanted) and not isinstance(getattr(config, "detector_config", None), wanted):
        raise ValueError(f"{folder} is a {config.model_type} model; name one of the architecture {wanted.model_type}")
    if quantized := getattr(config, "quantization_config", None):
        method = quantized.get("quant_method", "") if isinstance(quantized, dict) else quantized.quant_method
        raise ValueError(f"{folder} is quantized ({method}); name the checkpoint that it was made from")
    return config


def language_model_class(folder: Path) -> Any:
    """The class of transformers that continues texts with a checkpoint.

    Raises:
        FileNotFoundError: it has no configuration.
        ValueError: there is no such class.
    """
    config = read_config(folder)
    refuse_encoder(config, folder)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{folder} is a {config.model_type} model, not a language model that reads text alone")
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def refuse_encoder(config: PreTrainedConfig, folder: Path) -> None:
    """Refuse a BERT or the like: its weights fit a language model's class, but it was not trained to continue texts.

    Raises:
        ValueError: it is one.
    """
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise ValueError(f"{folder} is a {config.model_type} model, an encoder; name a model that writes text")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that reads text, perhaps beside images.

    Raises:
        OSError: files are missing.
        ValueError: it cannot be the model's.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    require_words(tokenizer, read_config(folder).get_text_config().vocab_size, folder)
    return tokenizer


def require_words(tokenizer: PreTrainedTokenizerBase, rows: int, folder: Path) -> None:
    """Refuse a tokenizer that cannot be the model's.

    Where the files with its words are missing, transformers makes one of the special tokens alone, which takes every
    word for the unknown one.

    Args:
        tokenizer: as it was loaded.
        rows: of the model's word embeddings; some are spare in published models.
        folder: where it was loaded from.

    Raises:
        ValueError: it has less than half as many tokens, or more.
    """
    if len(tokenizer) < rows / 2 or tokenizer.vocab_size > rows:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer):,} tokens, and the model {rows:,} word embeddings; put the "
            "model's own tokenizer.json there, or the vocabulary that its tokenizer is made from"
        )
