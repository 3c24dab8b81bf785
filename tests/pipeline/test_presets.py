"""Presets of published models from the hub's own layout to boxes, with replicas in the place of the weights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import replicas
import torch
from peft import LoraConfig, get_peft_model

from gem_ray.annotator import build_stage
from gem_ray.config import load_config
from gem_ray.data.generated import generate
from gem_ray.data.shards import write_posts
from gem_ray.model_check import check_models
from gem_ray.planning.plan import passes_of
from gem_ray.rerank.llava import load_llava

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
            [sys.executable, "-c", "from gem_ray.cli import main; main()", *command],
            capture_output=True,
            text=True,
            timeout=500,
            env=environment,
        )

    return run


def entities(out: Path) -> list[dict]:
    rows = pq.read_table(out / "annotations", partitioning=None).to_pylist()
    assert len(rows) == 6
    return [entity for row in rows for entity in row["entities"]]


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
    *(f"--set=pipeline.{stage}.num_gpus=0" for stage in ("knowledge", "tag", "rerank", "ground")),
    "--set=knowledge.captioner=Salesforce/blip2-opt-2.7b",
    # vLLM's own tests ask it; here it would take a minute to start.
    "--set=reranker={enabled: true, engine: transformers, adapter: me/reranker-lora}",
    "--set=filter.gamma=0",
)


def test_one_gpu_runs_all_passes_on_a_cpu(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pass by pass, in this process: what Ray adds is the same for all presets."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    config = load_config("one-gpu", overrides=[change.removeprefix("--set=") for change in ALL_PASSES[1:]])
    posts = list(generate(6, seed=5))
    passes = passes_of(config)
    assert len(passes) == 3
    for stages in passes:
        for name in stages:
            check_models(name, config)
            build_stage(name, config)(posts)
    assert not [problem for post in posts for problem in post.problems]
    found = [entity for post in posts for entity in post.entities]
    assert any(post.caption for post in posts)
    assert any(entity.reranked for entity in found)
    assert any(entity.box for entity in found)


def test_a_missing_tensor_of_the_last_pass_ends_the_run_before_the_first_post(
    annotate: Run, hub: Path, tmp_path: Path
) -> None:
    folder = snapshot(hub, "Salesforce/blip-itm-large-coco")
    kept = (folder / "model.safetensors").read_bytes()
    replicas.rewrite(folder, lambda weights: weights.pop("itm_head.weight"))
    try:
        done = annotate(*ALL_PASSES)
    finally:
        (folder / "model.safetensors").write_bytes(kept)
    assert done.returncode == 1
    assert "missing: itm_head.weight" in done.stderr
    assert not list((tmp_path / "out").rglob("*.parquet"))
