"""A model card: what a tagger is, what it reaches on dev, and how it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gem_ray.tagger.recipe import TaggerTraining
from gem_ray.tagger.scores import DevScores

_CARD = """\
---
language: en
library_name: gem-ray
pipeline_tag: token-classification
tags: [named-entity-recognition, social-media, dual-path-crf]
base_model: {encoder}
---

# A tagger for social posts ({labels})

An encoder under a dual-path CRF, after *Granular Entity Mapper* (Wang et al.), trained by `gem-ray train tagger`.
It tags the words of a post with {categories}; auxiliary knowledge is read from: {knowledge}.

## DevScores

F1 in percent on the {dev} dev posts, which also chose the epoch that was kept ({best_epoch} of {epochs}).

{scores}

## Data

{train} training posts.

## Recipe

What is not here is at its default.

```yaml
{recipe}```

## Use

`gem-ray annotate posts/ out/ --set tagger.model=MODEL --set tagger.max_length={max_length}`
"""


def write_card(out: Path, settings: TaggerTraining, report: dict[str, Any], train: int, dev: int) -> None:
    """Write `README.md` into a model directory.

    Args:
        out: the directory.
        settings: the recipe.
        report: what `train_tagger` gives back.
        train: number of training posts.
        dev: number of dev posts.
    """
    text = _CARD.format(
        encoder=settings.encoder,
        labels=settings.labels,
        categories="51 fine categories" if settings.labels == "fmnerg" else "four categories",
        knowledge=settings.knowledge,
        dev=dev,
        train=train,
        best_epoch=report["best_epoch"],
        epochs=len(report["epochs"]),
        scores=_table(report["dev"]) if dev else "There were none.",
        recipe=yaml.safe_dump(settings.model_dump(exclude_defaults=True), sort_keys=False),
        max_length=settings.max_length,
    )
    (out / "README.md").write_text(text, encoding="utf-8")


def _table(scores: DevScores) -> str:
    rows = ["| | fine | coarse | span |", "| --- | --- | --- | --- |"]
    for name, values in scores.items():
        figures = " | ".join(f"{100 * values[level]:.1f}" for level in ("fine", "coarse", "span"))
        rows.append(f"| {name.replace('_', ' ')} | {figures} |")
    return "\n".join(rows)
