"""How many positions a reranker gets for prompt, image and answer, before its weights are loaded."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoProcessor

from gem_ray.config import Config, ConfigError
from gem_ray.model_kind import read_config
from gem_ray.rerank.encoding import count_image_tokens, largest_image, positions


def model_positions(folder: Path, config: Config) -> int:
    """Positions by `reranker.max_model_len`, or by what the model's own processor makes of the largest image.

    Args:
        folder: the checkpoint; its weights are not read.
        config: the section `reranker`, and `image.max_side`.

    Raises:
        ConfigError: the engine cannot load such a model, or the configured length leaves no room for a question beside
            an image.
    """
    settings, side = config.reranker, config.image.max_side
    if settings.engine == "text":  # which sees no image
        return settings.positions(0)
    model = read_config(folder)
    if (image_token := _image_token(model)) is None:
        raise ConfigError(
            f"reranker.model: {settings.model} is a {model.model_type} model, which is not asked about images; name a "
            "vision–language model, or set reranker.engine=text for a language model"
        )
    if settings.engine == "transformers" and model.model_type != "llava":
        raise ConfigError(
            f"reranker.model: {settings.model} is a {model.model_type} model; set reranker.engine=vllm for it"
        )
    if model.model_type == "llava":
        tokens = count_image_tokens(model)
    else:
        tokens = largest_image(AutoProcessor.from_pretrained(folder), image_token, side)
    return positions(settings, tokens, side)


def _image_token(model: object) -> int | None:
    """LLaVA's configurations and Qwen's have it under different names; `None`: the model sees no images."""
    found = getattr(model, "image_token_id", None)
    return getattr(model, "image_token_index", None) if found is None else found
