"""Whether models are whole, by the names and shapes of their weights, before they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from gem_ray.config import Config
from gem_ray.model_paths import resolve
from gem_ray.model_references import Key, model_keys, reference_at
from gem_ray.scope import load_scopes
from gem_ray.stages import StageSpec, active_stages


def stages_to_check(config: Config) -> list[StageSpec]:
    """The active stages that may refuse their models: those that do not come with gem-ray, or a reranker's length."""
    return [
        spec
        for spec in active_stages(config)
        if not all(_is_embedded(config, key) for key in model_keys([spec], config).values())
        or (spec.name == "rerank" and config.reranker.max_model_len is not None)
    ]


def _is_embedded(config: Config, key: Key) -> bool:
    return str(reference_at(config, key)).startswith("nano:")


def check_models(stages: Sequence[StageSpec], config: Config) -> None:
    """Check every model that stages load; fetches what is not on this machine.

    Raises:
        FileNotFoundError: a model is not there.
        ConfigError: the reranker's engine cannot load such a model, or `reranker.max_model_len` leaves no room beside
            an image.
        ValueError: weights are missing, unexpected or of another shape, or a `scope.json` is none; the message names
            them.
    """
    for role, key in model_keys(stages, config).items():
        if role in CHECKS:
            reference = reference_at(config, key)
            assert reference is not None  # `model_keys` leaves out what is not named
            CHECKS[role](resolve(reference), config)
    for spec in stages:
        load_scopes(spec.name, config)


def _tagger(folder: Path, config: Config) -> None:
    from gem_ray.tagger.checkpoint import load_tagger

    load_tagger(folder)


def _captioner(folder: Path, config: Config) -> None:
    from transformers import Blip2ForConditionalGeneration

    from gem_ray.loading import check_pretrained

    check_pretrained(Blip2ForConditionalGeneration, folder)


def _language_model(folder: Path, config: Config) -> None:
    from gem_ray.loading import check_declared

    check_declared(folder)


def _reranker(folder: Path, config: Config) -> None:
    from gem_ray.loading import check_declared
    from gem_ray.rerank.model_positions import model_positions

    model_positions(folder, config)
    check_declared(folder, {name: resolve(where) for name, where in config.reranker.adapter_references.items()})


def _matcher(folder: Path, config: Config) -> None:
    from gem_ray.grounding.grounder import check_matcher

    check_matcher(config.grounder.matcher.kind, folder)


def _sam(folder: Path, config: Config) -> None:
    from gem_ray.grounding.sam import check_sam

    check_sam(folder)


def _text_segmenter(folder: Path, config: Config) -> None:
    from gem_ray.grounding.text_segmenter import check_text_segmenter

    assert config.grounder.boxes.text is not None  # it is what names the folder
    check_text_segmenter(config.grounder.boxes.text.kind, folder)


CHECKS: dict[str, Callable[[Path, Config], None]] = {
    "captioner": _captioner,
    "explainer": _language_model,
    "tagger": _tagger,
    "reranker": _reranker,
    "matcher": _matcher,
    "sam": _sam,
    "text_segmenter": _text_segmenter,
}
