"""One process at a time writes to an output: a file there says which, and that it is alive."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gem_ray.pipeline.run_directory import RunDirectory

_FILE = "_run/lease.json"
_BEAT_S = 5.0
_SILENT_BEATS = 6  # after so many a holder is taken for dead


@dataclass(frozen=True)
class Claim:
    """Who holds an output; goes with every task that writes there, so that none does for a holder who has lost it."""

    directory: RunDirectory
    owner: str

    @property
    def holds(self) -> bool:
        """Whether nobody has taken the output since, as one may who took this process for dead."""
        return self._holder().get("owner") == self.owner

    def check(self) -> None:
        """Before something is written.

        Raises:
            FileExistsError: another process has taken the output.
        """
        holder = self._holder()
        if holder.get("owner") != self.owner:
            raise FileExistsError(_message(self.directory, holder))

    def _holder(self) -> Mapping[str, Any]:
        return self.directory.read_json(_FILE) or {}


class Lease:
    """The right to write to an output, for as long as nobody else has taken it.

    No clocks are compared: a holder is alive if its file changes while one looks.

    Attributes:
        claim: what it is told by.
    """

    def __init__(self, directory: RunDirectory, beat_s: float = _BEAT_S) -> None:
        self._directory = directory
        self._beat_s = beat_s
        self.claim = Claim(directory, uuid.uuid4().hex)
        self._place = {"host": socket.gethostname(), "pid": os.getpid()}
        self._beats = 0
        self._stop = threading.Event()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the output for as long as the block runs.

        Raises:
            FileExistsError: another process is writing there.
        """
        self._wait_for_silence()
        self._beat()
        beating = threading.Thread(target=self._keep_beating, daemon=True)
        beating.start()
        try:
            yield
        finally:
            self._stop.set()
            beating.join()
            if self.claim.holds:
                self._directory.delete(_FILE)

    def _wait_for_silence(self) -> None:
        before = self._directory.read_json(_FILE)
        if before is None or self._is_dead_here(before):
            return
        for _ in range(_SILENT_BEATS):
            time.sleep(self._beat_s)
            now = self._directory.read_json(_FILE)
            if now is None:
                return
            if now != before:
                raise FileExistsError(_message(self._directory, now))

    def _is_dead_here(self, holder: Mapping[str, Any]) -> bool:
        """Whether the holder was a process of this machine that is gone: no need to wait for it."""
        if holder.get("host") != self._place["host"]:
            return False
        try:
            os.kill(int(holder["pid"]), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False

    def _beat(self) -> None:
        self._beats += 1
        self._directory.write_json(_FILE, {"owner": self.claim.owner, **self._place, "beats": self._beats})

    def _keep_beating(self) -> None:
        while not self._stop.wait(self._beat_s):
            with suppress(OSError):  # the next beat tries again
                if not self.claim.holds:
                    return
                self._beat()


def _message(directory: RunDirectory, holder: Mapping[str, Any]) -> str:
    return (
        f"another process is annotating to {directory.output} (process {holder.get('pid')} on {holder.get('host')}); "
        "wait for it, or choose another output"
    )
