"""`gem-ray config`: every key is there, with the value that a configuration has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner, Result

from gem_ray.cli import app
from gem_ray.config import Config, ConfigError, load_config, preset_names
from gem_ray.config_keys import sections, settings

runner = CliRunner()


def config(*arguments: str) -> Result:
    return runner.invoke(app, ["config", *arguments])


def rows(*arguments: str) -> dict[str, dict[str, Any]]:
    """The JSON output: key -> its facts."""
    done = config(*arguments, "--json", "-")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len({row["key"] for row in found}) == len(found)
    return {row["key"]: row for row in found}


def at(section: Any, path: str) -> Any:
    """The value of a key, by attributes; a pool by its stage. A section that is null ends the walk."""
    for name in path.split("."):
        if isinstance(section, list):
            section = next(pool for pool in section if name in pool.stages)
        elif section is not None:
            section = getattr(section, name)
    return section


def plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, list):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


@pytest.mark.parametrize("preset", preset_names())
def test_every_key_has_the_value_that_the_preset_gives_it(preset: str) -> None:
    wanted, found = load_config(preset), rows("--preset", preset)
    for path, row in found.items():
        section = path.rpartition(".")[0]
        off = section and at(wanted, section) is None
        assert row["value"] == (row.get("default") if off else plain(at(wanted, path))), path


@pytest.mark.parametrize("preset", preset_names())
def test_values_that_are_printed_can_be_set(preset: str) -> None:
    """The paths are those that `--set` takes, and all values together are the preset."""
    wanted = load_config(preset)
    overrides = [
        f"{path}={json.dumps(value)}"
        for path, key, value in settings(wanted)
        if not key.is_section and at(wanted, path.rpartition(".")[0] or "labels") is not None
    ]
    assert len(overrides) > 100
    assert load_config(preset, overrides=overrides) == wanted


def test_every_key_of_the_reference_is_there_once_for_each_pool() -> None:
    found = set(rows("--preset", "cluster"))
    for section in sections(Config):
        for key in section.keys:
            names = [key.path.replace("STAGE", stage) for stage in ("knowledge", "tag", "rerank", "ground")]
            assert set(names) <= found, key.path
            found -= set(names)
    assert found == set()


def test_a_pool_that_only_loads_images_is_named_by_its_place() -> None:
    pools = [{"stages": ["tag"]}, {"stages": ["load_image"]}, {"stages": ["load_image", "ground"], "threads": 3}]
    tree = load_config(pipeline={"pools": pools})
    threads = {path: value for path, _, value in settings(tree) if path.endswith(".threads") and "pipeline" in path}
    assert list(threads.values()) == [1, 1, 3]
    assert [path.split(".")[2] for path in threads] == ["tag", "1", "ground"]


def test_settings_go_over_the_preset_and_the_default_stays_that_of_the_code(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("filter: {gamma: 0.6, k: 3}")
    gamma, k = (rows("--config", str(file), "--set", "filter.k=4")[key] for key in ("filter.gamma", "filter.k"))
    assert (gamma["value"], gamma["default"]) == (0.6, Config().filter.gamma)
    assert (k["value"], k["default"]) == (4, Config().filter.k)


def test_the_table_has_the_keys_that_were_asked_for_and_their_values() -> None:
    done = config("--set", "filter.gamma=0.35", "filter", "grounder.boxes.sam")
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["key", "value"],
        ["filter.gamma", "0.35"],
        ["filter.max_share", "null"],
        ["filter.k", str(load_config().filter.k)],
    ]
    assert {line.split()[0] for line in lines[4:]} == {
        "grounder.boxes.sam",
        *(f"grounder.boxes.sam.{name}" for name in ("model", "batch_size", "dtype")),
    }
    assert "entropy in nats" in lines[1]


def test_credentials_are_not_shown() -> None:
    done = config("--set", "knowledge.explainer.base_url=http://me:hunter2@host/v1")
    assert "http://***@host/v1" in done.stdout
    assert "hunter2" not in done.output


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("filtr", "filtr: no such key; did you mean 'filter'? expected one of labels, device"),
        ("filter.gama", "filter.gama: no such key; did you mean 'gamma'? expected one of gamma, max_share, k"),
        ("filtr.gamma", "filtr.gamma: no such key; did you mean 'filter'?"),
        ("filter.gamma.x", "filter.gamma.x: no such key; did you mean 'gamma'?"),
        ("pipeline.pools.tags", "did you mean 'tag'?"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(name: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        runner.invoke(app, ["config", "--preset", "cluster", name], catch_exceptions=False)
    assert says in str(caught.value)
