"""The run's folder, on a disk and in S3: nothing is replaced before the new is complete."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import boto3
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from gem_ray.data.generated import generate
from gem_ray.data.shards import write_posts
from gem_ray.pipeline.run_directory import RunDirectory
from gem_ray.pipeline.source import PostSource


@pytest.fixture(params=["disk", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "disk":
        yield str(tmp_path / "out")
        return
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"runs-{uuid4().hex}"  # servers of one process share their buckets
    boto3.client("s3").create_bucket(Bucket=bucket)
    yield f"s3://{bucket}/out"
    server.stop()


def write_result(directory: RunDirectory, content: str) -> None:
    directory.begin()
    directory.filesystem.create_dir(f"{directory.staging}/status=ok")
    with directory.filesystem.open_output_stream(f"{directory.staging}/status=ok/{content}.parquet") as stream:
        stream.write(content.encode())


def files_of(directory: RunDirectory) -> list[str]:
    entries = directory.filesystem.get_file_info(fs.FileSelector(directory.root, recursive=True))
    return sorted(entry.path.removeprefix(directory.root) for entry in entries if entry.is_file)


def test_result_appears_when_published(output: str) -> None:
    directory = RunDirectory(output)
    directory.check(fresh=False)
    write_result(directory, "first")
    directory.check(fresh=False)  # an interrupted run leaves nothing that would have to be replaced
    directory.publish({"run_id": "1"})
    assert files_of(directory) == ["/annotations/status=ok/first.parquet", "/run.json"]
    with directory.filesystem.open_input_stream(f"{directory.root}/run.json") as stream:
        assert json.loads(stream.read()) == {"run_id": "1"}


def test_old_result_stays_until_the_new_one_is_published(output: str) -> None:
    directory = RunDirectory(output)
    write_result(directory, "first")
    directory.publish({"run_id": "1"})
    with pytest.raises(FileExistsError, match="already holds annotations"):
        directory.check(fresh=False)
    directory.check(fresh=True)
    write_result(directory, "half")
    assert "/annotations/status=ok/first.parquet" in files_of(directory)
    write_result(directory, "second")
    directory.publish({"run_id": "2"})
    assert files_of(directory) == ["/annotations/status=ok/second.parquet", "/run.json"]


def test_file_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"):
        RunDirectory(str(tmp_path / "out")).check(fresh=True)


def test_posts_are_read_from_where_they_were_written(output: str) -> None:
    write_posts(generate(5, seed=2), output, per_shard=2)
    source = PostSource.open(output, limit=3)
    assert [file.rows for file in source.files] == [2, 1]
    assert sum(table.num_rows for task in source.get_read_tasks(1) for table in task()) == 3
