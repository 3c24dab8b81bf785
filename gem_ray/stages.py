"""The table of stages: what each is, once, for everything that runs, plans, serves or counts them.

A new stage is one module with a class that turns posts into posts, and one entry here: docs/new-stage.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from gem_ray.config import Config
    from gem_ray.records import Post

    Stage = Callable[[list[Post]], list[Post]]

Key = tuple[str, ...]
"""The path of a leaf of the configuration."""
Reads = Literal["encoded", "pixels"]


def _always(config: Config) -> bool:
    return True


def _no_models(config: Config) -> dict[str, Key]:
    return {}


def _nobody(config: Config) -> dict[str, str]:
    return {}


def _not_rejected(post: Post, config: Config) -> bool:
    return not post.is_rejected


def _one(config: Config) -> int:
    return 1


@dataclass(frozen=True)
class StageSpec:
    """A stage. What a function takes and gives back is said by its type; all are called with the whole configuration.

    Attributes:
        name: as in `problems`, `stage_seconds` and metrics.
        component: `module:Class` with a `from_config`, imported when it is built, so that a process loads only the
            libraries of its own stages; or a function of the configuration.
        is_active: whether a configuration runs it.
        has_model: false for a cheap stage, which shares the pool of whichever stage comes next.
        is_text: a post that fails here leaves with nothing to annotate: it is rejected, not degraded.
        reads: which form of the image it looks at besides the text.
        models: where the configuration names the models with files that it loads: role -> key.
        hosted: models behind an endpoint, which have no files: role -> name.
        needs: whether there is something to do for a post, as the stages before it left it.
        overlapping: batches that one process works on at once: only vLLM's engine gains from more than one.
        settings: what may change online without a restart: name -> key. Such a stage has a `reconfigure(config)`.
    """

    name: str
    component: str | Callable[[Config], Stage]
    is_active: Callable[[Config], bool] = _always
    has_model: bool = True
    is_text: bool = False
    reads: Reads | None = None
    models: Callable[[Config], dict[str, Key]] = _no_models
    hosted: Callable[[Config], dict[str, str]] = _nobody
    needs: Callable[[Post, Config], bool] = _not_rejected
    overlapping: Callable[[Config], int] = _one
    settings: dict[str, Key] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def build(self, config: Config) -> Stage:
        """Load the component."""
        if callable(self.component):
            return self.component(config)
        module, _, name = self.component.partition(":")
        stage: Stage = getattr(import_module(module), name).from_config(config)
        return stage


def find_stage(name: str) -> StageSpec:
    """A stage of the table.

    Raises:
        KeyError: there is no such stage.
    """
    for spec in STAGES:
        if spec.name == name:
            return spec
    raise KeyError(f"there is no stage {name!r}; the stages are {', '.join(stage_names())}")


def stage_names() -> tuple[str, ...]:
    """Of all stages, in order."""
    return tuple(spec.name for spec in STAGES)


def active_stages(config: Config) -> tuple[StageSpec, ...]:
    """The stages that a configuration runs, in order."""
    return tuple(spec for spec in STAGES if spec.is_active(config))


def tagging_stages(config: Config) -> tuple[StageSpec, ...]:
    """The active stages up to the tagger, without those that load images for what comes later."""
    return tuple(spec for spec in active_stages(config)[: _place("tag", config) + 1] if spec.name != LOAD_IMAGE)


def _place(name: str, config: Config) -> int:
    return [spec.name for spec in active_stages(config)].index(name)


def in_order(names: Iterable[str]) -> list[str]:
    """Names of stages as the table has them, each once."""
    there = set(names)
    return [name for name in stage_names() if name in there]


# What follows are the functions of the table's entries.


def _has_knowledge(config: Config) -> bool:
    return config.knowledge.captioner is not None or config.knowledge.explainer is not None


def _has_reranker(config: Config) -> bool:
    return config.reranker.enabled


def _has_grounder(config: Config) -> bool:
    return config.grounder.enabled


def _lacks_knowledge(post: Post, config: Config) -> bool:
    """False where the post brings what the stage would add."""
    captioned, explained = (bool((given or "").strip()) for given in (post.caption, post.knowledge))
    knowledge = config.knowledge
    wanted = (knowledge.captioner is not None and not captioned) or (knowledge.explainer is not None and not explained)
    return not post.is_rejected and wanted


def _is_grounded(post: Post, config: Config) -> bool:
    return not post.is_rejected and bool(post.entities) and not post.lacks_image


def _is_hard(post: Post, config: Config) -> bool:
    return _is_grounded(post, config) and any(entity.hard for entity in post.entities)


def _knowledge_models(config: Config) -> dict[str, Key]:
    explainer = config.knowledge.explainer
    in_process = explainer is not None and explainer.engine == "vllm"
    own = {"explainer": ("knowledge", "explainer", "model")} if in_process else {}
    return {"captioner": ("knowledge", "captioner"), **own}


def _hosted_explainer(config: Config) -> dict[str, str]:
    explainer = config.knowledge.explainer
    return {"explainer": explainer.model} if explainer is not None and explainer.engine == "endpoint" else {}


def _tagger_models(config: Config) -> dict[str, Key]:
    return {"tagger": ("tagger", "model")}


def _reranker_models(config: Config) -> dict[str, Key]:
    """The adapters that are loaded beside the one in use are asked for by name, if at all."""
    reranker = config.reranker
    if reranker.engine == "endpoint":
        return {}
    keys: dict[str, Key] = {"reranker": ("reranker", "model")}
    if reranker.adapter is not None:
        named = reranker.adapter in reranker.adapters
        keys["reranker_adapter"] = ("reranker", "adapters", reranker.adapter) if named else ("reranker", "adapter")
    others = {name for name in reranker.adapters if name != reranker.adapter}
    return keys | {f"reranker_adapter_{name}": ("reranker", "adapters", name) for name in sorted(others)}


def _hosted_reranker(config: Config) -> dict[str, str]:
    endpoint = config.reranker.endpoint
    return {"reranker": endpoint.model} if config.reranker.engine == "endpoint" and endpoint is not None else {}


def _reranker_batches(config: Config) -> int:
    return config.reranker.concurrency if config.reranker.engine == "vllm" else 1


def _grounder_models(config: Config) -> dict[str, Key]:
    return {
        "matcher": ("grounder", "matcher", "model"),
        "sam": ("grounder", "boxes", "sam", "model"),
        "text_segmenter": ("grounder", "boxes", "text", "model"),
    }


LOAD_IMAGE = "load_image"
"""The one stage that runs again in every pool that looks at pixels: they leave no process."""

STAGES: list[StageSpec] = [
    StageSpec("prepare", "gem_ray.data.prepare:Preparer", has_model=False, is_text=True),
    StageSpec(
        "knowledge",
        "gem_ray.knowledge.provider:KnowledgeProvider",
        _has_knowledge,
        reads="encoded",
        models=_knowledge_models,
        hosted=_hosted_explainer,
        needs=_lacks_knowledge,
    ),
    StageSpec(
        "tag",
        "gem_ray.annotator:TagStage",
        is_text=True,
        models=_tagger_models,
        settings={"gamma": ("filter", "gamma"), "k": ("filter", "k")},
    ),
    StageSpec(LOAD_IMAGE, "gem_ray.data.images:ImageLoader", has_model=False, reads="encoded", needs=_is_grounded),
    StageSpec(
        "rerank",
        "gem_ray.rerank.reranker:Reranker",
        _has_reranker,
        reads="pixels",
        models=_reranker_models,
        hosted=_hosted_reranker,
        needs=_is_hard,
        overlapping=_reranker_batches,
    ),
    StageSpec(
        "ground",
        "gem_ray.grounding.grounder:Grounder",
        _has_grounder,
        reads="pixels",
        models=_grounder_models,
        needs=_is_grounded,
        settings={"threshold": ("grounder", "matcher", "threshold")},
    ),
]
"""All stages, in the order in which posts go through them."""
