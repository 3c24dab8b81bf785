"""What surrounds the code agrees with it: package data, version, and the commands of CI and of contributors."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

import gem_ray

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGE = ROOT / "gem_ray"


def _targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def _recipe(target: str) -> list[str]:
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").partition(f"\n{target}:")[2].splitlines()[1:]
    return [line.strip() for line in lines[: lines.index("")]]


def test_wheel_holds_every_file_of_the_package():
    """A file that `package-data` does not name is missed by no other test: they run in the checkout."""
    named = {
        file
        for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for file in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    files = {file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    assert {file for file in files if file.suffix != ".py"} - named == set()
    modules = {file.parent for file in files if file.suffix == ".py"}
    assert all((folder / "__init__.py").is_file() for folder in modules)


def test_wheel_says_that_the_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()
    assert "Typing :: Typed" in PROJECT["project"]["classifiers"]


def test_version_to_cite_is_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == gem_ray.__version__
    assert citation["license"] == PROJECT["project"]["license"]


@pytest.mark.parametrize("file", ["CONTRIBUTING.md", ".github/workflows/ci.yml", ".github/pull_request_template.md"])
def test_make_targets_that_are_named_exist(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`|run: )make ([a-z]+)", text, re.MULTILINE))
    assert named
    assert named <= _targets()


@pytest.mark.parametrize("file", ["CONTRIBUTING.md", "SECURITY.md"])
def test_files_that_are_named_exist(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    named = re.findall(r"`((?:gem_ray|tests|docs|clusters)/[^`]*)`|\]\(([^)#]+)\)", text)
    paths = {path or link for path, link in named if "NAME" not in path}
    assert paths
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_pre_commit_runs_what_lint_runs():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [shlex.split(hook["entry"]) for repo in config["repos"] for hook in repo["hooks"]]
    lint = [shlex.split(line.replace("$(BIN)", ".venv/bin")) for line in _recipe("lint")]
    # Lint checks the whole checkout; pre-commit names the files, and formats them.
    assert [[word for word in command if word not in ("--check", ".")] for command in lint] == hooks


def test_forms_for_issues_ask_for_something():
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml"):
        fields = yaml.safe_load(form.read_text(encoding="utf-8"))["body"]
        assert any(field.get("validations", {}).get("required") for field in fields)
