"""The package's client, against the real service, and against one that is out of order."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import gem_ray
from gem_ray.client import Annotation, ClientError
from gem_ray.taxonomy import FMNERG_TREE

TEXT = "Taylor Swift is in Paris tonight"


@pytest.fixture
def client(service):
    with gem_ray.Client(service.url) as client:
        yield client


def test_a_post_with_an_image_in_memory_or_in_a_file(client, posts, tmp_path):
    file = tmp_path / "image"
    file.write_bytes(posts[0].image_bytes)
    first = client.annotate(posts[0].text, posts[0].image_bytes, post_id="a", heatmaps=True)
    second = client.annotate(posts[0].text, file, post_id="a", heatmaps=True)
    assert isinstance(first, Annotation)
    assert found(first) == found(second)
    assert first.post.post_id == "a"
    assert first.models["tagger"].startswith("nano:tagger@")
    seen = [entity for entity in first.post.entities if entity.point]
    assert seen
    assert all(len(entity.heatmap.data) == entity.heatmap.height * entity.heatmap.width for entity in seen)


def test_batches_and_streams(client, posts):
    asked = [{"text": post.text, "image": post.image_bytes, "post_id": post.post_id} for post in posts[:8]]
    batch = client.annotate_batch(asked)
    assert [annotation.post.post_id for annotation in batch] == [post.post_id for post in posts[:8]]
    streamed = dict(client.stream(asked))
    assert [found(streamed[index]) for index in range(8)] == [found(annotation) for annotation in batch]


def found(annotation):
    return [(entity.text, entity.fine, entity.box is not None) for entity in annotation.post.entities]


def test_facts(client):
    assert client.taxonomy() == {name: list(fine) for name, fine in FMNERG_TREE.items()}
    assert client.limits()["k"] == 2


def test_a_refusal_is_an_error_with_the_services_words(client):
    with pytest.raises(ClientError, match=r"422 Unprocessable .*: text is empty") as caught:
        client.annotate("   ")
    assert caught.value.status == 422
    with pytest.raises(ClientError) as caught:
        list(client.stream([]))
    assert caught.value.status == 422


class OutOfOrder(BaseHTTPRequestHandler):
    """Answers what the plan says, one after the other."""

    def do_GET(self):
        self.server.times.append(time.monotonic())
        status, headers = self.server.plan.pop(0)
        if status is None:
            return  # hangs up
        body = json.dumps({"k": 2} if status == 200 else {"title": "No", "status": status, "detail": "why"}).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def flaky(monkeypatch):
    monkeypatch.setattr("gem_ray.client._FIRST_PAUSE_S", 0.01)
    server = ThreadingHTTPServer(("127.0.0.1", 0), OutOfOrder)
    server.plan, server.times = [], []
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    server.client = gem_ray.Client(f"http://127.0.0.1:{server.server_port}", retries=3)
    yield server
    server.client.close()
    server.shutdown()
    server.server_close()


def test_what_will_pass_is_tried_again(flaky):
    flaky.plan += [(503, {}), (None, {}), (429, {}), (200, {})]
    assert flaky.client.limits() == {"k": 2}


def test_the_service_says_how_long_to_wait(flaky):
    flaky.plan += [(429, {"Retry-After": "1"}), (200, {})]
    flaky.client.limits()
    assert flaky.times[1] - flaky.times[0] >= 1


def test_there_is_an_end_to_trying(flaky):
    flaky.plan += [(503, {})] * 9
    with pytest.raises(ClientError, match="503 No: why"):
        flaky.client.limits()
    assert len(flaky.times) == 4


def test_what_will_not_pass_is_not_tried_again(flaky):
    flaky.plan += [(401, {}), (200, {})]
    with pytest.raises(ClientError, match="401"):
        flaky.client.limits()
    assert len(flaky.times) == 1


def test_nobody_there():
    with gem_ray.Client("http://127.0.0.1:9", retries=0) as client, pytest.raises(ClientError, match="no answer"):
        client.limits()


def test_the_package_has_nothing_else():
    with pytest.raises(AttributeError, match="Klient"):
        _ = gem_ray.Klient
