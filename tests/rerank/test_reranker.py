from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from gem_ray.noise import GRAIN
from gem_ray.records import Candidate, Entity, Post, ProblemKind, Status
from gem_ray.rerank.engine import Choice, Mode, Request, RequestError
from gem_ray.rerank.engine_transformers import TransformersEngine
from gem_ray.rerank.prompts import LLAVA, build_prompt
from gem_ray.rerank.reranker import Reranker, load_engine, ordered
from gem_ray.scope import Scope
from gem_ray.taxonomy import FMNERG

_TOKENS = ["so", "this", "is", "Ardenza", "and", "Corvane"]
_IMAGE: np.ndarray = np.zeros((8, 8, 3), np.uint8)


class ScriptedEngine:
    """Answers with the last choice, and remembers what it was asked."""

    def __init__(self, fails_on: str | None = None):
        self.prompt_format = LLAVA
        self.counts: Counter[str] = Counter()
        self.calls: list[tuple[list[Request], Mode]] = []
        self._fails_on = fails_on

    def choose(self, requests, mode, adapter=None):
        self.calls.append((requests, mode))
        return [
            RequestError("too long")
            if self._fails_on and f"{self._fails_on}(&&)" in request.prompt
            else Choice(len(request.choices) - 1, 0.9)
            for request in requests
        ]


def _entity(word=3, hard=True, **fields) -> Entity:
    candidates = [Candidate("sports_team", 0.6), Candidate("city", 0.4)]
    name = _TOKENS[word]
    return Entity(
        name, 0, 1, word, word + 1, "organization", "sports_team", 0.6, entropy=1.0, hard=hard,
        **{"candidates": candidates, **fields},
    )  # fmt: skip


def _post(*entities, image=_IMAGE) -> Post:
    return Post("p", " ".join(_TOKENS), _TOKENS, entities=list(entities), image=image)


def _reranker(engine, mode="score") -> Reranker:
    return Reranker(engine, FMNERG, mode)


def test_a_hard_entity_takes_the_answers_category_and_keeps_the_taggers_candidates():
    entity = _entity()
    _reranker(ScriptedEngine())([_post(entity)])
    assert (entity.fine, entity.coarse, entity.reranked) == ("city", "location", True)
    assert entity.score == pytest.approx(0.9, rel=GRAIN)
    assert entity.candidates == [Candidate("sports_team", 0.6), Candidate("city", 0.4)]
    assert entity.entropy == 1.0


def test_the_engine_is_asked_once_for_the_batch_with_the_entities_of_a_post_adjacent():
    engine = ScriptedEngine()
    other: np.ndarray = np.ones((8, 8, 3), np.uint8)
    _reranker(engine, "generate")([_post(_entity(3), _entity(5)), _post(_entity(3), image=other)])
    [(requests, mode)] = engine.calls
    assert mode == "generate"
    assert [request.image is _IMAGE for request in requests] == [True, True, False]
    assert requests[1].prompt == build_prompt(_TOKENS, 5, 6, ["sports_team", "city"])


def test_entities_that_a_model_does_not_know_are_left_as_they_are_and_not_asked_about():
    engine, scope = ScriptedEngine(), Scope(knows="a team", names=("Ardenza",))
    known, unknown = _entity(3), _entity(5)
    before = replace(unknown)
    Reranker(engine, FMNERG, scopes=[scope])([_post(known, unknown)])
    assert known.reranked
    assert unknown == before
    assert [len(requests) for requests, _ in engine.calls] == [1]


@pytest.mark.parametrize(
    "post",
    [
        pytest.param(_post(_entity(hard=False)), id="easy"),
        pytest.param(_post(_entity(candidates=[])), id="no candidates"),
        pytest.param(_post(_entity(), image=None), id="no image"),
        pytest.param(_post(), id="no entities"),
    ],
)
def test_the_engine_is_not_touched_when_there_is_nothing_to_decide(post):
    engine = ScriptedEngine()
    _reranker(engine)([post])
    assert engine.calls == []
    assert all((e.fine, e.score, e.reranked) == ("sports_team", 0.6, False) for e in post.entities)
    assert post.problems == []


def test_a_rejected_post_is_passed_over():
    post = _post(_entity())
    post.fail("tag", ProblemKind.STAGE_FAILED, "no")
    engine = ScriptedEngine()
    _reranker(engine)([post])
    assert engine.calls == []


def test_it_counts_the_entities_that_it_asked_about():
    reranker = _reranker(ScriptedEngine(fails_on="Ardenza"))
    for _ in range(2):
        reranker([_post(_entity(3), _entity(5), _entity(5, hard=False))])
    assert reranker.counts == {"asked": 4}


def test_candidates_come_in_the_order_that_is_asked_for():
    fines = ["music", "city", "actor", "park", "band"]
    entity = _entity(candidates=[Candidate(fine, 0.2) for fine in fines])
    other = _entity(5, candidates=entity.candidates[::-1])
    assert ordered(entity, "probability") == tuple(fines)
    assert ordered(entity, "name") == tuple(sorted(fines))
    shuffled = ordered(entity, "shuffled")
    assert sorted(shuffled) == sorted(fines)
    assert shuffled not in (tuple(fines), tuple(sorted(fines)))
    assert ordered(entity, "shuffled") == shuffled != ordered(other, "shuffled")


def test_the_answer_is_found_again_in_whatever_order():
    entity = _entity(candidates=[Candidate("sports_team", 0.6), Candidate("city", 0.4)])
    reranker = Reranker(ScriptedEngine(), FMNERG, "score", "name")
    reranker([_post(entity)])  # answers with the last choice
    assert (entity.fine, entity.coarse) == ("sports_team", "organization")


def test_a_request_that_fails_leaves_its_entity_to_the_tagger_and_its_neighbours_reranked():
    post, neighbour = _post(_entity(3), _entity(5)), _post(_entity(5))
    _reranker(ScriptedEngine(fails_on="Ardenza"))([post, neighbour])
    assert [entity.reranked for entity in post.entities] == [False, True]
    assert post.entities[0].fine == "sports_team"
    [problem] = post.problems
    assert (problem.stage, problem.kind) == ("rerank", ProblemKind.STAGE_FAILED)
    assert "'Ardenza'" in problem.message
    assert post.status is Status.DEGRADED
    assert neighbour.problems == []


def test_the_configured_engine_decides_hard_entities_from_the_image(trained, colored_requests):
    assert isinstance(load_engine(trained), TransformersEngine)
    reranker = Reranker.from_config(trained)
    tokens = ["RT", "@", "someone", ":", "so", "this", "is", "Ardenza", ",", "always"]
    candidates = [Candidate(fine, 0.2) for fine in colored_requests[0].choices]
    posts = []
    for request in colored_requests[::2]:
        entity = Entity("Ardenza", 0, 1, 7, 8, "art", "music", 0.2, entropy=1.6, hard=True, candidates=list(candidates))
        posts.append(Post("p", "", tokens, entities=[entity], image=request.image))
    reranker(posts)
    assert [post.entities[0].fine for post in posts] == ["city", "sports_team", "city"]
    assert [post.entities[0].coarse for post in posts] == ["location", "organization", "location"]
