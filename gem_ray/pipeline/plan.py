"""What runs where, with which batch, and what it will cost; and the refusal of what cannot fit."""

from __future__ import annotations

from gem_ray.annotator import active_stages
from gem_ray.config import Config
from gem_ray.records import StageName

MODEL_STAGES = {StageName.KNOWLEDGE, StageName.TAG, StageName.RERANK, StageName.GROUND}
_LOOK_AT_IMAGES = {StageName.RERANK, StageName.GROUND}


def passes_of(config: Config) -> list[tuple[StageName, ...]]:
    """The active stages of each execution, in order.

    A pass without a model is left out. Images are loaded in every pass that looks at them; in the last one if none
    does, because whether an image can be used is part of a post's status.
    """
    active = active_stages(config)
    listed = config.pipeline.passes or [list(active)]
    passes = [used for stages in listed if (used := {StageName(name) for name in stages} & MODEL_STAGES & {*active})]
    passes[0].add(StageName.PREPARE)
    for stages in [each for each in passes if each & _LOOK_AT_IMAGES] or passes[-1:]:
        stages.add(StageName.LOAD_IMAGE)
    return [tuple(name for name in active if name in stages) for stages in passes]
