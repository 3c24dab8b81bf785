"""Pools of a configuration as they run: the active stages of each, with those that it does not list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Generic, TypeVar

from gem_ray.stages import LOAD_IMAGE, StageSpec, active_stages, stage_names, tagging_stages

if TYPE_CHECKING:
    from gem_ray.config import Config, ReplicaPool, StagePool
    from gem_ray.records import Post

CPUS_FOR_TASKS = 1
"""Left free by actors, which hold theirs as long as a run takes: for reading and writing."""

ROWS_AT_ONCE = 6_400_000
"""Of a run in one pass, in one execution: of each of its blocks the driver keeps a few kilobytes until it ends."""

P = TypeVar("P", "StagePool", "ReplicaPool")


@dataclass(frozen=True)
class Pool(Generic[P]):
    """Stages that share processes.

    Attributes:
        stages: in order.
        placement: what the configuration says of it.
        key: where it says so, as `pipeline.pools.ground`.
        loads_all: no later pool looks at pixels, so that this one judges every image: whether an image can be used is
            part of a post's status. Others load only the images that their own stages look at.
        later_readers: stages of later pools of the same pass that look at the image.
        is_tagged: a post that leaves this pool has its entities.
    """

    stages: tuple[StageSpec, ...]
    placement: P
    key: str
    loads_all: bool
    later_readers: tuple[StageSpec, ...] = ()
    is_tagged: bool = True

    @cached_property
    def name(self) -> str:
        """Of its stages with a model, or of all if there are none."""
        return "-".join(spec.name for spec in self.stages if spec.has_model) or "-".join(map(str, self.stages))

    def overlapping(self, config: Config) -> int:
        """Batches that a process works on at once."""
        return max(spec.overlapping(config) for spec in self.stages)

    def passes_on_image(self, post: Post, config: Config) -> bool:
        """Whether a later pool of the pass has a use for a post's encoded image."""
        if post.is_rejected or not self.is_tagged:
            return bool(self.later_readers) and not post.is_rejected
        return any(spec.needs(post, config) for spec in self.later_readers)

    def is_needed_by(self, post: Post, config: Config) -> bool:
        """Whether some stage has anything to do for a post."""
        return any(spec.needs(post, config) for spec in self.stages if self.loads_all or spec.name != LOAD_IMAGE)

    def loads(self, post: Post, config: Config) -> bool:
        """Whether the image of a post is decoded here."""
        return self.loads_all or any(spec.needs(post, config) for spec in self.stages if spec.reads == "pixels")


def passes_of(config: Config) -> list[list[Pool[StagePool]]]:
    """The pools of each pass, in order; a pool or pass whose models are all off is left out."""
    active = active_stages(config)
    numbers = [pool.pass_number for pool in config.pipeline.pools]
    pools = _fill(active, config.pipeline.pools, "pipeline.pools", numbers)
    by_pass: dict[int, list[Pool[StagePool]]] = {}
    for pool in pools:
        by_pass.setdefault(pool.placement.pass_number, []).append(pool)
    return list(by_pass.values())


def tagging_pool(config: Config) -> Pool[StagePool]:
    """The stages that find entities, in one pool: where the tagger is, with the largest share of a card of any."""
    stages = tagging_stages(config)
    names = [spec.name for spec in stages]
    pools = [pool for pools in passes_of(config) for pool in pools if {*names} & {spec.name for spec in pool.stages}]
    shares = [pool.placement.num_gpus for pool in pools]
    placement = pools[-1].placement.model_copy(update={"num_gpus": max(shares), "stages": names})
    return Pool(stages, placement, pools[-1].key, loads_all=False)


def serving_pools(config: Config) -> tuple[tuple[StageSpec, ...], list[Pool[ReplicaPool]]]:
    """The stages of the ingress, which come before the first model; and the pools that follow."""
    active = active_stages(config)
    first = next(place for place, spec in enumerate(active) if spec.has_model)
    pools = config.serving.pools
    return active[:first], _fill(active[first:], pools, "serving.pools", [0] * len(pools))


def _fill(stages: Sequence[StageSpec], listed: Sequence[P], key: str, passes: Sequence[int]) -> list[Pool[P]]:
    members = _members(stages, listed)
    used = [place for place in range(len(listed)) if members[place]]
    looking = [place for place in used if any(spec.reads == "pixels" for spec in members[place])]
    pools = []
    for place in used:
        later = [other for other in used if other > place and passes[other] == passes[place]]
        pools.append(
            Pool(
                tuple(members[place]),
                listed[place],
                f"{key}.{_name_in_keys(listed[place], members[place], place)}",
                loads_all=place == (looking or used)[-1],
                later_readers=tuple(spec for other in later for spec in members[other] if spec.reads),
                is_tagged=any(spec.name == "tag" for other in used if other <= place for spec in members[other]),
            )
        )
    return pools


def _name_in_keys(placement: StagePool | ReplicaPool, members: Sequence[StageSpec], place: int) -> str:
    """By which overrides know a pool: a stage that it lists, one that runs if there is any, else its place."""
    active = {spec.name for spec in members}
    names = sorted((name for name in placement.stages if name != LOAD_IMAGE), key=lambda name: name not in active)
    return names[0] if names else str(place)


def _members(stages: Sequence[StageSpec], listed: Sequence[P]) -> list[list[StageSpec]]:
    """Active stages of each listed pool. A pool that has nothing but stages without a model is not used for them."""
    order = stage_names()
    place_of = {name: place for place, pool in enumerate(listed) for name in pool.stages if name != LOAD_IMAGE}
    with_model = [spec for spec in stages if spec.has_model]
    owner: dict[str, int] = {}
    for spec in with_model:
        later = [place_of[name] for name in order[order.index(spec.name) :] if name in place_of]
        owner[spec.name] = later[0] if later else len(listed) - 1
    members: list[list[StageSpec]] = [[] for _ in listed]
    for spec in stages:
        if spec.name == LOAD_IMAGE:
            looking = sorted({owner[each.name] for each in with_model if each.reads == "pixels"})
            places = looking or [max(owner.values())]
        elif spec.has_model:
            places = [owner[spec.name]]
        else:
            following = [each for each in with_model if order.index(each.name) > order.index(spec.name)]
            places = [owner[following[0].name] if following else max(owner.values())]
        for place in places:
            members[place].append(spec)
    return members
