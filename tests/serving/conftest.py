"""One real service for all tests: `gem-ray serve` in a process of its own, asked over HTTP."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import yaml

from gem_ray.data.generated import generate
from gem_ray.records import Post

ROOT = Path(__file__).parents[2]
MAX_IN_FLIGHT = 40
# Hosts that a careless owner might allow: what they lead to must be refused all the same.
ALLOWED_HOSTS = ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "169.254.169.254", "10.0.0.1", "0x7f.1"]


@dataclass
class Running:
    """A service that runs.

    Attributes:
        url: where.
        process: of `gem-ray serve`.
        config: the Serve config's file.
    """

    url: str
    process: subprocess.Popen[str]
    config: Path
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def annotate(self, post: Post, **options: Any) -> httpx.Response:
        """By a form, or for a text alone by JSON."""
        if post.image_bytes is None:
            return self.client.post("/v1/annotate", json={"text": post.text}, **options)
        files = {"image": ("image", post.image_bytes)}
        return self.client.post("/v1/annotate", data={"text": post.text}, files=files, **options)

    def replicas(self, deployment: str) -> list[int]:
        """Ids of a deployment's processes."""
        return [pid for pid in self.descendants() if deployment_of(pid) == deployment]

    def running(self, name: str) -> list[int]:
        """Ids of the processes whose command holds a name; of those that are gone meanwhile, none."""
        return [pid for pid in self.descendants() if name in command_of(pid)]

    def descendants(self) -> list[int]:
        """Ids of all processes that the command has started, and those have started."""
        parents = {int(stat.parent.name): _parent(stat) for stat in Path("/proc").glob("[0-9]*/stat")}

        def is_ours(pid: int | None) -> bool:
            while pid and pid != self.process.pid:
                pid = parents.get(pid)
            return bool(pid)

        return [pid for pid in parents if is_ours(parents[pid])]

    @contextmanager
    def under_load(self, posts: list[Post], clients: int = 12) -> Iterator[list[httpx.Response]]:
        """Clients that ask on and on while the block runs; gives the list of their answers, which grows."""
        answers: list[httpx.Response] = []
        stopped = threading.Event()

        def ask(number: int) -> None:
            while not stopped.is_set():
                answers.append(self.annotate(posts[(number + 7 * len(answers)) % len(posts)]))

        with ThreadPoolExecutor(clients) as pool:
            asking = [pool.submit(ask, number) for number in range(clients)]
            try:
                yield answers
            finally:
                stopped.set()
                for each in asking:
                    each.result()

    def wait_for(self, condition: Callable[[], object], seconds: float = 60) -> None:
        """Until the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not come about"
            time.sleep(0.05)

    @contextmanager
    def standing_still(self, deployment: str) -> Iterator[list[int]]:
        """The processes of a deployment do nothing while the block runs; gives their ids."""
        processes = self.replicas(deployment)
        assert processes
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        try:
            yield processes
        finally:
            for process in processes:
                with suppress(ProcessLookupError):  # it was taken for dead, and replaced
                    os.kill(process, signal.SIGCONT)

    def reload(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the config's file and say so."""
        values = yaml.safe_load(self.config.read_text())
        change(values)
        self.config.write_text(yaml.safe_dump(values))
        self.process.send_signal(signal.SIGHUP)


def command_of(pid: int) -> str:
    """A process's command and arguments, each ended by a NUL; nothing once it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def deployment_of(pid: int) -> str | None:
    title = command_of(pid).split("\0")[0].strip()
    # `ray::ServeReplica:APPLICATION:DEPLOYMENT`, and a method while it runs
    return title.rpartition(":")[2].partition(".")[0] if title.startswith("ray::ServeReplica:") else None


def _parent(stat: Path) -> int | None:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start(*arguments: object, **variables: str) -> subprocess.Popen[str]:
    """The command `gem-ray`, with this checkout's source."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | variables
    command = [sys.executable, "-m", "gem_ray", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_until_up(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if "listens on" in line:
            # What comes later is read, so that the process never waits for us.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return
    pytest.fail("gem-ray serve ended before it listened")


@contextmanager
def running(values: dict[str, Any], folder: Path, **variables: str) -> Iterator[Running]:
    """A service by a Serve config, which is written to the folder."""
    values["http_options"]["port"] = free_port()
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    process = start("serve", "--serve-config", config, **variables)
    try:
        wait_until_up(process)
        yield Running(f"http://127.0.0.1:{values['http_options']['port']}", process, config)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()


def nano_values() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "serve_configs" / "nano.yaml").read_text())


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`serve_configs/nano.yaml` with narrower limits."""
    values = nano_values()
    values["applications"][0]["args"] |= {
        "text": {"max_chars": 2000},
        "image": {"max_bytes": 9_000_000, "max_pixels": 10_000_000},
        "serving": {
            "max_body_bytes": 16_000_000,
            "max_batch_posts": 32,
            "max_in_flight": MAX_IN_FLIGHT,
            "health_check_s": 1,
            "image_hosts": ALLOWED_HOSTS,
        },
    }
    with running(values, tmp_path_factory.mktemp("serve")) as service:
        yield service


@pytest.fixture(scope="module")
def service_with_vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """As nano's, but vLLM reranks all that is a little uncertain, and a second tagger may be started.

    The engine shares its process with the grounder.
    """
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    values = nano_values()
    application = values["applications"][0]
    application["args"] |= {
        "reranker": {"engine": "vllm"},
        "serving": {
            "pools": [{"stages": ["tag"], "max_replicas": 2}, {"stages": ["rerank", "ground"]}],
            "stage_calls": None,
            "health_check_s": 1,
            "timeout_s": 110,
        },
    }
    scaling = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2}
    quick = {"upscale_delay_s": 1, "downscale_delay_s": 1, "metrics_interval_s": 1, "look_back_period_s": 2}
    application["deployments"] = [
        {"name": "ingress", "user_config": {"gamma": 0.01}},
        {"name": "tag", "autoscaling_config": scaling | quick},
    ]
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with running(values, tmp_path_factory.mktemp("serve-vllm"), **small) as service:
        yield service


@pytest.fixture(scope="session")
def posts() -> list[Post]:
    """200 posts whose images show some of their entities."""
    return list(generate(200, seed=5))


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.Popen[str]]:
    return start


@pytest.fixture(scope="session")
def until_up() -> Callable[[subprocess.Popen[str]], None]:
    return wait_until_up


@pytest.fixture(scope="session")
def port() -> Callable[[], int]:
    return free_port


@pytest.fixture(scope="session")
def listening() -> Callable[..., AbstractContextManager[int]]:
    """An ASGI application on a real socket; gives its port."""
    return _listening


@pytest.fixture(scope="session")
def assert_problem() -> Callable[[httpx.Response, int], dict[str, Any]]:
    """An RFC 9457 problem of a status, without internals."""
    return _assert_problem


@contextmanager
def _listening(app: Any, host: str = "127.0.0.1") -> Iterator[int]:
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)


def _assert_problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem.keys() >= {"type", "title", "status", "detail"}
    assert problem["status"] == status
    assert not any(word in answer.text for word in ("Traceback", "gem_ray/", "site-packages", ".py"))
    return problem


class Tagger:
    """In the place of the tagger's deployment: finds Paris, after a pause."""

    def __init__(self) -> None:
        self.pause_s = 0.0
        self.posts: list[Post] = []

    async def remote(self, posts: list[Post], settings: Any, only: str | None) -> list[Any]:
        from gem_ray.records import Entity
        from gem_ray.serving.calls import Answer

        self.posts += posts
        await asyncio.sleep(self.pause_s)
        for post in posts:
            start = post.text.find("Paris")
            post.entities = [Entity("Paris", start, start + 5, 0, 1, "location", "city", 0.9)] if start >= 0 else []
        return [Answer(post, {"tagger": "stand-in@1"}, {"tag": 0.1}, {"tag": 0.0}) for post in posts]


@dataclass
class Endpoint:
    """The API on a real socket in this process, as a Serve proxy serves it, without Ray and models."""

    port: int
    tagger: Tagger
    service: Any
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)

    def connect(self, sent: bytes = b"") -> socket.socket:
        """A connection of its own, on which something was sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(sent)
        return connection

    @contextmanager
    def health_watched(self, every_s: float = 0.02) -> Iterator[list[float]]:
        """Asks `/healthz` on and on while the block runs; gives the seconds that each answer took."""
        seconds: list[float] = []
        stopped = threading.Event()

        def watch() -> None:
            with httpx.Client(base_url=self.client.base_url, timeout=30) as client:
                while True:
                    started = time.perf_counter()
                    assert client.get("/healthz").status_code == 200
                    seconds.append(time.perf_counter() - started)
                    if stopped.wait(every_s):
                        return

        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(watch)
            try:
                yield seconds
            finally:
                stopped.set()
                watching.result()


@contextmanager
def _endpoint(**serving: Any) -> Iterator[Endpoint]:
    from gem_ray.config import load_config
    from gem_ray.serving.app import guarded
    from gem_ray.serving.proxy import middlewares
    from gem_ray.serving.service import Service

    text_only = {"reranker": {"enabled": False}, "grounder": {"enabled": False}}
    config = load_config(serving=serving, **text_only)
    tagger = Tagger()
    service = Service(config, {"tag": tagger}, "run")
    app = guarded(service)
    for middleware in middlewares():
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)
    with _listening(app) as port:
        yield Endpoint(port, tagger, service)


@pytest.fixture(scope="session")
def endpoint() -> Callable[..., AbstractContextManager[Endpoint]]:
    """The API by settings of `serving`."""
    return _endpoint
