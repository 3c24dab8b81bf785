"""Workers that are forked are what Ray would have started, with their libraries already there."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray

from gem_ray.ray_private import fork_server
from gem_ray.ray_private.core import start_local_ray
from gem_ray.ray_private.forked_worker import REQUEST, SERVER, STREAMS, ray_worker

pytestmark = pytest.mark.skipif(not fork_server.can_fork(), reason="workers are not forked on this machine")
_SECONDS = 60
# What a plain worker has, since the server refuses those whose libraries would have read something else.
_OWN_VARIABLE = {"HF_HOME": "/nowhere"}
_READ_LATER = {"AWS_PROFILE": "nobody"}
_START = "from gem_ray.ray_private import fork_server as it; it.start_fork_server(); print(it._server.process.pid, {}"


@pytest.fixture(scope="module")
def own_ray() -> Iterator[None]:
    start_local_ray(num_cpus=2)
    yield
    ray.shutdown()


def _facts() -> dict[str, Any]:
    """What a process can see of how it was started."""
    import gc
    import resource
    import threading

    import __main__ as main

    handlers = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE, signal.SIGHUP)
    streams = [os.readlink(f"/proc/self/fd/{number}") for number in range(3)]
    return {
        "libraries": "torch" in sys.modules,
        "pid": os.getpid(),
        "group": os.getpgid(0) == os.getpid(),
        "folder": os.getcwd(),
        "arguments": [each.partition("=")[0] for each in sys.argv],
        "first folder of modules": sys.path[0],
        "main": (main.__name__, getattr(main, "__file__", None)),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if "RLIMIT_" in name},
        "affinity": os.sched_getaffinity(0),
        "session": os.getsid(0),
        "umask": os.umask(0o22),
        "oom": Path("/proc/self/oom_score_adj").read_text(),
        "signals": [getattr(each, "__qualname__", each) for each in map(signal.getsignal, handlers)],
        "blocked signals": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "streams": [each.partition(":")[0].rpartition(".")[2] for each in streams],
        "encodings": (sys.stdin.encoding, sys.stdout.encoding, sys.getfilesystemencoding()),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "garbage": gc.get_threshold(),
        "command": Path("/proc/self/cmdline").read_bytes().split(b"\0")[0],
        "random": int.from_bytes(os.urandom(4)),
        "environment": dict(os.environ),
    }


def _numbers() -> tuple[float, float]:
    import random

    import numpy as np

    return random.random(), np.random.random()


def _in_a_worker(work: Callable[[], Any], **variables: str) -> Any:
    """What a function gives in a new process of Ray."""
    environment = {"env_vars": variables} if variables else None
    return ray.get(ray.remote(max_calls=1, runtime_env=environment)(work).remote(), timeout=_SECONDS)


@pytest.mark.alone
def test_a_forked_worker_is_the_process_that_ray_would_have_started(own_ray):
    forked, plain = _in_a_worker(_facts, **_READ_LATER), _in_a_worker(_facts, **_OWN_VARIABLE)
    assert forked.pop("libraries")
    assert not plain.pop("libraries")
    assert forked.pop("pid") != plain.pop("pid")
    assert forked.pop("random") != plain.pop("random")
    environment, other = forked.pop("environment"), plain.pop("environment")
    assert (environment.pop("AWS_PROFILE"), other.pop("HF_HOME")) == ("nobody", "/nowhere")
    for each in (environment, other):
        each.pop("TORCHINDUCTOR_CACHE_DIR", None)  # torch's import sets it
    assert environment == other
    assert forked == plain


@pytest.mark.alone
def test_no_two_workers_draw_the_same_numbers(own_ray):
    drawn = [_in_a_worker(_numbers) for _ in range(3)]
    for numbers in zip(*drawn, strict=True):
        assert len(set(numbers)) == 3


def _products() -> tuple[list[float], list[float]]:
    """Both libraries share the work among threads, which the server's process may have had."""
    import numpy as np
    import torch

    torch.set_num_threads(2)
    matrix = np.arange(500.0 * 500).reshape(500, 500)
    return torch.from_numpy(matrix).matmul(torch.from_numpy(matrix))[0].tolist(), (matrix @ matrix)[0].tolist()


@pytest.mark.alone
def test_a_forked_worker_computes_in_several_threads(own_ray):
    first, second = _in_a_worker(_products)
    assert first == pytest.approx(second)
    assert first == pytest.approx(_products()[0])


@pytest.mark.alone
def test_without_its_server_a_worker_starts_as_ray_does_it(own_ray):
    fork_server._server.process.kill()
    fork_server._server.process.wait()
    assert not _in_a_worker(_facts, AWS_PROFILE="somebody")["libraries"]  # one that does not wait already


def _gone(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def _wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.05)


@pytest.mark.parametrize("waits_s", [0, 1])  # before the server's first line, and amid its imports
def test_the_server_ends_with_the_process_that_has_started_it(waits_s):
    program = _START.format("flush=True); import time; time.sleep(600)")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        server = int(process.stdout.readline())
        time.sleep(waits_s)
        process.kill()
    _wait_for(lambda: _gone(server))


_SECRET = "5" * 64


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server that stops after three seconds without a request."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("")
    listener.listen()
    listener.set_inheritable(True)
    program = "from gem_ray.ray_private import fork_server as server; server._IDLE_S = 3; server._REQUEST_S = 0.5; "
    program += f"server._MODULES = ['numpy']; server.serve({listener.fileno()}, {os.getpid()})"
    environment = os.environ | {SERVER: f":{_SECRET}"}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, pass_fds=[listener.fileno()], env=environment) as process:
        address = listener.getsockname()
        listener.close()
        yield address
        process.wait(_SECONDS)


def _ask(address: str, body: bytes, streams: tuple[int, ...] = STREAMS, secret: str = _SECRET) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_SECONDS)
        connection.connect(address)
        socket.send_fds(connection, [secret.encode()], streams)
        with suppress(BrokenPipeError):  # who does not know the secret is not listened to
            connection.sendall(body)
            connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            return connection.recv(1)
    return b""


def _request(**changed: Any) -> bytes:
    values = ([], [], dict(os.environ), "/", sys.executable, [], os.getpriority(os.PRIO_PROCESS, 0), "0")
    return json.dumps(dict(zip(REQUEST, values, strict=True)) | changed).encode()


def test_what_is_not_a_request_of_a_worker_gets_nothing_and_harms_nobody(server):
    for body in (b"", b"\xff\xfe", b"{", b"[]", b"null", b"{}", b'{"environment": 1}'):
        assert _ask(server, body) == b""
    assert _ask(server, _request(), streams=STREAMS[:2]) == b""
    for secret in (_SECRET[1:], "6" * 64, "\0"):
        assert _ask(server, _request(), secret=secret) == b""
    for changed in ({"environment": {}}, {"environment": dict(os.environ) | _OWN_VARIABLE}, {"environment": "HOME"}):
        assert _ask(server, _request(**changed)) == b""
    assert _ask(server, _request(interpreter="/usr/bin/python")) == b""
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(server)
        assert silent.recv(1) == b""  # in half a second
    if os.getuid() == 0:
        program = f"import os, socket; s = socket.socket(socket.AF_UNIX); os.setuid(65534); s.connect({server!r}); "
        program += f"socket.send_fds(s, [{_SECRET!r}.encode()], (0, 1, 2)); raise SystemExit(len(s.recv(1)))"
        subprocess.run([sys.executable, "-c", program], check=True)
    assert _ask(server, _request()) == b"\n"


def test_a_server_without_work_ends(server):
    def refuses() -> bool:
        with socket.socket(socket.AF_UNIX) as connection, suppress(ConnectionRefusedError):
            connection.connect(server)
            return False
        return True

    time.sleep(3.5)  # a connection is work
    _wait_for(refuses)


@pytest.mark.parametrize("is_card", [False, True])
def test_where_there_is_a_card_nothing_is_forked(is_card, monkeypatch, tmp_path):
    if is_card:
        (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(fork_server, "_CARDS", (str(tmp_path / "nvidia*"),))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("it was started"))
    monkeypatch.setattr(fork_server, "_server", None)
    assert fork_server.can_fork() is not is_card
    if is_card:
        assert not fork_server.start_fork_server()


def test_a_server_is_used_again_while_its_modules_would_read_the_same(monkeypatch):
    assert fork_server.start_fork_server()
    first = fork_server._server
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert fork_server.start_fork_server()
    assert fork_server._server is first
    monkeypatch.setenv("HF_HOME", "/nowhere")
    assert fork_server.start_fork_server()
    assert fork_server._server is not first
    assert first.process.poll() is not None


def test_with_a_ray_that_is_there_no_server_is_started(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("it was started"))
    assert not fork_server.start_fork_server()


_THREAD = "import threading, time; threading.Thread(target=time.sleep, args=[60], daemon=True).start()"


@pytest.mark.parametrize("module", ["import ray", _THREAD])
def test_what_cannot_be_forked_is_not(module, tmp_path):
    (tmp_path / "unforkable.py").write_text(module)
    program = f"import os, socket, sys; sys.path.append({str(tmp_path)!r}); "
    program += "from gem_ray.ray_private import fork_server as it; it._MODULES = ['unforkable']; "
    program += "it.serve(socket.socket(socket.AF_UNIX).detach(), os.getppid())"
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    assert ended.returncode == 1
    assert "it cannot be forked" in ended.stderr


def test_ray_has_the_worker_that_is_run():
    assert Path(ray_worker()).is_file()
    assert Path(ray_worker()).is_relative_to(Path(ray.__file__).parent)
