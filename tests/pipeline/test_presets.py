"""Presets of published models from the hub's own layout to boxes, with replicas in the place of the weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import replicas
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from gem_ray.config import Config, ConfigError, load_config
from gem_ray.data.generated import generate
from gem_ray.data.shards import write_posts
from gem_ray.model_check import CHECKS, check_models, stages_to_check
from gem_ray.model_paths import resolve
from gem_ray.model_references import model_keys, reference_at
from gem_ray.pipeline.run import RunError, annotate_dataset
from gem_ray.rerank.llava import load_llava
from gem_ray.stages import find_stage

pytestmark = pytest.mark.alone

CPU = {
    "Salesforce/blip-itm-base-coco": replicas.blip_itm,
    "facebook/sam-vit-base": replicas.sam_vit,
    "CIDAS/clipseg-rd64-refined": replicas.clipseg,
}
ONE_GPU = {
    "Salesforce/blip-itm-large-coco": replicas.blip_itm,
    "facebook/sam-vit-huge": replicas.sam_vit,
    "google/owlv2-base-patch16-ensemble": replicas.owlv2,
    "Salesforce/blip2-opt-2.7b": replicas.blip2_opt,
    "llava-hf/llava-1.5-7b-hf": replicas.llava,
    "me/reranker-lora": None,  # on the one before
    "me/tagger": lambda folder: shutil.copytree(resolve("nano:tagger"), folder, dirs_exist_ok=True),
    "me/explainer": replicas.chat,
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# A replica says yes and no at random: tilted, so that there is something to box.
TILT = torch.tensor([0.0, 3.0])

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def posts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("posts")
    write_posts(list(generate(6, seed=5)), folder, per_shard=6)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache as downloads leave it."""
    cache = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    for name, build in {**CPU, **ONE_GPU}.items():
        snapshot(cache, name).mkdir(parents=True)
        (snapshot(cache, name).parents[1] / "refs").mkdir()
        (snapshot(cache, name).parents[1] / "refs" / "main").write_text(COMMIT)
        if build is not None:
            build(snapshot(cache, name))
        if build is replicas.blip_itm:
            replicas.rewrite(snapshot(cache, name), lambda weights: weights.update({"itm_head.bias": TILT}))
    base = load_llava(snapshot(cache, "llava-hf/llava-1.5-7b-hf"))
    adapter = get_peft_model(base, LoraConfig(r=4, target_modules=r".*language_model.*\.q_proj"))
    adapter.save_pretrained(snapshot(cache, "me/reranker-lora"), save_embedding_layers=False)
    return cache


def snapshot(cache: Path, name: str) -> Path:
    return cache / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT


@pytest.fixture
def annotate(hub: Path, posts: Path, tmp_path: Path) -> Run:
    """`gem-ray annotate` without a connection."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["annotate", str(posts), str(tmp_path / "out"), *arguments]
        return subprocess.run(
            [sys.executable, "-m", "gem_ray", *command],
            capture_output=True,
            text=True,
            timeout=500,
            env=environment,
        )

    return run


def annotations(out: Path) -> list[dict]:
    rows = pq.read_table(out / "annotations", partitioning="hive").to_pylist()
    assert len(rows) == 6
    assert {row["status"] for row in rows} == {"ok"}
    return rows


def entities(out: Path) -> list[dict]:
    return [entity for row in annotations(out) for entity in row["entities"]]


def test_cpu_runs_from_the_download_to_boxes_with_no_other_setting(annotate: Run, tmp_path: Path) -> None:
    done = annotate("--preset", "cpu")
    assert done.returncode == 0, done.stderr
    found = entities(tmp_path / "out")
    assert found
    assert all(entity["match_score"] is not None for entity in found)
    assert any(entity["box"] for entity in found)
    assert {entity["box_source"] for entity in found if entity["box"]} & {"sam", "text"}


ALL_PASSES = (
    "--preset=one-gpu",
    "--set=device=cpu",
    *(f"--set=pipeline.pools.{stage}.num_gpus=0" for stage in ("knowledge", "tag", "rerank", "ground")),
    "--set=knowledge.captioner=Salesforce/blip2-opt-2.7b",
    # vLLM's own tests ask it; here it would take a minute to start.
    "--set=reranker={enabled: true, engine: transformers, adapter: me/reranker-lora}",
    "--set=filter.gamma=0",
)


def test_one_gpu_runs_all_passes_on_a_cpu(annotate: Run, tmp_path: Path) -> None:
    done = annotate(*ALL_PASSES)
    assert done.returncode == 0, done.stderr
    assert all(row["caption"] for row in annotations(tmp_path / "out"))
    found = entities(tmp_path / "out")
    assert any(entity["reranked"] for entity in found)
    assert any(entity["box"] for entity in found)


# Every model that a configuration can name; they never run together.
EVERYTHING = (
    *ALL_PASSES[1:],
    "--set=tagger.model=me/tagger",
    "--set=knowledge.explainer={engine: vllm, model: me/explainer}",
)


def _everything(preset: str) -> Config:
    return load_config(preset, overrides=[change.removeprefix("--set=") for change in EVERYTHING])


def _roles() -> list[tuple[str, str, str]]:
    named = {preset: load_config(preset) for preset in ("cpu", "one-gpu", "cluster")}
    named["everything"] = _everything("one-gpu")
    return [
        (preset, spec.name, role)
        for preset, config in named.items()
        for spec in stages_to_check(config)
        for role, key in model_keys([spec], config).items()
        if not str(reference_at(config, key)).startswith("nano:")
    ]


@pytest.mark.parametrize(("preset", "stage", "role"), _roles())
def test_a_missing_tensor_of_any_model_is_named_by_the_check(
    hub: Path, monkeypatch: pytest.MonkeyPatch, preset: str, stage: str, role: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    config = _everything("one-gpu") if preset == "everything" else load_config(preset)
    stages = [find_stage(stage)]
    check_models(stages, config)
    reference = reference_at(config, model_keys(stages, config)[role])
    with without_a_tensor(snapshot(hub, str(reference))) as name, pytest.raises(ValueError, match="missing") as caught:
        check_models(stages, config)
    assert ".".join(name.split(".")[-2:]) in str(caught.value)  # a model's names may begin otherwise than its file's


def test_every_kind_of_model_is_checked() -> None:
    roles = {role for _, _, role in _roles()}
    assert roles == {*CHECKS, "reranker_adapter"}


@contextmanager
def without_a_tensor(folder: Path) -> Iterator[str]:
    """Leave out the last one, and put it back."""
    file = next(folder.glob("*.safetensors"))
    whole = file.read_bytes()
    weights = load_file(file)
    name = max(weights)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    try:
        yield name
    finally:
        file.write_bytes(whole)


@pytest.mark.usefixtures("local_ray")
def test_a_run_checks_its_models_before_the_first_post(hub: Path, posts: Path, tmp_path: Path) -> None:
    """Also a run of one pass, and before the sample that a budget is measured on."""
    matcher = snapshot(hub, "Salesforce/blip-itm-base-coco")
    config = load_config(overrides=[f"grounder.matcher.model={matcher}", "filter.max_share=0.5"])
    with without_a_tensor(matcher) as name, pytest.raises(RunError, match=f"missing: {name}"):
        annotate_dataset(posts, tmp_path, config)
    too_short = load_config(overrides=["reranker.max_model_len=100", "filter.max_share=0.5"])
    with pytest.raises(ConfigError, match=r"max_model_len is 100, .* set it to \d+ or more"):
        annotate_dataset(posts, tmp_path, too_short, fresh=True)
    assert not [*tmp_path.rglob("*.parquet"), *tmp_path.rglob("gamma*")]
