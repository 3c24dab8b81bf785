"""Traces: off unless somebody says where they go; then stages stand under their request."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gem_ray.serving.tracing import add_stage_spans, span_processors


@pytest.fixture
def spans(monkeypatch):
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("gem_ray.serving.tracing.trace.get_tracer", provider.get_tracer)
    return provider, exporter


def test_stages_stand_under_their_request_with_their_own_times(spans):
    provider, exporter = spans
    with provider.get_tracer("test").start_as_current_span("request") as request:
        add_stage_spans({"tag": 100.0, "ground": 101.5}, {"tag": 0.25, "ground": 2.0})
    stages = exporter.get_finished_spans()[:-1]
    assert [(span.name, span.start_time / 1e9, span.end_time / 1e9) for span in stages] == [
        ("tag", 100.0, 100.25), ("ground", 101.5, 103.5),
    ]  # fmt: skip
    assert {span.parent.span_id for span in stages} == {request.get_span_context().span_id}


def test_without_a_recorded_request_there_are_none(spans):
    _, exporter = spans
    assert not trace.get_current_span().is_recording()
    add_stage_spans({"tag": 100.0}, {"tag": 0.25})
    assert not exporter.get_finished_spans()


@pytest.mark.parametrize("variables", [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}])
def test_serve_traces_only_where_an_endpoint_is_set(variables):
    code = """
import os
from gem_ray.serving.environment import prepare_own_ray
prepare_own_ray()
print(os.environ.get("RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH"))
"""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OTEL_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=known | variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ("gem_ray.serving.tracing:span_processors" if variables else "None")


def test_serve_takes_what_sends_them():
    """As Serve checks it."""
    from ray.serve._private.tracing_utils import _load_span_processors

    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    (processor,) = _load_span_processors(f"{span_processors.__module__}:{span_processors.__name__}", "")
    processor.shutdown()
