"""What surrounds the code agrees with it: package data, version, and the commands of CI and of contributors."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gem_ray

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGE = ROOT / "gem_ray"


# They come with a build: for a card, for CPUs.
BUILDS = {"torch", "torchvision", "vllm"}
# Extras that neither the tests nor the demo install.
NOT_INSTALLED = {"quantize", "tracing"}


def _requirements() -> list[Requirement]:
    """What the project itself asks for, in every extra that `make install` installs."""
    extras = PROJECT["project"]["optional-dependencies"].items()
    lists = [PROJECT["project"]["dependencies"], *(each for name, each in extras if name not in NOT_INSTALLED)]
    found = [Requirement(line) for each in lists for line in each]
    return [each for each in found if each.name != PROJECT["project"]["name"]]


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition("==") for line in lines if not line.startswith("#")]
    assert all(equals and version for _, equals, version in pins)
    names = [canonicalize_name(name) for name, _, _ in pins]
    assert len(set(names)) == len(names)
    return dict(zip(names, (version for _, _, version in pins), strict=True))


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


def test_constraints_pin_every_requirement_within_its_range():
    pins = _pins()
    assert not BUILDS & pins.keys()
    for each in _requirements():
        name = canonicalize_name(each.name)
        if name not in BUILDS:
            assert name in pins, f"{each.name} has no version in constraints.txt: `make constraints`"
            assert each.specifier.contains(pins[name]), (
                f"constraints.txt has {name} {pins[name]}, pyproject.toml {each}"
            )


def test_whatever_installs_the_project_for_its_users_or_tests_takes_the_constraints():
    for file in ("Makefile", ".github/workflows/ci.yml", "clusters/Dockerfile"):
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        installs = [line for line in lines if re.search(r"(INSTALL\)|pip install) .*(\.|whl\))\[", line)]
        assert installs, file
        assert all("constraints.txt" in line or "$(INSTALL) " in line for line in installs), installs


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
