"""The posts of a run as a plan sees them: measured on a sample, taken from an earlier run, or stated with a source."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gem_ray.stages import LOAD_IMAGE

if TYPE_CHECKING:
    from gem_ray.config import Config, StagePool
    from gem_ray.pools import Pool

USUAL_CANDIDATES = 5  # with which prompts were measured
SEEN_SHARE = 0.402  # of the 11,779 gold entities in FMNERG's training tweets
TWEET_TOKENS = 22  # of 16 words, 4 characters to a subword


@dataclass(frozen=True)
class Workload:
    """An average post. Entities and boxes: gold of the 7,000 training tweets of FMNERG (Wang et al. 2023).

    Attributes:
        entities: mentions in a post.
        with_entities: share of posts that have any.
        hard: hard mentions in a post: of the embedded tagger at γ = 0.2, on 600 of FMNERG's dev tweets.
        with_hard: share of posts that have any; likewise.
        with_images: share of posts with an image.
        s3_images: share of posts whose image is an object in S3; assumed to be in the input's files instead.
        captioned, explained: share of posts that bring a caption, and knowledge; assumed to be none.
        with_boxes: share of posts with an entity that is seen.
        with_other_boxes: the same, persons aside, for whom the text prompt goes first.
        person_prompts: categories of seen persons in a post.
        megapixels: of an image, before it is reduced; assumed.
        text_tokens: subwords of a tweet and of its knowledge, which has 570 characters there.
        caption_tokens: assumed; a batch goes on until its longest caption is done.
        prompt_tokens: of the reranker's prompt without the image, with a tweet of 16 words and five candidates;
            estimated.
        query_tokens: of the matcher's sentence; estimated.
        examples_tokens: of the explainer's worked examples, which vLLM reads once and keeps; estimated.
        question_tokens: of its question, a tweet and a caption; estimated.
        answer_tokens: of its answer: 570 characters, as above.
        entropies: quantiles of the entities' entropies in nats, evenly spaced; empty: not known.
        gamma: at which `hard` was counted, where the entropies are only shaped like those of tweets; else `None`.
        has_budget: whether as many entities are hard as the configuration's budget lets through.
        source: where these figures are from.
        is_measured: on the posts of the run, or of one like it.
        assumed: names of figures that were not, although the others were.
    """

    entities: float = 1.68
    with_entities: float = 0.95
    hard: float = 1.35
    with_hard: float = 0.85
    with_images: float = 1.0
    s3_images: float = 0.0
    captioned: float = 0.0
    explained: float = 0.0
    with_boxes: float = 0.56
    with_other_boxes: float = 0.19
    person_prompts: float = 0.42
    megapixels: float = 0.8
    text_tokens: int = 165
    caption_tokens: int = 15
    prompt_tokens: int = 130
    query_tokens: int = 16
    examples_tokens: int = 800
    question_tokens: int = 60
    answer_tokens: int = 143
    entropies: tuple[float, ...] = ()
    gamma: float | None = None
    has_budget: bool = False
    source: str = "tweets of FMNERG, each with an image"
    is_measured: bool = False
    assumed: tuple[str, ...] = ()

    @property
    def judged(self) -> float:
        """Share of posts whose image is looked at."""
        return self.with_entities * self.with_images

    @property
    def hard_share(self) -> float:
        """Of the entities."""
        return self.hard / self.entities if self.entities else 0.0

    def under(self, config: Config) -> Workload:
        """The same posts with as many hard entities as γ or the budget lets through, if their entropies are known."""
        share, work = self.hard_share, self
        if config.filter.max_share is not None:
            share, work = config.filter.max_share, replace(self, has_budget=True)
        elif self.gamma == config.filter.gamma:
            return self
        elif self.entropies and config.routing.threshold is None:
            work = self if self.gamma is None else replace(self, assumed=(*self.assumed, "hard"), gamma=None)
            places = np.linspace(0, 1, len(self.entropies))
            share = 1 - float(np.interp(config.filter.gamma, self.entropies, places, left=0.0, right=1.0))
        return work.with_hard_share(share)

    def with_hard_share(self, share: float) -> Workload:
        """The same posts with another share of hard entities, as if each were hard by chance."""
        if not (self.entities and self.with_entities):
            return self
        each = self.entities / self.with_entities
        expected = 1 - (1 - min(1.0, self.hard_share)) ** each
        scale = (1 - (1 - share) ** each) / expected if expected else 1.0
        most = min(self.with_entities, share * self.entities)
        with_hard = self.with_hard * scale if self.with_hard else self.with_entities * (1 - (1 - share) ** each)
        return replace(self, hard=share * self.entities, with_hard=min(most, with_hard))

    def with_seen_share(self, share: float = SEEN_SHARE) -> Workload:
        """The same posts with that share of their entities seen: none of a post without an image."""
        usual, most = TWEETS, self.judged
        scale = self.entities / usual.entities * self.with_images * share / SEEN_SHARE
        return replace(
            self,
            with_boxes=min(most, usual.with_boxes * scale),
            with_other_boxes=min(most, usual.with_other_boxes * scale),
            person_prompts=usual.person_prompts * scale,
        )

    def with_texts(self, tokens: int, knowledge_tokens: int) -> Workload:
        """The same posts with longer or shorter texts, of which every prompt holds one."""
        more = tokens - TWEET_TOKENS
        return replace(
            self,
            text_tokens=tokens + knowledge_tokens,
            prompt_tokens=self.prompt_tokens + more,
            question_tokens=self.question_tokens + more,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self) | {"hard_share": self.hard_share}


# Of the 971 entities that the embedded tagger finds in 600 of FMNERG's dev tweets, from least to largest.
# fmt: off
_ENTROPIES = (
    0.0044, 0.0403, 0.0714, 0.1212, 0.178, 0.2405, 0.3243, 0.4166, 0.5278, 0.6416, 0.7498,
    0.8375, 0.939, 1.0793, 1.2168, 1.3467, 1.5435, 1.7285, 1.9478, 2.2021, 3.0654,
)
# fmt: on
TWEETS = Workload(entropies=_ENTROPIES)


def entropies_with(hard_share: float, gamma: float) -> tuple[float, ...]:
    """Quantiles of entropies of which a share is above γ, and above every other value the share of tweets' that is
    larger or smaller by the same factor; of tweets, where nothing is above γ.
    """
    places = np.linspace(0, 1, len(_ENTROPIES))
    above = 1 - float(np.interp(gamma, _ENTROPIES, places, left=0.0))
    if not above:
        return _ENTROPIES
    factor = max(hard_share / above, 1e-9)
    return tuple(float(np.interp(1 - (1 - place) / factor, places, _ENTROPIES, left=0.0)) for place in places)


def _tweets_with(hard_share: float, with_hard: float) -> Workload:
    """Tweets of whose entities another share is hard at γ = 0.2."""
    hard = hard_share * TWEETS.entities
    return replace(TWEETS, hard=hard, with_hard=with_hard, entropies=entropies_with(hard_share, 0.2))


# Where nothing is measured, the truth may lie between these: generated posts had 37 % of hard entities at γ = 0.2,
# tweets 81 %; and half of the posts may have no image, which is assumed.
LIGHT = replace(
    _tweets_with(0.37, with_hard=0.5),
    with_images=0.5,
    with_boxes=0.5 * TWEETS.with_boxes,
    with_other_boxes=0.5 * TWEETS.with_other_boxes,
    person_prompts=0.5 * TWEETS.person_prompts,
)
HEAVY = _tweets_with(0.81, with_hard=0.86)


def loaded_share(pool: Pool[StagePool], work: Workload) -> float:
    """Share of posts whose image a pool loads, if it has one: with any entity where it judges images, else with a hard
    one.
    """
    if all(spec.name != LOAD_IMAGE for spec in pool.stages):
        return 0.0
    return work.with_entities if pool.loads_all else work.with_hard


def decoded_share(pool: Pool[StagePool], work: Workload, captions: bool) -> float:
    """Share of posts whose image a pool decodes, if it has one: where it makes captions, of all that bring none."""
    captioned = captions and any(spec.name == "knowledge" for spec in pool.stages)
    return max(loaded_share(pool, work), 1 - work.captioned if captioned else 0.0)


def fetched_images(passes: Iterable[Iterable[Pool[StagePool]]], work: Workload, captions: bool) -> float:
    """How often the image of a post is fetched, if it has one: in each pass that looks at it.

    Args:
        passes: the pools of each.
        work: an average post.
        captions: whether the knowledge stage makes them.
    """
    return sum(max(decoded_share(pool, work, captions) for pool in pools) for pools in passes)
