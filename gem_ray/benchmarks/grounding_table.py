"""What each choice of the grounder is worth, as the paper's Table 3 asks: on gold mentions of generated posts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gem_ray.annotator import Annotator
from gem_ray.config import Config, parse_config
from gem_ray.data.generated import generate
from gem_ray.data.images import ImageLoader
from gem_ray.evaluation.grounding import draw_worst, ground_gold, split_by_category, summarize, worst
from gem_ray.grounding.grounder import Grounder
from gem_ray.grounding.matcher import Matcher
from gem_ray.taxonomy import FMNERG

_WORST = 16

WHOLE_SYSTEM = "whole system"

# Name -> changes to `grounder`. None means an untrained matcher (GEM-wo), with `grounder` as configured.
VARIANTS: dict[str, Mapping[str, Any] | None] = {
    "as configured": {},
    "matcher untrained": None,
    "SAM alone": {"boxes": {"text": None}},
    "text prompt alone": {"boxes": {"sam": None}},
    "neither: the map's region": {"boxes": {"sam": None, "text": None}},
    "text prompt first for all": {"boxes": {"text_first": sorted(set(FMNERG.parent.values()))}},
    "text prompt first for persons": {"boxes": {"text_first": ["person"]}},
    "SAM's mask by the map": {"boxes": {"sam_mask": "map"}},
    "all of SAM's mask": {"boxes": {"largest_component": False}},
    "peak between patches": {"matcher": {"subpatch_peak": True}},
    "tokens without special ones": {"matcher": {"tokens": "inner"}},
    "the entity's tokens": {"matcher": {"tokens": "words"}},
    "logit": {"matcher": {"target": "logit"}},
}


def measure_grounding(config: Config, count: int, seed: int, out: Path, only: Sequence[str] = ()) -> dict[str, Any]:
    """Ground the same mentions in every variant; the worst of the first one are drawn into `out/worst.png`.

    With all variants, also what the whole system says of the mentions that it finds, by whether it has their category.

    Args:
        config: with the models.
        count: generated posts.
        seed: of the posts.
        out: folder.
        only: names of variants; all if empty.
    """
    posts = [post for post in generate(count, seed) if post.gold]
    loader = ImageLoader(config.image)
    for post in posts:
        loader.load(post)
    results: dict[str, Any] = {}
    for name in only or VARIANTS:
        mentions = ground_gold(posts, _variant(config, VARIANTS[name]))
        results[name] = summarize(mentions)
        if len(results) == 1 and (wrong := worst(mentions, _WORST)):
            draw_worst(wrong, out / "worst.png")
    return results if only else results | _whole_system(config, count, seed)


def _whole_system(config: Config, count: int, seed: int) -> dict[str, Any]:
    right, wrong = split_by_category(Annotator.from_config(config).annotate(list(generate(count, seed))))
    groups = {"all": [*right, *wrong], "in the right category": right, "in a wrong category": wrong}
    return {f"{WHOLE_SYSTEM}, {name}": summarize(mentions) for name, mentions in groups.items()}


def _variant(config: Config, changes: Mapping[str, Any] | None) -> Grounder:
    values = config.model_dump()
    for section, settings in (changes or {}).items():
        values["grounder"][section] |= settings
    grounder = Grounder.from_config(parse_config(values))
    if changes is None:
        assert isinstance(grounder.matcher, Matcher)
        torch.manual_seed(0)
        model = grounder.matcher.model
        model.load_state_dict(type(model)(model.config).state_dict())
    return grounder


def as_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Percentages as Markdown."""
    lines = [
        "| variant | EEG | small | large | seen or not | mean IoU |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in results.items():
        figures = [row[key] for key in ("eeg", "small", "large", "groundable", "mean_iou")]
        lines.append(f"| {name} | " + " | ".join(f"{100 * figure:.1f}" for figure in figures) + " |")
    return "\n".join(lines) + "\n"
