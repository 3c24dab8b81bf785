"""Submit a job to a Ray cluster: package the source, follow the log, end as the job ends."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

LOCAL_ADDRESS = "http://127.0.0.1:8265"
PACKAGE_LIMIT = 100 * 2**20  # bytes: the largest request that Ray's dashboard takes
EXIT_DETACHED = 130  # what a shell reports after Ctrl-C

_SOURCE = ("gem_ray", "jobs")
_POLL_S = 0.2
_TOLD_EVERY_S = 10.0  # while a job is prepared, and says nothing


class SubmitError(RuntimeError):
    """A job that could not be submitted or followed; the message says how to mend it."""


class Job(StrEnum):
    """The jobs, each a script in `jobs/`."""

    ANNOTATE = "annotate"
    TRAIN_TAGGER = "train-tagger"
    TRAIN_RERANKER = "train-reranker"
    TRAIN_MATCHER = "train-matcher"
    TRAIN_TEXT_SEGMENTER = "train-text-segmenter"
    EVALUATE = "evaluate"
    EXPERIMENT = "experiment"

    @property
    def script(self) -> str:
        """Path of the script, from the root of a checkout."""
        return f"jobs/{self.value.replace('-', '_')}.py"


def submit_job(job: Job, arguments: Iterable[str], address: str, runtime_env: dict[str, Any]) -> str:
    """Start a job on a cluster and return its submission id.

    Args:
        job: which script runs.
        arguments: the script's arguments; paths are the cluster's.
        address: URL of the cluster's dashboard.
        runtime_env: what `job_environment` makes.

    Raises:
        SubmitError: nothing answers at the address, or it refuses the token or the job.
    """
    with _explained(address):
        return _connect(address).submit_job(
            entrypoint=shlex.join(["python", job.script, *arguments]), runtime_env=runtime_env
        )


def job_environment(working_dir: Path, include: Iterable[str] = (), env: Iterable[str] = ()) -> dict[str, Any]:
    """Ray's runtime environment of a job: the source, and nothing else that lies in the checkout.

    Data, models, results, virtual environments and files with secrets stay behind, because only what is named goes.

    Args:
        working_dir: a checkout of gem-ray.
        include: names of more files or folders in it that the job needs, such as a configuration.
        env: variables for the job: `NAME=value`, or `NAME` for this process's own value.

    Raises:
        FileNotFoundError: something that is to go is not there.
        ValueError: more than the cluster takes, something outside of the working directory, or a variable that is not
            set.
    """
    names = [*_SOURCE, *include]
    for name in names:
        if Path(name).name != name or name == "..":
            raise ValueError(f"--include takes a name in {working_dir.resolve()}, not the path {name!r}")
        if not (working_dir / name).exists():
            raise FileNotFoundError(
                f"there is no {name} in {working_dir.resolve()}; --working-dir takes a checkout of gem-ray"
            )
        _check_inside(working_dir.resolve(), working_dir / name)
    size = sum(file.stat().st_size for name in names for file in _files(working_dir / name))
    if size > PACKAGE_LIMIT:
        raise ValueError(
            f"{', '.join(names)} hold {size / 2**20:.0f} MiB, and Ray takes {PACKAGE_LIMIT / 2**20:.0f}; "
            "put data and models where the cluster can read them, for example on S3"
        )
    # Git's patterns: nothing of the top level but the folder itself and what is named.
    excludes = ["/*", "!/.", *(f"!/{name}" for name in names), "__pycache__"]
    return {"working_dir": str(working_dir), "excludes": excludes, "env_vars": dict(map(_variable, env))}


def follow_job(submission_id: str, address: str, again: str) -> int:
    """Print a job's log until it ends, and return the exit code that says how it ended.

    Ctrl-C leaves the job running.

    Args:
        submission_id: of the job.
        address: URL of the cluster's dashboard.
        again: which command continues the job, in words.

    Raises:
        SubmitError: the cluster is gone, or refuses the token.
    """
    try:
        with _explained(address):
            client = _connect(address)
            _print_log(client, submission_id)
            return _exit_code(client, submission_id)
    except KeyboardInterrupt:
        print(f"\nno longer following; the job goes on\n{commands_for(submission_id, address, again)}", file=sys.stderr)
        return EXIT_DETACHED


def commands_for(submission_id: str, address: str, again: str) -> str:
    """Three lines that say how to follow a job, how to stop it, and how to go on: with which command, in words."""
    return (
        f"follow it: ray job logs --follow --address {address} {submission_id}\n"
        f"stop it: ray job stop --address {address} {submission_id}\n"
        f"continue it, once it has stopped or failed: submit {again}; finished rows are kept"
    )


def _print_log(client: JobSubmissionClient, submission_id: str) -> None:
    """Print the log as it comes, in another thread.

    Interrupted itself, the client would wait for an end of the log that comes with the job's.
    """
    failures: list[BaseException] = []
    heard = threading.Event()

    async def print_lines() -> None:
        async for lines in client.tail_job_logs(submission_id):
            heard.set()
            print(lines, end="", flush=True)

    def follow() -> None:
        try:
            asyncio.run(print_lines())
        except BaseException as error:
            # What Ray raises where a connection breaks that was there is what it raises where it refuses one.
            failures.append(ConnectionError(str(error)) if heard.is_set() else error)

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    began = told = time.monotonic()
    while follower.is_alive():
        follower.join(_POLL_S)
        if (now := time.monotonic()) - told > _TOLD_EVERY_S:
            told = now
            status = client.get_job_info(submission_id).status.value.lower()  # a log of a head that is gone just rests
            if not heard.is_set():
                print(f"job {submission_id} is {status}, {now - began:.0f} s; no output yet", file=sys.stderr)
    if failures:
        raise failures[0]


def _exit_code(client: JobSubmissionClient, submission_id: str) -> int:
    """The script's own exit code; 1 if it has none, because it was stopped or never ran."""
    while not (details := client.get_job_info(submission_id)).status.is_terminal():
        time.sleep(_POLL_S)  # the log may end a moment before the job does
    ended = details.status.value.lower()
    if ended == "succeeded":
        return 0
    # The message of a script that ran repeats the log; else it is Ray's account, whose last line says why.
    ran = details.driver_exit_code is not None
    print(f"job {submission_id} {ended}" + ("" if ran else _reason(details.message)), file=sys.stderr)
    return details.driver_exit_code or 1


def _connect(address: str) -> JobSubmissionClient:
    """The client; it sends the token of `RAY_AUTH_TOKEN` or `RAY_AUTH_TOKEN_PATH` where `RAY_AUTH_MODE` is `token`."""
    from ray.job_submission import JobSubmissionClient

    if not address.startswith(("http://", "https://")):
        raise ValueError(f"{address!r} is no address of a dashboard; it looks like {LOCAL_ADDRESS}")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers its variables, RAY_ADDRESS too, to the argument
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)  # else each upload tells what it leaves out, and each log its socket
    return JobSubmissionClient(address)


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Ray's and the network's errors as one sentence."""
    from aiohttp import ClientError
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        raise SubmitError(
            f"the cluster at {address} wants its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to what the cluster was started with"
        ) from None
    except (ClientError, OSError) as error:
        raise SubmitError(
            f"no Ray dashboard answers at {address} ({type(error).__name__}): is the cluster up, and the tunnel or "
            "port-forward open? A job that runs there goes on"
        ) from error
    except RuntimeError as error:
        raise SubmitError(f"the cluster at {address} refused{_reason(str(error))}") from error


def _reason(account: str | None) -> str:
    """The last line of what Ray has to say, which may begin with a traceback."""
    lines = (account or "").strip().splitlines()
    return f": {lines[-1]}" if lines else ""


def _check_inside(root: Path, path: Path) -> None:
    """Refuse links that lead out of the working directory: what they lead to would go along.

    Raises:
        ValueError: there is one.
    """
    for each in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if each.is_symlink() and not each.resolve().is_relative_to(root):
            raise ValueError(f"{each} is a link to {each.resolve()}, outside of {root}: copy what is to go along")


def _files(path: Path) -> Iterator[Path]:
    """The files that would be packaged."""
    found = path.rglob("*") if path.is_dir() else [path]
    return (file for file in found if file.is_file() and "__pycache__" not in file.parts)


def _variable(setting: str) -> tuple[str, str]:
    name, equals, value = setting.partition("=")
    if equals:
        return name, value
    if name not in os.environ:
        raise ValueError(f"--env {name}: the variable is not set here; set it, or give {name}=value")
    return name, os.environ[name]
