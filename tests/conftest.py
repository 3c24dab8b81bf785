"""Stand-ins on this machine for S3 (moto behind a proxy that fails as S3 does) and for the hub; a browser."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import pytest
from hypothesis import settings

from gem_ray.process_exit import skip_native_exit

# The same examples in every run, however long one takes; `pytest --hypothesis-profile default` looks for new ones.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")

# Small models gain nothing from a second thread, and threads that share cores with Ray's processes wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray's processes export their metrics every ten seconds, which tests that read them would wait for.
os.environ.setdefault("RAY_metrics_report_interval_ms", "1000")
# vLLM's import would start two processes that compile for a GPU, ten seconds of a core, which fail where none is.
os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")

# A shell that runs the suite in the background has it ignore Ctrl-C, and with it every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_REFUSALS = {
    "slow_down": (503, b"SlowDown"),
    "forbidden": (403, b"AccessDenied"),
    "expired": (400, b"ExpiredToken"),
    "busy": (409, b"ConditionalRequestConflict"),
}
_START_RAY = {"local_ray", "service", "service_with_vllm"}
_HOP_BY_HOP = ("connection", "host", "keep-alive", "transfer-encoding", "content-length", "expect")


_exit_codes: list[int] = []
skip_native_exit(lambda: _exit_codes[-1] if _exit_codes else None)  # tests start Ray again and again


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(exitstatus: int) -> None:
    """The exit code of the process."""
    _exit_codes.append(int(exitstatus))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of these fixtures run alone; those that start Ray otherwise are marked where they stand."""
    for item in items:
        if isinstance(item, pytest.Function) and not _START_RAY.isdisjoint(item.fixturenames):
            item.add_marker(pytest.mark.alone)


@dataclass(frozen=True)
class S3:
    """An S3 server.

    Attributes:
        endpoint: its URL.
        client: a boto3 client of it.
    """

    endpoint: str
    client: Any

    def bucket(self, name: str) -> str:
        """The URI of a new, empty bucket, whose name begins with `name`."""
        bucket = f"{name}-{uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=bucket)
        return f"s3://{bucket}"

    def put(self, uri: str, body: bytes) -> str:
        """Write an object; gives back its URI."""
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        self.client.put_object(Bucket=bucket, Key=key, Body=body)
        return uri

    def forbid(self, uri: str, *actions: str) -> None:
        """Refuse actions, as `s3:GetObject`, on a bucket or on the objects that `uri` matches; `*` stands for any."""
        resource = uri.removeprefix("s3://")
        denied = {"Effect": "Deny", "Principal": "*", "Action": list(actions), "Resource": f"arn:aws:s3:::{resource}"}
        policy = {"Version": "2012-10-17", "Statement": [denied]}
        self.client.put_bucket_policy(Bucket=resource.partition("/")[0], Policy=json.dumps(policy))


_WORDS = ["google", "visits", "paris", "london", "sees", "said", "the"]


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """A server for the whole test session; every process that starts from now on finds it by its environment.

    A Ray that runs already does not know it: request this fixture before the one that starts Ray.
    """
    # Imported here: in a process that has loaded moto, vLLM does not start.
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # nobody answers there, and asking takes seconds
        yield S3(endpoint, boto3.session.Session().client("s3"))
    server.stop()


@dataclass
class FaultyS3:
    """A proxy in front of an S3 server that spoils a share of the requests. What is not a count may be set at any time.

    Attributes:
        endpoint: the proxy's URL.
        upstream: the server's URL.
        share: of the requests that fail, from 0 to 1.
        kinds: faults to choose from: `slow_down` (503), `forbidden` (403), `expired` (400: the token is too old),
            `busy` (409: with another conditional request), `reset` (before anything is done), `cut` (a reset midway
            through the answer), `stall` (midway through the answer, for `stall_s` seconds).
        plan: what happens to the next requests, by kind, before chance decides.
        stall_s: length of a stall, in seconds.
        counts: faults so far by kind, and `passed`.
        unsigned: requests so far that came without credentials.
        at_once: the most requests that were under way at a time.
    """

    endpoint: str
    upstream: str
    share: float = 0.0
    kinds: Sequence[str] = ("slow_down", "reset", "cut", "stall")
    plan: list[str] = field(default_factory=list)
    stall_s: float = 5.0
    unsigned: int = 0
    at_once: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    _random: random.Random = field(default_factory=lambda: random.Random(0))
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _under_way: int = 0

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """While a request is answered."""
        with self._lock:
            self._under_way += 1
            self.at_once = max(self.at_once, self._under_way)
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1

    @property
    def faults(self) -> int:
        """Requests spoilt so far."""
        return self.counts.total() - self.counts["passed"]

    def next_fault(self, method: str, signed: bool) -> str:
        """What happens to the next request, counted."""
        with self._lock:
            kind = self._random.choice(self.kinds) if self._random.random() < self.share else "passed"
            kind = self.plan.pop(0) if self.plan else kind
            # POST completes uploads, and moto does not let that be done twice as S3 does.
            kind = "reset" if kind == "cut" and method == "POST" else kind
            self.counts[kind] += 1
            self.unsigned += not signed
            return kind


@pytest.fixture
def faulty_s3(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """The same buckets as `s3` through a proxy, at which `AWS_ENDPOINT_URL` points; it fails when `share` is set."""
    server = _ProxyServer(("127.0.0.1", 0), _Proxy)
    server.faults = FaultyS3(f"http://127.0.0.1:{server.server_port}", s3.endpoint)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.faults.endpoint)
    yield server.faults
    server.shutdown()
    server.server_close()


class _ProxyServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    faults: FaultyS3

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # without saying goodbye first, which would be no reset

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away, which is what faults make them do, are no news."""


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _ProxyServer

    def handle_any(self) -> None:
        with self.server.faults.under_way():
            self._handle()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any  # noqa: N815

    def _handle(self) -> None:
        body = self._read_body()
        kind = self.server.faults.next_fault(self.command, "authorization" in self.headers)
        if kind in _REFUSALS:
            status, code = _REFUSALS[kind]
            self._answer(status, [("content-type", "application/xml")], b"<Error><Code>%s</Code></Error>" % code)
        elif kind == "reset":
            self._reset()
        else:
            status, headers, answer = self._forward(body)
            self._answer(status, headers, answer, kind)

    def _read_body(self) -> bytes:
        if self.headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.server.faults.upstream.removeprefix("http://"), timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, answer.getheaders(), data

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, kind: str = "passed") -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        # An answer to HEAD has the length of a body that does not come.
        is_head = self.command == "HEAD"
        self.send_header("Content-Length", dict(headers).get("Content-Length", "0") if is_head else str(len(body)))
        if kind == "stall" and not body:
            time.sleep(self.server.faults.stall_s)
        self.end_headers()
        half = 0 if is_head else len(body) // 2
        self.wfile.write(body[:half])
        if kind == "cut":
            return self._reset()
        if kind == "stall" and body:
            time.sleep(self.server.faults.stall_s)
        self.wfile.write(b"" if is_head else body[half:])
        return None

    def _reset(self) -> None:
        # Closing with a linger time of zero is a reset.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@dataclass
class Hub:
    """A Hugging Face hub on this machine, which counts the bytes of files that it gives out.

    Attributes:
        endpoint: its URL, for `HF_ENDPOINT`.
        sent: bytes of each file that were sent, by `repo/path`.
        requests: answered so far.
        gated: repositories whose terms nobody has accepted.
        refused: files that it does not give out now, as `repo/path`.
        licences: as their cards name them.
    """

    endpoint: str
    sent: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    gated: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    licences: dict[str, str] = field(default_factory=dict)
    _commits: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    _refs: dict[tuple[str, str], str] = field(default_factory=dict)

    def push(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Make files the newest commit of a branch; gives back its hash."""
        facts = json.dumps([repo, sorted((name, hashlib.sha1(content).hexdigest()) for name, content in files.items())])
        commit = hashlib.sha1(facts.encode()).hexdigest()
        self._commits[repo, commit] = files
        self._refs[repo, revision] = commit
        return commit

    def commit(self, repo: str, revision: str) -> str | None:
        """What a branch, or a commit itself, stands for."""
        return revision if (repo, revision) in self._commits else self._refs.get((repo, revision))

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """The files of a revision; None: there is none."""
        return self._commits.get((repo, self.commit(repo, revision) or ""))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub for this process and those that it starts, and an empty cache of it."""
    from huggingface_hub import constants

    server = _HubServer(("127.0.0.1", 0), _HubHandler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    endpoint, cache = server.hub.endpoint, str(tmp_path / "hub-cache")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # as other tests' folders have it
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name, value in {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": cache, "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, value)
    yield server.hub
    server.shutdown()
    server.server_close()


class _HubServer(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub


class _HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _HubServer

    def do_GET(self) -> None:
        self.server.hub.requests += 1
        path = unquote(urlsplit(self.path).path).strip("/")
        if path.startswith("api/models/"):
            self._api(path.removeprefix("api/models/"))
        else:
            self._file(path)

    do_HEAD = do_GET  # noqa: N815

    def _api(self, path: str) -> None:
        """`ORG/NAME`, `ORG/NAME/revision/REV` or `ORG/NAME/tree/REV`."""
        parts = path.split("/")
        repo, kind, revision = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "", "/".join(parts[3:]) or "main"
        files = self._allowed(repo, revision)
        if files is None:
            return
        if kind == "tree":
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            return self._answer(200, json.dumps(entries).encode())
        facts: dict[str, Any] = {"id": repo, "sha": self.server.hub.commit(repo, revision), "siblings": []}
        if licence := self.server.hub.licences.get(repo):
            facts |= {"cardData": {"license": licence}, "tags": [f"license:{licence}"]}
        return self._answer(200, json.dumps(facts).encode())

    def _file(self, path: str) -> None:
        """`ORG/NAME/resolve/REV/FILE`."""
        repo, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        files = self._allowed(repo, revision)
        if files is None:
            return
        if name not in files:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        if f"{repo}/{name}" in self.server.hub.refused and self.command == "GET":
            return self._answer(403, b"")
        commit, etag = self.server.hub.commit(repo, revision), hashlib.sha1(files[name]).hexdigest()
        if self.command == "GET":
            self.server.hub.sent[f"{repo}/{name}"] += len(files[name])
        self._answer(200, files[name], {"X-Repo-Commit": commit or "", "ETag": f'"{etag}"'})

    def _allowed(self, repo: str, revision: str) -> dict[str, bytes] | None:
        hub = self.server.hub
        if repo in hub.gated:
            self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
            return None
        files = hub.files(repo, revision)
        if files is None:
            known = any(name == repo for name, _ in hub._refs)
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
        return files

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response_only(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def tiny_encoder(tmp_path: Path) -> Path:
    """An encoder of seven words. Without dropout: what is left must be the same however the work is shared."""
    import replicas  # with torch and transformers, which few tests need

    size = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "max_position_embeddings": 32}
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    replicas.encoder(tmp_path / "e", _WORDS, length=32, **size, **without_dropout)
    return tmp_path / "e"


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Any, Any], None]:
    """Equal up to the float noise of other batches, which may move a rounded number by a step."""
    return _assert_same


def _assert_same(left: Any, right: Any, where: str = "") -> None:
    """Equal up to the float noise of other batches, which may move a rounded number by a step."""
    from gem_ray.noise import GRAIN  # with numpy, which is to see the number of threads above

    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            _assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), where
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            _assert_same(a, b, f"{where}[{index}]")
    elif isinstance(left, float):
        assert left == pytest.approx(right, abs=1e-4, rel=2.001 * GRAIN), where
    else:
        assert left == right, where


# Of a module: while Playwright runs, it holds the event loop of the thread, and other tests have loops of their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: the page is not driven")
    from playwright.sync_api import sync_playwright

    flags = ["gpu", "quic", "background-networking", "component-update", "sync", "extensions"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            chromium_sandbox=False,
            args=["--no-first-run", *(f"--disable-{flag}" for flag in flags)],
        )
        yield browser
        browser.close()
