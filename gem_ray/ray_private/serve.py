"""Private names of Ray Serve."""

from __future__ import annotations

from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema


def deploy(schema: ServeDeploySchema) -> None:
    """Deploy a config as `serve deploy` does, but without a dashboard; returns at once.

    In a running service, what stands under `user_config` changes in place, everything else replica by replica; address
    and port stay.
    """
    _get_global_client().deploy_apps(schema)
