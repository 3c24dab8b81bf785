"""Whether models are whole, by the names and shapes of their weights, before they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from gem_ray.config import Config, ConfigError
from gem_ray.model_paths import resolve
from gem_ray.model_references import Key, model_keys, reference_at
from gem_ray.scope import load_scopes
from gem_ray.stages import StageSpec, active_stages


def stages_to_check(config: Config) -> list[StageSpec]:
    """The active stages that may be refused: models that do not come with gem-ray, endpoints, a reranker's length."""
    return [
        spec
        for spec in active_stages(config)
        if not all(_is_embedded(config, key) for key in model_keys([spec], config).values())
        or spec.hosted(config)
        or (spec.name == "rerank" and config.reranker.max_model_len is not None)
    ]


def _is_embedded(config: Config, key: Key) -> bool:
    return str(reference_at(config, key)).startswith("nano:")


def check_models(stages: Sequence[StageSpec], config: Config) -> None:
    """Check every model that stages load, and ask every endpoint one question; fetches what is not on this machine.

    Raises:
        FileNotFoundError: a model is not there.
        ConfigError: the reranker's engine cannot load such a model, or `reranker.max_model_len` leaves no room beside
            an image.
        ValueError: weights are missing, unexpected or of another shape, a `scope.json` is none, or an endpoint refuses
            its key, its model or a setting, or gives no answer; the message names them.
    """
    for role, key in model_keys(stages, config).items():
        if role in CHECKS:
            reference = reference_at(config, key)
            assert reference is not None  # `model_keys` leaves out what is not named
            try:
                CHECKS[role](resolve(reference), config)
            except ConfigError:
                raise
            except Exception as error:  # libraries raise anything about files that are not what they expect
                raise ValueError(f"{'.'.join(key)} is {reference}: {_sentence(error)}") from error
    for spec in stages:
        load_scopes(spec.name, config)
        for role in spec.hosted(config):
            _check_endpoint(role, config)


def _check_endpoint(role: str, config: Config) -> None:
    from gem_ray.chat import ChatError

    key, check = ENDPOINT_CHECKS[role]
    try:
        check(config)
    except ChatError as error:
        raise ValueError(f"{key}: {error}") from error


def _sentence(error: Exception) -> str:
    """What an error says in one line; libraries add lists of all that they know."""
    first = (str(error).strip().splitlines() or [""])[0]
    return first if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {first}"


def _tagger(folder: Path, config: Config) -> None:
    from gem_ray.confidence import Confidence
    from gem_ray.tagger.tagger import load_parts

    Confidence.from_config(config)
    load_parts(config)


def _captioner(folder: Path, config: Config) -> None:
    from gem_ray.knowledge.captioner import check_captioner

    check_captioner(folder)


def _language_model(folder: Path, config: Config) -> None:
    from gem_ray.loading import check_declared
    from gem_ray.model_kind import load_tokenizer, read_config, refuse_encoder

    refuse_encoder(read_config(folder), folder)
    check_declared(folder)
    if not load_tokenizer(folder).chat_template:
        raise ValueError("it has no chat template; name a model tuned to instructions")


def _reranker(folder: Path, config: Config) -> None:
    from gem_ray.loading import check_adapters, check_declared, check_pretrained
    from gem_ray.model_kind import language_model_class, load_tokenizer, read_config
    from gem_ray.rerank.llava import check_llava, is_merged, refuse_unserved
    from gem_ray.rerank.model_positions import model_positions
    from gem_ray.rerank.prompts import PromptFormat
    from gem_ray.rerank.reranker import load_calibration

    settings = config.reranker
    model_positions(folder, config)
    if settings.engine == "transformers":
        model = check_llava(folder)
    else:
        load_tokenizer(folder)
        is_text = settings.engine == "text"
        model = check_pretrained(language_model_class(folder), folder) if is_text else check_declared(folder)
    if settings.engine != "text":
        PromptFormat.of_model(folder, settings.template)
    if settings.decision == "calibrated":
        load_calibration(config)
    adapters = {name: resolve(where) for name, where in settings.adapter_references.items()}
    if model is not None:
        check_adapters(model, adapters)
    if settings.engine == "vllm" and not is_merged(settings, read_config(folder).model_type):
        refuse_unserved(settings, adapters.values())


def _matcher(folder: Path, config: Config) -> None:
    from gem_ray.grounding.grounder import check_matcher

    check_matcher(config.grounder.matcher, folder)


def _sam(folder: Path, config: Config) -> None:
    from gem_ray.grounding.sam import check_sam

    check_sam(folder)


def _text_segmenter(folder: Path, config: Config) -> None:
    from gem_ray.grounding.text_segmenter import check_text_segmenter

    assert config.grounder.boxes.text is not None  # it is what names the folder
    check_text_segmenter(config.grounder.boxes.text.kind, folder)


def _explainer_endpoint(config: Config) -> None:
    from gem_ray.chat import ChatClient, NoAnswerError
    from gem_ray.knowledge.prompts import KnowledgeQuery, chat_messages

    assert config.knowledge.explainer is not None  # it is what is hosted
    client = ChatClient(config.knowledge.explainer)
    try:
        client.complete(chat_messages(KnowledgeQuery("Good morning, Chicago")))
    except NoAnswerError:
        if config.knowledge.cache is None:  # which may hold all answers
            raise
    finally:
        client.close()


def _reranker_endpoint(config: Config) -> None:
    from gem_ray.rerank.engine_endpoint import EndpointEngine

    EndpointEngine.from_config(config).check()


ENDPOINT_CHECKS: dict[str, tuple[str, Callable[[Config], None]]] = {
    "explainer": ("knowledge.explainer", _explainer_endpoint),
    "reranker": ("reranker.endpoint", _reranker_endpoint),
}

CHECKS: dict[str, Callable[[Path, Config], None]] = {
    "captioner": _captioner,
    "explainer": _language_model,
    "tagger": _tagger,
    "reranker": _reranker,
    "matcher": _matcher,
    "sam": _sam,
    "text_segmenter": _text_segmenter,
}
