"""Private names of Ray Serve."""

from __future__ import annotations

from contextvars import Context

from ray.serve.context import _get_global_client, _get_serve_request_context, _set_request_context
from ray.serve.schema import ServeDeploySchema


def deploy(schema: ServeDeploySchema) -> None:
    """Deploy a config as `serve deploy` does, but without a dashboard; returns at once.

    In a running service, what stands under `user_config` changes in place, everything else replica by replica; address
    and port stay.
    """
    _get_global_client().deploy_apps(schema)


def take_request_into(context: Context) -> None:
    """Give a context what Serve tells replicas of the current request: its id, for their logs, and its route.

    What is begun there is not cancelled with the request: Serve would do that by an id of its own, which stays behind.
    """
    request = _get_serve_request_context()
    context.run(_set_request_context, route=request.route, request_id=request.request_id, app_name=request.app_name)
