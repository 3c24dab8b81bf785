"""Workers of a local Ray that are forked from a process that has imported what they need.

A process with models spends over four seconds of a core on importing torch, transformers, pandas and Arrow before it
loads the first; one that is forked has them at once, and shares their memory. Ray itself is imported after the fork:
its library reads a worker's environment once, when it is loaded.

Ray starts `forked_worker.py` in the place of its own worker. That asks the server, whose name is in `SERVER`, and does
as Ray's own where no server answers, so that a server that is gone costs nothing but time.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from glob import glob
from importlib import import_module
from pathlib import Path
from typing import Any

from gem_ray.process_start import quick_start
from gem_ray.ray_private.forked_worker import REQUEST, SERVER, STREAMS, run_ray_worker

WORKER = Path(__file__).with_name("forked_worker.py")
"""What Ray runs in the place of its own worker."""

# The stages' modules import what is theirs of transformers; nothing here imports Ray, loads a model or starts a thread.
_MODULES = (
    "torch",
    "pandas",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "gem_ray.annotator",
    "gem_ray.tagger.tagger",
    "gem_ray.rerank.reranker",
    "gem_ray.rerank.engine_transformers",
    "gem_ray.grounding.grounder",
)
_IDLE_S = 60.0  # without a request; then its memory is given back, if no worker shares it
_REQUEST_S = 10.0  # for all of a request
_SECRET_BYTES = 32
_CARDS = ("/dev/nvidia*", "/dev/nvmap", "/dev/dxg", "/dev/kfd")  # NVIDIA's, Jetson's, WSL's and AMD's
_SET_PDEATHSIG = 1  # prctl(2)
_PEER = struct.Struct("3i")  # ucred of unix(7): pid, uid, gid

# Read by those who use them, when they do, so that they may differ between the server and a worker (torch's import sets
# its own). All others may have been read by what the server has imported.
_READ_LATER = (
    "RAY_",
    "AWS_",
    "SPT_NOENV",
    "PYTEST_CURRENT_TEST",
    "COLUMNS",
    "LINES",
    "TORCHINDUCTOR_CACHE_DIR",
    SERVER,
)


@dataclass(frozen=True)
class _Server:
    """A server that was started, and the environment that its modules have read."""

    process: subprocess.Popen[bytes]
    environment: dict[str, str]

    def fits(self) -> bool:
        return self.process.poll() is None and _read_the_same(self.environment, os.environ)


_server: _Server | None = None


def can_fork() -> bool:
    """Whether workers may be forked here: not where there is a card, whose driver no fork survives."""
    return sys.platform == "linux" and not any(glob(pattern) for pattern in _CARDS)


def start_fork_server() -> bool:
    """Start the server of this process, if it has none: before its Ray, or as soon as it is known that one will start.

    It ends with the thread that has started it, and without work.

    Returns:
        Whether there is one: not where `RAY_ADDRESS` names a Ray that is there.
    """
    global _server
    if not can_fork() or os.environ.get("RAY_ADDRESS"):
        return False
    if _server is not None:
        if _server.fits():
            return True
        _server.process.kill()
        _server.process.wait()
        _server = None
    try:
        _server = _start()
    except OSError:  # as where a sandbox has no such sockets
        return False
    return True


def _start() -> _Server:
    secret = secrets.token_hex(_SECRET_BYTES)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("")  # the kernel chooses an abstract name, which needs no file
        listener.listen(128)
        code = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
        code += f"from {__name__} import serve; serve(int(sys.argv[2]), int(sys.argv[3]))"
        process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(sys.path), str(listener.fileno()), str(os.getpid())],
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {SERVER: f":{secret}"},
        )
        os.environ[SERVER] = f"{listener.getsockname()[1:].decode()}:{secret}"
    return _Server(process, dict(os.environ))


def serve(listening: int, parent: int) -> None:
    """Import, then fork a worker for each request, for as long as the parent lives."""
    _end_with(parent)
    environment = dict(os.environ)  # torch's import adds to it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent decides
    listener = socket.socket(fileno=listening)
    with quick_start():
        for name in _MODULES:
            import_module(name)
    if "ray" in sys.modules or threading.active_count() > 1:
        raise RuntimeError("one of the server's modules imports ray or has started a thread: it cannot be forked")
    gc.freeze()  # so that no worker's garbage collection copies what they share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for workers
    listener.settimeout(_IDLE_S)
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            if _has_workers():
                continue
            return
        with connection:
            request = _forked(connection, environment)
        if request is not None:
            listener.close()
            run_ray_worker(request["arguments"])
            return


def _forked(connection: socket.socket, environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Fork a worker, if that can be done: in the worker, which is then what Ray has started, the request."""
    connection.settimeout(_REQUEST_S)
    with ExitStack() as stack:
        try:
            secret, streams, _, _ = socket.recv_fds(connection, 2 * _SECRET_BYTES, len(STREAMS))
            for stream in streams:
                stack.callback(os.close, stream)
            if not _is_own(connection, secret, environment):
                return None
            with connection.makefile("rb") as file:
                request = json.load(file)
            if not _can_take_over(request, streams, environment) or os.fork():
                return None
        except (OSError, ValueError, AttributeError):  # not a worker of Ray, or no memory for one
            return None
        try:
            connection.sendall(b"\n")
        except OSError:  # it is not waited for any more
            os._exit(1)
        _take_over(request, streams, environment)
        return request


def _is_own(connection: socket.socket, secret: bytes, environment: Mapping[str, str]) -> bool:
    """Whether the other end is a process of the same user to whom the server's parent has told the secret.

    Other containers that share the network reach abstract sockets, too, and may have the same user id.
    """
    _, user, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return user == os.getuid() and secrets.compare_digest(secret, environment[SERVER].partition(":")[2].encode())


def _can_take_over(request: Mapping[str, Any], streams: Sequence[int], environment: Mapping[str, str]) -> bool:
    """Whether a fork of this process would be what another has become by its own imports."""
    return (
        request.keys() == set(REQUEST)
        and len(streams) == len(STREAMS)
        and request["interpreter"] == sys.executable
        and _read_the_same(request["environment"], environment)
    )


def _has_workers() -> bool:
    """Whether there are any: they would be no descendants of the command if their parent were gone."""
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def _read_the_same(first: Mapping[str, str], second: Mapping[str, str]) -> bool:
    """Whether the server's modules would have read the same variables in both environments."""

    def read(variables: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in variables.items() if not name.startswith(_READ_LATER)}

    return read(first) == read(second)


def _take_over(request: Mapping[str, Any], streams: Sequence[int], environment: Mapping[str, str]) -> None:
    """What makes a process the one that Ray has started: group, streams, folder, environment, limits and priorities."""
    import numpy as np

    for stream, number in zip(streams, STREAMS, strict=True):
        os.dup2(stream, number)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked_signals"])
    os.setpgrp()
    os.chdir(request["folder"])
    for name in environment.keys() - request["environment"].keys():
        del os.environ[name]
    os.environ.update(request["environment"])
    for number, soft, hard in request["limits"]:  # Ray raises that of open files
        resource.setrlimit(number, (soft, hard))
    with suppress(OSError):  # where a container forbids it, Ray's own could not either
        os.setpriority(os.PRIO_PROCESS, 0, request["niceness"])
        Path("/proc/self/oom_score_adj").write_text(request["oom_score_adj"], encoding="ascii")
    np.random.seed()  # Python's own generator does so by itself


def _end_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit()
