"""The package's clients, against the real service, against its API alone, and against one that is out of order."""

from __future__ import annotations

import asyncio
import json
import math
import pickle
import runpy
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import fields
from email.utils import format_datetime, formatdate
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from inspect import isawaitable
from itertools import islice
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gem_ray
from gem_ray import client as client_module
from gem_ray.client import Annotation, Client, ClientError, Limits
from gem_ray.data.shards import write_posts
from gem_ray.serving import messages
from gem_ray.taxonomy import FMNERG_TREE

TEXT = "Paris tonight"
ROOT = Path(__file__).parents[2]


class InALoop:
    """The asynchronous client, asked as the other."""

    def __init__(self, *args, **options):
        self._runner = asyncio.Runner()
        self._client = self._runner.run(self._call(gem_ray.AsyncClient, *args, **options))

    @staticmethod
    async def _call(function, *args, **options):
        value = function(*args, **options)
        if isinstance(value, AsyncIterator):
            return [item async for item in value]
        return await value if isawaitable(value) else value

    def __getattr__(self, name):
        return lambda *args, **options: self._runner.run(self._call(getattr(self._client, name), *args, **options))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
        self._runner.close()


KINDS = {"sync": gem_ray.Client, "async": InALoop}


def test_the_example_runs(service, posts, tmp_path, monkeypatch, capsys):
    write_posts(posts[:8], tmp_path / "posts")
    monkeypatch.setattr(sys, "argv", ["client.py", str(tmp_path / "posts"), service.url])
    runpy.run_path(str(ROOT / "examples" / "client.py"), run_name="__main__")
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("degraded [('Taylor Swift', '")  # it has no image
    assert [line.split()[0] for line in others[:8]] == ["ok"] * 8
    assert sorted(int(line.split()[0]) for line in others[8:]) == list(range(8))
    assert all(line.endswith(" s waited") for line in others[8:])


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


@pytest.fixture(scope="module")
def api(endpoint):
    with endpoint(max_batch_posts=3, max_body_bytes=10_000) as api:
        yield api


@pytest.fixture
def client(api, make):
    with make(f"http://127.0.0.1:{api.port}", retries=0) as client:
        yield client


def test_a_post_with_an_image_in_memory_or_in_a_file(service, posts, tmp_path, make):
    file = tmp_path / "image"
    file.write_bytes(posts[0].image_bytes)
    with make(service.url) as client:
        answers = [
            client.annotate(posts[0].text, image, post_id="a", heatmaps=True)
            for image in (posts[0].image_bytes, file, str(file))
        ]
    first, *others = answers
    assert isinstance(first, Annotation)
    assert all(found(other) == found(first) for other in others)
    assert first.post_id == "a"
    assert first.models["tagger"].startswith("nano:tagger@")
    seen = [entity for entity in first.entities if entity.point]
    assert seen
    assert all(len(entity.heatmap.data) == entity.heatmap.height * entity.heatmap.width for entity in seen)


def found(annotation):
    return [(entity.text, entity.fine, entity.box) for entity in annotation.entities]


def test_batches_of_any_number_are_cut_to_the_limits(api, client):
    """Of posts, and of bytes: a post of 4,000 characters leaves no room for a third."""
    asked = [{"text": f"{TEXT} {index}", "post_id": str(index)} for index in range(8)]
    asked += [{"text": f"{TEXT} {'a' * 4000}", "post_id": str(index)} for index in range(8, 12)]
    batch = client.annotate_batch(asked)
    assert [annotation.post_id for annotation in batch] == [str(index) for index in range(12)]
    assert all(annotation.entities[0].fine == "city" for annotation in batch)
    streamed = dict(client.stream(asked))
    assert [streamed[index].post_id for index in range(12)] == [str(index) for index in range(12)]
    assert client.annotate_batch([]) == []
    assert list(client.stream([])) == []


def test_facts(client):
    assert client.taxonomy() == {name: list(fine) for name, fine in FMNERG_TREE.items()}
    limits = client.limits()
    assert isinstance(limits, Limits)
    assert (limits.max_batch_posts, limits.max_body_bytes) == (3, 10_000)


def test_a_refusal_is_an_error_with_the_services_words(client):
    with pytest.raises(ClientError, match=r"422 Unprocessable .*: text is empty") as caught:
        client.annotate("   ")
    assert caught.value.status == 422
    with pytest.raises(ClientError) as caught:
        client.annotate_batch([{"text": "a" * 20_000}])
    assert caught.value.status == 413


def test_an_answer_may_say_more_than_is_known(api):
    row = api.client.post("/v1/annotate", json={"text": TEXT}).json()
    row["entities"][0]["colour"] = row["mood"] = "blue"
    assert found(Annotation.from_json(row)) == [("Paris", "city", None)]


def test_the_client_knows_every_field_of_an_answer():
    told = {"Problem": messages.PostProblemOut, "Limits": messages.Limits}
    for name in ("Annotation", "Entity", "Candidate", "Point", "Box", "HeatMap"):
        told[name] = getattr(messages, f"{name}Out")
    for name, model in told.items():
        assert {field.name for field in fields(getattr(client_module, name))} == {*model.model_fields}, name


def test_the_client_alone_needs_httpx_alone(tmp_path):
    """The distribution `gem-ray-client`, which is one module; nothing of Ray, torch or Arrow is there."""
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", target]
    source = shutil.copytree(ROOT / "client", tmp_path / "client")  # a build leaves files there
    subprocess.run([*command, source], check=True, timeout=120, capture_output=True)
    assert (target / "gem_ray_client" / "py.typed").exists()
    code = """
import sys
import gem_ray_client
assert gem_ray_client.Client and gem_ray_client.AsyncClient
heavy = {"torch", "ray", "transformers", "pyarrow", "numpy", "pydantic", "gem_ray"} & sys.modules.keys()
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=target, timeout=60)
    code = code.replace("gem_ray_client", "gem_ray.client").replace(', "gem_ray"}', "}")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


class OutOfOrder(BaseHTTPRequestHandler):
    """Answers what the plan says, one after the other."""

    def do_GET(self):
        self.server.times.append(time.monotonic())
        self.server.auth.append(self.headers["Authorization"])
        status, headers = self.server.plan.pop(0)
        if status is None:
            return  # hangs up
        body = json.dumps(
            {"coarse": {"k": []}} if status == 200 else {"title": "No", "status": status, "detail": "why"}
        ).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def flaky(monkeypatch, make):
    monkeypatch.setattr("gem_ray.client._FIRST_PAUSE_S", 0.01)
    server = ThreadingHTTPServer(("127.0.0.1", 0), OutOfOrder)
    server.plan, server.times, server.auth = [], [], []
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    server.client = make(f"http://127.0.0.1:{server.server_port}", retries=3)
    with server.client:
        yield server
    server.shutdown()
    server.server_close()


def test_what_will_pass_is_tried_again(flaky):
    flaky.plan += [(503, {}), (None, {}), (429, {}), (200, {})]
    assert flaky.client.taxonomy() == {"k": []}


def test_the_service_says_how_long_to_wait(flaky):
    flaky.plan += [(429, {"Retry-After": "1"}), (200, {})]
    flaky.client.taxonomy()
    assert flaky.times[1] - flaky.times[0] >= 1


def test_a_proxy_may_say_until_when(flaky):
    began, now = time.monotonic(), time.time()
    until = math.ceil(now) + 1
    flaky.plan += [(429, {"Retry-After": formatdate(until, usegmt=True)}), (429, {"Retry-After": "soon"}), (200, {})]
    flaky.client.taxonomy()
    assert flaky.times[1] - began > until - now - 0.1
    assert flaky.times[2] - flaky.times[1] < 1  # what nobody can read is passed over


@given(st.one_of(st.text(), st.datetimes().map(format_datetime)))
def test_no_answer_makes_a_pause_longer_than_allowed(retry_after):
    with Client("http://127.0.0.1:9", max_pause_s=3) as client:
        assert 0 < client._pause_s(0, retry_after) <= 3


def test_there_is_an_end_to_trying(flaky):
    flaky.plan += [(503, {})] * 9
    with pytest.raises(ClientError, match="503 No: why"):
        flaky.client.taxonomy()
    assert len(flaky.times) == 4


def test_what_will_not_pass_is_not_tried_again(flaky):
    flaky.plan += [(401, {}), (200, {})]
    with pytest.raises(ClientError, match="401"):
        flaky.client.taxonomy()
    assert len(flaky.times) == 1


def test_nobody_there(make):
    with make("http://127.0.0.1:9", retries=0) as client, pytest.raises(ClientError, match="no answer"):
        client.taxonomy()


def test_the_package_has_nothing_else():
    with pytest.raises(AttributeError, match="Klient"):
        _ = gem_ray.Klient


ENTITY = dict.fromkeys(messages.EntityOut.model_fields) | {"candidates": []}
ROW = dict.fromkeys(messages.AnnotationOut.model_fields) | {
    "entities": [ENTITY],
    "problems": [],
    "models": [],
}
LIMITS = dict.fromkeys(messages.Limits.model_fields, 10000) | {"max_batch_posts": 3}


class Parts(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body, and how it ends."""

    def __init__(self, data, error=None):
        self.data, self.error = data, error

    def __iter__(self):
        yield self.data
        if self.error:
            raise self.error

    async def __aiter__(self):
        for part in self:
            yield part


@pytest.fixture
def against(monkeypatch, make):
    """A client of what a function answers to each request."""
    monkeypatch.setattr("gem_ray.client._FIRST_PAUSE_S", 0)

    def client(handler, **options):
        transport = httpx.MockTransport(handler)
        for kind, of_httpx in ((gem_ray.Client, httpx.Client), (gem_ray.AsyncClient, httpx.AsyncClient)):
            monkeypatch.setattr(kind, "_transport", partial(of_httpx, transport=transport))
        return make("http://service", **options)

    return client


def lines_of(request):
    return [
        json.dumps({"index": index} | ROW | {"text": post["text"]}).encode() + b"\n"
        for index, post in enumerate(json.loads(request.content)["posts"])
    ]


ENDS = [None, httpx.RemoteProtocolError("cut"), httpx.ReadTimeout("slow"), httpx.DecodingError("bad gzip")]
DAMAGE = st.tuples(st.integers(0, 400), st.sampled_from([b"", b"<html>", b'{"index":9}\n', b'{"index":-1}\n', b"\xff"]))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damages=st.lists(st.tuples(DAMAGE, st.sampled_from(ENDS)), max_size=6), count=st.integers(1, 5))
def test_however_answers_are_cut_each_post_is_answered_once_or_named(against, damages, count):
    """An answer may end anywhere, cleanly or not, with nonsense at its end."""

    def handler(request):
        if request.method == "GET":
            return httpx.Response(200, json=LIMITS)
        data, end = b"".join(lines_of(request)), None
        if left:
            (at, nonsense), end = left.pop(0)
            data = data[: at * 5] + nonsense
        return httpx.Response(200, stream=Parts(data, end))

    texts = [str(number) for number in range(count)]
    for retries in (0, 10):
        left = [*damages]
        seen, failure = {}, None
        with against(handler, retries=retries) as client:
            try:
                for index, annotation in client.stream({"text": text} for text in texts):
                    assert index not in seen
                    seen[index] = annotation.text
            except ClientError as error:
                failure = str(error)
        if failure is None:
            assert seen == dict(enumerate(texts))
        else:
            assert retries == 0
            assert "no answer to the post" in failure


ANSWERS = {
    "html": {"html": "<html>log in</html>"},
    "another shape": {"json": {"ok": True}},
    "no object": {"json": [1]},
    "nothing": {"content": b""},
    "no text": {"content": b"\xff\xfe\xfd"},
    "deep": {"content": b"[" * 100_000},
    "bad gzip": {"stream": Parts(b"no gzip"), "headers": {"Content-Encoding": "gzip"}},
    "cut": {"stream": Parts(b"{", httpx.RemoteProtocolError("cut"))},
}
CALLS = {
    "annotate": lambda client: client.annotate(TEXT),
    "annotate_batch": lambda client: client.annotate_batch([{"text": TEXT}]),
    "stream": lambda client: list(client.stream([{"text": TEXT}])),
    "taxonomy": lambda client: client.taxonomy(),
    "limits": lambda client: client.limits(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("has_limits", [True, False])
def test_what_no_service_of_ours_answers_is_a_client_error(against, call, answer, has_limits):
    def handler(request):
        is_limits = has_limits and request.url.path == "/v1/limits" and call != "limits"
        return httpx.Response(200, **({"json": LIMITS} if is_limits else ANSWERS[answer]))

    with against(handler, retries=1) as client, pytest.raises(ClientError):
        CALLS[call](client)


@pytest.mark.parametrize("status", [429, 503, 504])
@pytest.mark.parametrize("times", [1, 2])
def test_posts_that_the_service_is_too_busy_for_are_asked_for_again(against, status, times):
    """A line says so of one post; the others of its batch are answered."""

    def handler(request):
        if request.method == "GET":
            return httpx.Response(200, json=LIMITS)
        lines = lines_of(request)
        asked.append(len(lines))
        if len(asked) <= times:
            lines[-1] = json.dumps({"index": len(lines) - 1, "problem": {"status": status, "detail": "busy"}}).encode()
        return httpx.Response(200, content=b"".join(lines))

    asked = []
    with against(handler, retries=1) as client:
        answers = dict(client.stream({"text": text} for text in "abc"))
    assert asked == [3, 1]
    assert [answers[0].text, answers[1].text] == ["a", "b"]
    assert (answers[2].text == "c") if times == 1 else (answers[2].status == status)


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9"])
def test_no_proxy_stands_between_programs_of_one_machine(make, flaky, monkeypatch, proxy):
    monkeypatch.setenv("HTTP_PROXY", proxy)  # httpx alone knows none of SOCKS
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    flaky.plan += [(200, {})]
    with make(f"http://127.0.0.1:{flaky.server_port}", retries=0) as client:
        assert client.taxonomy() == {"k": []}


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_statuses_that_pass_are_tried_again(against, status):
    answers = iter([httpx.Response(status), httpx.Response(200, json={"coarse": {}})])
    with against(lambda _: next(answers), retries=1) as client:
        assert client.taxonomy() == {}


def test_a_redirection_is_told(against):
    """From http to https, mostly; what was posted is not sent elsewhere."""
    there = {"Location": "https://service/v1/annotate"}
    with (
        against(lambda _: httpx.Response(301, headers=there, html="<h1>Moved</h1>")) as client,
        pytest.raises(ClientError, match=r"301: go to https://service/v1/annotate; is base_url right\?") as caught,
    ):
        client.annotate(TEXT)
    assert caught.value.status == 301


def test_a_client_may_try_for_days(against, monkeypatch):
    monkeypatch.setattr("gem_ray.client._FIRST_PAUSE_S", 0.5)
    answers = [httpx.Response(503)] * 2000 + [httpx.Response(200, json={"coarse": {}})]
    with against(lambda _: answers.pop(0), retries=3000, max_pause_s=0) as client:
        assert client.taxonomy() == {}


def test_posts_are_taken_a_request_at_a_time_and_what_was_answered_is_kept(against):
    taken = []

    def handler(request):
        if request.method == "GET":
            return httpx.Response(200, json=LIMITS)
        posts = json.loads(request.content)["posts"]
        assert len(taken) <= int(posts[-1]["text"]) + 2
        if posts[0]["text"] == "6":
            return httpx.Response(413)
        return httpx.Response(200, json={"annotations": [ROW | {"text": post["text"]} for post in posts]})

    def posts():
        for number in range(100):
            taken.append(number)
            yield {"text": str(number)}

    with against(handler) as client, pytest.raises(ClientError) as caught:
        client.annotate_batch(posts())
    assert [annotation.text for annotation in caught.value.answered] == list("012345")
    assert caught.value.status == 413
    taken.clear()
    with against(handler) as client, pytest.raises(ClientError, match="post at 4 cannot be sent") as caught:
        client.annotate_batch([*islice(posts(), 4), {"text": "4", "image": "/there/is/none"}])
    assert len(caught.value.answered) == 3


def test_what_is_missing_in_rows_of_pandas_is_not_sent(against):
    sent = []

    def handler(request):
        if request.method == "GET":
            return httpx.Response(200, json=LIMITS)
        sent.extend(json.loads(request.content)["posts"])
        return httpx.Response(200, json={"annotations": [ROW] * 2})

    rows = pd.DataFrame({"text": ["Paris", "Rome"], "caption": [None, "a view"], "image_url": [float("nan")] * 2})
    for table in (rows, rows.convert_dtypes()):
        sent.clear()
        with against(handler) as client:
            client.annotate_batch(table.to_dict("records"))
        assert sent == [{"text": "Paris"}, {"text": "Rome", "caption": "a view"}]


def test_arrays_and_their_numbers_are_sent_as_their_values(against):
    """As pandas gives the lists and integers of a Parquet file."""
    sent = []

    def handler(request):
        sent.append(json.loads(request.content))
        return httpx.Response(200, json=ROW)

    with against(handler) as client:
        client.annotate("Paris", tokens=np.array(["Paris"]), post_id=np.int64(7))
    assert sent == [{"text": "Paris", "tokens": ["Paris"], "post_id": 7}]


@pytest.mark.parametrize(
    ("posts", "words"),
    [
        ({"text": "Paris"}, "it is str, not a mapping"),
        (["Paris"], "it is str, not a mapping"),
        ([{"text": "Paris", "image": np.zeros((4, 4, 3), np.uint8)}], "image is ndarray, not the bytes or the path"),
        ([{"text": "Paris", "caption": object()}], "object cannot be sent"),
    ],
)
def test_what_is_no_post_is_named(against, posts, words):
    with against(lambda _: httpx.Response(200, json=LIMITS)) as client, pytest.raises(ClientError, match=words):
        client.annotate_batch(posts)


def test_posts_may_come_from_an_asynchronous_generator(api):
    async def posts():
        for number in range(4):
            yield {"text": TEXT, "post_id": str(number)}

    async def ask():
        async with gem_ray.AsyncClient(f"http://127.0.0.1:{api.port}", retries=0) as client:
            batch = await client.annotate_batch(posts())
            return [each.post_id for each in batch], sorted([index async for index, _ in client.stream(posts())])

    assert asyncio.run(ask()) == (["0", "1", "2", "3"], [0, 1, 2, 3])


def test_an_asynchronous_client_outlives_an_event_loop(api):
    """As in a page or a notebook that calls `asyncio.run` for each question."""
    client = gem_ray.AsyncClient(f"http://127.0.0.1:{api.port}", retries=0)
    statuses = [asyncio.run(client.annotate(TEXT)).status for _ in range(3)]
    assert statuses == ["degraded"] * 3
    asyncio.run(client.close())
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(client.annotate(TEXT))


@pytest.mark.parametrize("kind", [gem_ray.Client, gem_ray.AsyncClient])
def test_a_client_can_go_to_another_process(api, kind):
    """In the closure of a function that Ray sends to its workers, too."""
    client = pickle.loads(pickle.dumps(kind(f"http://127.0.0.1:{api.port}", retries=0)))
    limits = client.limits()
    assert (asyncio.run(limits) if isawaitable(limits) else limits).max_batch_posts == 3


SECRET = "SECRET"


@pytest.mark.parametrize(
    "arguments",
    [
        {"api_key": f"gem-{SECRET}\n"},
        {"api_key": f"gem-{SECRET} x"},
        {"api_key": f"{SECRET}\u0416"},
        {"base_url": "127.0.0.1:8000"},
        {"base_url": "localhost"},
        {"base_url": "ftp://host"},
        {"base_url": "http://"},
        {"base_url": f"http://host/?key={SECRET}"},
        {"base_url": f"http://host#{SECRET}"},
        {"base_url": f"http://bob:{SECRET}@host:port"},
        {"base_url": f"http://bob:{SECRET}@host", "api_key": "gem-key"},
    ],
)
def test_an_address_or_key_that_can_be_none_is_refused_at_once_and_not_repeated(make, arguments):
    with pytest.raises(ValueError, match=r"base_url|api_key") as caught:
        make(**arguments)
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_password_in_the_address_is_sent_and_never_told(make, flaky):
    flaky.plan += [(None, {})]
    address = f"http://bob:{SECRET}@127.0.0.1:{flaky.server_port}"
    with (
        make(address, retries=0) as client,
        pytest.raises(ClientError, match=r"http://127.0.0.1.* no answer") as caught,
    ):
        client.taxonomy()
    assert SECRET not in str(caught.value)
    flaky.plan += [(200, {})]
    with make(address, retries=0) as client:
        client.taxonomy()
    assert flaky.auth[-1] == "Basic Ym9iOlNFQ1JFVA=="
