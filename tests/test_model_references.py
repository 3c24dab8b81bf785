"""A run's models: every key that names one, and what happens when a model changes after the run began."""

import shutil
from pathlib import Path

import pytest

from gem_ray.annotator import build_stage, models_of
from gem_ray.config import load_config, preset_names
from gem_ray.model_paths import content_hash, describe, resolve
from gem_ray.model_references import ModelChangedError, load_unchanged, model_keys
from gem_ray.pools import passes_of
from gem_ray.records import Post
from gem_ray.stages import active_stages, find_stage

TAG = find_stage("tag")
FILES = {"config.json": b"{}", "model.safetensors": b"first"}
CHANGED = FILES | {"model.safetensors": b"other"}


def tagger(reference):
    return load_config(overrides=[f"tagger.model={reference}"])


def read_weights(config):
    """Stands in for the loading of a tagger."""
    return (resolve(config.tagger.model) / "model.safetensors").read_bytes()


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.fixture(params=["local", "s3", "s3-another-node"])
def place(request, tmp_path, monkeypatch):
    """The reference of a model, and what changes it; a branch of the hub may move, because its commit is kept."""
    monkeypatch.setenv("GEM_RAY_CACHE", str(tmp_path / "cache"))
    if request.param == "local":
        write(tmp_path / "model", FILES)
        return str(tmp_path / "model"), lambda: write(tmp_path / "model", CHANGED)
    s3 = request.getfixturevalue("s3")
    reference = f"{s3.bucket('models')}/tagger"

    def put(files):
        for name, content in files.items():
            s3.put(f"{reference}/{name}", content)

    def change():
        put(CHANGED)
        if request.param == "s3-another-node":
            monkeypatch.setenv("GEM_RAY_CACHE", str(tmp_path / "another-node"))

    put(FILES)
    return reference, change


def test_an_actor_loads_what_the_run_began_with_or_nothing(place):
    reference, change = place
    config = tagger(reference)
    models = models_of(config, [TAG])
    assert load_unchanged([TAG], config, models, read_weights) == b"first"
    change()
    with pytest.raises(ModelChangedError) as caught:
        load_unchanged([TAG], config, models, read_weights)
    message = str(caught.value)
    assert "tagger" in message
    assert models["tagger"] in message
    assert describe(reference) in message != models["tagger"]


def test_a_model_that_changes_while_it_is_loaded_is_noticed(place):
    reference, change = place
    config = tagger(reference)
    with pytest.raises(ModelChangedError):
        load_unchanged([TAG], config, models_of(config, [TAG]), lambda config: change())


def test_a_branch_of_the_hub_that_moves_changes_no_run_that_has_begun(hub):
    first = hub.push("org/tagger", FILES)
    config = tagger("org/tagger")
    models = models_of(config, [TAG])
    assert models["tagger"] == f"org/tagger@{first}"
    moved = hub.push("org/tagger", CHANGED)
    assert load_unchanged([TAG], config, models, read_weights) == b"first"
    assert models_of(config, [TAG])["tagger"] == f"org/tagger@{moved}"
    assert config.tagger.model == "org/tagger"


def test_a_node_whose_hub_cache_holds_another_commit_annotates_nothing(hub, monkeypatch, tmp_path):
    hub.push("org/tagger", FILES)
    config = tagger("org/tagger")
    models = models_of(config, [TAG])
    hub.push("org/tagger", CHANGED)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another-node"))
    resolve("org/tagger")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=models["tagger"]):
        load_unchanged([TAG], config, models, read_weights)


def test_the_encoder_that_a_tagger_leaves_to_another_is_a_model_too(tmp_path):
    folder = tmp_path / "tagger"
    shutil.copytree(resolve("nano:tagger"), folder)
    models = models_of(tagger(folder), [TAG])
    assert set(models) == {"tagger", "tagger_encoder"}
    assert models["tagger_encoder"].startswith("package:")
    write(tmp_path / "encoder", FILES)
    (folder / "config.json").write_text(f'{{"base_encoder": "{tmp_path}/encoder"}}')
    assert models_of(tagger(folder), [TAG])["tagger_encoder"] == describe(f"{tmp_path}/encoder")


def test_a_stage_with_another_model_ends_with_a_message_and_annotates_nothing(tmp_path):
    from gem_ray.pipeline.graph import PoolActor
    from gem_ray.pipeline.tables import posts_to_table

    class Failures:
        begin_actor = hear = lambda *_: None

        def set_failure(self, message):
            self.message = message

    shutil.copytree(resolve("nano:tagger"), tmp_path / "tagger")
    config, ledger = tagger(tmp_path / "tagger"), Failures()
    models = models_of(config)
    assert build_stage(TAG, config, models).name == "tag"
    with (tmp_path / "tagger" / "README.md").open("a") as file:
        file.write("trained again")
    ((pool,),) = passes_of(config)
    actor = PoolActor(pool, config, models, ledger)
    with pytest.raises(RuntimeError):
        actor(posts_to_table([Post("1", "Paris")]))
    assert f"expected {models['tagger']}, found {tmp_path}/tagger@{content_hash(tmp_path / 'tagger')}" in ledger.message


def _named(tree, path=()):
    """Every leaf that names a model by its key."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _named(value, (*path, name))
        elif name in ("model", "adapter", "captioner") and value is not None:
            yield (*path, name)


EXTRA = ["knowledge.explainer={engine: vllm, model: org/llm}", "reranker.adapters={one: org/one, two: org/two}"]


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("adapter", ["null", "org/alone", "two"])
def test_every_model_that_a_configuration_names_is_known(preset, adapter):
    config = load_config(preset, overrides=[*EXTRA, f"reranker.adapter={adapter}", "reranker.enabled=true"])
    named = set(_named(config.model_dump(exclude={"pipeline", "serving"})))
    if adapter == "two":
        named.remove(("reranker", "adapter"))  # a name, not a reference
    known = [*model_keys(active_stages(config), config).values()]
    assert set(known) == named | {("reranker", "adapters", "one"), ("reranker", "adapters", "two")}
    assert len(known) == len(set(known))


def test_a_model_behind_an_endpoint_has_no_files():
    there = "{base_url: 'http://127.0.0.1:1/v1', model: llm}"
    config = load_config(overrides=[f"knowledge.explainer={there}", "knowledge.captioner=null"])
    assert model_keys([find_stage("knowledge")], config) == {}
    assert models_of(config, [find_stage("knowledge")]) == {"explainer": "llm"}


def test_loading_leaves_the_configuration_as_it_was(tmp_path: Path):
    write(tmp_path / "model", FILES)
    config = tagger(tmp_path / "model")
    before = config.model_dump()
    load_unchanged([TAG], config, models_of(config, [TAG]), read_weights)
    assert config.model_dump() == before
