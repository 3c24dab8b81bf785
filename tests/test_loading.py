"""Replicas of published checkpoints through the product's own loading; one wrong tensor is an error that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import replicas
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from segment_anything import sam_model_registry
from transformers import AutoModel, BlipConfig, BlipForImageTextRetrieval

from gem_ray.config import RerankerConfig, load_config
from gem_ray.grounding import sam as sam_module
from gem_ray.grounding.blip import check_blip, load_blip
from gem_ray.grounding.grounder import load_matcher
from gem_ray.grounding.sam import SamSegmenter, load_sam
from gem_ray.grounding.text_segmenter import load_text_segmenter
from gem_ray.knowledge.captioner import Captioner
from gem_ray.loading import check_adapters, check_declared, load_adapters
from gem_ray.rerank.adapter_base import adapter_remarks
from gem_ray.rerank.engine_text import TextEngine
from gem_ray.rerank.engine_transformers import TransformersEngine
from gem_ray.rerank.llava import load_llava
from gem_ray.tagger.checkpoint import load_encoder

Load = Callable[[Path], object]


def _matcher(kind: str) -> Load:
    return lambda folder: load_matcher(load_config(grounder={"matcher": {"kind": kind, "model": str(folder)}}))


def _boxes(kind: str) -> Load:
    settings = {"kind": kind}
    return lambda folder: load_text_segmenter(
        load_config(grounder={"boxes": {"text": {**settings, "model": str(folder)}}})
    )


def _reranker(folder: Path) -> object:
    return TransformersEngine.from_config(load_config(reranker={"model": str(folder), "adapter": None}))


def _text_reranker(folder: Path) -> object:
    settings = {"engine": "text", "model": str(folder), "adapter": None}
    return TextEngine.from_config(load_config(reranker=settings))


def _sam(folder: Path) -> object:
    return SamSegmenter.from_config(load_config(grounder={"boxes": {"sam": {"model": str(folder)}}}))


LOADERS: dict[str, tuple[Callable[[Path], None], Load]] = {
    "blip-itm": (replicas.blip_itm, _matcher("blip")),
    "blip2-itm": (replicas.blip2_itm, _matcher("blip2")),
    "llava as matcher": (replicas.llava, _matcher("llava")),
    "blip2-opt": (
        replicas.blip2_opt,
        lambda folder: Captioner.from_config(load_config(knowledge={"captioner": str(folder)})),
    ),
    "llava": (replicas.llava, _reranker),
    "llava in vLLM": (replicas.llava, check_declared),
    "llava-next in vLLM": (replicas.llava_next, check_declared),
    "qwen2.5-vl in vLLM": (replicas.qwen2_5_vl, check_declared),
    "gpt2": (replicas.gpt2, _text_reranker),
    "clipseg": (replicas.clipseg, _boxes("clipseg")),
    "sam3": (replicas.sam3, _boxes("sam3")),
    "grounding-dino": (replicas.grounding_dino, _boxes("grounding-dino")),
    "owlv2": (replicas.owlv2, _boxes("owlv2")),
    "sam-vit": (replicas.sam_vit, _sam),
    "roberta": (replicas.roberta, lambda folder: load_encoder(str(folder))),
    "bert": (replicas.bert, lambda folder: load_encoder(str(folder))),
    "albert": (replicas.albert, lambda folder: load_encoder(str(folder))),
}
LAYOUTS = {"one file": lambda folder: None, "bin": replicas.as_bin, "shards": replicas.as_shards}
# Parts that are not read: the tagger's encoder has no pooler and no head, and no detector follows an object.
_NOT_READ = ("lm_head.", "cls.", "bert.pooler.", "albert.pooler", "predictions.", "sop_classifier.", "tracker_model.")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model directory of each kind, made once."""
    made: dict[Callable[[Path], None], Path] = {}

    def get(kind: str) -> Path:
        build = LOADERS[kind][0]
        if build not in made:
            torch.manual_seed(0)
            made[build] = tmp_path_factory.mktemp("checkpoint")
            build(made[build])
        return made[build]

    return get


@pytest.fixture
def copy(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy to spoil."""
    return lambda kind: Path(shutil.copytree(checkpoint(kind), tmp_path / "copy", dirs_exist_ok=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", LOADERS)
def test_every_layout_is_loaded(copy: Callable[[str], Path], kind: str, layout: str) -> None:
    folder = copy(kind)
    LAYOUTS[layout](folder)
    LOADERS[kind][1](folder)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "of another shape"])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_wrong_tensor_is_named(copy: Callable[[str], Path], kind: str, fault: str) -> None:
    folder = copy(kind)
    names = [name for name in sorted(load_file(folder / "model.safetensors")) if not name.startswith(_NOT_READ)]
    for name in names[:: len(names) // 3]:
        folder = copy(kind)
        replicas.rewrite(folder, lambda weights: _spoil(weights, name, fault))  # noqa: B023
        with pytest.raises(ValueError, match=fault) as caught:
            LOADERS[kind][1](folder)
        # A model's names may begin otherwise than its file's.
        said = "stranger" if fault == "unexpected" else ".".join(name.split(".")[-2:])
        assert said in str(caught.value)
        assert str(caught.value).count("weights are not those of the model (") == 1
        assert " more" not in str(caught.value)


def _spoil(weights: dict[str, torch.Tensor], name: str, fault: str) -> None:
    tensor = weights[name]
    if fault == "missing":
        del weights[name]
    elif fault == "unexpected":
        weights[f"{name.rpartition('.')[0]}.stranger"] = tensor.clone()
    else:
        weights[name] = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1) if tensor.dim() else torch.zeros(2)


def test_names_and_buffers_of_old_checkpoints_are_understood(copy: Callable[[str], Path]) -> None:
    folder = copy("bert")
    before = AutoModel.from_pretrained(folder).state_dict()

    def grow_old(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            weights[old] = weights.pop(name)
        weights["bert.embeddings.position_ids"] = torch.arange(512)[None]

    replicas.rewrite(folder, grow_old)
    replicas.as_bin(folder)
    after = load_encoder(str(folder)).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_tied_weights_may_be_there_once_or_twice(copy: Callable[[str], Path]) -> None:
    folder = copy("gpt2")
    replicas.rewrite(
        folder, lambda weights: weights.update({"lm_head.weight": weights["transformer.wte.weight"].clone()})
    )
    _text_reranker(folder)


def test_tied_weights_that_are_not_there_at_all_are_named(copy: Callable[[str], Path]) -> None:
    folder = copy("blip2-opt")
    names = [name for name in load_file(folder / "model.safetensors") if "embed_tokens" in name or "lm_head" in name]
    replicas.rewrite(folder, lambda weights: [weights.pop(name) for name in names])
    with pytest.raises(ValueError, match="embed_tokens"):
        LOADERS["blip2-opt"][1](folder)


def test_a_file_of_an_index_that_is_not_there_is_named(copy: Callable[[str], Path]) -> None:
    folder = copy("blip-itm")
    replicas.as_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    for look in (LOADERS["blip-itm"][1], check_blip):
        with pytest.raises(OSError, match="model-00002-of-00002"):
            look(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stale_files_beside_the_weights_are_not_looked_at(copy: Callable[[str], Path], layout: str) -> None:
    """As `from_pretrained`, the check reads one format, and of shards those that the index names."""
    folder = copy("blip-itm")
    LAYOUTS[layout](folder)
    stranger = {"stranger": torch.zeros(1)}
    save_file(stranger, folder / "model-00001-of-00009.safetensors")
    save_file(stranger, folder / "adapter_model.safetensors")
    if layout != "bin":
        torch.save(stranger, folder / "pytorch_model.bin")
    load_blip(folder)
    check_blip(folder)


def test_a_text_encoder_with_the_default_number_of_heads_is_refused(tmp_path: Path) -> None:
    """The shapes of 12 heads of 64 and of 8 heads of 96 are the same; only `config.json` tells."""
    config = BlipConfig(
        text_config={"num_hidden_layers": 1, "vocab_size": 40, "encoder_hidden_size": 32, "intermediate_size": 32},
        vision_config={**replicas.SMALL, "image_size": 32, "patch_size": 8},
    )
    BlipForImageTextRetrieval(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="would have 8 heads"):
        load_blip(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    facts["text_config"]["num_attention_heads"] = 12
    (tmp_path / "config.json").write_text(json.dumps(facts))
    assert load_blip(tmp_path).config.text_config.num_attention_heads == 12


@pytest.mark.parametrize("fault", ["missing", "unexpected", "of another shape"])
def test_a_wrong_tensor_of_an_adapter_is_named(checkpoint: Callable[[str], Path], tmp_path: Path, fault: str) -> None:
    base = checkpoint("llava")
    targets = r".*language_model.*\.(q_proj|v_proj)"
    get_peft_model(load_llava(base), LoraConfig(r=4, target_modules=targets)).save_pretrained(tmp_path)
    adapters = {"one": tmp_path, "two": tmp_path}
    adapted = load_adapters(load_llava(base), adapters)
    assert set(adapted.peft_config) == set(adapters)
    check_adapters(check_declared(base), adapters)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for name in sorted(stored)[::3]:
        weights = dict(stored)
        _spoil(weights, name, fault)
        save_file(weights, tmp_path / "adapter_model.safetensors")
        said = "stranger" if fault == "unexpected" else name
        with pytest.raises(ValueError, match=fault) as caught:
            load_adapters(load_llava(base), adapters)
        assert said in str(caught.value)
        with pytest.raises(ValueError, match=fault) as caught:
            check_adapters(check_declared(base), adapters)
        assert said in str(caught.value)


def test_an_adapter_changes_what_the_model_says_and_peft_reads_it_alike(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base = checkpoint("llava")
    adapter = get_peft_model(load_llava(base), LoraConfig(r=4, target_modules=r".*language_model.*\.q_proj"))
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapter.save_pretrained(tmp_path)
    ours = load_adapters(load_llava(base), {"default": tmp_path}).merge_and_unload().state_dict()
    theirs = PeftModel.from_pretrained(load_llava(base), str(tmp_path)).merge_and_unload().state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    plain = load_llava(base).state_dict()
    assert any(not torch.equal(ours[name], tensor) for name, tensor in plain.items())


@pytest.fixture
def adapter(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """An adapter of `llava` that changes something."""
    targets = r".*language_model.*\.(q_proj|v_proj)"
    adapted = get_peft_model(load_llava(checkpoint("llava")), LoraConfig(r=4, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_with_the_names_of_older_transformers_is_the_same_adapter(
    checkpoint: Callable[[str], Path], adapter: Path
) -> None:
    """Until 4.51, `language_model.model.layers` was what is `model.language_model.layers` now."""
    base = checkpoint("llava")
    now = load_adapters(load_llava(base), {"default": adapter}).merge_and_unload().state_dict()
    file = adapter / "adapter_model.safetensors"
    old = {name.replace("model.language_model.", "language_model.model."): w for name, w in load_file(file).items()}
    assert all(name.startswith("base_model.model.language_model.model.layers.") for name in old)
    save_file(old, file, metadata={"format": "pt"})
    check_adapters(check_declared(base), {"default": adapter})
    then = load_adapters(load_llava(base), {"default": adapter}).merge_and_unload().state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in then.items())


@pytest.mark.parametrize(
    ("stated", "model", "is_another"),
    [
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf@main", False),
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf", True),
        ("llava-hf/llava-1.5-7b-hf", "s3://bucket/models/llava-hf/llava-1.5-7b-hf@0123456789ab", False),
        ("llava-hf/llava-1.5-7b-hf", "/data/llava-hf/llava-v1.6@0123456789ab", True),
        ("/root/.cache/hub/models--llava-hf--llava-1.5-7b-hf/snapshots/abc", "Llava-HF/llava-1.5-7b-hf", False),
        ("/root/.cache/hub/models--llava-hf--llava-1.5-7b-hf/snapshots/abc", "org/other", True),
        ("llava", "org/other", False),  # a folder, which may have held anything
        ("org/other", "models/somewhere/llava", False),
        (None, "org/other", False),
    ],
)
def test_an_adapter_of_another_model_is_told(adapter: Path, stated: str | None, model: str, is_another: bool) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": stated}))
    remarks = list(adapter_remarks(RerankerConfig(model=model, adapter=str(adapter))))
    assert len(remarks) == is_another
    assert all(str(adapter) in remark and model in remark for remark in remarks)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_that_is_no_adapter_is_named(checkpoint: Callable[[str], Path], adapter: Path, file: str) -> None:
    (adapter / file).unlink()
    with pytest.raises(FileNotFoundError, match="is no adapter") as caught:
        check_adapters(check_declared(checkpoint("llava")), {"default": adapter})
    assert str(adapter) in str(caught.value)


def test_adapters_of_other_kinds_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(load_llava(checkpoint("llava")), prompts).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        check_adapters(check_declared(checkpoint("llava")), {"default": tmp_path})


@pytest.mark.parametrize("fault", ["missing", "unexpected", "of another shape"])
def test_a_wrong_tensor_of_metas_sam_is_named(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    weights = load_sam(checkpoint("sam-vit")).state_dict()
    width = weights["image_encoder.pos_embed"].shape[-1]
    # The real ones weigh 375 MB and more, so a small size is registered in their place.
    monkeypatch.setitem(sam_model_registry, "vit_tiny", lambda: load_sam(checkpoint("sam-vit")))
    monkeypatch.setattr(sam_module, "_PUBLISHED", {width: "vit_tiny"})
    for name in sorted(weights.keys() - {"image_encoder.pos_embed"})[::50]:
        spoiled = dict(weights)
        _spoil(spoiled, name, fault)
        torch.save(spoiled, tmp_path / "sam_vit_tiny.pth")
        with pytest.raises(ValueError, match=fault) as caught:
            load_sam(tmp_path / "sam_vit_tiny.pth")
        assert ("stranger" if fault == "unexpected" else name) in str(caught.value)
