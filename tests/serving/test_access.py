"""What is told of requests: their numbers, a line each, their ids, and when to come back."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from gem_ray.records import ProblemKind
from gem_ray.serving import access
from gem_ray.serving.keys import new_key

TEXT = "Paris tonight"


@pytest.fixture
def counted(monkeypatch):
    """(metric, labels) -> what was counted; Ray's own metrics need a Ray."""
    values = Counter()

    class Metric:
        def __init__(self, name, *_):
            self.name = name

        def inc(self, value, labels):
            values[self.name, *labels.items()] += value

        def observe(self, value, labels):
            values[self.name, *labels.items()] += 1

        def set(self, value):
            values[self.name] = value

    for name in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(access, name, Metric)
    return values


def test_requests_are_counted_by_endpoint_status_and_key(counted, endpoint, monkeypatch):
    key, digest = new_key()
    monkeypatch.setenv("GEM_RAY_API_KEYS", f"{digest} newsroom")
    headers = {"Authorization": f"Bearer {key}"}
    with endpoint(max_in_flight=40) as api:
        for _ in range(2):
            api.client.post("/v1/annotate", json={"text": TEXT}, headers=headers)
        api.client.post("/v1/annotate/", json={"text": " "}, headers=headers)
        api.client.post("/v1/annotate", json={"text": TEXT})
        for number in range(20):
            api.client.get(f"/wp-{number}.php")
        api.client.head("/v1/annotate", headers=headers)
        for method in ("PUT", "PROPFIND", "M-SEARCH"):
            api.client.request(method, "/healthz")
    requests = {
        tuple(dict(labels).values()): count
        for (name, *labels), count in ((k, v) for k, v in counted.items() if isinstance(k, tuple))
        if name == "gem_ray_http_requests"
    }
    assert requests == {
        ("/v1/annotate", "POST", "200", "newsroom"): 2,
        ("/v1/annotate", "POST", "422", "newsroom"): 1,
        ("/v1/annotate", "POST", "401", ""): 1,
        ("other", "GET", "404", ""): 20,
        ("/v1/annotate", "HEAD", "405", "newsroom"): 1,
        ("/healthz", "other", "405", ""): 3,
    }
    assert counted["gem_ray_http_seconds", ("endpoint", "/v1/annotate")] == 5


def test_a_refusal_is_counted_by_the_route_and_the_key_that_are_known(counted, endpoint, monkeypatch):
    key, digest = new_key()
    monkeypatch.setenv("GEM_RAY_API_KEYS", f"{digest} newsroom")
    with endpoint(max_body_bytes=2**20) as api:
        large = b" " * 2**21
        for headers in ({"Authorization": f"Bearer {key}"}, {"Authorization": "Bearer wrong"}):
            for path in ("/v1/annotate", "/v1/nothing"):
                api.client.post(path, content=large, headers=headers | {"Content-Type": "application/json"})
        assert api.client.request("GET", "/healthz", content=large).status_code == 200  # nobody reads it
    requests = {tuple(dict(labels).values()) for name, *labels in counted if name == "gem_ray_http_requests"}
    assert requests == {
        ("/v1/annotate", "POST", "413", "newsroom"),
        ("other", "POST", "404", "newsroom"),
        ("/v1/annotate", "POST", "401", ""),
        ("other", "POST", "401", ""),
        ("/healthz", "GET", "200", ""),
    }


def test_posts_are_told_while_no_request_ends(counted, endpoint, monkeypatch):
    monkeypatch.setattr(access, "_GAUGES_S", 0.01)
    with endpoint(max_in_flight=40) as api, ThreadPoolExecutor(3) as pool:
        api.tagger.pause_s = 0.5
        asking = [pool.submit(api.client.post, "/v1/annotate", json={"text": TEXT}) for _ in range(3)]
        deadline = time.monotonic() + 10
        while counted["gem_ray_posts_in_flight"] < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not any(name == "gem_ray_http_requests" for name, *_ in filter(is_labelled, counted))
        assert counted["gem_ray_posts_limit"] == 40
        assert {each.result().status_code for each in asking} == {200}


def is_labelled(name):
    return isinstance(name, tuple)


class Flow:
    in_flight = waiting = 0


@pytest.mark.parametrize("way", ["cancelled", "disconnected", "begun", "bug"])
def test_a_client_that_leaves_is_no_error_of_the_server(counted, tmp_path, way):
    """Whether Serve cancels its request or the body breaks off; an answer that has begun keeps its status."""
    log = tmp_path / "access.jsonl"

    async def app(scope, receive, send):
        if way == "bug":
            raise KeyError("a bug")
        if way == "begun":
            await send({"type": "http.response.start", "status": 200, "headers": []})
        if way == "disconnected":
            await receive()
            await send({"type": "http.response.start", "status": 400, "headers": []})
            return
        raise asyncio.CancelledError

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        pass

    scope = {"type": "http", "method": "POST", "path": "/v1/annotate", "headers": []}
    with suppress(asyncio.CancelledError, KeyError):
        asyncio.run(access.Access(app, Flow(), log, 8)(scope, receive, send))
    expected = {"cancelled": 499, "disconnected": 499, "begun": 200, "bug": 500}[way]
    assert line_of(log)["status"] == expected
    assert ("status", str(expected)) in next(name for name in counted if name[0] == "gem_ray_http_requests")


def line_of(log):
    """It is written once the answer is sent."""
    deadline = time.monotonic() + 10
    while not (log.exists() and log.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return json.loads(log.read_text())


def test_each_request_has_a_line_which_outlives_a_rotation(endpoint, monkeypatch, tmp_path):
    key, digest = new_key()
    monkeypatch.setenv("GEM_RAY_API_KEYS", f"{digest} newsroom")
    log = tmp_path / "access.jsonl"
    with endpoint(access_log=str(log)) as api:
        headers = {"Authorization": f"Bearer {key}", "X-Request-ID": "a-1"}
        answer = api.client.post("/v1/annotate?heatmaps=true", json={"text": TEXT}, headers=headers)
        first = line_of(log)
        log.rename(tmp_path / "old")
        api.client.get("/v1/nothing%0A%22", headers=headers)
        second = line_of(log)
    assert first.pop("time").endswith("+00:00")
    assert 0 <= first.pop("seconds") < 5
    assert first == {
        "request_id": "a-1", "peer": "127.0.0.1", "key": "newsroom", "method": "POST", "path": "/v1/annotate",
        "status": 200, "bytes": len(answer.content),
    }  # fmt: skip
    assert (second["status"], second["path"]) == (404, '/v1/nothing\n"')
    assert key not in log.read_text() + (tmp_path / "old").read_text()


def test_a_log_that_cannot_be_written_costs_no_answer(counted, tmp_path):
    log = tmp_path / "logs" / "access.jsonl"
    log.parent.mkdir()

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        pass

    logging_app = access.Access(app, Flow(), log, 8)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    log.parent.rename(tmp_path / "old")
    for _ in range(2):
        asyncio.run(logging_app(scope, None, send))
    log.parent.mkdir()
    asyncio.run(logging_app(scope, None, send))
    assert line_of(log)["status"] == 200


def test_a_problem_and_the_log_have_the_id_of_the_request(endpoint, assert_problem, caplog):
    with endpoint() as api:
        headers = {"X-Request-ID": "a-1"}
        assert assert_problem(api.client.get("/v1/nothing", headers=headers), 404)["request_id"] == "a-1"
        refused = api.client.get("/v1/limits", headers=headers | {"Via": "x"})
        assert assert_problem(refused, 403)["request_id"] == "a-1"
        assert len(assert_problem(api.client.get("/v1/nothing"), 404)["request_id"]) == 32
        api.tagger.remote = None  # a bug
        with caplog.at_level(logging.ERROR):
            failed = api.client.post("/v1/annotate", json={"text": TEXT}, headers=headers)
        assert assert_problem(failed, 500)["request_id"] == "a-1"
        assert "request a-1 failed" in caplog.text


def test_a_refusal_says_when_a_place_will_be_free(endpoint, assert_problem):
    """From how long the posts take that have one; not always the same second."""
    with endpoint(max_in_flight=2, max_batch_posts=2) as api, ThreadPoolExecutor(2) as pool:

        def refused_after(seconds):
            asking = [pool.submit(api.client.post, "/v1/annotate", json={"text": TEXT}) for _ in range(2)]
            while api.service.flow.in_flight < 2:
                time.sleep(0.01)
            time.sleep(seconds)
            refused = api.client.post("/v1/annotate", json={"text": TEXT})
            assert_problem(refused, 429)
            assert {each.result().status_code for each in asking} == {200}
            return int(refused.headers["retry-after"])

        api.tagger.pause_s = 0.3
        assert refused_after(0) == 1
        api.tagger.pause_s = 2.5
        assert refused_after(2.1) == 3


def test_facts_about_the_server(endpoint):
    with endpoint() as api:
        version = api.client.get("/version").json()
        assert version == {"version": "0.1.0", "api": "v1", "run_id": "run"}
        models = {model["role"]: model["reference"] for model in api.client.get("/v1/models").json()["models"]}
        assert models.keys() == {"tagger", "tagger_encoder"}
        assert models["tagger"].startswith("nano:tagger@")


def test_the_limits_promise_what_fits(endpoint):
    """The largest image beside the longest texts, in the longest form of both, is taken."""
    with endpoint(max_body_bytes=2**20) as api:
        limits = api.client.get("/v1/limits").json()
        size = limits["max_image_bytes"]
        assert size < 2**20 < api.service.config.image.max_bytes
        text = "\U0001f600" * limits["max_text_chars"]
        import base64

        body = {"text": text, "caption": text, "knowledge": text, "post_id": "a" * 512}
        body["image"] = base64.b64encode(b"x" * size).decode()
        sent = json.dumps(body).encode()  # four bytes of UTF-8 become twelve
        assert len(sent) <= limits["max_body_bytes"]
        answer = api.client.post("/v1/annotate", content=sent, headers={"Content-Type": "application/json"})
        assert answer.status_code == 200, answer.text


def test_nothing_of_a_post_makes_a_line_of_its_own_in_the_log(endpoint, caplog, monkeypatch):
    with endpoint() as api:
        ask = api.tagger.remote

        async def failing(posts, settings, only):
            answers = await ask(posts, settings, only)
            answers[0].post.fail("tag", ProblemKind.STAGE_FAILED, "failed on\nseveral lines")
            return answers

        monkeypatch.setattr(api.tagger, "remote", failing)
        with caplog.at_level(logging.ERROR):
            api.client.post("/v1/annotate", json={"text": TEXT, "post_id": "mine\nERROR all is lost"})
    (message,) = caplog.messages
    assert "all is lost" in message
    assert "several lines" in message
    assert len(message.splitlines()) == 1
