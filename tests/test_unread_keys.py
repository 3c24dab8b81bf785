"""Overrides without effect: each rule is tried with every key that it is about."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

import gem_ray
from gem_ray.config import Config, ConfigError, load_config, section_type
from gem_ray.config_keys import settings
from gem_ray.grounding.matcher_recipe import MatcherTraining
from gem_ray.grounding.train_text_segmenter import TextSegmenterTraining
from gem_ray.rerank.recipe import RerankerTraining
from gem_ray.tagger.recipe import TaggerTraining
from gem_ray.unread_keys import READ_IF, refuse_unread, why_unread

ENDPOINT = "reranker={engine: endpoint, endpoint: {base_url: http://127.0.0.1:1/v1}}"
ASKED = "knowledge.explainer.base_url=http://127.0.0.1:1/v1"
# Configurations in which one rule or another holds, and with which the preset's own values go together.
WORLDS = (
    [],
    ["reranker.enabled=false"],
    [ENDPOINT],
    ["reranker.engine=vllm"],
    ["routing.threshold=0.5"],
    ["filter.max_share=0.5"],
    ["grounder.enabled=false"],
    ["grounder.matcher.kind=llava"],
    ["grounder.boxes.sam=null"],
    ["grounder.boxes.text=null"],
    ["knowledge.captioner=org/one"],
    [ASKED],
    ["knowledge.explainer.engine=vllm"],
    ["image.allow_http=true"],
)
CONFIGS = [load_config(overrides=overrides) for overrides in WORLDS]
FULL = load_config(overrides=[ENDPOINT, ASKED])


def _cases() -> Iterator[tuple[int, str]]:
    paths = [path for path, _, _ in settings(FULL)]
    for number, (keys, _, _) in enumerate(READ_IF):
        for key in keys:
            below = [path for path in paths if path == key or path.startswith(f"{key}.")]
            assert below, f"{key} is no key"
            yield from ((number, path) for path in below)


@pytest.mark.parametrize(("number", "path"), list(_cases()))
def test_a_key_is_refused_where_its_rule_says_so_and_taken_in_some_configuration(number: int, path: str) -> None:
    _, is_read, reason = READ_IF[number]
    outcomes = {why_unread(config, path): is_read(config) for config in CONFIGS}
    if path.endswith(".enabled"):
        assert set(outcomes) == {None}
    else:
        assert outcomes[None], "taken where its rule forbids it"
        assert outcomes.get(reason) is False, "refused by its rule in no configuration"


def test_every_key_that_has_no_effect_gets_its_line_and_sections_are_looked_into() -> None:
    overrides = [
        "reranker.enabled=false",
        "reranker={mode: score, dtype: float32}",
        "filter.k=3",
        "serving.drain_s=5",
    ]
    with pytest.raises(ConfigError) as caught:
        refuse_unread(load_config(overrides=overrides), overrides, unused="serving")
    assert str(caught.value).splitlines() == [
        "--set reranker.mode has no effect: reranker.enabled is false",
        "--set reranker.dtype has no effect: reranker.enabled is false",
        "--set serving.drain_s has no effect: this command does not read serving",
    ]
    refuse_unread(load_config(overrides=overrides), ["grounder.enabled=true", "filter.k=3", "reranker.enabled=false"])


@pytest.mark.parametrize("kind", [Config, TaggerTraining, RerankerTraining, MatcherTraining, TextSegmenterTraining])
def test_every_setting_is_read_somewhere(kind: type[BaseModel]) -> None:
    """By its name, in a file that does not only define it."""
    package = Path(gem_ray.__file__).parent
    read = {word for file in package.rglob("*.py") for word in re.findall(r"\.(\w+)", file.read_text(encoding="utf-8"))}
    assert [name for name in _names(kind) if name not in read] == []


def _names(kind: type[BaseModel]) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        yield name
        if section := section_type(field.annotation):
            yield from _names(section)
