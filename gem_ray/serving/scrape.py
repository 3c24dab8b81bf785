"""One page of metrics for Prometheus: what Ray exports on every node, as far as it is about the service."""

from __future__ import annotations

import asyncio
import re

import httpx
import ray

from gem_ray.serving.flow import UnavailableError

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_OURS = "ray_gem_ray_"
# What one asks of Serve itself. Its other families, mostly histograms by route and replica, are most of its lines.
_OF_SERVE = re.compile(
    "ray_serve_("
    "deployment_(replica_healthy|status|replica_starts|error_counter|queued_queries|request_counter)"
    "|replica_(processing_queries|utilization_percent)|proxy_status|application_status|health_check_failures_total"
    "|autoscaling_(desired|target)_replicas)(_total)?"
)
_TIMEOUT_S = 3


async def scrape() -> str:
    """Metrics of the system and of Ray Serve, from all nodes that answer.

    Raises:
        UnavailableError: no node did.
    """
    nodes = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"]]
    async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as client:
        urls = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
        answers = await asyncio.gather(*(client.get(url) for url in urls), return_exceptions=True)
    pages = [answer.text for answer in answers if isinstance(answer, httpx.Response) and answer.is_success]
    if not pages:
        raise UnavailableError("no node of the cluster gives its metrics")
    return merge(pages)


def merge(pages: list[str]) -> str:
    """One page out of several: each family once, with its header and the samples of all."""
    families: dict[str, list[str]] = {}
    for page in pages:
        name, is_known = "", False
        for line in page.splitlines():
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
                is_known = name in families
            if (name.startswith(_OURS) or _OF_SERVE.fullmatch(name)) and not (is_known and line.startswith("#")):
                families.setdefault(name, []).append(line)
    return "".join(f"{line}\n" for lines in families.values() for line in lines)
