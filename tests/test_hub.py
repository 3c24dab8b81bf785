"""References to the hub, against a stand-in that counts what it gives out."""

import json
import os
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gem_ray import model_paths
from gem_ray.hub import HubReference, loaded_files, look_up

REPO = "org/model"
SETTINGS = {"config.json": b"{}", "tokenizer.json": b"{tokens}", "preprocessor_config.json": b"{pixels}"}
OTHERS = {
    "README.md": b"# card",
    ".gitattributes": b"*.bin",
    "tf_model.h5": b"tensorflow" * 100,
    "flax_model.msgpack": b"flax" * 100,
    "onnx/model.onnx": b"onnx" * 100,
    "onnx/config.json": b"{onnx}",
    "original/model.safetensors": b"original" * 100,
    "training_args.bin": b"arguments",
    "modeling_model.py": b"import os",
}
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
SHARDS = {"model-00001-of-00002.safetensors": b"1" * 50, "model-00002-of-00002.safetensors": b"2" * 60}
BIN_INDEX = json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}})
LAYOUTS = {
    "safetensors": {"model.safetensors": b"safe" * 100},
    "sharded": {"model.safetensors.index.json": INDEX.encode(), **SHARDS},
    "bin": {"pytorch_model.bin": b"pickle" * 100},
    "sharded-bin": {"pytorch_model.bin.index.json": BIN_INDEX.encode(), "pytorch_model-00001-of-00001.bin": b"3" * 70},
}


def everything_else(layout):
    """Weights in the formats that are not loaded where the layout's are there."""
    order = list(LAYOUTS)
    worse = {name: content for other in order[order.index(layout) + 1 :] for name, content in LAYOUTS[other].items()}
    stale = {"model-00001-of-00003.safetensors": b"of an older upload"} if layout == "sharded" else {}
    return OTHERS | worse | stale


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_byte_is_fetched_but_of_what_is_loaded(hub, layout):
    wanted = SETTINGS | LAYOUTS[layout]
    hub.push(REPO, wanted | everything_else(layout))
    folder = model_paths.resolve(REPO)
    assert hub.sent == {f"{REPO}/{name}": len(content) for name, content in wanted.items()}
    assert {name: (folder / name).read_bytes() for name in wanted} == wanted


def test_what_is_there_is_not_fetched_again_nor_asked_for_when_its_commit_is_named(hub):
    commit = hub.push(REPO, SETTINGS | LAYOUTS["sharded"])
    folder = model_paths.resolve(REPO)
    sent, requests = hub.sent.copy(), hub.requests
    assert model_paths.resolve(REPO) == folder
    assert hub.sent == sent
    assert hub.requests == requests + 1  # for the commit that the branch stands for
    assert model_paths.resolve(f"{REPO}@{commit}") == folder
    assert hub.requests == requests + 1


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub):
    old = hub.push(REPO, SETTINGS | {"model.safetensors": b"old"}, revision="v1")
    new = hub.push(REPO, SETTINGS | {"model.safetensors": b"new"})
    for revision, content in (
        ("@v1", b"old"),
        (f"@{old}", b"old"),
        ("@main", b"new"),
        ("", b"new"),
        (f"@{new}", b"new"),
    ):
        assert (model_paths.resolve(f"{REPO}{revision}") / "model.safetensors").read_bytes() == content


def test_one_file_of_a_repository(hub):
    commit = hub.push(REPO, OTHERS | {"checkpoints/sam_vit_b.pth": b"sam"})
    file = model_paths.resolve(f"{REPO}@main:checkpoints/sam_vit_b.pth")
    assert (file.name, file.read_bytes()) == ("sam_vit_b.pth", b"sam")
    assert hub.sent == {f"{REPO}/checkpoints/sam_vit_b.pth": 3}
    assert model_paths.describe(f"{REPO}:checkpoints/sam_vit_b.pth") == f"{REPO}@{commit}:checkpoints/sam_vit_b.pth"
    assert model_paths.local(f"{REPO}:checkpoints/sam_vit_b.pth") == file
    with pytest.raises(FileNotFoundError, match=r"it has no other\.pth"):
        model_paths.resolve(f"{REPO}:other.pth")


def test_a_model_is_described_by_its_commit_without_fetching_its_weights(hub):
    commit = hub.push(REPO, SETTINGS | LAYOUTS["sharded"])
    assert model_paths.describe(REPO) == f"{REPO}@{commit}"
    assert not any(name.endswith(".safetensors") for name in hub.sent)
    assert model_paths.describe(f"{REPO}@{commit}") == f"{REPO}@{commit}"  # what is described can be asked for
    moved = hub.push(REPO, SETTINGS | LAYOUTS["bin"])
    assert model_paths.describe(REPO) == f"{REPO}@{moved}" != f"{REPO}@{commit}"


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("org/nothing", "no such repository"),
        (f"{REPO}@no-branch", "no branch, tag or commit 'no-branch'"),
        ("org/empty", "pytorch_model.bin"),
        ("org/lost-shard", "model-00002-of-00002.safetensors"),
        ("a b", "not `repo`"),
    ],
)
def test_what_cannot_be_loaded_is_said_before_anything_is_fetched(hub, reference, says):
    hub.push(REPO, SETTINGS | LAYOUTS["bin"])
    hub.push("org/empty", SETTINGS | {"tf_model.h5": b"tensorflow"})
    lost = LAYOUTS["sharded"] | SETTINGS
    hub.push("org/lost-shard", {name: lost[name] for name in lost if not name.startswith("model-00002")})
    for ask in (model_paths.describe, model_paths.resolve):
        with pytest.raises(FileNotFoundError, match=says) as caught:
            ask(reference)
        assert reference in str(caught.value)
    assert set(hub.sent) <= {"org/lost-shard/model.safetensors.index.json"}


def test_a_gated_model_says_what_to_do(hub):
    hub.push(REPO, SETTINGS | LAYOUTS["bin"])
    hub.gated.add(REPO)
    with pytest.raises(PermissionError, match=r"accept its terms .* HF_TOKEN"):
        model_paths.describe(REPO)


@pytest.mark.parametrize("offline", ["switched off", "gone"])
def test_without_a_connection_the_cache_answers(hub, monkeypatch, offline):
    commit = hub.push(REPO, SETTINGS | LAYOUTS["sharded"] | OTHERS)
    folder = model_paths.resolve(REPO)
    if offline == "gone":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    else:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    requests = hub.requests
    assert model_paths.resolve(REPO) == model_paths.local(REPO) == folder
    assert model_paths.describe(REPO) == f"{REPO}@{commit}"
    assert hub.requests == requests
    assert model_paths.local("org/other") is None
    with pytest.raises(FileNotFoundError, match="org/other"):
        model_paths.describe("org/other")


def test_a_model_of_which_a_part_is_missing_is_not_there(hub, monkeypatch):
    hub.push(REPO, SETTINGS | LAYOUTS["sharded"])
    folder = model_paths.resolve(REPO)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert model_paths.local(REPO) is None
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(FileNotFoundError, match=r"not whole in the hub's cache here.*model-00002-of-00002"):
            model_paths.describe(REPO)
    assert (model_paths.resolve(REPO) / "model-00002-of-00002.safetensors").is_file()


def test_where_there_is_no_home_the_hub_s_cache_is_in_ours(hub, monkeypatch, tmp_path):
    hub.push(REPO, SETTINGS | LAYOUTS["bin"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/proc/nobody/huggingface/hub")
    monkeypatch.setenv("GEM_RAY_CACHE", str(tmp_path / "ours"))
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith("/proc"))
    assert model_paths.resolve(REPO).is_relative_to(tmp_path / "ours")


NAMES = st.text(string.ascii_letters + string.digits + "-._", min_size=1, max_size=9).filter(lambda s: s[0].isalnum())


@given(
    st.builds(
        HubReference,
        st.lists(NAMES, min_size=1, max_size=2).map("/".join),
        st.none() | st.lists(NAMES, min_size=1, max_size=3).map("/".join),
        st.none() | st.lists(NAMES, min_size=1, max_size=3).map("/".join),
    )
)
def test_a_reference_is_read_as_it_is_written(reference):
    assert HubReference.parse(str(reference)) == reference


@given(st.sets(st.sampled_from([*SETTINGS, *OTHERS, *(name for layout in LAYOUTS.values() for name in layout)])))
def test_one_format_is_loaded_whatever_else_there_is(names):
    indices = {"model.safetensors.index.json": INDEX, "pytorch_model.bin.index.json": BIN_INDEX}
    order = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    best = next((name for name in order if name in names), None)
    if best is None:
        with pytest.raises(FileNotFoundError):
            loaded_files(names, indices.__getitem__)
        return
    shards = set(json.loads(indices[best])["weight_map"].values()) if best in indices else set()
    assert loaded_files(names, indices.__getitem__) == (SETTINGS.keys() & names) | {best} | shards


def test_sizes_are_those_of_the_files_that_are_loaded(hub):
    hub.push(REPO, SETTINGS | LAYOUTS["sharded"] | OTHERS)
    wanted = SETTINGS | LAYOUTS["sharded"]
    assert look_up(REPO).sizes == {name: len(content) for name, content in wanted.items()}
