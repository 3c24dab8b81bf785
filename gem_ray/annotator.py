"""The components composed in one process, and the table of stages that the pipeline shares."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from gem_ray.model_references import describe_models, load_unchanged
from gem_ray.records import Post, ProblemKind, StageName

if TYPE_CHECKING:
    from gem_ray.config import Config

Stage = Callable[[list[Post]], list[Post]]

# Exceptions, by class name, that say that the process can do no more work, whatever the post: the run must stop rather
# than mark every later post as failed. Named, not imported: they belong to vLLM and to torch.
_FATAL = ("EngineDeadError", "EngineDiedError", "AcceleratorError")
_MESSAGE_CHARS = 300


class GuardedStage:
    """A stage whose failures stay with the posts that cause them, and whose time is known.

    When the stage raises on a batch, its posts are put back as they were and tried one by one; those that fail alone
    are left as they were, with a `stage_failed` problem.

    Threads may call it at once if the stage allows it.

    Attributes:
        seconds: wall time so far in which posts were inside the stage; overlapping calls count once.
    """

    def __init__(self, name: StageName, stage: Stage) -> None:
        self.name = name
        self.seconds = 0.0
        self._stage = stage
        self._lock = threading.Lock()
        self._inside = 0
        self._since = 0.0

    @property
    def counts(self) -> dict[str, int]:
        """What the stage itself has counted so far."""
        return dict(getattr(self._stage, "counts", {}))

    def __call__(self, posts: list[Post]) -> list[Post]:
        """Run the stage in place; the same posts in the same order."""
        with self._timed():
            self._run(posts)
        return posts

    @contextmanager
    def _timed(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._since = time.perf_counter()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self.seconds += time.perf_counter() - self._since

    def _run(self, posts: list[Post]) -> None:
        before = [_snapshot(post) for post in posts]
        try:
            self._stage(posts)
        except Exception as error:
            if _is_fatal(error):
                raise
            for post, state in zip(posts, before, strict=True):
                vars(post).update(vars(state))
            if len(posts) == 1:
                posts[0].fail(self.name, ProblemKind.STAGE_FAILED, _sentence(error))
                return
            for post in posts:
                self._run([post])


def _snapshot(post: Post) -> Post:
    """A copy that shares only what stages replace and never change: strings, bytes and arrays."""
    return replace(
        post,
        tokens=list(post.tokens),
        entities=[replace(entity, candidates=list(entity.candidates)) for entity in post.entities],
        problems=list(post.problems),
    )


def _is_fatal(error: Exception) -> bool:
    return any(kind.__name__ in _FATAL for kind in type(error).__mro__)


def _sentence(error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"[:_MESSAGE_CHARS]


def active_stages(config: Config) -> tuple[StageName, ...]:
    """The stages that a configuration runs, in order."""
    is_active = {
        StageName.KNOWLEDGE: config.knowledge.captioner is not None or config.knowledge.explainer is not None,
        StageName.RERANK: config.reranker.enabled,
        StageName.GROUND: config.grounder.enabled,
    }
    return tuple(name for name in StageName if is_active.get(name, True))


def build_stage(name: StageName, config: Config, models: Mapping[str, str] | None = None) -> GuardedStage:
    """Load one stage; as `build_component`."""
    return GuardedStage(name, build_component(name, config, models))


def build_component(name: StageName, config: Config, models: Mapping[str, str] | None = None) -> Stage:
    """Load one stage without its guard.

    Args:
        name: which.
        config: names its models.
        models: what they must be, as `models_of` gives it; none: whatever is there.

    Raises:
        FileNotFoundError: one of its models is not there.
        ModelChangedError: one of its models is not what it must be.
    """
    build = _BUILDERS[name]
    return build(config) if models is None else load_unchanged(name, config, models, build)


class Annotator:
    """The whole system in one process."""

    def __init__(self, stages: Sequence[GuardedStage]) -> None:
        self.stages = list(stages)

    @classmethod
    def from_config(cls, config: Config) -> Annotator:
        """Load every active stage.

        Raises:
            FileNotFoundError: a model is not there.
        """
        return cls([build_stage(name, config) for name in active_stages(config)])

    def annotate(self, posts: list[Post]) -> list[Post]:
        """Annotate posts in place.

        Args:
            posts: as `prepare.post_from_row` or a reader gives them.

        Returns:
            The same posts, in the same order.
        """
        for stage in self.stages:
            stage(posts)
        return posts


def models_of(config: Config, stages: Sequence[StageName] | None = None) -> dict[str, str]:
    """What makes the output: role -> `checkpoints.describe` of every model that a configuration uses.

    No weights are fetched. A model behind an endpoint has no files: its name stands alone.

    Args:
        config: names the models.
        stages: only the models of these; none: of all active stages.

    Raises:
        FileNotFoundError: a model is not there.
    """
    names: dict[str, str] = {}
    for stage in stages or active_stages(config):
        names |= describe_models(stage, config)
        names |= _hosted_elsewhere(stage, config)
    return names


def _hosted_elsewhere(stage: StageName, config: Config) -> dict[str, str]:
    explainer, reranker = config.knowledge.explainer, config.reranker
    if stage is StageName.KNOWLEDGE and explainer is not None and explainer.engine == "endpoint":
        return {"explainer": explainer.model}
    if stage is StageName.RERANK and reranker.engine == "endpoint" and reranker.endpoint is not None:
        return {"reranker": reranker.endpoint.model}
    return {}


# The builders import what they build, so that a process loads only the libraries of its own stages.


def _prepare(config: Config) -> Stage:
    from gem_ray.data.prepare import Preparer

    return Preparer.from_config(config)


def _knowledge(config: Config) -> Stage:
    from gem_ray.knowledge.provider import KnowledgeProvider

    return KnowledgeProvider.from_config(config)


def _tag(config: Config) -> Stage:
    from gem_ray.rerank.uncertainty import UncertaintyFilter
    from gem_ray.tagger.tagger import Tagger

    tagger, uncertainty = Tagger.from_config(config), UncertaintyFilter.from_config(config)
    return lambda posts: uncertainty(tagger(posts))


def _load_image(config: Config) -> Stage:
    from gem_ray.data.images import ImageLoader

    return ImageLoader.from_config(config)


def _rerank(config: Config) -> Stage:
    from gem_ray.rerank.reranker import Reranker

    return Reranker.from_config(config)


def _ground(config: Config) -> Stage:
    from gem_ray.grounding.grounder import Grounder

    return Grounder.from_config(config)


_BUILDERS: dict[StageName, Callable[[Config], Stage]] = {
    StageName.PREPARE: _prepare,
    StageName.KNOWLEDGE: _knowledge,
    StageName.TAG: _tag,
    StageName.LOAD_IMAGE: _load_image,
    StageName.RERANK: _rerank,
    StageName.GROUND: _ground,
}
