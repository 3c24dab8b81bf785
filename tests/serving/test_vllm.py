"""vLLM's engine in a replica, and replicas that come and go with the load."""

from __future__ import annotations

import base64
import copy
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from gem_ray.annotator import Annotator
from gem_ray.config import load_config
from gem_ray.records import Post

pytestmark = pytest.mark.timeout(300)


def engines(service) -> list[int]:
    return service.running("EngineCore")


def named(row: dict) -> list[tuple]:
    return [(e["start"], e["end"], e["fine"], e["reranked"], e["box"] is not None) for e in row["entities"]]


def test_answers_are_those_of_the_transformers_engine_in_process(service_with_vllm, posts: list[Post]) -> None:
    with ThreadPoolExecutor(16) as pool:
        online: list[httpx.Response] = list(pool.map(service_with_vllm.annotate, posts[:64]))
    copies = [Post(str(number), post.text, image_bytes=post.image_bytes) for number, post in enumerate(posts[:64])]
    in_process = Annotator.from_config(load_config(overrides=["filter.gamma=0.01"])).annotate(copy.deepcopy(copies))
    assert sum(entity.reranked for post in in_process for entity in post.entities) > 40
    assert [named(answer.json()) for answer in online] == [named(post.annotation()) for post in in_process]


def test_posts_wait_for_no_process_that_they_do_not_need(service_with_vllm, posts: list[Post]) -> None:
    text = Post("text", "Taylor Swift is in Paris tonight")
    with ThreadPoolExecutor(1) as pool, service_with_vllm.standing_still("rerank-ground"):  # it goes on first
        waiting = pool.submit(service_with_vllm.annotate, posts[0])
        found = {entity["text"] for entity in service_with_vllm.annotate(text).json()["entities"]}
        assert found >= {"Taylor Swift", "Paris"}
        assert not waiting.done()
    answer = waiting.result().json()
    assert answer["status"] == "ok"
    assert answer["seconds"]["waiting"] > 0
    assert any(entity["box"] for entity in answer["entities"])


def test_a_batch_is_streamed_as_posts_are_done(service_with_vllm, posts: list[Post]) -> None:
    picture = {"text": posts[0].text, "image": base64.b64encode(posts[0].image_bytes or b"").decode()}
    asked = {"posts": [picture, {"text": "Taylor Swift is in Paris tonight"}]}
    accept = {"Accept": "application/x-ndjson"}
    with (
        service_with_vllm.standing_still("rerank-ground") as processes,
        service_with_vllm.client.stream("POST", "/v1/annotate/batch", json=asked, headers=accept) as answer,
    ):
        lines = answer.iter_lines()
        assert json.loads(next(lines))["index"] == 1  # text alone does not wait for the other's picture
        for process in processes:
            os.kill(process, signal.SIGCONT)
        assert json.loads(next(lines))["index"] == 0


def test_an_engine_that_is_killed_costs_no_answer(service_with_vllm, posts: list[Post]) -> None:
    with service_with_vllm.under_load(posts, clients=6) as answers:
        service_with_vllm.wait_for(lambda: len(answers) > 12)
        (victim,) = engines(service_with_vllm)
        os.kill(victim, signal.SIGKILL)
        service_with_vllm.wait_for(lambda: engines(service_with_vllm) not in ([], [victim]), seconds=120)
        before = len(answers)
        service_with_vllm.wait_for(lambda: len(answers) > before + 12)
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["status"] for answer in answers} == {"ok"}


def test_a_second_tagger_comes_with_the_load_and_goes_with_it(service_with_vllm, posts: list[Post]) -> None:
    assert len(service_with_vllm.replicas("tag")) == 1
    texts = [Post(post.post_id, post.text) for post in posts]
    with service_with_vllm.under_load(texts, clients=24) as answers:
        service_with_vllm.wait_for(lambda: len(service_with_vllm.replicas("tag")) == 2)
        before = len(answers)
        service_with_vllm.wait_for(lambda: len(answers) > before + 24)
    service_with_vllm.wait_for(lambda: len(service_with_vllm.replicas("tag")) == 1)
    assert {answer.status_code for answer in answers} == {200}
