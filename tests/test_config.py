from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from gem_ray import Annotator, annotate_dataset
from gem_ray.config import Config, ConfigError, FilterConfig, load_config, parse_config, preset_names


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_a_valid_config(preset):
    assert isinstance(load_config(preset), Config)


def test_the_default_preset_is_there():
    assert "nano" in preset_names()
    assert load_config() == load_config("nano")


def test_the_papers_settings_are_the_defaults():
    config = Config()
    assert (config.filter.gamma, config.filter.k) == (0.2, 5)
    assert config.tagger.max_length == 256
    assert config.grounder.matcher.threshold is None
    assert config.grounder.boxes.text_first == ["person"]


def test_a_config_survives_yaml(tmp_path):
    config = load_config(overrides=["filter.gamma=0.7", "knowledge.cache=cache", "grounder.boxes.sam=null"])
    file = _write(tmp_path / "config.yaml", yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(file=file) == config


def test_overrides_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    preset = load_config()
    file = _write(tmp_path / "config.yaml", "filter: {gamma: 0.4, k: 4}\nimage: {max_bytes: 1000}\n")
    config = load_config(file=file, overrides=["filter.k=3", "device=cpu", "filter.k=2"], filter={"gamma": 0.5})
    assert (config.filter.gamma, config.filter.k, config.device) == (0.5, 2, "cpu")
    assert config.image.max_bytes == 1000
    assert config.image.max_side == preset.image.max_side  # the neighbour of what the file sets stays
    assert load_config() == preset  # nothing leaks into the next one
    assert load_config(file=str(file), overrides="filter.k=2").filter == FilterConfig(gamma=0.4, k=2)  # in Python


def test_sections_can_be_given_as_models():
    assert load_config(filter=FilterConfig(gamma=0.9)).filter.gamma == 0.9


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("filter.gamma=0.3", "filter.gamma", 0.3),
        ("filter.gamma=1e-3", "filter.gamma", 0.001),  # YAML 1.1 takes this for text
        (" filter.gamma = 0.3 ", "filter.gamma", 0.3),
        ("reranker.enabled=false", "reranker.enabled", False),
        ("reranker.adapter=null", "reranker.adapter", None),
        ("reranker.adapter=", "reranker.adapter", None),
        ("device=cuda:1", "device", "cuda:1"),
        ("grounder.boxes.text_first=[person, animal]", "grounder.boxes.text_first", ["person", "animal"]),
        ("grounder.boxes.text_first=[]", "grounder.boxes.text_first", []),
        ("tagger.model=s3://bucket/a=b", "tagger.model", "s3://bucket/a=b"),
        ("knowledge.cache=/tmp/answers", "knowledge.cache", Path("/tmp/answers")),
        ("knowledge.explainer={base_url: 'http://localhost/v1'}", "knowledge.explainer.model", "gpt-3.5-turbo"),
        ("knowledge.explainer.base_url=http://localhost:8000/v1", "knowledge.explainer.concurrency", 8),
    ],
)
def test_an_override_sets_one_leaf(override, path, value):
    found = load_config(overrides=[override])
    for key in path.split("."):
        found = getattr(found, key)
    assert found == value


def test_an_override_reaches_into_a_section_that_a_file_turned_off(tmp_path):
    file = _write(tmp_path / "config.yaml", "grounder: {boxes: {sam: null}}")
    config = load_config(file=file, overrides=["grounder.boxes.sam.model=mine"])
    assert config.grounder.boxes.sam.model == "mine"


@pytest.mark.parametrize("override", ["gamma", "=3", ".gamma=3", "filter..gamma=3", "filter.=3", ""])
def test_an_override_without_key_or_value_is_refused(override):
    with pytest.raises(ConfigError, match=r"key\.path=value"):
        load_config(overrides=[override])


def test_an_override_that_is_no_yaml_is_refused():
    with pytest.raises(ConfigError, match=r"filter\.gamma=\["):
        load_config(overrides=["filter.gamma=["])


def _sections(model: type[BaseModel], path: str = ""):
    """Every section of the tree with its path, found through the defaults of a filled config."""
    yield path, model
    filled = {"base_url": "http://localhost"} if "base_url" in model.model_fields else {}
    for name, value in model(**filled):
        if isinstance(value, BaseModel):
            yield from _sections(type(value), f"{path}.{name}" if path else name)


SECTIONS = [
    *_sections(Config),
    (
        "knowledge.explainer",
        type(Config.model_validate({"knowledge": {"explainer": {"base_url": "http://localhost"}}}).knowledge.explainer),
    ),
]


@pytest.mark.parametrize(("path", "section"), SECTIONS, ids=lambda value: value if isinstance(value, str) else "")
def test_an_unknown_key_is_named_with_the_nearest_and_all_that_are_expected(path, section):
    known = list(section.model_fields)
    for name in known:
        key = f"{path}.{name}x" if path else f"{name}x"
        with pytest.raises(ConfigError) as caught:
            load_config(overrides=[f"{key}=1"])
        line = next(line for line in str(caught.value).splitlines() if line.startswith(f"{key}: "))
        assert f"did you mean {name!r}?" in line
        assert line.endswith(", ".join(known))


def test_a_key_that_resembles_nothing_still_says_what_is_expected():
    with pytest.raises(ConfigError, match=r"^filter\.zzz: no such key; expected one of gamma, max_share, k$"):
        load_config(overrides=["filter.zzz=1"])


def test_an_unknown_preset_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match="unknown preset 'nanu'; did you mean 'nano'"):
        load_config("nanu")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"filter": {"gamma": "much"}}, ["filter.gamma", "number", "'much'"]),
        ({"filter": {"gamma": -1}}, ["filter.gamma", "greater than or equal to 0", "-1"]),
        ({"filter": {"gamma": float("nan")}}, ["filter.gamma", "nan"]),
        ({"filter": {"k": 0}}, ["filter.k", "greater than or equal to 1"]),
        ({"grounder": {"matcher": {"threshold": 2}}}, ["grounder.matcher.threshold", "less than or equal to 1"]),
        ({"labels": "fmner"}, ["labels", "'fmnerg' or 'gmner'", "'fmner'"]),
        ({"filter": 3}, ["filter", "dictionary", "3"]),
        ({"knowledge": {"explainer": {"model": "x"}}}, ["knowledge.explainer", "base_url must be set"]),
        (
            {"pipeline": {"pools": [{"stages": ["tag"], "num_gpus": 1.5}]}},
            ["pipeline.pools.0.num_gpus", "more than one GPU are whole ones"],
        ),
        (
            {"serving": {"pools": [{"stages": ["tag"], "num_gpus": 0.00001}]}},
            ["serving.pools.0.num_gpus", "in parts of 0.0001"],
        ),
        (
            {"pipeline": {"pools": [{"stages": ["tag"], "num_gpus": float("inf")}]}},
            ["pipeline.pools.0.num_gpus", "finite"],
        ),
        (
            {"pipeline": {"pools": [{"stages": ["tag"], "min_actors": 3, "max_actors": 2}]}},
            ["pipeline.pools.0", "max_actors (2) is below"],
        ),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(values, says):
    with pytest.raises(ConfigError) as caught:
        parse_config(values)
    for words in says:
        assert words in str(caught.value)
    assert caught.value.__suppress_context__  # the message is all there is to see


@pytest.mark.parametrize(
    ("section", "key", "wrong", "says"),
    [
        ("filter", "gamma", "x", r"gamma: .* \(got 'x'\)"),
        ("filter", "gama", 0.3, "gama: no such key; did you mean 'gamma'"),
        ("reranker", "engine", "endpoint", "engine endpoint needs endpoint.base_url"),
        ("serving", "max_batch_posts", 1000, r"max_batch_posts \(1000\) is above max_in_flight"),
        ("pipeline", "pools", [], "pools: "),
        ("pipeline.pools.0", "threads", 0, "threads: .* greater than or equal to 1"),
    ],
)
def test_what_is_assigned_is_checked_as_what_is_read(section, key, wrong, says):
    config = load_config()
    part = config
    for name in section.split("."):
        part = part[int(name)] if name.isdigit() else getattr(part, name)
    with pytest.raises(ConfigError, match=says):
        setattr(part, key, wrong)
    assert config == load_config()  # what was refused is not kept


def test_what_is_assigned_is_converted_and_its_neighbours_stay_the_same_objects():
    config = load_config()
    matcher = config.grounder.matcher
    config.grounder.boxes.sam = {"batch_size": "2"}
    config.filter.gamma = "0.5"
    assert config.grounder.boxes.sam.batch_size == 2
    assert config.filter == load_config(overrides=["filter.gamma=0.5"]).filter
    assert config.grounder.matcher is matcher


def test_what_no_section_can_see_is_refused_before_anything_is_loaded(tmp_path):
    """Two sections that do not go together, and a list that is changed in place."""
    routed, listed = load_config(), load_config()
    routed.routing.threshold, routed.filter.max_share = 0.5, 0.1
    listed.pipeline.pools.append("ground")
    for config, says in ((routed, "routing.threshold and filter.max_share"), (listed, "pipeline.pools.1")):
        for use in (Annotator.from_config, lambda config: annotate_dataset(tmp_path, tmp_path / "out", config)):
            with pytest.raises(ConfigError, match=says):
                use(config)


def test_every_wrong_key_gets_its_line():
    with pytest.raises(ConfigError) as caught:
        parse_config({"filter": {"gamma": -1, "gama": 1}, "tager": {}})
    assert sorted(line.partition(":")[0] for line in str(caught.value).splitlines()) == [
        "filter.gama",
        "filter.gamma",
        "tager",
    ]


@pytest.mark.parametrize("text", ["", "# only a comment\n"])
def test_an_empty_file_changes_nothing(tmp_path, text):
    assert load_config(file=_write(tmp_path / "config.yaml", text)) == load_config()


@pytest.mark.parametrize("text", ["- a\n- list\n", "just text", "filter: [", "filter: !!python/object:os.system {}"])
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path, text):
    file = _write(tmp_path / "broken.yaml", text)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_config(file=file)


def test_a_file_that_is_no_text_or_not_there_is_refused_by_name(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("binary.yaml", "missing.yaml"):
        with pytest.raises(ConfigError, match=name):
            load_config(file=tmp_path / name)


def test_the_folder_of_images_is_the_same_from_wherever_a_run_is_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(overrides=["image.root=images"])
    assert config.image.root == tmp_path / "images"
    assert config.public()["image"]["root"] == str(tmp_path / "images")
