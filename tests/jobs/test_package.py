"""What a job takes along, and what stays behind."""

from __future__ import annotations

import zipfile

import pytest
from ray._private.runtime_env.packaging import create_package

from gem_ray.cluster.submit import PACKAGE_LIMIT, job_environment

SOURCE = ("gem_ray/__init__.py", "gem_ray/data/files.py", "gem_ray/presets/nano.yaml", "jobs/annotate.py")
LEFT_BEHIND = (
    "gem_ray/__pycache__/a.pyc",
    ".git/config",
    ".venv/bin/python",
    ".env",
    "data/posts.parquet",
    "out/run.json",
    "tests/test_cli.py",
    "other.yaml",
)


@pytest.fixture
def checkout(tmp_path):
    for name in (*SOURCE, *LEFT_BEHIND, "my.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def test_package_holds_the_source_and_what_is_included_and_nothing_else(checkout, tmp_path_factory):
    """Ray's own packager says what goes."""
    environment = job_environment(checkout, include=["my.yaml"])
    package = tmp_path_factory.mktemp("package") / "package.zip"
    create_package(
        environment["working_dir"], package, include_gitignore=True, excludes=[".git", *environment["excludes"]]
    )
    with zipfile.ZipFile(package) as archive:
        files = {name for name in archive.namelist() if not name.endswith("/")}
    assert files == {*SOURCE, "my.yaml"}


def test_folder_without_the_source_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no gem_ray in .*--working-dir takes a checkout"):
        job_environment(tmp_path)


def test_source_larger_than_the_cluster_takes_is_refused_with_the_numbers(checkout):
    (checkout / "jobs" / "weights.bin").touch()
    with (checkout / "jobs" / "weights.bin").open("r+b") as file:
        file.truncate(PACKAGE_LIMIT)
    with pytest.raises(ValueError, match=r"gem_ray, jobs hold 100 MiB, and Ray takes 100"):
        job_environment(checkout)


@pytest.mark.parametrize("name", ["configs/my.yaml", "../my.yaml", "/etc/passwd", "..", "."])
def test_only_names_in_the_checkout_are_included(checkout, name):
    with pytest.raises(ValueError, match="--include takes a name"):
        job_environment(checkout, include=[name])


def test_links_that_lead_out_of_the_checkout_are_refused(checkout, tmp_path_factory):
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.yaml"
    secret.write_text("token")
    (checkout / "link.yaml").symlink_to(secret)
    with pytest.raises(ValueError, match=r"link\.yaml is a link to .*secret\.yaml, outside of"):
        job_environment(checkout, include=["link.yaml"])
    (checkout / "configs").mkdir()
    (checkout / "configs" / "inner").symlink_to(secret.parent)
    with pytest.raises(ValueError, match="inner is a link to"):
        job_environment(checkout, include=["configs"])
    (checkout / "configs" / "inner").unlink()
    (checkout / "configs" / "mine.yaml").symlink_to(checkout / "my.yaml")
    assert job_environment(checkout, include=["configs"])


def test_only_the_variables_that_are_asked_for_go(checkout, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    assert job_environment(checkout)["env_vars"] == {}
    forwarded = job_environment(checkout, env=["AWS_REGION", "OPTIONS=a=b", "EMPTY="])["env_vars"]
    assert forwarded == {"AWS_REGION": "eu-central-1", "OPTIONS": "a=b", "EMPTY": ""}


def test_variable_that_is_not_set_is_named(checkout, monkeypatch):
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    with pytest.raises(ValueError, match="--env AWS_PROFILE: the variable is not set"):
        job_environment(checkout, env=["AWS_PROFILE"])
