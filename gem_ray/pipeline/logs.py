"""Logs that machines can read: a JSON object a line, with the run and the post that it is about."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from datetime import UTC, datetime

from gem_ray.records import Post, Status
from gem_ray.redaction import redacted

LEVEL_VARIABLE = "GEM_RAY_LOG_LEVEL"

logger = logging.getLogger("gem_ray.posts")

_FIELDS = ("run_id", "post_id", "row_id", "stage", "kind")


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, logger and message, and those of run, post, row, stage and kind that the record carries."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        values = {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        values |= {name: getattr(record, name) for name in _FIELDS if hasattr(record, name)}
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(redacted(values), ensure_ascii=False)


def log_as_json() -> None:
    """Make this process log so, to standard error, from the level that `GEM_RAY_LOG_LEVEL` names (WARNING)."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    package = logging.getLogger("gem_ray")
    package.handlers = [handler]
    package.propagate = False
    package.setLevel(os.environ.get(LEVEL_VARIABLE, "WARNING").upper())


def log_problems(run_id: str, posts: Sequence[Post]) -> None:
    """A line for every problem: a warning where the post is rejected, else of level INFO."""
    for post in posts:
        level = logging.WARNING if post.status is Status.REJECTED else logging.INFO
        for problem in post.problems:
            known = {"run_id": run_id, "post_id": post.post_id, "row_id": post.row_id}
            logger.log(level, problem.message, extra={**known, "stage": str(problem.stage), "kind": str(problem.kind)})
