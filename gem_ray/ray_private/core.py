"""Private names of Ray's core."""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray._private import worker

SYSTEM_CONFIG = "_system_config"
"""Argument of `ray.init`, and of the head of a `ray.cluster_utils.Cluster`: settings of Ray's own processes."""


def start_local_ray(**arguments: Any) -> None:
    """Connect to a new Ray of this machine alone, quiet, without dashboard and autoscaler.

    The autoscaler's process would take CPU time while actors start, and at the end a second: its GCS is gone by then,
    which it still wants to tell that it ends, until Ray kills it.

    Args:
        arguments: of `ray.init`.
    """
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **arguments)
    worker._global_node.kill_monitor()
