"""What a start looks at first: arguments, input, output, and only then the models."""

import json
import time

import pytest

from gem_ray.config import load_config
from gem_ray.pipeline.run import annotate_dataset


@pytest.fixture
def posts(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "posts").mkdir()
    pq.write_table(pa.table({"post_id": ["1"], "text": ["Paris"]}), tmp_path / "posts" / "a.parquet")
    return str(tmp_path / "posts")


@pytest.mark.parametrize("wrong", ["input", "output", "both"])
def test_a_wrong_bucket_is_said_at_once_and_no_model_is_asked_for(s3, hub, posts, tmp_path, wrong):
    nowhere = "s3://there-is-no-such-bucket/folder"
    source = nowhere if wrong != "output" else posts
    output = nowhere if wrong != "input" else str(tmp_path / "out")
    started = time.monotonic()
    with pytest.raises(FileNotFoundError, match="there-is-no-such-bucket"):
        annotate_dataset(source, output, load_config("one-gpu"))
    assert time.monotonic() - started < 5
    assert hub.requests == 0


def test_a_missing_model_is_said_once_input_and_output_are_right(hub, posts, tmp_path):
    config = load_config("one-gpu", overrides=["tagger.model=org/none"])
    with pytest.raises(FileNotFoundError, match=r"no model at"):
        annotate_dataset(posts, tmp_path / "out", config)
    assert hub.requests > 0
    assert json.loads((tmp_path / "out" / "_run" / "lease.json").read_text())["released"]


def test_a_run_resumes_with_another_password_and_stores_neither(posts, tmp_path, monkeypatch):
    def no_ray(*arguments, **options):
        raise RuntimeError("no Ray here")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", no_ray)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    for password in ("first-s3cr3t", "second-s3cr3t"):
        config = load_config(
            overrides=[f"knowledge.explainer.base_url=http://user:{password}@127.0.0.1:1/v1?token=s3cr3t"]
        )
        with pytest.raises(RuntimeError, match="no Ray here"):
            annotate_dataset(posts, tmp_path / "out", config)
    stored = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert any(file.name.startswith("manifest") for file in stored)
    assert not any(b"s3cr3t" in file.read_bytes() for file in stored)
    other = load_config(overrides=["knowledge.explainer.base_url=http://127.0.0.1:2/v1"])
    with pytest.raises(ValueError, match="base_url"):
        annotate_dataset(posts, tmp_path / "out", other)
