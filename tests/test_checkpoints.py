import multiprocessing
from pathlib import Path

import pytest

from gem_ray.checkpoints import content_hash, describe, resolve


def _folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def test_a_local_path_is_taken_as_it_is(tmp_path):
    model = _folder(tmp_path / "model", {"config.json": b"{}"})
    assert resolve(str(model)) == model
    assert resolve(str(model / "config.json")) == model / "config.json"


def test_a_folder_of_an_installed_package_is_found():
    assert (resolve("package:gem_ray/presets") / "nano.yaml").is_file()
    assert resolve("package:gem_ray.evaluation").is_dir()


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("nano:no-such-model", "no-such-model"),
        ("package:gem_ray/no_such_folder", "no_such_folder"),
        ("package:no_such_package/model", "not installed"),
        ("/no/such/folder", "not a local path"),
        ("./no/such/folder", "not a local path"),
        ("no-org/no-model", "not a local path"),
    ],
)
def test_what_is_not_there_is_named_with_what_was_tried(monkeypatch, reference, says):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=says) as caught:
        resolve(reference)
    assert reference in str(caught.value)


def test_the_hash_is_of_names_and_contents_and_nothing_else(tmp_path):
    files = {"config.json": b"{}", "sub/weights": b"12"}
    first = content_hash(_folder(tmp_path / "first", files))
    copy = _folder(tmp_path / "copy", dict(reversed(files.items())))
    (copy / "config.json").touch()
    assert content_hash(copy) == first
    assert len(first) == 12
    int(first, 16)
    changed = [
        {"config.json": b"{}", "sub/weights": b"13"},
        {"config.json": b"{}", "weights": b"12"},
        {"config.json": b"{}"},
        {"config.json": b"{}sub/weights\x0012"},
        {"config.json": b"", "sub/weights": b"{}12"},
    ]
    hashes = {content_hash(_folder(tmp_path / str(i), files)) for i, files in enumerate(changed)}
    assert len(hashes | {first}) == len(changed) + 1


def test_a_single_file_has_a_hash(tmp_path):
    folder = _folder(tmp_path, {"a.pth": b"1", "b.pth": b"1", "c.pth": b"2"})
    assert content_hash(folder / "a.pth") == content_hash(folder / "b.pth") != content_hash(folder / "c.pth")


def test_describe_names_the_reference_and_the_hash(tmp_path):
    model = _folder(tmp_path / "model", {"config.json": b"{}"})
    assert describe(str(model)) == f"{model}@{content_hash(model)}"


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """An S3 endpoint that really listens, with a bucket `models`; the node's staging folder is empty."""
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    pytest.importorskip("flask", reason="moto's server needs flask")
    import boto3

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "GEM_RAY_CACHE": str(tmp_path / "staged"),
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="models")
    client.put_object(Bucket="models", Key="tagger/config.json", Body=b"{}")
    client.put_object(Bucket="models", Key="tagger/sub/weights", Body=b"123")
    yield client
    server.stop()


def test_an_s3_prefix_is_fetched_once(bucket, tmp_path):
    folder = resolve("s3://models/tagger")
    assert content_hash(folder) == content_hash(
        _folder(tmp_path / "same", {"config.json": b"{}", "sub/weights": b"123"})
    )
    bucket.delete_object(Bucket="models", Key="tagger/config.json")
    assert resolve("s3://models/tagger") == folder
    assert (folder / "config.json").is_file()


def test_a_single_file_on_s3_keeps_its_name(bucket):
    file = resolve("s3://models/tagger/sub/weights")
    assert (file.name, file.read_bytes()) == ("weights", b"123")


def test_two_prefixes_of_one_name_are_two_models(bucket):
    bucket.put_object(Bucket="models", Key="other/tagger/config.json", Body=b"other")
    assert resolve("s3://models/other/tagger") != resolve("s3://models/tagger")


def test_a_flat_prefix_is_fetched(bucket):
    """As model directories are; Arrow by itself makes only the folders below the first."""
    bucket.put_object(Bucket="models", Key="flat/config.json", Body=b"flat")
    assert (resolve("s3://models/flat") / "config.json").read_bytes() == b"flat"


def test_a_fetch_that_broke_off_is_done_again(bucket):
    target = resolve("s3://models/tagger")
    broken_off = target.parent / ".partial" / "model"
    target.rename(broken_off)
    (broken_off / "config.json").write_bytes(b"{trunc")
    (broken_off / "of an older version").write_bytes(b"")
    again = resolve("s3://models/tagger")
    assert (again / "config.json").read_bytes() == b"{}"
    assert sorted(entry.name for entry in again.iterdir()) == ["config.json", "sub"]


@pytest.mark.parametrize("reference", ["s3://models/nothing", "s3://no-such-bucket/model"])
def test_nothing_at_an_s3_prefix_is_said_so(bucket, reference):
    with pytest.raises(FileNotFoundError, match=reference):
        resolve(reference)


def _resolve_and_check(reference):
    assert (resolve(reference) / "sub" / "weights").read_bytes() == b"123"


def test_processes_of_one_node_that_ask_at_once_all_get_the_whole_model(bucket):
    context = multiprocessing.get_context("spawn")  # Arrow's threads do not survive a fork
    workers = [context.Process(target=_resolve_and_check, args=("s3://models/tagger",)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 3
