"""The stages of the table composed in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from gem_ray.clock import BusyClock
from gem_ray.confidence import Confidence
from gem_ray.data.prepare import check_fields
from gem_ray.model_references import describe_models, load_unchanged
from gem_ray.process_start import quick_start, refuse_fork
from gem_ray.records import Post, ProblemKind
from gem_ray.rerank.uncertainty import UncertaintyFilter
from gem_ray.stages import LOAD_IMAGE, StageSpec, active_stages

if TYPE_CHECKING:
    from gem_ray.config import Config
    from gem_ray.pools import Pool
    from gem_ray.tagger.tagger import Tagger

Stage = Callable[[list[Post]], list[Post]]

# Exceptions, by class name, that say that the process can do no more work, whatever the post: the run must stop rather
# than mark every later post as failed. Named, not imported: they belong to vLLM and to torch.
_FATAL = ("EngineDeadError", "EngineDiedError", "AcceleratorError")
_MESSAGE_CHARS = 300


class GuardedStage:
    """A stage whose failures stay with the posts that cause them, and whose time is known.

    When the stage raises on a batch, or gives numbers that are not finite, its posts are put back as they were and
    tried one by one; those that fail alone are left as they were, with a `stage_failed` problem.

    Threads may call it at once if the stage allows it.
    """

    def __init__(self, name: str, stage: Stage) -> None:
        self.name = name
        self._stage = stage
        self._clock = BusyClock()

    @property
    def seconds(self) -> float:
        """Wall time so far in which posts were inside the stage; overlapping calls count once."""
        return self._clock.seconds

    @property
    def trouble(self) -> str | None:
        """What the stage is waiting for and asks again, in words; None if nothing."""
        return getattr(self._stage, "trouble", None)

    def reconfigure(self, config: Config) -> None:
        """Tell the stage settings that may change while it runs."""
        self._stage.reconfigure(config)  # type: ignore[attr-defined]

    @property
    def counts(self) -> dict[str, int]:
        """What the stage itself has counted so far."""
        return dict(getattr(self._stage, "counts", {}))

    def __call__(self, posts: list[Post]) -> list[Post]:
        """Run the stage in place; the same posts in the same order."""
        with self._clock.inside():
            self._run(posts)
        return posts

    def _run(self, posts: list[Post]) -> None:
        before = [_snapshot(post) for post in posts]
        try:
            self._stage(posts)
            _check_numbers(posts)
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


def _check_numbers(posts: list[Post]) -> None:
    if not all(entity.is_finite for post in posts for entity in post.entities):
        raise ValueError("the model gave a number that is not finite")


def _is_fatal(error: Exception) -> bool:
    return any(kind.__name__ in _FATAL for kind in type(error).__mro__)


def _sentence(error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"[:_MESSAGE_CHARS]


def build_stage(
    spec: StageSpec, config: Config, models: Mapping[str, str] | None = None, pool: Pool[Any] | None = None
) -> GuardedStage:
    """Load a stage.

    Args:
        spec: which.
        config: names its models.
        models: what they must be, as `models_of` gives it; default: whatever is there.
        pool: in which it runs, whose images alone are loaded; `None` if all stages run in this process.

    Raises:
        FileNotFoundError: one of its models is not there.
        ModelChangedError: one of its models is not what it must be.
        RuntimeError: see `refuse_fork`.
    """
    refuse_fork()
    with quick_start():
        stage = spec.build(config) if models is None else load_unchanged([spec], config, models, spec.build)
    if pool is not None and spec.reads == "encoded":
        stage.keeps_encoded = bool(pool.later_readers)  # type: ignore[attr-defined]
    if pool is not None and spec.name == LOAD_IMAGE:
        stage.wants = lambda post: pool.loads(post, config)  # type: ignore[attr-defined]
    return GuardedStage(spec.name, stage)


class TagStage:
    """Stage TAG: fills `entities` (§3.2), each with its score, its candidates, whether it is hard (§3.3.1), and how
    sure it is.

    Args:
        tagger: finds the entities.
        uncertainty: judges their categories.
        confidence: judges them as a whole.
    """

    def __init__(self, tagger: Tagger, uncertainty: UncertaintyFilter, confidence: Confidence) -> None:
        self._tagger = tagger
        self._uncertainty = uncertainty
        self._confidence = confidence

    @classmethod
    def from_config(cls, config: Config) -> TagStage:
        """Load the tagger.

        Raises:
            FileNotFoundError: there is no such model.
            ConfigError: see `Confidence.from_config`.
        """
        from gem_ray.tagger.tagger import Tagger  # with torch

        confidence = Confidence.from_config(config)
        return cls(Tagger.from_config(config), UncertaintyFilter.from_config(config), confidence)

    def reconfigure(self, config: Config) -> None:
        """Take over γ and K."""
        self._uncertainty = UncertaintyFilter.from_config(config)

    def __call__(self, posts: list[Post]) -> list[Post]:
        """Annotate posts in place."""
        return self._confidence(self._uncertainty(self._tagger(posts)))


class Annotator:
    """The whole system in one process. Safe to use from several threads, which take turns."""

    def __init__(self, stages: Sequence[GuardedStage]) -> None:
        self.stages = list(stages)
        self._turn = threading.Lock()

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied."""
        raise TypeError("an Annotator stays in its process: send the Config, and make one there from it")

    @classmethod
    def from_config(cls, config: Config) -> Annotator:
        """Load every active stage.

        Raises:
            ConfigError: what was assigned to the configuration does not go together.
            FileNotFoundError: a model is not there.
            ConfigError: `filter.max_share` is set, which only a run can keep; or a threshold of `routing` or
                `acceptance` was measured with another tagger.
            ValueError: the files of a model are not those of its architecture.
            RuntimeError: see `refuse_fork`.
        """
        config = config.checked()
        return cls([build_stage(spec, config) for spec in active_stages(config)])

    def annotate(self, posts: Iterable[Post]) -> list[Post]:
        """Annotate posts in place.

        Args:
            posts: of a reader, or made by hand. A wrong field is the post's problem, as in a row of an input.

        Returns:
            The same posts, in the same order.

        Raises:
            TypeError: something else than posts.
            RuntimeError: see `refuse_fork`.
        """
        refuse_fork()
        if isinstance(posts, Post):
            raise TypeError("annotate takes a list of posts: annotate([post])")
        posts = list(posts)
        for post in posts:
            if not isinstance(post, Post):
                raise TypeError(f"annotate takes posts, not {type(post).__name__}: Post('some-id', 'some text')")
            check_fields(post)
        with self._turn:
            for stage in self.stages:
                stage(posts)
        return posts


def models_of(config: Config, stages: Sequence[StageSpec] | None = None) -> dict[str, str]:
    """What makes the output: role -> `model_paths.describe` of every model that a configuration uses.

    No weights are fetched. A model behind an endpoint has no files: its name stands alone.

    Args:
        config: names the models.
        stages: only the models of these; default: all active stages.

    Raises:
        FileNotFoundError: a model is not there.
    """
    stages = active_stages(config) if stages is None else stages
    names = describe_models(stages, config)
    for spec in stages:
        names |= spec.hosted(config)
    return names
