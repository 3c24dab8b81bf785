"""A real Ray head with token authentication, on ports of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = Path(sys.executable).parent  # where `ray`, `gem-ray` and the jobs' `python` are


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
        for attempt in range(3):  # its processes give each other 30 s, which may be too short on a busy machine
            home = Path(folder) / str(attempt)
            head, process = start_head(home, checkout)
            if process.poll() is None:
                break
        else:
            pytest.fail((home / "log").read_text())
        yield head
        process.terminate()  # it ends what it started
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def start_head(home: Path, checkout: Path) -> tuple[Head, subprocess.Popen[bytes]]:
    """Start a head and wait until it is up, or has ended."""
    home.mkdir()
    dashboard, gcs, agent, environments, client = map(str, free_ports(5))
    head = Head(f"http://127.0.0.1:{dashboard}", home, checkout)
    log = home / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(ROOT / "clusters" / "local.sh", "--num-cpus", "4", "--temp-dir", home),
                *("--dashboard-port", dashboard, "--port", gcs),
                *("--dashboard-agent-listen-port", agent, "--runtime-env-agent-port", environments),
                *("--ray-client-server-port", client),
            ],
            # Nothing has to drain, and a process group of its own can be ended without touching another Ray.
            env=head.environment | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    while process.poll() is None and "Ray runtime started" not in log.read_text():
        time.sleep(0.25)
    return head, process


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
