"""What the API stands on: the flow of posts, who may use it, and facts about the deployments."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray import serve

from gem_ray.annotator import models_of
from gem_ray.config import Config
from gem_ray.prometheus import PostMetrics
from gem_ray.serving.flow import Annotated, Flow
from gem_ray.serving.kept import Kept
from gem_ray.serving.keys import ApiKeys
from gem_ray.serving.messages import answer_row
from gem_ray.serving.settings import filter_settings
from gem_ray.tally import Tally

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from gem_ray.serving.guard import Caller

_STATE_S = 0.5  # each question is a call of Serve's controller, and anybody may ask
_RUNNING = ("RUNNING", "UPDATING")  # the latter take over a `user_config`


class Service:
    """The online annotator of one ingress replica.

    Args:
        config: the whole configuration.
        handles: the deployments of the pools, by their names.
        run_id: of this deployment of the application.

    Attributes:
        models: role -> `reference@hash` of every model of the configuration.
        missing_pools: pools of which no process runs.
    """

    def __init__(self, config: Config, handles: Mapping[str, DeploymentHandle], run_id: str) -> None:
        self.config = config
        self.flow = Flow(config, handles)
        self.keys = ApiKeys.from_config(config.serving)
        self._handles = handles
        self.run_id = run_id
        self._metrics = PostMetrics(run_id)
        self.models = Kept(self._find_models, math.inf)
        self.missing_pools = Kept(self._find_missing_pools, _STATE_S)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over `gamma` and `k`; posts that are under way keep theirs.

        Raises:
            ValueError: another key, or a value that is none.
        """
        self.flow.set_filter(filter_settings(self.config, user_config))

    def row(self, done: Annotated, heatmaps: bool) -> dict[str, Any]:
        """The answer about a post, which is counted."""
        self._metrics.add(Tally.of_posts([done.post]))
        return answer_row(done, self.run_id, heatmaps)

    def sharing_key(self, caller: Caller) -> str | None:
        """The key whose posts are bounded, so that they leave places to other keys; `None` if there is no other."""
        is_bounded = self.config.serving.max_in_flight_per_key is not None or len(self.keys) > 1
        return caller.key if is_bounded else None

    def max_batch_posts(self, key: str | None) -> int:
        """Posts of a batch that find places in an idle service.

        Args:
            key: of `sharing_key`.
        """
        serving = self.config.serving
        return serving.max_batch_posts if key is None else min(serving.max_batch_posts, serving.places_of_a_key)

    async def _find_models(self) -> dict[str, str]:
        return await asyncio.to_thread(models_of, self.config)

    async def _find_missing_pools(self) -> list[str]:
        application = serve.get_replica_context().app_name
        status = await asyncio.to_thread(serve.status)
        deployments = status.applications[application].deployments
        return [
            name for name in self._handles if not any(deployments[name].replica_states.get(state) for state in _RUNNING)
        ]
