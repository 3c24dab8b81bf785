"""The service under load: batches, refusals, changes of settings, and processes that die or stand still."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gem_ray.benchmarks.load import Load

POOL = "tag-rerank-ground"


def test_posts_that_come_together_share_batches(service, posts):
    time.sleep(3)  # what was asked before this test is exported
    before = batches(service)
    outcome = asyncio.run(Load(service.url, posts=64).closed(clients=24, requests=96))
    assert {status: len(times) for status, times in outcome.latencies.items()} == {200: 96}
    assert set(outcome.stage_seconds) == {"prepare", "tag", "load_image", "rerank", "ground", "waiting"}
    # Metrics are exported from time to time, a process's at a time.
    service.wait_for(lambda: all((batches(service) - before)[stage, "sum"] > 48 for stage in ("tag", "ground")))
    posts_and_batches = batches(service) - before
    for stage in ("tag", "ground"):
        assert posts_and_batches[stage, "sum"] > 3 * posts_and_batches[stage, "count"], stage


def test_what_answers_goes_before_what_computes(service, posts):
    """Priorities of the kernel: models use all the CPU time that they get."""
    assert service.annotate(posts[0]).status_code == 200
    answering = [*service.running("ray::ProxyActor"), *service.replicas("ingress")]
    assert len(answering) == 2
    assert {os.getpriority(os.PRIO_PROCESS, process) for process in answering} == {os.getpriority(os.PRIO_PROCESS, 0)}
    threads = [int(task.name) for process in service.replicas(POOL) for task in Path(f"/proc/{process}/task").iterdir()]
    assert max(os.getpriority(os.PRIO_PROCESS, thread) for thread in threads) > os.getpriority(os.PRIO_PROCESS, 0)


def batches(service):
    """(stage, `sum` or `count`) -> posts or batches so far."""
    totals = Counter()
    for line in service.client.get("/metrics").text.splitlines():
        if found := re.match(r'ray_gem_ray_batch_posts_(sum|count)\{.*stage="(.*?)".* (\S+)$', line):
            totals[found[2], found[1]] += float(found[3])
    return totals


def test_gamma_and_threshold_change_under_load_without_a_restart_or_a_failure(service, posts):
    processes = {name: service.replicas(name) for name in ("ingress", POOL)}
    assert [*map(len, processes.values())] == [1, 2]

    def change(gamma, threshold):
        def edit(values):
            ingress, pool = values["applications"][0]["deployments"]
            ingress["user_config"]["gamma"] = gamma
            pool["user_config"]["threshold"] = threshold

        return edit

    with service.under_load(posts) as answers:
        service.reload(change(-1, 1.0))  # nonsense changes nothing
        service.reload(change(0.0, 1.0))
        service.wait_for(lambda: answers and answers[-1].json().get("gamma") == 0.0)
        time.sleep(1)  # the threshold is another deployment's
        done = len(answers)
        service.wait_for(lambda: len(answers) > done + 24)
        service.reload(change(0.2, 0.1))
        service.wait_for(lambda: answers[-1].json().get("gamma") == 0.2)
    assert {answer.status_code for answer in answers} == {200}
    late = [answer.json() for answer in answers[done + 12 : done + 24]]
    entities = [entity for row in late for entity in row["entities"] if row["status"] == "ok"]
    assert all(entity["reranked"] for entity in entities)
    assert not any(entity["box"] for entity in entities)
    for answer in answers:  # a post is judged by one γ from beginning to end
        row = answer.json()
        assert all(e["reranked"] == (e["entropy"] > row["gamma"]) for e in row["entities"] if row["status"] == "ok")
    assert {name: service.replicas(name) for name in processes} == processes
    assert service.client.get("/v1/limits").json()["gamma"] == 0.2


def test_a_process_that_is_killed_costs_no_answer(service, posts):
    with service.under_load(posts, clients=8) as answers:
        service.wait_for(lambda: len(answers) > 16)
        victim, other = service.replicas(POOL)
        os.kill(victim, signal.SIGKILL)
        before = len(answers)
        service.wait_for(lambda: len({*service.replicas(POOL)} - {victim}) == 2)
        assert other in service.replicas(POOL)
        service.wait_for(lambda: len(answers) > before + 16)
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["status"] for answer in answers} == {"ok"}
    service.wait_for(lambda: service.client.get("/readyz").status_code == 200)


def test_overload_is_refused_at_once_with_429_and_soon_over(service, assert_problem):
    load = Load(service.url, posts=64)
    usual = min(asyncio.run(load.closed(1, 4)).latencies[200])
    many = asyncio.run(load.closed(24, 72))
    outcome = asyncio.run(load.open(rate=3 * many.per_second, seconds=5))
    statuses = Counter({status: len(times) for status, times in outcome.latencies.items()})
    assert statuses.keys() == {200, 429}
    assert statuses[429] > statuses[200] / 4
    refused = sorted(outcome.latencies[429])
    assert refused[len(refused) // 2] < sorted(outcome.latencies[200])[statuses[200] // 2] / 2
    service.wait_for(lambda: min(asyncio.run(load.closed(1, 2)).latencies[200]) < 3 * usual, seconds=10)


def test_a_refusal_says_when_to_come_back(service, posts, assert_problem):
    """A batch counts with all its posts."""
    image = base64.b64encode(posts[0].image_bytes).decode()
    batch = {"posts": [{"text": posts[0].text, "image": image}] * 30}
    with service.standing_still(POOL) as processes, ThreadPoolExecutor(1) as pool:
        first = pool.submit(service.client.post, "/v1/annotate/batch", json=batch)
        time.sleep(1.5)
        for headers in ({}, {"Accept": "application/x-ndjson"}):
            refused = service.client.post("/v1/annotate/batch", json=batch, headers=headers)
            assert_problem(refused, 429)
            # From the queue: nothing leaves it, and the oldest post has been there for more than a second.
            assert 2 <= int(refused.headers["retry-after"]) < 60
        for process in processes:
            os.kill(process, signal.SIGCONT)
        assert first.result().status_code == 200
    assert service.client.post("/v1/annotate/batch", json=batch).status_code == 200
