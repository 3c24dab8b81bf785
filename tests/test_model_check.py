"""A model that a configuration names by mistake, or that is not whole, is refused before a post is touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import replicas
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlavaForConditionalGeneration, RobertaConfig, RobertaForMaskedLM, RobertaTokenizer

from gem_ray.annotator import build_stage
from gem_ray.config import Config, ConfigError, load_config
from gem_ray.model_check import check_models
from gem_ray.stages import find_stage
from gem_ray.tagger.checkpoint import load_encoder
from gem_ray.tagger.features import fit, load_tokenizer

BUILDERS: dict[str, Callable[[Path], None]] = {
    "blip": replicas.blip_itm,
    "blip2": replicas.blip2_itm,
    "blip2-opt": replicas.blip2_opt,
    "llava": replicas.llava,
    "llava-next": replicas.llava_next,
    "qwen2.5-vl": replicas.qwen2_5_vl,
    "clipseg": replicas.clipseg,
    "sam3": replicas.sam3,
    "grounding-dino": replicas.grounding_dino,
    "owlv2": replicas.owlv2,
    "sam": replicas.sam_vit,
    "bert": replicas.bert,
    "roberta": replicas.roberta,
    "gpt2": replicas.gpt2,
    "chat": replicas.chat,
}
# A place for a model: its stage, its key, what else is set, and which of the models belong there.
PLACES: dict[str, tuple[str, str, dict[str, Any], set[str]]] = {
    "blip": ("ground", "grounder.matcher.model", {"kind": "blip"}, {"blip"}),
    "blip2": ("ground", "grounder.matcher.model", {"kind": "blip2"}, {"blip2"}),
    "llava": ("ground", "grounder.matcher.model", {"kind": "llava"}, {"llava"}),
    "sam": ("ground", "grounder.boxes.sam.model", {}, {"sam"}),
    **{
        kind: ("ground", "grounder.boxes.text.model", {"kind": kind}, {kind})
        for kind in ("clipseg", "sam3", "grounding-dino", "owlv2")
    },
    "tagger": ("tag", "tagger.model", {}, set()),
    "captioner": ("knowledge", "knowledge.captioner", {}, {"blip2-opt"}),
    "explainer": ("knowledge", "knowledge.explainer.model", {"engine": "vllm"}, {"llava-next", "qwen2.5-vl", "chat"}),
    "reranker": ("rerank", "reranker.model", {"engine": "transformers", "adapter": None}, {"llava"}),
    "reranker in vLLM": (
        "rerank",
        "reranker.model",
        {"engine": "vllm", "adapter": None},
        {"llava", "llava-next", "qwen2.5-vl"},
    ),
    "reranker by text": ("rerank", "reranker.model", {"engine": "text", "adapter": None}, {"gpt2", "chat"}),
}
WHOLE = [(place, kind) for place, (*_, right) in PLACES.items() for kind in sorted(right)]
# Tokenizers of LLaMA and the like cannot be made of nothing; of these, transformers makes an empty one.
READING = [(place, kind) for place, kind in WHOLE if kind != "sam"]
IN_PROCESS = [(place, kind) for place, kind in READING if place not in ("explainer", "reranker in vLLM")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, build in BUILDERS.items():
        build(folder / name)
    return folder


def configured(place: str, model: Path) -> Config:
    _, key, settings, _ = PLACES[place]
    *sections, last = key.split(".")
    section = {last: str(model), **settings}
    return load_config(**reduce(lambda inner, name: {name: inner}, reversed(sections), section))


def check(place: str, model: Path) -> None:
    check_models([find_stage(PLACES[place][0])], configured(place, model))


@pytest.mark.parametrize(("place", "kind"), WHOLE)
def test_models_that_belong_there_pass(models: Path, place: str, kind: str) -> None:
    check(place, models / kind)


@pytest.mark.parametrize("place", PLACES)
def test_models_of_other_architectures_are_named_with_their_key_in_one_line(models: Path, place: str) -> None:
    _, key, _, right = PLACES[place]
    for kind in BUILDERS.keys() - right:
        with pytest.raises((ValueError, ConfigError)) as caught:
            check(place, models / kind)
        message = str(caught.value)
        assert message.startswith(key)
        assert str(models / kind) in message
        assert "\n" not in message
        if (place, kind) != ("reranker in vLLM", "blip2-opt"):  # which vLLM can ask about images; its processor fails
            assert "Error: " not in message, f"{kind}: {message}"  # a library's own, about an attribute or a key


@pytest.mark.parametrize(("place", "kind"), READING)
def test_a_tokenizer_without_its_words_is_refused(models: Path, tmp_path: Path, place: str, kind: str) -> None:
    """transformers makes an empty one, for which every word is the unknown one."""
    folder = Path(shutil.copytree(models / kind, tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer"):
        check(place, folder)
    if (place, kind) in IN_PROCESS:
        with pytest.raises(ValueError, match="tokenizer"):
            build_stage(find_stage(PLACES[place][0]), configured(place, folder))


def test_a_tagger_without_its_words_is_refused(tmp_path: Path) -> None:
    from gem_ray.model_paths import resolve
    from gem_ray.tagger.checkpoint import load_tagger, save_tagger

    save_tagger(*load_tagger(resolve("nano:tagger")), tmp_path)
    check("tagger", tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer"):
        check("tagger", tmp_path)


def test_the_tokenizer_of_a_larger_model_is_refused(models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "blip", tmp_path / "model"))
    replicas.bert_tokenizer([*replicas.WORDS, *map(str, range(1000))]).save_pretrained(folder)
    with pytest.raises(ValueError, match="word embeddings"):
        check("blip", folder)


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "fp8", "compressed-tensors"])
@pytest.mark.parametrize(("place", "kind"), [("reranker", "llava"), ("llava", "llava"), ("reranker by text", "gpt2")])
def test_quantized_weights_are_vllms_alone(models: Path, tmp_path: Path, place: str, kind: str, method: str) -> None:
    folder = Path(shutil.copytree(models / kind, tmp_path / "model"))
    facts = json.loads((folder / "config.json").read_text())
    facts["quantization_config"] = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=f"is quantized .{method}"):
        check(place, folder)


def test_sam_3_in_the_layout_of_its_tracker_is_the_detector(models: Path, tmp_path: Path) -> None:
    """As facebook/sam3 is published."""
    folder = Path(shutil.copytree(models / "sam3", tmp_path / "model"))
    detector = json.loads((folder / "config.json").read_text())
    facts = {"model_type": "sam3_video", "architectures": ["Sam3VideoModel"], "detector_config": detector}
    (folder / "config.json").write_text(json.dumps(facts))
    check("sam3", folder)
    build_stage(find_stage("ground"), configured("sam3", folder))


def test_a_model_with_code_of_its_own_is_refused_without_a_question(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(models / "llava", tmp_path / "model"))
    facts = json.loads((folder / "config.json").read_text())
    facts |= {"model_type": "internvl_chat", "auto_map": {"AutoConfig": "configuration_internvl.InternVLConfig"}}
    (folder / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="custom code"):
        check("reranker in vLLM", folder)
    assert "Do you wish" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"half a file", b"version https://git-lfs.github.com/spec/v1\noid sha256:12"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_files_that_are_no_weights_are_named(models: Path, tmp_path: Path, name: str, content: bytes) -> None:
    folder = Path(shutil.copytree(models / "blip", tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} cannot be read as weights") as caught:
        check("blip", folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["blip", "blip2", "llava"])
def test_a_layer_that_the_matcher_does_not_have_is_refused(models: Path, kind: str) -> None:
    config = configured(kind, models / kind)
    config.grounder.matcher.layer = 30
    with pytest.raises(ValueError, match=r"grounder\.matcher\.layer is 30"):
        check_models([find_stage("ground")], config)


@pytest.mark.parametrize("name", ["grounding.json", "confidence.json"])
def test_what_lies_beside_the_weights_is_read_too(models: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(models / "blip", tmp_path / "model"))
    (folder / name).write_text("{broken")
    with pytest.raises(ValueError, match=name):
        check("blip", folder)


@pytest.mark.parametrize("changes", [{"tagger": {"max_length": 5000}}, {"labels": "gmner"}])
def test_a_tagger_that_does_not_fit_the_configuration_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"max_length|the configuration asks"):
        check_models([find_stage("tag")], load_config(**changes))


def test_an_encoder_reads_as_many_subwords_as_it_has_positions_whatever_its_tokenizer_says(tmp_path: Path) -> None:
    """Many published tokenizers say nothing. RoBERTa's positions begin behind the padding's."""
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "\u0120", "a"]
    RobertaTokenizer({name: index for index, name in enumerate(names)}, []).save_pretrained(tmp_path)
    size = {**replicas.SMALL, "vocab_size": len(names), "max_position_embeddings": 20}
    RobertaForMaskedLM(RobertaConfig(**size, pad_token_id=1)).save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert fit(load_tokenizer(tmp_path), encoder, tmp_path).model_max_length == 18
    encoder(input_ids=torch.full((1, 18), 6))
    with pytest.raises((IndexError, RuntimeError)):
        encoder(input_ids=torch.full((1, 19), 6))


@pytest.mark.parametrize(("engine", "merge"), [("vllm", False), ("vllm", True), ("transformers", None)])
@pytest.mark.parametrize("settings", [{"r": 128}, {"r": 4, "rank_pattern": {"q_proj": 96}}, {"r": 4, "use_dora": True}])
def test_adapters_that_vllm_does_not_serve_are_refused_unless_they_are_merged(
    models: Path, tmp_path: Path, engine: str, merge: bool | None, settings: dict[str, Any]
) -> None:
    targets = r".*language_model.*\.(q_proj|v_proj)"
    model = LlavaForConditionalGeneration.from_pretrained(models / "llava")
    get_peft_model(model, LoraConfig(target_modules=targets, **settings)).save_pretrained(tmp_path)
    reranker = {"engine": engine, "model": str(models / "llava"), "adapter": str(tmp_path), "merge_adapter": merge}
    config = load_config(reranker=reranker)
    if engine == "vllm" and not merge:
        with pytest.raises(ConfigError, match=r"reranker\.(max_lora_rank|adapter)"):
            check_models([find_stage("rerank")], config)
    else:
        check_models([find_stage("rerank")], config)
