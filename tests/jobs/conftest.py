"""A real Ray head with token authentication, on ports of its own."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = Path(sys.executable).parent  # where `ray`, `gem-ray` and the jobs' `python` are

PORTS = ("--port", "--dashboard-agent-listen-port", "--runtime-env-agent-port", "--ray-client-server-port")


@dataclass(frozen=True)
class Head:
    """A cluster, and how to run commands that know its token.

    Attributes:
        address: URL of its dashboard.
        home: home of the user who started it, where its token is.
        checkout: where commands run.
    """

    address: str
    home: Path
    checkout: Path

    def start(self, *command: object, **variables: str) -> subprocess.Popen[str]:
        """Start a command; `variables` go over its environment."""
        return subprocess.Popen(
            list(map(str, command)),
            cwd=self.checkout,
            env=self.environment | {"RAY_AUTH_MODE": "token"} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: object, **variables: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*command, **variables)
        out, err = process.communicate(timeout=240)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    @property
    def token(self) -> Path:
        return self.home / ".ray" / "auth_token"

    @property
    def environment(self) -> dict[str, str]:
        """This process's, with the user's home, and without what would lead to another cluster."""
        own = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        return own | {"HOME": str(self.home), "PATH": f"{COMMANDS}{os.pathsep}{own['PATH']}"}


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source, so that nothing changes between the package's hash and its upload."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("gem_ray", "jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="session")
def head(checkout: Path) -> Iterator[Head]:
    """What `clusters/local.sh` starts, with a home and thus a token of its own."""
    # Not pytest's folder: a socket's path may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        dashboard, *ports = map(str, free_ports(5))
        head = Head(f"http://127.0.0.1:{dashboard}", home, checkout)
        process = start_head(
            head, ["--dashboard-port", dashboard, *chain.from_iterable(zip(PORTS, ports, strict=True))]
        )
        try:
            wait_until_started(process, home / "log")
            yield head
        finally:
            process.terminate()  # it ends what it started
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def start_head(head: Head, ports: list[str]) -> subprocess.Popen[bytes]:
    patience = {
        "RAY_raylet_start_wait_time_s": "300",  # on a busy machine
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # at the end, nothing has to drain
    }
    with (head.home / "log").open("wb") as output:
        return subprocess.Popen(
            [ROOT / "clusters" / "local.sh", "--num-cpus", "4", "--temp-dir", head.home, *ports],
            env=head.environment | patience,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group that can be ended without touching another Ray
        )


def wait_until_started(process: subprocess.Popen[bytes], log: Path) -> None:
    while "Ray runtime started" not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.25)


def free_ports(count: int) -> list[int]:
    """Below the range from which the kernel gives ports to others before Ray takes these."""
    sockets: list[socket.socket] = []
    while len(sockets) < count:
        with suppress(OSError):  # in use
            sockets.append(socket.create_server(("127.0.0.1", random.randrange(20_000, 32_000))))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
