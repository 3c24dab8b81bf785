"""Decide uncertain entities by an engine of your own: here, how often a category occurs in your field.

python examples/custom_reranker.py posts/
"""

import sys
from collections import Counter

from gem_ray import Annotator, load_config, read_posts
from gem_ray.annotator import GuardedStage, build_stage
from gem_ray.rerank.engine import Choice, Mode, Request, RequestError
from gem_ray.rerank.prompts import PromptFormat
from gem_ray.rerank.reranker import Reranker
from gem_ray.stages import active_stages
from gem_ray.taxonomy import LABEL_SETS


class PriorEngine:
    """Weighs the tagger's probabilities by a prior; a model would look at `request.image` and `request.prompt`."""

    prompt_format = PromptFormat()

    def __init__(self, prior: dict[str, float]) -> None:
        self.prior = prior
        self.counts: Counter[str] = Counter()

    def choose(self, requests: list[Request], mode: Mode, adapter: str | None = None) -> list[Choice | RequestError]:
        return [self._choose(request) for request in requests]

    def _choose(self, request: Request) -> Choice:
        hinted = zip(request.choices, request.hints, strict=True)
        weights = [hint * self.prior.get(choice, 1.0) for choice, hint in hinted]
        shares = tuple(weight / sum(weights) for weight in weights)
        return Choice(shares.index(max(shares)), max(shares), shares)


config = load_config("nano")
reranker = Reranker(PriorEngine({"company": 5.0}), LABEL_SETS[config.labels])
stages = [
    GuardedStage("rerank", reranker) if spec.name == "rerank" else build_stage(spec, config)
    for spec in active_stages(config)
]
for post in Annotator(stages).annotate(list(read_posts(sys.argv[1], limit=32))):
    for entity in (entity for entity in post.entities if entity.reranked):
        print(f"{entity.text}: {entity.candidates[0].fine} -> {entity.fine}, {entity.score:.2f}")
