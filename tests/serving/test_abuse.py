"""Hostile bodies, floods and slow senders: what they cost the others is bounded."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import resource
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from http.client import HTTPResponse
from itertools import cycle

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private import constants

from gem_ray.benchmarks.abuse import FORM, hostile_bodies, hostile_forms
from gem_ray.config import ServingConfig
from gem_ray.ray_private.serve import BodyQueue
from gem_ray.serving import bodies, proxy, uploads
from gem_ray.serving.bodies import _JsonCounter
from gem_ray.serving.flow import BusyError
from gem_ray.serving.problems import ProblemError

TEXT = "Paris tonight"
POST = b"POST /v1/annotate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
PROMPT_S = 0.5  # usually under 0.1; sender and server share this process, and machines are noisy
MIB = 2**20


@pytest.fixture(scope="module")
def api(endpoint):
    with endpoint(body_timeout_s=1, max_in_flight=32) as api:
        assert api.client.post("/v1/annotate", json={"text": TEXT}).status_code == 200
        yield api


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


SIZE = 23 * MIB
HOSTILE, HOSTILE_FORMS = hostile_bodies(SIZE), hostile_forms(SIZE)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("path", ["/v1/annotate", "/v1/annotate/batch"])
def test_a_hostile_body_holds_nobody_up_and_takes_little(api, assert_problem, name, path):
    body = HOSTILE[name]
    before = peak_bytes()
    with api.health_watched() as seconds:
        answer = api.client.post(path, content=body, headers={"Content-Type": "application/json"})
    if answer.status_code != 200:
        assert_problem(answer, answer.status_code)
        assert answer.status_code in (413, 422)
    else:
        assert len(answer.json()["annotations"]) == 1
    assert max(seconds) < PROMPT_S
    assert peak_bytes() - before < 8 * len(body)


def test_posts_are_counted_before_they_are_parsed(api, assert_problem):
    limit = api.client.get("/v1/limits").json()["max_batch_posts"]
    posts = [{"text": TEXT, "image": base64.b64encode(b"{" * 1000).decode(), "caption": '{"posts": [{'}] * limit
    assert api.client.post("/v1/annotate/batch", json={"posts": posts}).status_code == 200
    assert_problem(api.client.post("/v1/annotate/batch", json={"posts": [*posts, posts[0]]}), 413)


json_values = st.recursive(
    st.none() | st.integers() | st.text('"\\\\{}[],:u00a\u00e9', max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('"\\\\{a', max_size=4), inner, max_size=4),
    max_leaves=12,
)


@given(value=json_values, size=st.integers(1, 9), is_ascii=st.booleans())
def test_objects_are_counted_wherever_the_parts_of_a_body_end(value, size, is_ascii):
    """With quotes, escapes and braces in strings; `size` bytes at a time."""
    body = json.dumps(value, ensure_ascii=is_ascii).encode()
    dictionaries = 0

    def count(pairs):
        nonlocal dictionaries
        dictionaries += 1

    json.loads(body, object_pairs_hook=count)

    def feed(posts):
        counter = _JsonCounter(posts, escapes=10_000)
        for start in range(0, len(body), size):
            counter.add(body[start : start + size])

    feed(max(dictionaries - 1, 1))
    if dictionaries > 2:
        with pytest.raises(ProblemError):
            feed(dictionaries - 2)


@pytest.mark.parametrize("name", HOSTILE_FORMS)
def test_a_hostile_form_holds_nobody_up_and_takes_little(api, assert_problem, name):
    body, before = HOSTILE_FORMS[name], peak_bytes()
    with api.health_watched() as seconds:
        answer = api.client.post("/v1/annotate", content=body, headers={"Content-Type": FORM})
    assert answer.status_code in (413, 422)
    assert_problem(answer, answer.status_code)
    assert max(seconds) < PROMPT_S
    assert peak_bytes() - before < 8 * len(body)


def test_others_have_their_turn_between_the_parts_of_a_body_that_is_there_at_once():
    """Serve's proxy hands over all that has come meanwhile."""
    parts, turns, seen = 50, 0, []

    async def receive():
        return {"type": "http.request", "body": b"a", "more_body": len(seen) < parts - 1}

    async def others():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def scenario():
        watching = asyncio.create_task(others())
        with uploads.Uploads(ServingConfig()).limited(receive, "caller") as limited:
            while not seen or seen[-1]["more_body"]:
                seen.append(await limited())
        watching.cancel()

    asyncio.run(scenario())
    assert len(seen) == parts
    assert turns >= parts - 1


def test_one_large_body_is_parsed_at_a_time_and_small_ones_do_not_wait_for_it(api, monkeypatch):
    inside, most = Counter(), Counter()
    large_is_inside, small_is_done = threading.Event(), threading.Event()
    parse = bodies._parse

    def parse_seen(model, body):
        kind = "large" if len(body) > MIB else "small"
        inside[kind] += 1
        most[kind] = max(most[kind], inside[kind])
        if kind == "large":
            large_is_inside.set()
            small_is_done.wait(20)
        try:
            return parse(model, body)
        finally:
            inside[kind] -= 1

    monkeypatch.setattr(bodies, "_parse", parse_seen)
    large = {"text": TEXT, "image": base64.b64encode(b"x" * MIB).decode()}
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(api.client.post, "/v1/annotate", json=large) for _ in range(4)]
        assert large_is_inside.wait(20)
        assert api.client.post("/v1/annotate", json={"text": TEXT}).status_code == 200
        assert most == {"large": 1, "small": 1}
        small_is_done.set()
        assert {each.result().status_code for each in asked} == {200}
    assert most["large"] == 1


def first_line(connection):
    return connection.recv(4096).partition(b"\r\n")[0]


@pytest.fixture
def short_first_parts(monkeypatch):
    monkeypatch.setattr(proxy, "FIRST_PART_S", 1)


def test_bodies_that_do_not_come_take_no_place_and_are_cut_off(api, short_first_parts):
    """Places are for posts that are there."""
    with ExitStack() as stack, api.health_watched() as seconds:
        slow = [stack.enter_context(api.connect(POST % 100 + b"{")) for _ in range(100)]
        started = time.monotonic()
        answers = [api.client.post("/v1/annotate", json={"text": TEXT}) for _ in range(20)]
        assert {answer.status_code for answer in answers} == {200}
        assert time.monotonic() - started < 1
        assert {first_line(connection) for connection in slow} == {b"HTTP/1.1 408 Request Timeout"}
        assert 0.5 < time.monotonic() - started < 3
    assert max(seconds) < PROMPT_S


def test_a_body_that_comes_byte_by_byte_is_cut_off(api, short_first_parts):
    """However regularly: it is the rate that counts."""
    with api.connect(POST % 1000 + b"{") as connection:
        connection.settimeout(0.05)
        started = time.monotonic()
        while time.monotonic() - started < 10:
            try:
                assert first_line(connection) == b"HTTP/1.1 408 Request Timeout"
                break
            except TimeoutError:
                connection.sendall(b" ")
        assert time.monotonic() - started < 3


@given(sizes=st.lists(st.integers(0, 300), max_size=20), pauses=st.lists(st.booleans(), min_size=1, max_size=8))
def test_a_body_comes_to_the_ingress_in_order_and_in_bounded_parts(sizes, pauses):
    """Whoever is faster, client or ingress; and the proxy holds no more of it than a part."""
    part, largest = 256, max(sizes, default=0)
    sent = [{"type": "http.request", "body": bytes([n]) * size} for n, size in enumerate(sizes)]
    sent.append({"type": "http.disconnect"})
    put, got = 0, []

    async def client(queue, pausing):
        nonlocal put
        for message in sent:
            await queue(message)
            put += len(message.get("body", b""))
            if next(pausing):
                await asyncio.sleep(0)
        queue.close()

    async def ingress(queue, pausing):
        while not got or got[-1]["type"] != "http.disconnect":
            await queue.wait_for_message()
            handed = queue.get_messages_nowait()
            assert sum(len(message.get("body", b"")) for message in handed) < part + largest
            got.extend(handed)
            assert put - sum(len(message.get("body", b"")) for message in got) < part + largest
            if next(pausing):
                await asyncio.sleep(0)

    async def scenario():
        queue = BodyQueue(part)
        await asyncio.wait_for(asyncio.gather(client(queue, cycle(pauses)), ingress(queue, cycle(pauses[::-1]))), 10)
        await queue.wait_for_message()  # at once, as no more come
        assert queue.get_messages_nowait() == []

    asyncio.run(scenario())
    assert got == sent


def gathering(app, receive, send=None):
    return proxy.GatherBody(app)({"type": "http", "headers": [(b"x-request-id", b"a-1")]}, receive, send)


@given(sizes=st.lists(st.integers(0, 40_000), max_size=20), is_cut_off=st.booleans())
def test_a_body_is_passed_on_whole_in_parts_that_are_worth_a_call(sizes, is_cut_off):
    """Who leaves before the first part is there causes no call at all."""
    sent = [{"type": "http.request", "body": b"x" * size, "more_body": True} for size in sizes]
    end = {"type": "http.disconnect"} if is_cut_off else {"type": "http.request", "body": b"", "more_body": False}
    coming, seen = iter([*sent, end]), []

    async def receive():
        return next(coming)

    async def app(scope, receive, send):
        while not seen or seen[-1].get("more_body"):
            seen.append(await receive())

    asyncio.run(gathering(app, receive))
    assert len(seen) <= sum(sizes) // proxy.GATHER_BYTES + 2
    if is_cut_off:
        assert bool(seen) == (sum(sizes) >= proxy.GATHER_BYTES)
        assert not seen or seen[-1]["type"] == "http.disconnect"
    else:
        assert sum(len(message["body"]) for message in seen) == sum(sizes)


def dripping(first, pause_s=0.01):
    """A `receive`: something, and then a byte now and then."""
    sent = iter([first])

    async def receive():
        body = next(sent, None)
        if body is None:
            await asyncio.sleep(pause_s)
        return {"type": "http.request", "body": body or b" ", "more_body": True}

    return receive


def test_who_sends_slowly_costs_the_ingress_nothing(monkeypatch):
    """Only the proxy, which refuses at moments that do not coincide."""
    monkeypatch.setattr(proxy, "FIRST_PART_S", 0.4)
    answers, refused_at = [], []

    async def app(scope, receive, send):
        raise AssertionError("the ingress was called")

    async def send(message):
        answers.append(message)
        if message["type"] == "http.response.start":
            refused_at.append(time.monotonic())

    async def scenario():
        await asyncio.gather(*(gathering(app, dripping(b"{"), send) for _ in range(50)))

    asyncio.run(scenario())
    starts, texts = answers[::2], [json.loads(answer["body"]) for answer in answers[1::2]]
    assert {start["status"] for start in starts} == {408}
    headers = {name.lower(): value for name, value in starts[0]["headers"]}
    assert headers[b"content-type"] == b"application/problem+json"
    assert (headers[b"connection"], headers[b"x-request-id"]) == (b"close", b"a-1")
    assert texts[0].keys() == {"type", "title", "status", "detail", "request_id"}
    assert max(refused_at) - min(refused_at) > 0.02


def test_later_parts_of_a_body_that_comes_slowly_are_few(monkeypatch):
    monkeypatch.setattr(proxy, "GATHER_S", 0.2)
    seen = []

    async def app(scope, receive, send):
        while sum(len(message["body"]) for message in seen) < proxy.GATHER_BYTES + 60:
            seen.append(await receive())

    asyncio.run(gathering(app, dripping(b" " * proxy.GATHER_BYTES)))
    assert len(seen) < 20


def test_the_proxy_holds_a_bounded_number_of_requests(monkeypatch):
    """The one that has waited longest makes room; one whose body is there never waits."""
    monkeypatch.setattr(proxy, "MAX_HELD", 5)
    statuses, calls = Counter(), 0

    async def app(scope, receive, send):
        nonlocal calls
        calls += 1

    async def whole():
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message):
        statuses[message.get("status")] += 1

    async def scenario():
        middleware = proxy.GatherBody(app)
        scope = {"type": "http", "headers": []}
        slow = [asyncio.create_task(middleware(scope, dripping(b"{"), send)) for _ in range(50)]
        await asyncio.sleep(0.1)
        assert sum(not task.done() for task in slow) == 5
        assert not any(task.done() for task in slow[-5:])
        for _ in range(20):
            await middleware(scope, whole, send)
        for task in slow:
            task.cancel()

    asyncio.run(scenario())
    assert (calls, statuses[408] >= 45) == (20, True)


@pytest.mark.parametrize("body", [b"{}", b" " * 100_000 + b"{}"])
def test_a_client_that_expects_to_be_told_to_continue_is_told(api, body):
    head = (POST % len(body)).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n")
    with api.connect(head) as connection:
        assert first_line(connection) == b"HTTP/1.1 100 Continue"
        connection.sendall(body)
        assert first_line(connection).startswith(b"HTTP/1.1 422 ")


def test_a_large_body_over_a_slow_line_arrives(api):
    """Four times slower than the time for a small body allows."""
    body = json.dumps({"text": TEXT, "image": base64.b64encode(b"x" * 300_000).decode()}).encode()

    def slowly():
        for start in range(0, len(body), len(body) // 20):
            time.sleep(0.15)
            yield body[start : start + len(body) // 20]

    headers = {"Content-Type": "application/json"}
    assert api.client.post("/v1/annotate", content=slowly(), headers=headers).status_code == 200


def asked_until(status, api, post):
    """What a post is answered once what was sent before it has arrived, or gone."""
    deadline = time.monotonic() + 10
    while True:
        answer = api.client.post("/v1/annotate", json=post)
        if answer.status_code == status or time.monotonic() > deadline:
            return answer
        time.sleep(0.05)


def test_bodies_on_their_way_are_bounded_in_number_and_in_bytes(endpoint, monkeypatch, assert_problem):
    monkeypatch.setattr(uploads, "MAX_READ_AT_ONCE", 3)
    post = {"text": TEXT, "image": base64.b64encode(b"x" * 600_000).decode()}
    with endpoint(max_body_bytes=MIB, max_bodies_bytes=MIB) as api, ExitStack() as stack:
        assert api.client.post("/v1/annotate", json=post).status_code == 200
        for _ in range(3):
            stack.enter_context(api.connect(POST % MIB + b" " * 150_000))
        assert_problem(asked_until(429, api, {"text": TEXT}), 429)
        stack.close()
        assert asked_until(200, api, post).status_code == 200
        for pause_s in (0.2, 1, 5):  # a post that comes before the other body is not the one that is refused
            with api.connect(POST % MIB + b" " * 700_000):
                time.sleep(pause_s)
                refused, small = (api.client.post("/v1/annotate", json=each) for each in (post, {"text": TEXT}))
            if refused.status_code == 429:
                break
        assert_problem(refused, 429)
        assert small.status_code == 200


def uploading(limits, caller, sizes):
    """Uploads a body's parts, each after its pause, and holds them; gives what came of it."""
    coming = iter(sizes)

    async def receive():
        pause_s, size = next(coming, (0, None))
        await asyncio.sleep(pause_s)
        return {"type": "http.request", "body": b"x" * (size or 0), "more_body": size is not None}

    async def upload(held):
        with limits.limited(receive, caller) as limited:
            try:
                while (await limited())["more_body"]:
                    pass
            except (ProblemError, BusyError) as error:
                return getattr(error, "status", 429)
            await held.wait()
        return 200

    return upload


def test_one_caller_leaves_bytes_to_the_others():
    limits = uploads.Uploads(ServingConfig(max_body_bytes=MIB, max_bodies_bytes=8 * MIB))

    async def scenario():
        held = asyncio.Event()
        greedy = [asyncio.create_task(uploading(limits, "one", [(0, MIB)])(held)) for _ in range(11)]
        await asyncio.sleep(0.05)
        others = [asyncio.create_task(uploading(limits, "other", [(0, MIB)])(held)) for _ in range(2)]
        await asyncio.sleep(0.05)
        held.set()
        return Counter(await asyncio.gather(*greedy)), await asyncio.gather(*others)

    statuses, others = asyncio.run(scenario())
    assert statuses == {200: 6, 429: 5}
    assert others == [200, 200]


@pytest.mark.parametrize(
    ("sizes", "status"),
    [
        ([(0, MIB), (9, 1)], 408),  # stops
        ([(0, MIB), *[(0.3, 1)] * 30], 408),  # goes on by single bytes
        ([(0.1, 100_000)] * 12, 200),  # keeps up
        ([(0, MIB), (0.4, 1), (0, MIB), (0.4, 1), (0, MIB), (0.4, 1)], 200),  # pauses
    ],
)
def test_what_came_fast_earns_a_body_no_longer_pause(sizes, status):
    limits = uploads.Uploads(ServingConfig(body_timeout_s=1))

    async def scenario():
        held = asyncio.Event()
        held.set()
        started = time.monotonic()
        assert await uploading(limits, "one", sizes)(held) == status
        assert status == 200 or time.monotonic() - started < 5

    asyncio.run(scenario())


@pytest.fixture
def short_heads(monkeypatch):
    monkeypatch.setattr(proxy, "HEAD_TIMEOUT_S", 0.5)


def wait_until_closed(connection):
    with suppress(ConnectionError):
        while connection.recv(4096):
            pass


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"])
def test_a_head_that_does_not_come_is_not_waited_for(api, short_heads, sent):
    with ExitStack() as stack:
        slow = [stack.enter_context(api.connect(sent)) for _ in range(50)]
        started = time.monotonic()
        for _ in range(3):
            for connection in slow[:25] if sent else []:
                send(connection, b"a")
            time.sleep(0.1)
        assert api.client.get("/healthz").status_code == 200
        for connection in slow:
            wait_until_closed(connection)
        assert time.monotonic() - started < 2


def test_a_connection_may_rest_between_requests(api, short_heads):
    with httpx.Client(base_url=api.client.base_url) as client:
        assert client.get("/healthz").status_code == 200
        network = client.get("/healthz").extensions["network_stream"]
        time.sleep(1)
        assert client.get("/healthz").extensions["network_stream"] is network


def test_a_head_of_any_size_is_not_kept(api):
    with api.connect(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n") as connection:
        sent = 0
        while sent < 16 * MIB and send(connection, b"X-A: " + b"a" * 1000 + b"\r\n"):
            sent += 1007
        assert sent < 8 * MIB  # what the sockets hold besides


CHUNKED = b"POST /v1/annotate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("start", "repeated"),
    [
        (b"1\r\n{\r\n0\r\n", b"X-A: " + b"a" * 1000 + b"\r\n"),
        (b"1\r\n{\r\n0\r\nX-A: ", b"a" * 1000),
        (b"1\r\n{\r\n0;", b"a" * 1000),
        (b"1\r\n{\r\n1;", b"a" * 1000),
    ],
)
def test_what_comes_behind_or_between_the_pieces_of_a_body_is_not_kept(api, start, repeated):
    with api.connect(CHUNKED + start) as connection:
        sent = 0
        while sent < 16 * MIB and send(connection, repeated):
            sent += len(repeated)
        assert sent < 8 * MIB  # what the sockets hold besides


@pytest.mark.parametrize(("size", "is_read"), [(1, False), (64, True), (4096, True)])
def test_a_body_in_single_bytes_is_not_read_to_its_end(api, size, is_read):
    """Each chunk costs as much, however small: such bodies would hold everybody up."""
    chunk = b"%x\r\n%s\r\n" % (size, b" " * size)
    body = json.dumps({"text": TEXT}).encode()
    last = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    with api.connect(CHUNKED.replace(b"Host", b"Content-Type: application/json\r\nHost")) as connection:
        with suppress(ConnectionError):
            connection.sendall(chunk * (2 * MIB // len(chunk)) + last)
        try:
            status = first_line(connection)
        except ConnectionError:
            status = b""
        assert (status == b"HTTP/1.1 200 OK") == is_read, status


@pytest.mark.parametrize("repeated", [b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", POST % 2 + b"{}"])
def test_requests_of_a_connection_that_wait_for_their_turn_are_few(api, monkeypatch, repeated):
    """uvicorn would keep all that come: thousands in each part that it reads, and it reads on with every answer."""
    protocols = []
    begin = proxy.LimitedProtocol.connection_made

    def connection_made(self, transport):
        protocols.append(self)
        begin(self, transport)

    monkeypatch.setattr(proxy.LimitedProtocol, "connection_made", connection_made)
    with api.connect(repeated * 8) as connection:
        answers = b""
        while answers.count(b"HTTP/1.1 ") < 8:
            answers += connection.recv(4096)
    with api.connect() as connection:
        sent = 0
        while sent < 16 * MIB and send(connection, repeated * 1000):
            sent += len(repeated) * 1000
        assert sent < 8 * MIB  # what the sockets hold besides
    assert len(protocols) == 2
    assert len(protocols[1].pipeline) <= proxy.MAX_PIPELINED + 1


@pytest.mark.parametrize("upgrade", [b"h2c", b"websocket", b"TLS/1.0"])
@pytest.mark.parametrize("pause_s", [0, 0.05])
@pytest.mark.parametrize("is_whole", [True, False])
def test_an_upgrade_is_ignored_and_the_body_behind_it_is_read(api, upgrade, pause_s, is_whole):
    """A body that is taken for the next request could be one that a proxy has not let through."""
    body = json.dumps({"text": TEXT}).encode()
    head = b"POST /v1/annotate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %s\r\nHTTP2-Settings: AAMAAABkAAQAoAAA\r\n" % upgrade
    head += b"Content-Length: %d\r\n\r\n" % len(body) if is_whole else b"Transfer-Encoding: chunked\r\n\r\n"
    sent = body if is_whole else b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    with api.connect() as connection:
        for _ in range(2):  # the connection goes on
            for part in (head[:30], head[30:] + sent) if not pause_s else (head, sent):
                connection.sendall(part)
                time.sleep(pause_s)
            answer = HTTPResponse(connection)
            answer.begin()
            assert answer.status == 200, answer.read()
            assert json.loads(answer.read())["entities"][0]["text"] == "Paris"


def test_upgrades_of_every_request_of_a_connection_cost_no_more(api):
    upgrade = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"
    with api.connect(upgrade * 5000) as connection:
        wait_until_closed(connection)
    assert api.client.get("/healthz").status_code == 200


def test_a_trailer_is_no_header(listening):
    """It comes when all checks of the headers are done."""
    seen = []

    async def app(scope, receive, send):
        while (await receive())["more_body"]:
            pass
        seen.append(dict(scope["headers"]))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    proxy.middlewares()
    with listening(app) as port, socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(CHUNKED + b"1\r\n{\r\n0\r\nAuthorization: Bearer x\r\n\r\n")
        assert first_line(connection) == b"HTTP/1.1 204 No Content"
        connection.sendall(b"GET / HTTP/1.1\r\nX-Next: 1\r\n\r\n")
        assert first_line(connection) == b"HTTP/1.1 204 No Content"
    assert b"authorization" not in seen[0]
    assert seen[1] == {b"x-next": b"1"}


def send(connection, data):
    try:
        connection.sendall(data)
    except OSError:
        return False
    return True


def names_that_serve_reads():
    """Headers by which clients would tell Serve what to do: its constants whose names say so, with either separator."""
    found = {
        value
        for name, value in vars(constants).items()
        if isinstance(value, str)
        and re.search("SERVE_(HTTP_)?.*HEADER|SERVE_SESSION_ID|SERVE_MULTIPLEXED_MODEL_ID$", name)
    } - {constants.SERVE_HTTP_REQUEST_ID_HEADER, constants.RAY_SERVE_INGRESS_REQUEST_ROUTER_OPT_HEADERS_FIELD}
    assert len(found) >= 5
    names = {f"{name}a" if name.endswith("-") else name for name in found}
    return sorted(names | {name.replace("-", "_") for name in names} | {name.replace("_", "-") for name in names})


def cleaned(*headers):
    seen = []

    async def app(scope, receive, send):
        seen.extend(scope["headers"])

    asyncio.run(proxy.CleanHeaders(app)({"type": "http", "headers": list(headers)}, None, None))
    return seen


@pytest.mark.parametrize("name", names_that_serve_reads())
@pytest.mark.parametrize("value", [b"0.001", b"?1", b"\xff"])
def test_no_client_tells_serve_what_to_do(name, value):
    assert [found for found, _ in cleaned((name.encode(), value), (b"accept", b"*/*"))] == [b"accept", b"x-request-id"]


@pytest.mark.parametrize("name", ["traceparent", "tracestate"])
def test_only_a_trace_context_that_serve_can_decode_is_passed_on(name):
    good = {"traceparent": b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01", "tracestate": b"vendor=1,other=2"}[name]
    assert (name.encode(), good) in cleaned((name.encode(), good))
    for bad in (b"\xff", good + b"\xff", b""):
        assert [found for found, _ in cleaned((name.encode(), bad))] == [b"x-request-id"]


@pytest.mark.parametrize("values", [[b"\xff"], [b"a" * 500], [b"a b"], [b""], [], [b"\xff", b"a"]])
def test_a_request_id_that_is_no_word_is_replaced(values):
    ids = [value for name, value in cleaned(*((b"x-request-id", value) for value in values)) if name == b"x-request-id"]
    assert len(ids) == 1
    assert len(ids[0]) == 32


def test_a_request_id_is_passed_on():
    assert cleaned((b"x-request-id", b"a-1"), (b"x-request-id", b"\xff")) == [(b"x-request-id", b"a-1")]


def test_one_key_leaves_places_to_the_others(endpoint, monkeypatch, assert_problem):
    from gem_ray.serving.keys import new_key

    (one, first), (other, second) = new_key(), new_key()
    monkeypatch.setenv("GEM_RAY_API_KEYS", f"{first} one, {second} other")
    with endpoint(max_in_flight=40, max_batch_posts=30) as api:
        api.tagger.pause_s = 1
        batch = {"posts": [{"text": TEXT}] * 30}

        def ask(key, **body):
            path = "/v1/annotate/batch" if "posts" in body else "/v1/annotate"
            return httpx.post(api.client.base_url.join(path), json=body, headers={"Authorization": f"Bearer {key}"})

        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(ask, one, **batch)
            while not api.service.flow.in_flight:
                time.sleep(0.01)
            assert_problem(ask(one, text=TEXT), 429)
            assert ask(other, text=TEXT).status_code == 200
            assert under_way.result().status_code == 200


def test_sockets_are_given_back(api):
    """After all of that."""
    time.sleep(0.3)
    assert not api.service.flow.in_flight
    with socket.create_connection(("127.0.0.1", api.port)):
        assert api.client.get("/healthz").status_code == 200
