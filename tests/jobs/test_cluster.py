"""Jobs on a real Ray head with token authentication, by `gem-ray submit` and by `ray job submit`."""

from __future__ import annotations

import json
import signal
import stat
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gem_ray.cluster.submit import job_environment

pytestmark = pytest.mark.alone

TEXT_ONLY = ("--set", "reranker.enabled=false", "--set", "grounder.enabled=false")
POSTS = 15


@pytest.fixture(scope="module")
def posts(tmp_path_factory):
    """Posts without an image, and one that has to be rejected."""
    folder = tmp_path_factory.mktemp("posts")
    texts = [f"Angela Merkel visits Lyon, day {day}" for day in range(POSTS)]
    write_texts(folder, [*texts, ""])
    return folder


def write_texts(folder, texts):
    table = pa.table({"post_id": [str(number) for number in range(len(texts))], "text": texts})
    pq.write_table(table, folder / "posts.parquet")


def test_submitted_annotation_shows_its_log_and_ends_with_0_although_a_row_was_rejected(head, posts, tmp_path):
    done = head.run(
        "gem-ray", "submit", "annotate", "--address", head.address, "--", posts, tmp_path / "out", *TEXT_ONLY
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"degraded {POSTS}, ok 0, rejected 1" in done.stdout
    rows = pq.read_table(tmp_path / "out" / "annotations").to_pylist()
    assert {row["post_id"] for row in rows} == {str(number) for number in range(POSTS + 1)}
    assert any(entity["text"] == "Angela Merkel" for row in rows for entity in row["entities"] or ())
    assert head.token.read_text() not in done.stdout + done.stderr


def test_failed_job_ends_with_the_scripts_own_exit_code_and_its_sentence(head, posts, tmp_path):
    done = head.run("gem-ray", "submit", "annotate", "--address", head.address, "--", posts, tmp_path, "--set", "a.b=1")
    assert done.returncode == 2
    assert "error: a: no such key" in done.stdout
    assert "failed" in done.stderr


def test_ray_job_submit_runs_the_packaged_source(head, checkout, tmp_path):
    """The environment of this test has gem_ray too; the job must not use that one."""
    source = "import gem_ray; print('source:', gem_ray.__file__)"
    environment = json.dumps(job_environment(checkout))
    entrypoint = f'python -c "{source}" && python jobs/evaluate.py {tmp_path} {tmp_path}'
    submit = ("ray", "job", "submit", "--address", head.address, "--runtime-env-json", environment)
    done = head.run(*submit, "--", "sh", "-c", entrypoint)
    assert done.returncode == 1, done.stdout + done.stderr  # there is nothing to evaluate
    assert "_ray_pkg_" in next(line for line in done.stdout.splitlines() if line.startswith("source:"))
    assert f"{tmp_path}" in next(line for line in done.stdout.splitlines() if line.startswith("error:"))


def test_the_heads_token_is_its_users_alone(head):
    assert stat.S_IMODE(head.token.stat().st_mode) == 0o600


@pytest.mark.parametrize("variables", [{"RAY_AUTH_TOKEN": "wrong"}, {"RAY_AUTH_MODE": "disabled"}])
def test_without_the_right_token_nothing_is_submitted(head, posts, tmp_path, variables):
    submit = ("gem-ray", "submit", "annotate", "--address", head.address, "--", posts, tmp_path / "out")
    done = head.run(*submit, **variables)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "wants its token: set RAY_AUTH_MODE=token" in done.stderr
    assert head.token.read_text() not in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_leaves_the_job_running_and_a_stop_ends_it_cleanly(head, tmp_path):
    write_texts(tmp_path, ["Angela Merkel visits Lyon"] * 20_000)
    out = tmp_path / "out"
    command = ("gem-ray", "submit", "annotate", "--address", head.address, "--", tmp_path / "posts.parquet", out)
    following = head.start(*command, *TEXT_ONLY)
    wait_until(lambda: any(out.glob("_run/*/staged/**/*.parquet")))  # while it connects, Ray would end it with a trace
    following.send_signal(signal.SIGINT)
    log, hints = following.communicate(timeout=180)
    job = log.splitlines()[0]
    assert following.returncode == 130
    assert "the job goes on" in hints
    assert f"ray job stop --address {head.address} {job}" in hints

    stopped = head.run("ray", "job", "stop", "--address", head.address, job)
    assert "was stopped" in stopped.stdout + stopped.stderr
    arguments = f"{job!r}, {head.address!r}, 'the same command'"
    follow = f"from gem_ray.cluster.submit import follow_job; raise SystemExit(follow_job({arguments}))"
    ended = head.run(sys.executable, "-c", follow)
    assert ended.returncode == 1
    assert "stopped; run the same command to resume" in ended.stdout.splitlines()
    assert f"job {job} stopped" in ended.stderr


def wait_until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.2)
    raise TimeoutError
