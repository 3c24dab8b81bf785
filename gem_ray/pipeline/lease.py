"""One process at a time writes to an output: a file there says which, and that it is alive."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gem_ray.data.output import RUN_ID_TIME, run_ids
from gem_ray.data.storage import ConflictError, Storage, as_json

if TYPE_CHECKING:
    from gem_ray.pipeline.output_folder import OutputFolder

logger = logging.getLogger(__name__)

_FILE = "_run/lease.json"
_BEAT_S = 5.0
_SILENT_BEATS = 6  # after so many a holder is taken for dead
_LATE_BEATS = 2  # after so many its storage is in trouble


@dataclass(frozen=True)
class LeaseClaim:
    """Who holds an output; goes with every task that writes there.

    Attributes:
        storage: of the output.
        output: as the user named it.
        owner: drawn at random, so that no holder is taken for another, not even after the whole output was deleted.
    """

    storage: Storage
    output: str
    owner: str

    @property
    def holds(self) -> bool:
        """True while nobody has taken the output over."""
        return self._holder().get("owner") == self.owner

    def check(self) -> None:
        """Before something is written or deleted, and after.

        Raises:
            FileExistsError: another process has taken the output.
        """
        holder = self._holder()
        if holder.get("owner") != self.owner:
            raise FileExistsError(_message(self.output, holder))

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Check before the block, and after it.

        Raises:
            FileExistsError: another process has taken the output.
        """
        self.check()
        yield
        self.check()

    def _holder(self) -> Mapping[str, Any]:
        return self.storage.read_json(_FILE) or {}


class Lease:
    """The right to write to an output, for as long as nobody else has taken it.

    It is taken, kept and given back by conditional writes, so that of two processes which take it at once one fails. No
    clocks are compared: a holder is alive if its file changes while one looks.

    Attributes:
        moment: in which it was taken, as in ids of runs; later than those of earlier holders and runs, whatever the
            clocks of their machines. So a run that an earlier holder begins late is not taken for the last one.
    """

    def __init__(self, directory: OutputFolder, beat_s: float = _BEAT_S) -> None:
        self.moment = ""
        self._storage = directory.storage
        self._output = directory.output
        self._beat_s = beat_s
        self._stop = threading.Event()
        self._facts: dict[str, Any] = {**_this_process(), "owner": uuid.uuid4().hex, "beats": 0}
        self._version: str | None = None
        self._last_beat = time.monotonic()

    @property
    def claim(self) -> LeaseClaim:
        """What holds while the output is held."""
        return LeaseClaim(self._storage, self._output, self._facts["owner"])

    @property
    def trouble(self) -> str | None:
        """Since when the output does not answer; None while it does."""
        silent = time.monotonic() - self._last_beat
        return f"{self._output} has not answered for {silent:.0f} s" if silent > _LATE_BEATS * self._beat_s else None

    @contextmanager
    def held(self) -> Iterator[LeaseClaim]:
        """Hold the output for as long as the block runs.

        Raises:
            FileExistsError: another process is writing there.
        """
        claim = self._take()
        beating = threading.Thread(target=self._keep_beating, daemon=True)
        beating.start()
        try:
            yield claim
        finally:
            self._stop.set()
            beating.join()
            # The file stays, and says so. Whoever took the output over has changed it.
            with suppress(Exception):
                self._write(released=True)

    def _take(self) -> LeaseClaim:
        before = self._wait_for_holder()
        self.moment = self._facts["moment"] = self._moment_after(before or {})
        try:
            self._write(released=False)
        except ConflictError:
            raise FileExistsError(_message(self._output, self._storage.read_json(_FILE) or {})) from None
        return self.claim

    def _moment_after(self, before: Mapping[str, Any]) -> str:
        runs = (run_id.partition("-")[0] for run_id in run_ids(self._storage))
        last = max([before.get("moment", ""), *runs])
        now = f"{datetime.now(UTC):{RUN_ID_TIME}}"
        return now if now > last else f"{datetime.strptime(last, RUN_ID_TIME) + timedelta(seconds=1):{RUN_ID_TIME}}"

    def _wait_for_holder(self) -> Mapping[str, Any] | None:
        """Wait until it is clear whether the holder, if there is one, is alive; gives back what was last seen of it.

        Raises:
            FileExistsError: it is.
        """
        before = self._look()
        for _ in range(_SILENT_BEATS):
            if before is None or before.get("released") or _is_dead_here(before):
                break
            time.sleep(self._beat_s)
            now = self._look()
            if now != before and now is not None and not now.get("released"):
                raise FileExistsError(_message(self._output, now))
            before = now
        return before

    def _look(self) -> Mapping[str, Any] | None:
        """The lease as it is. Its version is read first: what changes in between makes taking it over fail."""
        self._version = self._storage.version(_FILE)
        return None if self._version is None else self._storage.read_json(_FILE)

    def _write(self, **facts: Any) -> None:
        self._facts |= {"beats": self._facts["beats"] + 1, **facts}
        content = as_json(self._facts)
        try:
            self._version = self._storage.swap(_FILE, content, self._version)
        except ConflictError:
            # Perhaps with what this process has written last, whose answer was lost.
            if (self._look() or {}).get("owner") != self._facts["owner"]:
                raise
            self._version = self._storage.swap(_FILE, content, self._version)
        self._last_beat = time.monotonic()

    def _keep_beating(self) -> None:
        while not self._stop.wait(self._beat_s):
            try:
                self._write()
            except ConflictError:
                return
            except Exception:  # whatever it is: the holder lives, and the next beat tries again
                logger.info("the lease was not renewed", exc_info=True)


def _this_process() -> dict[str, Any]:
    """What tells this process from every other, also from those of another container with the same host name."""
    facts = {"host": socket.gethostname(), "pid": os.getpid(), "started": _state_and_start(os.getpid())[1]}
    with suppress(OSError):  # no Linux: a dead holder is waited for
        facts["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        facts["pids"] = os.readlink("/proc/self/ns/pid")
    return facts


def _state_and_start(pid: int) -> tuple[str | None, str | None]:
    """The state of a process of this machine, and when it began, in the kernel's ticks; None where nobody may know."""
    with suppress(OSError):  # gone, or another user's on a machine that hides those
        # The second field is the program's name in parentheses, which may hold spaces; the third is the state.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    return None, None


def _is_dead_here(holder: Mapping[str, Any]) -> bool:
    """True if the holder was certainly a process of this machine, and is gone: no need to wait for it."""
    here = _this_process()
    if not all(name in here and holder.get(name) == here[name] for name in ("boot", "pids")):
        return False
    pid = int(holder["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's
    state, started = _state_and_start(pid)
    # A zombie is dead; a number may have been given to another process since.
    known = (started, holder.get("started"))
    return state in ("Z", "X") or (None not in known and known[0] != known[1])


def _message(output: str, holder: Mapping[str, Any]) -> str:
    if not holder:
        return (
            f"{output}/{_FILE} is not there, as {socket.gethostname()} sees it: the output was deleted, or is a folder "
            "that the nodes do not share"
        )
    return (
        f"another process is annotating to {output} (process {holder.get('pid')} on {holder.get('host')}); "
        "wait for it, or choose another output"
    )
