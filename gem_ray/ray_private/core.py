"""How a process gets its Ray, and private names of Ray's core."""

from __future__ import annotations

import logging
import re
import socket
import time
from typing import Any

import ray
from ray._private import worker

SYSTEM_CONFIG = "_system_config"
"""Argument of `ray.init`, and of the head of a `ray.cluster_utils.Cluster`: settings of Ray's own processes."""

_ANSWERS_WITHIN_S = 10.0  # while a head is being replaced, say


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
    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)


def start_local_ray(**arguments: Any) -> None:
    """Connect to a new Ray of this machine alone, quiet, without dashboard, autoscaler and log monitor.

    The autoscaler's process would take CPU time while actors start, and at the end a second: its GCS is gone by then,
    which it still wants to tell that it ends, until Ray kills it. The log monitor would read all logs again and again,
    for drivers that want to print them.

    Args:
        arguments: of `ray.init`.
    """
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **arguments)
    worker._global_node.kill_monitor()
    worker._global_node.kill_log_monitor()
