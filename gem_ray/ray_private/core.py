"""How a process gets its Ray, and private names of Ray's core."""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._private import parameter, worker

from gem_ray.ray_private.fork_server import WORKER, start_fork_server

_PRINT = worker.print_to_stdstream
SYSTEM_CONFIG = "_system_config"
"""Argument of `ray.init`, and of the head of a `ray.cluster_utils.Cluster`: settings of Ray's own processes."""

_ANSWERS_WITHIN_S = 10.0  # while a head is being replaced, say
_MAX_SOCKET_PATH = 107  # sun_path of unix(7), without the NUL
_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"  # the longest name of one


def connect_to_ray(address: str) -> None:
    """Connect to the Ray at an address, quiet.

    Raises:
        ValueError: it is that of a Ray Client, which Ray Data cannot use.
        ConnectionError: nothing answers there. Ray itself would go on trying for minutes.
    """
    if address.startswith("ray://"):
        raise ValueError(
            f"RAY_ADDRESS is {address}, a Ray Client, which Ray Data cannot use: `gem-ray submit` runs a command on "
            "the cluster; on one of its nodes, RAY_ADDRESS is HEAD:6379"
        )
    place = re.fullmatch(r"\[?([\w.:-]+?)\]?:(\d+)", address)  # not `auto`
    until = time.monotonic() + _ANSWERS_WITHIN_S
    while place:
        try:
            socket.create_connection((place[1], int(place[2])), timeout=_ANSWERS_WITHIN_S).close()
            break
        except OSError as error:
            if time.monotonic() > until:
                reason = error.strerror or error
                raise ConnectionError(f"no Ray answers at {address}, which RAY_ADDRESS names: {reason}") from None
            time.sleep(0.5)
    _init(address=address)


def start_local_ray(*, forks: bool = True, **arguments: Any) -> None:
    """Connect to a new Ray of this machine alone, quiet, without dashboard, autoscaler and log monitor.

    The autoscaler's process would take CPU time while actors start, and at the end a second: its GCS is gone by then,
    which it still wants to tell that it ends, until Ray kills it. The log monitor would read all logs again and again,
    for drivers that want to print them.

    Args:
        forks: have workers forked, where they can be: they start sooner.
        arguments: of `ray.init`.

    Raises:
        OSError: Ray cannot keep the files of its session.
    """
    _give_token_without_home()
    folder = _short_session_folder()
    try:
        with _nodes_with(**(forked_workers() if forks else {})):
            _init(address="local", include_dashboard=False, **folder, **arguments)
    except OSError as error:
        raise OSError(f"Ray cannot keep the files of its session: {error}. RAY_TMPDIR names another folder") from None
    worker._global_node.kill_monitor()
    worker._global_node.kill_log_monitor()


def forked_workers() -> dict[str, str]:
    """Arguments of a node of a `ray.cluster_utils.Cluster`, which this process starts on this machine.

    Its workers are forked, where they can be: see `fork_server`.
    """
    return {"worker_path": str(WORKER)} if start_fork_server() else {}


@contextmanager
def _nodes_with(**arguments: str) -> Iterator[None]:
    """A Ray that is started inside has these arguments of its node, which `ray.init` does not take."""
    usual = parameter.RayParams
    parameter.RayParams = partial(usual, **arguments)
    try:
        yield
    finally:
        parameter.RayParams = usual


def be_silent() -> None:
    """From now on Ray says nothing of processes that die: they are being stopped."""
    worker.print_to_stdstream = lambda *_, **__: None


def _init(**arguments: Any) -> None:
    """`ray.init`, which puts its own handler of SIGTERM in the place of one that this process has chosen."""
    worker.print_to_stdstream = _print_to_standard_error
    chosen = signal.getsignal(signal.SIGTERM)
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **arguments)
    if callable(chosen) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, chosen)


def _print_to_standard_error(data: dict[str, Any], ignore_prefix: bool) -> None:
    """What Ray says of processes that die and of tasks that it begins again: not among the results of a command."""
    _PRINT(data | {"is_err": True}, ignore_prefix)


def _short_session_folder() -> dict[str, str]:
    """`/tmp/ray` where TMPDIR, as of a batch system, is too long for the sockets that Ray would make in it.

    Its daemons would be waited for 30 s, and the reason stays in their logs.
    """
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    if len(os.fsencode(os.environ.get(name, "") + _SOCKET)) <= _MAX_SOCKET_PATH:
        return {}
    if name == "RAY_TMPDIR":
        longest = _MAX_SOCKET_PATH - len(_SOCKET)
        raise OSError(f"RAY_TMPDIR is longer than the {longest} bytes that leave room for the names of sockets")
    return {"_temp_dir": "/tmp/ray"}


def _give_token_without_home() -> None:
    """Ray keeps the token of a local cluster in the home, which a container under a random user id does not have."""
    try:
        home = Path.home()
    except RuntimeError:
        home = Path("/")
    kept = home / ".ray" / "auth_token"
    folder = kept.parent if kept.parent.is_dir() else home
    if not kept.is_file() and not os.access(folder, os.W_OK) and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
