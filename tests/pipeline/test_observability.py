"""What a run tells: metrics that Prometheus can read, JSON logs, progress lines, and the report."""

from __future__ import annotations

import io
import itertools
import json
import logging
import re
import time
from pathlib import Path

import httpx
import pytest
import ray

from gem_ray.clock import BatchClock
from gem_ray.pipeline.ledger import Ledger
from gem_ray.pipeline.logs import JsonFormatter, log_problems
from gem_ray.pipeline.progress import json_lines, reader
from gem_ray.pipeline.summary import RunSummary
from gem_ray.prometheus import PostMetrics, StageMetrics, WorkMetrics
from gem_ray.records import Box, Entity, Post, ProblemKind
from gem_ray.tally import Tally

DASHBOARD = Path(__file__).parents[2] / "clusters" / "grafana-dashboard.json"


def entity(**values) -> Entity:
    return Entity("Lyon", 0, 4, 0, 1, "location", "city", 0.9, **values)


def failed_post(stage: str, kind: ProblemKind) -> Post:
    post = Post("7", "Lyon", row_id=3)
    post.fail(stage, kind, "why")
    return post


def exported() -> str:
    """What Prometheus would read from this node."""
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    return httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").text


def samples(text: str, metric: str, *labels: str) -> list[float]:
    """Values of a metric with some labels, one for each process; those of other tests' runs among them."""
    lines = [line for line in text.splitlines() if line.startswith(metric) and all(label in line for label in labels)]
    return [float(line.rsplit(" ", 1)[1]) for line in lines]


def counted(text: str, metric: str, *labels: str) -> list[int]:
    """The same of counters, which begin at a little more than nothing."""
    return [round(value) for value in samples(text, metric, *labels)]


def test_rates_of_prometheus_add_up_to_the_posts(local_ray) -> None:
    """As `increase` does: what a series grows by between scrapes; what it has when it appears is no growth."""
    posts, block, run_id = 5000, 64, "run-of-rates"
    ledger = Ledger(run_id)
    before: dict[str, float] = {}
    increase, sent, deadline = 0.0, 0, time.monotonic() + 90
    while increase < 0.99 * posts and time.monotonic() < deadline:
        lines = [line for line in exported().splitlines() if line.startswith("ray_gem_ray_posts_total{")]
        for series, value in (line.rsplit(" ", 1) for line in lines if f'run_id="{run_id}"' in line):
            increase += float(value) - before.get(series, float(value))
            before[series] = float(value)
        if before and sent < posts:  # the run's first posts take longer than a scrape
            rows = min(20 * block, posts - sent)
            ledger.add_done(Tally(rows=rows, statuses={"ok": rows, "degraded": 0, "rejected": 0}))
            sent += rows
        time.sleep(0.5)
    assert increase == pytest.approx(posts, rel=0.01)


def test_metrics_reach_prometheus_and_the_dashboard_asks_for_them(local_ray) -> None:
    # In a process of its own: one that other tests have used would count on.
    @ray.remote(num_cpus=0, runtime_env={"env_vars": {"GEM_RAY_TEST": "metrics"}})
    def work() -> None:
        stage = StageMetrics("run-7")
        stage.add("knowledge", 0.2, 5, 0.25)
        stage.add("knowledge", 1.2, 6, 0)
        WorkMetrics("run-7").add("knowledge", 1.0, {"asked": 3})
        seen = Post("1", "Lyon", entities=[entity(hard=True, box=Box(0, 0, 1, 1)), entity()])
        PostMetrics("run-7").add(Tally.of_posts([seen, failed_post("prepare", ProblemKind.TEXT_TOO_LONG)]))
        time.sleep(3)  # exported from time to time

    working = work.remote()
    deadline = time.monotonic() + 60
    text = ""
    # Until what was counted last is there.
    last = ("ray_gem_ray_entities_total", 'what="found"', 'run_id="run-7"')
    while time.monotonic() < deadline and 2 not in counted(text, *last):
        time.sleep(0.5)
        text = exported()
    ray.get(working)
    assert 1 in counted(text, "ray_gem_ray_posts_total", 'status="rejected"', 'run_id="run-7"')
    assert 1 in counted(text, "ray_gem_ray_problems_total", 'kind="text_too_long"', 'run_id="run-7"')
    assert 2 in counted(text, *last)
    for what, count in {"grounded": 1, "hard": 1, "reranked": 0}.items():
        assert count in counted(text, "ray_gem_ray_entities_total", f'what="{what}"', 'run_id="run-7"')
    # Ray keeps buckets and no exact sum.
    assert samples(text, "ray_gem_ray_batch_posts_count", 'stage="knowledge"', 'run_id="run-7"') == [2]
    assert samples(text, "ray_gem_ray_batch_posts_bucket", 'le="4.0",', 'stage="knowledge"') == [0]
    assert samples(text, "ray_gem_ray_idle_seconds_total", 'stage="knowledge"', 'run_id="run-7"') == [0.25]
    assert samples(text, "ray_gem_ray_stage_counts_total", 'stage="knowledge"') == [3]
    panels = json.loads(DASHBOARD.read_text())["panels"]
    of_runs = itertools.takewhile(lambda panel: panel["type"] != "row", panels)  # then those of the online service
    asked = set(re.findall(r"ray_gem_ray_\w+", json.dumps([*of_runs])))
    assert asked
    assert all(f"{name}{{" in text for name in asked)


def test_a_process_waits_only_while_no_batch_is_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr("gem_ray.clock.time.perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    clock = BatchClock()
    wait(2)
    first = clock.begin()
    wait(1)
    second = clock.begin()
    wait(1)
    assert clock.end(first) == (2, 2)
    wait(5)  # one is still inside
    assert clock.end(second) == (6, 0)
    wait(3)
    assert clock.end(clock.begin()) == (0, 3)


def test_log_lines_name_run_post_and_reason() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("gem_ray.posts")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        rejected = failed_post("prepare", ProblemKind.BAD_RECORD)
        log_problems("run-1", [rejected, failed_post("load_image", ProblemKind.IMAGE_MISSING), Post("8", "x")])
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert {
        "run_id": "run-1",
        "post_id": "7",
        "row_id": 3,
        "kind": "bad_record",
        "level": "WARNING",
    }.items() <= first.items()
    assert {"stage": "load_image", "kind": "image_missing", "level": "INFO", "message": "why"}.items() <= second.items()


def test_progress_lines_have_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    counts = iter([10, 20, 60, 100])
    read, report = reader(lambda: next(counts), 100), json_lines(every_s=0)
    for _ in range(4):
        report(read())
        time.sleep(0.01)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["done"] for line in lines] == [10, 20, 60, 100]
    assert [line["seconds_left"] is None for line in lines] == [True, True, False, False]
    assert lines[2]["posts_per_second"] > 0
    assert lines[-1]["seconds_left"] == 0


def test_report_shows_every_kind_of_problem_with_examples(run: tuple[Path, RunSummary]) -> None:
    output, summary = run
    facts = json.loads((output / "_run" / "report.json").read_text())
    page = (output / "_run" / "report.html").read_text()
    assert facts["problems"] == dict(summary.tally.problems)
    for kind in facts["problems"]:
        assert f'id="{kind}"' in page
        examples = facts["examples"][kind]
        assert 1 <= len(examples) <= 5
        assert all(example["message"] for example in examples)
    assert "<script" not in page
