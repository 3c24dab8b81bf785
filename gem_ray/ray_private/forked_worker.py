"""What a local Ray runs in the place of its own worker: asks the fork server for a process, and leaves.

It is run as a file, by processes that have imported nothing, and imports nothing of gem-ray.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import signal
import socket
import sys
from importlib.util import find_spec

SERVER = "GEM_RAY_FORK_SERVER"
"""Environment variable: the name of the server's socket in the abstract namespace of unix(7), a colon, and a secret."""
STREAMS = (0, 1, 2)
REQUEST = (
    "arguments",
    "blocked_signals",
    "environment",
    "folder",
    "interpreter",
    "limits",
    "niceness",
    "oom_score_adj",
)
"""What the server is told of the process that Ray has started, besides its streams."""
_LIMITS = [number for name, number in vars(resource).items() if name.startswith("RLIMIT_")]


def ray_worker() -> str:
    """The file of Ray's own worker."""
    folder = find_spec("ray").submodule_search_locations[0]  # type: ignore[union-attr, index]  # Ray has started this
    return os.path.join(folder, "_private", "workers", "default_worker.py")


def is_forked() -> bool:
    """Ask for a process in the place of this one; whether there is one."""
    name, _, secret = os.environ.get(SERVER, "").partition(":")
    if not secret:
        return False
    try:
        with open("/proc/self/oom_score_adj", encoding="ascii") as file:
            oom_score_adj = file.read()
        limits = [(each, *resource.getrlimit(each)) for each in _LIMITS]
        niceness = os.getpriority(os.PRIO_PROCESS, 0)
        blocked = [int(each) for each in signal.pthread_sigmask(signal.SIG_BLOCK, ())]
        values = (sys.argv[1:], blocked, dict(os.environ), os.getcwd(), sys.executable, limits, niceness, oom_score_adj)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.connect(f"\0{name}")
            socket.send_fds(server, [secret.encode()], STREAMS)
            server.sendall(json.dumps(dict(zip(REQUEST, values, strict=True))).encode())
            server.shutdown(socket.SHUT_WR)
            return bool(server.recv(1))
    except OSError:
        return False


def run_ray_worker(arguments: list[str]) -> None:
    """Become Ray's own worker, with the arguments that Ray has given."""
    sys.argv = [ray_worker(), *arguments]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__" and not is_forked():
    del sys.path[0]  # the folder of this file
    run_ray_worker(sys.argv[1:])
