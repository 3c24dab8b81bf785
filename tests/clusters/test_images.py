"""The images: they copy what is there, install the versions of the project, and run without root's rights."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = sorted((ROOT / "clusters").glob("Dockerfile*"))


def instructions(file: Path) -> list[tuple[str, str]]:
    """Instruction and arguments; continued lines are one."""
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


@pytest.fixture(params=IMAGES, ids=lambda file: file.name)
def image(request) -> list[tuple[str, str]]:
    return instructions(request.param)


def test_there_is_one_for_cards_and_one_for_cpus():
    assert [file.name for file in IMAGES] == ["Dockerfile", "Dockerfile.cpu"]


def test_base_is_pinned_by_a_tag(image):
    ((_, base),) = [each for each in image if each[0] == "FROM"]
    _, _, tag = base.partition(":")
    assert re.match(r"\d+\.\d+", tag)


def test_what_is_copied_is_in_the_repository(image):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for copied in (rest for name, rest in image if name == "COPY"):
        *sources, _ = [word for word in shlex.split(copied) if not word.startswith("--")]
        for source in sources:
            assert any(file == source or file.startswith(f"{source}/") for file in tracked), source


def test_what_the_build_reads_of_the_project_is_copied(image):
    """`pip install .` reads the files that pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    copied = " ".join(rest for name, rest in image if name == "COPY").split()
    assert {"pyproject.toml", "constraints.txt", "gem_ray", project["readme"], *project["license-files"]} <= set(copied)


def test_versions_are_those_of_the_project(image):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = dict(line.split("==") for line in project["dependencies"] if "==" in line)
    installs = [rest for name, rest in image if name == "RUN" and "pip install" in rest]
    pins = dict(re.findall(r"(torch|torchvision)={2,3}([\d.]+)", " ".join(installs)))
    assert pins == {name: versions[name] for name in ("torch", "torchvision")}
    for command in (part for rest in installs for part in rest.split("&&")):
        assert "-c constraints.txt" in command
        assert "--no-cache-dir" in command


def test_it_does_not_run_as_root(image):
    users = [rest for name, rest in image if name == "USER"]
    assert users[-1] not in ("root", "0")
