import multiprocessing
import os
import time
from pathlib import Path

import pytest
from pyarrow import fs

from gem_ray.model_paths import content_hash, describe, resolve


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


def test_the_hash_is_also_of_what_lies_behind_links(tmp_path):
    model = _folder(tmp_path / "model", {"config.json": b"{}"})
    _folder(tmp_path / "shared", {"weights": b"1"})
    (model / "encoder").symlink_to("../shared")
    whole = _folder(tmp_path / "whole", {"config.json": b"{}", "encoder/weights": b"1"})
    first = content_hash(model)
    assert first == content_hash(whole)
    (tmp_path / "shared" / "weights").write_bytes(b"2")
    assert content_hash(model) != first


def test_a_single_file_has_a_hash(tmp_path):
    folder = _folder(tmp_path, {"a.pth": b"1", "b.pth": b"1", "c.pth": b"2"})
    assert content_hash(folder / "a.pth") == content_hash(folder / "b.pth") != content_hash(folder / "c.pth")


def test_the_hash_of_a_large_model_is_computed_once_until_a_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("GEM_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("gem_ray.model_paths._KEPT_FROM_BYTES", 4)
    monkeypatch.setattr("gem_ray.model_paths._SETTLED_S", -1)
    model = _folder(tmp_path / "model", {"config.json": b"{}", "weights": b"1234"})
    first = content_hash(model)
    with monkeypatch.context() as patch:
        patch.setattr("gem_ray.model_paths._hash", None)
        assert content_hash(model) == first
    before = (model / "weights").stat()
    time.sleep(0.02)
    (model / "weights").write_bytes(b"5678")
    os.utime(model / "weights", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert content_hash(model) == content_hash(_folder(tmp_path / "same", {"config.json": b"{}", "weights": b"5678"}))
    assert content_hash(model) != first


def test_describe_names_the_reference_and_the_hash(tmp_path):
    model = _folder(tmp_path / "model", {"config.json": b"{}"})
    assert describe(str(model)) == f"{model}@{content_hash(model)}"


@pytest.fixture
def models(s3, monkeypatch, tmp_path):
    """The URI of a bucket with a model in it; the node's staging folder is empty."""
    monkeypatch.setenv("GEM_RAY_CACHE", str(tmp_path / "staged"))
    uri = s3.bucket("models")
    s3.put(f"{uri}/tagger/config.json", b"{}")
    s3.put(f"{uri}/tagger/sub/weights", b"123")
    return uri


def test_an_s3_prefix_is_fetched_once(models, s3, tmp_path):
    folder = resolve(f"{models}/tagger")
    same = _folder(tmp_path / "same", {"config.json": b"{}", "sub/weights": b"123"})
    assert content_hash(folder) == content_hash(same)
    s3.forbid(f"{models}/tagger/*", "s3:GetObject")
    assert resolve(f"{models}/tagger") == folder


def test_a_prefix_that_has_changed_is_another_model_and_is_fetched_anew(models, s3, monkeypatch, tmp_path):
    reference = f"{models}/tagger"
    first, folder = describe(reference), resolve(reference)
    s3.put(f"{reference}/sub/weights", b"456")  # of the same size
    second = describe(reference)
    assert second != first
    assert (resolve(reference) / "sub" / "weights").read_bytes() == b"456"
    assert (folder / "sub" / "weights").read_bytes() == b"123"  # an actor may still be reading it
    monkeypatch.setenv("GEM_RAY_CACHE", str(tmp_path / "another-node"))
    assert describe(reference) == second
    assert (resolve(reference) / "sub" / "weights").read_bytes() == b"456"
    s3.put(f"{reference}/new.json", b"{}")
    assert describe(reference) not in (first, second)


def test_what_changes_while_it_is_fetched_is_refused(models, s3, monkeypatch):
    copy_files = fs.copy_files

    def copy_and_change(*arguments, **options):
        copy_files(*arguments, **options)
        s3.put(f"{models}/tagger/sub/weights", b"456")

    with monkeypatch.context() as patch:
        patch.setattr(fs, "copy_files", copy_and_change)
        with pytest.raises(FileNotFoundError, match="changed while it was fetched"):
            resolve(f"{models}/tagger")
    assert (resolve(f"{models}/tagger") / "sub" / "weights").read_bytes() == b"456"


def test_an_s3_model_is_described_without_being_fetched(models, s3):
    s3.forbid(f"{models}/tagger/*", "s3:GetObject")
    assert describe(f"{models}/tagger").startswith(f"{models}/tagger@")
    with pytest.raises(FileNotFoundError):
        resolve(f"{models}/tagger")


def test_a_single_file_on_s3_keeps_its_name(models):
    file = resolve(f"{models}/tagger/sub/weights")
    assert (file.name, file.read_bytes()) == ("weights", b"123")


def test_two_prefixes_of_one_name_are_two_models(models, s3):
    s3.put(f"{models}/other/tagger/config.json", b"other")
    assert resolve(f"{models}/other/tagger") != resolve(f"{models}/tagger")


def test_a_flat_prefix_is_fetched(models, s3):
    """As model directories are; Arrow by itself makes only the folders below the first."""
    s3.put(f"{models}/flat/config.json", b"flat")
    assert (resolve(f"{models}/flat") / "config.json").read_bytes() == b"flat"


def test_a_model_arrives_whole_whatever_happens_to_some_requests(models, s3, faulty_s3):
    files = {f"part-{index}": bytes([index]) * 500_000 for index in range(8)}
    for name, content in files.items():
        s3.put(f"{models}/large/{name}", content)
    faulty_s3.share, faulty_s3.kinds = 0.3, ["slow_down", "reset", "cut"]
    folder = resolve(f"{models}/large")
    assert {entry.name: entry.read_bytes() for entry in folder.iterdir()} == files
    assert faulty_s3.faults >= 3


def test_a_model_of_which_a_part_could_not_be_fetched_is_not_there_until_it_is_whole(models, s3, faulty_s3):
    s3.forbid(f"{models}/tagger/sub/*", "s3:GetObject")
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="ACCESS_DENIED"):
            resolve(f"{models}/tagger")
    s3.client.delete_bucket_policy(Bucket=models.removeprefix("s3://"))
    assert (resolve(f"{models}/tagger") / "sub" / "weights").read_bytes() == b"123"


def test_a_fetch_that_broke_off_is_done_again(models):
    target = resolve(f"{models}/tagger")
    broken_off = target.parent / ".partial" / "model"
    target.rename(broken_off)
    (broken_off / "config.json").write_bytes(b"{trunc")
    (broken_off / "of an older version").write_bytes(b"")
    again = resolve(f"{models}/tagger")
    assert (again / "config.json").read_bytes() == b"{}"
    assert sorted(entry.name for entry in again.iterdir()) == ["config.json", "sub"]


def test_nothing_at_an_s3_prefix_is_said_so(models):
    for reference in (f"{models}/nothing", "s3://no-such-bucket/model"):
        with pytest.raises(FileNotFoundError, match=reference):
            resolve(reference)


def test_credentials_in_a_reference_are_refused_and_not_repeated():
    with pytest.raises(ValueError, match="credentials come from the environment") as caught:
        resolve("s3://key:secret@models/tagger")
    assert "secret" not in str(caught.value)


def _resolve_and_check(reference):
    assert (resolve(reference) / "sub" / "weights").read_bytes() == b"123"


def test_processes_of_one_node_that_ask_at_once_all_get_the_whole_model(models):
    context = multiprocessing.get_context("spawn")  # Arrow's threads do not survive a fork
    workers = [context.Process(target=_resolve_and_check, args=(f"{models}/tagger",)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 3
