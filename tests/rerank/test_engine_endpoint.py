"""A model that is asked in context, over real HTTP: what it is told, and what its free answers mean."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from gem_ray.config import ConfigError, load_config
from gem_ray.model_check import check_models
from gem_ray.records import Candidate, Entity, Post, Status
from gem_ray.rerank.engine import RequestError
from gem_ray.rerank.in_context import read_answer
from gem_ray.rerank.reranker import Reranker
from gem_ray.stages import find_stage

WORDS = ["Jordan", "wins", "in", "Chicago"]
RED = np.full((12, 16, 3), (250, 5, 5), np.uint8)


class Chat(ThreadingHTTPServer):
    """Answers with `answer`, or with an HTTP status; remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer: str | int = "athlete"
        self.conversations: list[list[dict]] = []


class _Handler(BaseHTTPRequestHandler):
    server: Chat

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.conversations.append(asked["messages"])
        answer = self.server.answer
        body = json.dumps({"choices": [{"message": {"role": "assistant", "content": str(answer)}}]}).encode()
        self.send_response(answer if isinstance(answer, int) else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Iterator[Chat]:
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    with Chat() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def rerank(chat: Chat, **endpoint: object) -> Post:
    url = f"http://127.0.0.1:{chat.server_port}/v1"
    settings = {"base_url": url, "retries": 1, "max_pause_s": 0.01, **endpoint}
    config = load_config(reranker={"engine": "endpoint", "endpoint": settings}, filter={"gamma": 0.2, "k": 3})
    candidates = [Candidate("brand_name_products", 0.5), Candidate("athlete", 0.375), Candidate("city", 0.125)]
    entities = [
        Entity("Jordan", 0, 6, 0, 1, "product", "brand_name_products", 0.5, 1.0, True, candidates=candidates),
        Entity("Chicago", 15, 22, 3, 4, "location", "city", 0.99, 0.01, candidates=candidates),
    ]
    post = Post("p", " ".join(WORDS), WORDS, caption="a man with a ball", image=RED, entities=entities)
    return Reranker.from_config(config)([post])[0]


@pytest.mark.parametrize("image", [True, False])
def test_an_endpoint_is_asked_once_before_the_first_post_with_an_image_if_posts_are(chat: Chat, image: bool) -> None:
    settings = {"base_url": f"http://127.0.0.1:{chat.server_port}/v1", "retries": 0, "image": image}
    config = load_config(reranker={"engine": "endpoint", "endpoint": settings})
    check_models([find_stage("rerank")], config)
    (asked,) = chat.conversations
    assert ("image_url" in json.dumps(asked)) == image
    for refusal in (400, 503):
        chat.answer = refusal
        with pytest.raises(ValueError, match=rf"^reranker\.endpoint: .*HTTP {refusal}"):
            check_models([find_stage("rerank")], config)


def test_a_hard_entity_gets_the_answer_and_an_easy_one_is_not_asked_about(chat: Chat) -> None:
    post = rerank(chat)
    assert [(entity.fine, entity.coarse, entity.reranked) for entity in post.entities] == [
        ("athlete", "person", True),
        ("city", "location", False),
    ]
    assert len(chat.conversations) == 1


def test_the_worked_examples_of_table_7_come_first(chat: Chat) -> None:
    rerank(chat)
    *examples, _ = chat.conversations[0]
    assert [message["role"] for message in examples] == ["user", "assistant"] * 3
    assert [message["content"] for message in examples[1::2]] == ["park", "sports_team", "character"]
    assert "Text: Golden(&&) State(&&) Warriors(&&) win NBA championship" in examples[2]["content"]


def test_the_image_is_sent_as_it_is(chat: Chat) -> None:
    rerank(chat)
    picture, text = chat.conversations[0][-1]["content"]
    data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
    assert np.abs(np.asarray(Image.open(io.BytesIO(data))).astype(int) - RED).max() < 12
    assert "Jordan(&&) wins in Chicago" in text["text"]
    assert "a man with a ball" not in text["text"]
    assert "0.5" not in text["text"]


def test_without_images_the_caption_is_told_and_a_hint_if_asked(chat: Chat) -> None:
    rerank(chat, image=False, hint=True)
    question = chat.conversations[0][-1]["content"]
    assert "Image: a man with a ball." in question
    assert "brand_name_products 0.50, athlete 0.38, city 0.12" in question


@pytest.mark.parametrize("answer", ["I do not know", "athlete or city", 500])
def test_without_an_answer_the_taggers_category_stands_and_the_post_says_why(chat: Chat, answer: str | int) -> None:
    chat.answer = answer
    post = rerank(chat)
    assert (post.entities[0].fine, post.entities[0].reranked) == ("brand_name_products", False)
    assert "'Jordan' was not reranked" in post.problems[0].message
    assert post.status is Status.DEGRADED


def test_an_endpoint_that_is_gone_leaves_a_problem_not_silently_the_taggers_category(chat: Chat) -> None:
    post = rerank(chat, base_url="http://127.0.0.1:1/v1")
    assert not post.entities[0].reranked
    assert "ConnectError" in post.problems[0].message
    assert post.status is Status.DEGRADED


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("music", 0),
        ("Answer: Musician.", 1),
        ("Sports team", 2),
        ('"sports_team"', 2),
        ("It is a sports_team, not music", None),
        ("musical", None),
        ("", None),
    ],
)
def test_a_free_answer_is_read_as_a_person_would(answer: str, index: int | None) -> None:
    read = read_answer(answer, ("music", "musician", "sports_team"))
    assert isinstance(read, RequestError) if index is None else read == index


def test_a_longer_name_is_not_the_shorter_one_in_it() -> None:
    assert read_answer("park ranger", ("park", "park_ranger")) == 1


def test_an_endpoint_without_an_address_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"endpoint\.base_url"):
        load_config(reranker={"engine": "endpoint"})
