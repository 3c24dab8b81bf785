"""A random tiny encoder and a few labelled posts, so that experiments really train, annotate and score in a moment."""

from collections.abc import Callable
from pathlib import Path

import pytest
import replicas

from gem_ray.experiments.definition import Experiment, load_experiment
from gem_ray.records import Box, GoldEntity, Post
from gem_ray.taxonomy import gmner_category

WORDS = [
    "the",
    "in",
    "sees",
    "plays",
    "taylor",
    "swift",
    "london",
    "paris",
    "google",
    "visits",
    "and",
    "singer",
    "city",
]

DEFINITION = """
title: A trial
recipe: nano
settings: {encoder: ENCODER, on_base_encoder: false, epochs: 2, batch_size: 4, head_lr: 0.05, max_length: 32}
columns:
  - {label: fine, metric: mner.f1}
  - {label: span, metric: span.f1}
  - {label: MNERG, metric: mnerg.f1}
  - {label: "fine, bare", metric: mner.f1, input: without-knowledge}
  - {label: GMNER, labels: gmner, metric: mner.f1}
rows:
  - {label: all on, fmnerg: full, gmner: gmner}
  - {label: no CRF, fmnerg: no-crf}
  - {label: tagger alone, fmnerg: alone}
  - {label: no reranker, fmnerg: no-rerank}
against: all on
variants:
  - {name: full, label: all on, settings: {}}
  - {name: no-crf, label: no CRF, settings: {crf: false}}
  - {name: alone, label: alone, tagger: full, config: {reranker: {enabled: false}, grounder: {enabled: false}}}
  - {name: no-rerank, label: no reranker, tagger: full, config: {reranker: {enabled: false}}}
  - {name: gmner, label: GMNER, settings: {labels: gmner}}
published:
  - source: A paper
    rows: [{label: Theirs, values: [50.5 ± 0.1, null, 40.25, null, 77]}]
    notes: [A correction.]
"""


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with random weights."""
    folder = tmp_path_factory.mktemp("encoder")
    replicas.encoder(folder, WORDS)
    return folder


@pytest.fixture
def experiment(tmp_path: Path, encoder: Path) -> Experiment:
    file = tmp_path / "trial.yaml"
    file.write_text(DEFINITION.replace("ENCODER", str(encoder)), encoding="utf-8")
    return load_experiment(str(file))


@pytest.fixture
def posts() -> Callable[[str, str], list[Post]]:
    """Two sentences, many times: easy to learn."""

    def read(split: str, labels: str) -> list[Post]:
        name = gmner_category if labels == "gmner" else str
        made = []
        for number in range(12 if split == "train" else 6):
            singer = GoldEntity(0, 2, name("musician"), (Box(0, 0, 5, 5),))
            city = GoldEntity(4, 5, name("city"))
            text = f"taylor swift plays in {('london', 'paris')[number % 2]}"
            made.append(Post(f"{split}{number}", text, text.split(), knowledge="taylor singer", gold=[singer, city]))
        return made

    return read
