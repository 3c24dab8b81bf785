"""The explainer on vLLM in this process, with a tiny model of random weights: form and flow, not sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import replicas
import torch

from gem_ray.config import ConfigError, parse_config
from gem_ray.knowledge.explainer import ExplainerError, ParsedAnswer
from gem_ray.knowledge.prompts import ANSWER_FIELD, KnowledgeQuery, chat_messages
from gem_ray.knowledge.provider import KnowledgeProvider
from gem_ray.records import Post, ProblemKind
from gem_ray.rerank.tokenizer import train_tokenizer

pytestmark = pytest.mark.vllm

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUERIES = [
    KnowledgeQuery("Adele at the O2"),
    KnowledgeQuery("i gotta feeling", "a screenshot"),
    KnowledgeQuery("日本 🚀"),
]


def save_model(folder: Path, template: str | None) -> Path:
    tokenizer = train_tokenizer([message["content"] for message in chat_messages(QUERIES[0])], 600)
    tokenizer.chat_template = template
    torch.manual_seed(1)
    replicas.llama(folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, so that the test leaves none behind
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        yield


@pytest.fixture(scope="module")
def settings(environment, tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("llm"), TEMPLATE)
    return {"engine": "vllm", "model": str(folder), "max_model_len": 2048, "max_tokens": 40}


@pytest.fixture(scope="module")
def explainer(settings):
    from gem_ray.knowledge.explainer_vllm import VllmExplainer

    return VllmExplainer.from_config(parse_config({"knowledge": {"explainer": settings}}).knowledge.explainer)


def test_answers_are_the_asked_for_json_whatever_the_model(explainer, monkeypatch):
    """Random weights would never write JSON: the engine holds them to it, until the answer's end cuts it off."""
    raw = []

    def keep(answer: str) -> ParsedAnswer:
        raw.append(answer)
        return ParsedAnswer(answer, repaired=False)

    monkeypatch.setattr("gem_ray.knowledge.explainer_vllm.parse_answer", keep)
    assert [query for query, _ in explainer.ask_all(QUERIES)] == QUERIES
    assert len(raw) == len(QUERIES)
    for answer in raw:
        assert answer.startswith(f'{{"{ANSWER_FIELD}":"')
        if answer.endswith('"}'):
            assert set(json.loads(answer)) == {ANSWER_FIELD}


def test_an_answer_does_not_depend_on_the_batch(explainer):
    together = dict(explainer.ask_all(QUERIES))
    alone = {query: dict(explainer.ask_all([query]))[query] for query in QUERIES}
    assert together == alone
    assert all(isinstance(answer, ParsedAnswer) for answer in together.values())


def test_a_question_that_is_too_long_fails_alone(explainer):
    answers = dict(explainer.ask_all([QUERIES[0], KnowledgeQuery("long " * 3000), QUERIES[2]]))
    assert [type(answer) for answer in answers.values()].count(ExplainerError) == 1
    assert isinstance(answers[KnowledgeQuery("long " * 3000)], ExplainerError)
    assert dict(explainer.ask_all([])) == {}


def test_the_stage_fills_posts_and_asks_nothing_twice(explainer, settings, tmp_path, monkeypatch):
    config = parse_config({"knowledge": {"explainer": settings, "cache": tmp_path}})
    monkeypatch.setattr("gem_ray.knowledge.provider.load_explainer", lambda _: explainer)
    stages = [KnowledgeProvider.from_config(config) for _ in range(2)]
    posts = [
        stage([Post("1", "Adele"), Post("2", "Adele"), Post("3", "word " * 3000), Post("4", "hi", knowledge="known")])
        for stage in stages
    ]
    for first, adele, long, known in posts:
        assert first.knowledge == adele.knowledge
        assert [problem.kind for problem in long.problems] == [ProblemKind.KNOWLEDGE_FAILED]
        assert known.knowledge == "known"
    assert posts[0][0].knowledge == posts[1][0].knowledge
    assert [(stage.asked, stage.from_cache) for stage in stages] == [(2, 0), (1, 2)]


def test_a_model_without_conversations_is_refused(environment, tmp_path):
    from gem_ray.knowledge.provider import load_explainer

    folder = save_model(tmp_path / "llm", None)
    values = {"engine": "vllm", "model": str(folder), "max_model_len": 512}
    with pytest.raises(ConfigError, match="chat template"):
        load_explainer(parse_config({"knowledge": {"explainer": values}}).knowledge.explainer)
