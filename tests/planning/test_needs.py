"""What a configuration needs, listed and fetched, against a hub that counts what it gives out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save

from gem_ray.config import load_config, merge_trees
from gem_ray.model_paths import describe, resolve
from gem_ray.planning.model_facts import count_parameters, model_facts, read_shape
from gem_ray.planning.needs import fetch_models, models_needed
from gem_ray.planning.published import PUBLISHED, find_published

BLIP, SAM, OWL = "Salesforce/blip-itm-base-coco", "ybelkada/segment-anything", "google/owlv2-base-patch16-ensemble"
WEIGHTS = {"model.safetensors": b"w" * 1000}
CONFIG = {"config.json": b"{}", "tokenizer.json": b"{tokens}", "preprocessor_config.json": b"{pixels}"}
OTHERS = {"README.md": b"x" * 99, "pytorch_model.bin": b"y" * 999, "tf_model.h5": b"z" * 999}
PTH = "checkpoints/sam_vit_b_01ec64.pth"
OVERRIDES = [
    "reranker.enabled=false",
    f"grounder.matcher.model={BLIP}",
    f"grounder.boxes.sam.model={SAM}@main:{PTH}",
    f"grounder.boxes.text={{kind: owlv2, model: {OWL}}}",
]


@pytest.fixture
def stocked(hub):
    """A hub with what the configuration names."""
    hub.push(BLIP, CONFIG | WEIGHTS | OTHERS)
    hub.push(SAM, {PTH: b"s" * 300, "checkpoints/sam_vit_h_4b8939.pth": b"h" * 999} | OTHERS)
    hub.push(OWL, CONFIG | WEIGHTS | OTHERS)
    hub.licences[BLIP] = "bsd-3-clause"
    return hub


WANTED = {
    **{f"{repo}/{name}": len(content) for repo in (BLIP, OWL) for name, content in (CONFIG | WEIGHTS).items()},
    f"{SAM}/{PTH}": 300,
}


def command(*arguments):
    start = [sys.executable, "-m", "gem_ray", "models"]
    return subprocess.run(
        [*start, *arguments, *(part for each in OVERRIDES for part in ("--set", each))], capture_output=True, text=True
    )


def test_sizes_licences_and_revisions_are_the_hubs_and_nothing_is_fetched(stocked):
    needs = {need.role: need for need in models_needed(load_config(overrides=OVERRIDES))}
    assert set(needs) == {"tagger", "matcher", "sam", "text_segmenter"}
    assert {role: need.size for role, need in needs.items() if role != "tagger"} == {
        "matcher": sum(map(len, (CONFIG | WEIGHTS).values())),
        "sam": 300,
        "text_segmenter": sum(map(len, (CONFIG | WEIGHTS).values())),
    }
    assert needs["matcher"].licence == "bsd-3-clause"
    assert needs["sam"].licence == find_published(needs["sam"].reference).licence  # its card on the hub names none
    assert needs["tagger"].licence == "apache-2.0"
    assert needs["matcher"].revision == describe(BLIP).rpartition("@")[2]
    assert (needs["tagger"].place, needs["matcher"].place) == ("with gem-ray", "missing")
    assert not stocked.sent
    resolve(BLIP)
    assert {need.place for need in models_needed(load_config(overrides=OVERRIDES)) if need.role == "matcher"} == {
        "hub cache"
    }


def test_without_a_connection_sizes_and_licences_are_the_published_ones(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    one_gpu = [need for need in models_needed(load_config("one-gpu")) if find_published(need.reference)]
    assert one_gpu
    for need in one_gpu:
        published = find_published(need.reference)
        assert (need.size, need.licence, need.is_exact) == (published.size, published.licence, False)
        assert need.place == "missing"
        assert need.reference in need.reason
    assert not hub.requests


def test_fetch_takes_no_byte_more_than_what_is_loaded(stocked, tmp_path):
    done = command("fetch", "--to", str(tmp_path / "models"))
    assert done.returncode == 0, done.stderr
    assert stocked.sent == WANTED
    settings = yaml.safe_load(done.stdout)
    config = load_config(**merge_trees(load_config(overrides=OVERRIDES).model_dump(), settings))
    stocked.sent.clear()
    blip, sam = Path(config.grounder.matcher.model), Path(config.grounder.boxes.sam.model)
    assert {file.name: file.read_bytes() for file in blip.iterdir()} == CONFIG | WEIGHTS
    assert (sam.name, sam.read_bytes()) == (Path(PTH).name, b"s" * 300)
    assert find_published(config.grounder.matcher.model) is PUBLISHED[BLIP]
    assert find_published(str(sam)) is PUBLISHED[Path(PTH).name]
    assert {need.place for need in models_needed(config)} == {"with gem-ray", "here"}
    assert not stocked.sent


def test_a_fetch_that_broke_off_is_done_again_from_where_it_was(stocked, tmp_path):
    config, lines = load_config(overrides=OVERRIDES), []
    weights = f"{OWL}/{next(iter(WEIGHTS))}"
    stocked.refused.add(weights)
    with pytest.raises(FileNotFoundError, match=OWL):
        fetch_models(config, str(tmp_path / "models"), lines.append)
    assert {need.role: need.place for need in models_needed(config)}["text_segmenter"] == "missing"
    stocked.refused.clear()
    settings = fetch_models(config, str(tmp_path / "models"), lines.append)
    copy = Path(settings["grounder"]["boxes"]["text"]["model"])
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == CONFIG | WEIGHTS
    assert stocked.sent == WANTED  # each file once


def test_fetch_to_s3_is_done_once_and_takes_own_models_along(stocked, s3, tmp_path, monkeypatch):
    monkeypatch.setenv("GEM_RAY_CACHE", str(tmp_path / "cache"))
    own = tmp_path / "matcher"
    own.mkdir()
    for name, content in (CONFIG | WEIGHTS | OTHERS).items():
        (own / name).write_bytes(content)
    config = load_config(overrides=[*OVERRIDES, f"grounder.matcher.model={own}"])
    lines: list[str] = []
    target = f"{s3.bucket('models')}/gem-ray"
    settings = fetch_models(config, target, lines.append)
    there = settings["grounder"]["matcher"]["model"]
    assert there.startswith(f"{target}/matcher@")
    assert {file.name: file.read_bytes() for file in resolve(there).iterdir()} == CONFIG | WEIGHTS
    assert resolve(settings["grounder"]["boxes"]["sam"]["model"]).read_bytes() == b"s" * 300
    lines.clear()
    assert fetch_models(config, target, lines.append) == settings
    assert all("(0 bytes copied)" in line for line in lines if target in line)
    on_s3 = load_config(**merge_trees(config.model_dump(), settings))
    assert fetch_models(on_s3, target, lines.append) == {}


def test_list_says_what_is_to_fetch(stocked):
    done = command("list")
    assert done.returncode == 0, done.stderr
    for word in (BLIP, "bsd-3-clause", "grounder.boxes.sam.model", "missing", "with gem-ray", "0.000 GB"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        (BLIP, BLIP),
        (f"{BLIP}@v1", BLIP),
        (f"s3://bucket/models/{BLIP}@0123456789ab", BLIP),
        (f"/data/{BLIP}@0123456789ab/", BLIP),
        (f"{SAM}@main:{PTH}", "sam_vit_b_01ec64.pth"),
        ("models/sam_vit_h_4b8939.pth", "sam_vit_h_4b8939.pth"),
        ("facebook/sam-vit-huge", "sam_vit_h_4b8939.pth"),
        (f"s3://bucket/{SAM}@0123456789ab/{PTH}", "sam_vit_b_01ec64.pth"),
        ("models/tagger", None),
        ("nano:tagger", None),
    ],
)
def test_a_published_model_is_known_wherever_it_is(reference, name):
    assert find_published(reference) is (PUBLISHED[name] if name else None)


TENSORS = {"a.weight": torch.zeros(3, 5), "b.bias": torch.zeros(7, dtype=torch.float16)}


def write_bin(folder, legacy):
    torch.save(TENSORS, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)


def write_sharded_bin(folder, legacy):
    names = {}
    for number, (name, tensor) in enumerate(TENSORS.items(), start=1):
        names[name] = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: tensor}, folder / names[name], _use_new_zipfile_serialization=not legacy)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("write", [write_bin, write_sharded_bin])
def test_a_repository_of_bin_files_has_a_size(tmp_path, write, legacy):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 8}')
    write(tmp_path, legacy)
    facts = model_facts("tagger.model", str(tmp_path), "FacebookAI/roberta-base", {})
    assert facts.parameters == 3 * 5 + 7
    assert facts.shape["hidden_size"] == 8


def test_weights_that_are_not_loaded_do_not_count(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(save(TENSORS))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(save({"stale": torch.zeros(100)}))
    write_bin(tmp_path, legacy=False)
    assert count_parameters(tmp_path) == 3 * 5 + 7


def test_a_sam_of_the_hub_has_the_shape_of_its_pth(tmp_path):
    from transformers import SamConfig, SamVisionConfig

    for name, settings in {
        "sam_vit_b_01ec64.pth": {},
        "sam_vit_h_4b8939.pth": {
            "hidden_size": 1280,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "global_attn_indexes": [7, 15, 23, 31],
        },
    }.items():
        SamConfig(vision_config=SamVisionConfig(**settings)).save_pretrained(tmp_path)
        expected = PUBLISHED[name].shape
        shape = read_shape(tmp_path)
        assert {key: tuple(v) if isinstance(v, list) else v for key, v in shape.items()} == expected
