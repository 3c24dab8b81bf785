"""A chat-completions server that really listens, and answers or misbehaves as a test says."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gem_ray.config import ExplainerConfig

KEY = "sk-nobody-may-see-this"


@dataclass
class Reply:
    """One HTTP reply; `content` is the message of a chat completion, `body` replaces all of it."""

    content: str | None = '{"explanation": "fine"}'
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    delay_s: float = 0
    drip_s: float = 0  # a byte at a time, this far apart
    hang_up: bool = False

    def encoded(self) -> bytes:
        if self.body is not None:
            return self.body
        return json.dumps({"choices": [{"message": {"role": "assistant", "content": self.content}}]}).encode()


class ChatServer(ThreadingHTTPServer):
    """`script(text, n)` says how the n-th question (from 0) about a post's text is answered."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script: Callable[[str, int], Reply] = lambda text, n: Reply(json.dumps({"explanation": f"about {text}"}))
        self.asked: dict[str, list[float]] = defaultdict(list)  # text -> when
        self.requests: list[dict] = []
        self.keys: list[str | None] = []
        self.key_headers: list[str | None] = []  # Azure's
        self.paths: list[str] = []
        self.running = self.most_running = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address) -> None:
        """Clients that give up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = request["messages"][-1]["content"]
        text = re.fullmatch(r"Here's a tweet content: (.*?) (?:Accordingly|Please).*", question, re.DOTALL)[1]
        server = self.server
        with server.lock:
            server.requests.append(request)
            server.keys.append(self.headers["Authorization"])
            server.key_headers.append(self.headers["api-key"])
            server.paths.append(self.path)
            reply = server.script(text, len(server.asked[text]))
            server.asked[text].append(time.monotonic())
            server.running += 1
            server.most_running = max(server.most_running, server.running)
        try:
            time.sleep(reply.delay_s)
            if not reply.hang_up:
                self._send(reply)
        finally:
            with server.lock:
                server.running -= 1

    def _send(self, reply: Reply) -> None:
        body = reply.encoded()
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if not reply.drip_s:
            self.wfile.write(body)
            return
        for byte in body:
            self.wfile.write(bytes([byte]))
            time.sleep(reply.drip_s)

    def log_message(self, *args) -> None:
        """Quiet."""


@pytest.fixture
def server(monkeypatch) -> Iterator[ChatServer]:
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TEST_KEY", KEY)
    with ChatServer() as chat:
        thread = threading.Thread(target=chat.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield chat
        chat.shutdown()
        thread.join()


@pytest.fixture
def reply() -> type[Reply]:
    return Reply


@pytest.fixture
def key() -> str:
    return KEY


@pytest.fixture
def explainer_config(server) -> Callable[..., ExplainerConfig]:
    """A config of the server with short pauses; keywords replace fields."""

    def make(**fields) -> ExplainerConfig:
        defaults = {"base_url": server.url, "api_key_env": "TEST_KEY", "timeout_s": 30, "retries": 2}
        return ExplainerConfig(**{**defaults, "max_pause_s": 0.05, **fields})

    return make
