"""Traces of requests, from a client's `traceparent` through Serve to the stages.

Serve makes the spans of proxies, deployments and calls where `RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH` names
`span_processors`; `gem-ray serve` sets that where `OTEL_EXPORTER_OTLP_ENDPOINT` says where traces go. Stages run for
the posts of many requests at once, in a process that knows of none: each request has their times from the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import Context
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.context import attach

from gem_ray.ray_private.serve import take_request_into

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

_NANOSECONDS = 1_000_000_000


def span_processors() -> list[SpanProcessor]:
    """For Serve: send spans by OTLP over HTTP, to where the usual `OTEL_EXPORTER_OTLP_*` variables say."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(OTLPSpanExporter())]


def outlasting_context() -> Context:
    """A context for what is begun by a request and does not end with it: it has the request's id and span alone."""
    context = Context()
    take_request_into(context)
    context.run(attach, trace.set_span_in_context(trace.get_current_span()))
    return context


def add_stage_spans(began: Mapping[str, float], seconds: Mapping[str, float]) -> None:
    """Put stages under the current span, if there is one that is recorded.

    Args:
        began: stage -> when, in seconds since the epoch by the clock of its process.
        seconds: stage -> how long it took for its batch.
    """
    if not trace.get_current_span().is_recording():
        return
    tracer = trace.get_tracer("gem_ray")
    for name, start in began.items():
        span = tracer.start_span(name, start_time=int(start * _NANOSECONDS))
        span.end(int((start + seconds[name]) * _NANOSECONDS))
