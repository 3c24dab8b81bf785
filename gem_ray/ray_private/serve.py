"""Private names of Ray Serve."""

from __future__ import annotations

import asyncio
from collections import deque
from contextvars import Context
from functools import partial

from ray.serve._private import proxy
from ray.serve.context import _get_global_client, _get_serve_request_context, _set_request_context
from ray.serve.schema import ServeDeploySchema
from starlette.types import Message


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


def hand_over_bodies_in_parts(part_bytes: int) -> None:
    """Have the HTTP proxy of this process hold no more than about so much of each body, and hand over as much at once.

    Serve's own queue takes all that a client sends and hands over all that has come since the last call: of a large
    body megabytes at a time, for which neither the proxy nor the ingress answers anybody else.
    """
    proxy.MessageQueue = partial(BodyQueue, part_bytes)


class BodyQueue:
    """What a proxy has of a request for the ingress, which fetches it; has what Serve calls of its `MessageQueue`.

    Args:
        part_bytes: of body to hold, and to hand over at once; the message that reaches it may go beyond.
    """

    def __init__(self, part_bytes: int) -> None:
        self._part_bytes = part_bytes
        self._messages: deque[Message] = deque()
        self._held_bytes = 0
        self._is_closed = False
        self._has_message, self._has_room = asyncio.Event(), asyncio.Event()
        self._has_room.set()

    async def __call__(self, message: Message) -> None:
        """Take a message as soon as there is room for it, so that a client sends no faster than its body is fetched."""
        await self._has_room.wait()
        self._messages.append(message)
        self._held_bytes += _body_bytes(message)
        if self._held_bytes >= self._part_bytes:
            self._has_room.clear()
        self._has_message.set()

    def close(self) -> None:
        """No more messages come."""
        self._is_closed = True
        self._has_message.set()

    async def wait_for_message(self) -> None:
        """Until there is a message, or no more come."""
        await self._has_message.wait()

    def get_messages_nowait(self) -> list[Message]:
        """The messages of the next part; none if there are none."""
        messages: list[Message] = []
        part = 0
        while self._messages and part < self._part_bytes:
            messages.append(self._messages.popleft())
            part += _body_bytes(messages[-1])
        self._held_bytes -= part
        if self._held_bytes < self._part_bytes:
            self._has_room.set()
        if not self._messages and not self._is_closed:
            self._has_message.clear()
        return messages


def _body_bytes(message: Message) -> int:
    return len(message.get("body", b""))
