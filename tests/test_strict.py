import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gem_ray.config import ConfigError, load_config
from gem_ray.experiments.definition import load_experiment
from gem_ray.serving.schemas import file_schema
from gem_ray.strict import load_json, load_yaml

KEYS = st.lists(st.text("abc", min_size=1, max_size=2), min_size=1, max_size=5)


@given(KEYS, st.booleans())
def test_a_mapping_is_read_or_the_key_that_stands_twice_is_named(keys, nested):
    """Whether in JSON or YAML, at the top or inside a list."""
    members = [f"{json.dumps(key)}: {number}" for number, key in enumerate(keys)]
    text = "{" + ",\n ".join(members) + "}"
    text = f'{{"outer": [{text}]}}' if nested else text
    for load, error in ((load_json, ValueError), (load_yaml, yaml.YAMLError)):
        if len(set(keys)) == len(keys):
            assert load(text) == json.loads(text)
        else:
            with pytest.raises(error, match=r"`[abc]+` stands twice"):
                load(text)


def test_merged_keys_may_be_written_anew():
    text = "base: &base {a: 1, b: 2}\nnew: {<<: *base, b: 3}\nmore: {<<: [*base], a: 1}"
    assert load_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize("load", [lambda file: load_config("nano", file), lambda file: load_experiment(str(file)),
                                  file_schema])  # fmt: skip
def test_files_of_settings_in_which_something_stands_twice_are_refused(tmp_path: Path, load):
    file = tmp_path / "my.yaml"
    file.write_text("filter:\n  gamma: 0.5\nimage:\n  max_side: 500\n\nfilter:\n  k: 3\n")
    with pytest.raises(ConfigError, match=r"`filter` stands twice, in lines 1 and 6"):
        load(file)
