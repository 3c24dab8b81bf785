"""Plans: sizes against counted models, memory and operations against what torch does, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import replicas
import torch
import transformers
from segment_anything import sam_model_registry
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gem_ray.config import Config, ConfigError, load_config
from gem_ray.grounding.sam import load_sam
from gem_ray.knowledge import captioner
from gem_ray.model_paths import resolve
from gem_ray.pipeline import graph, session
from gem_ray.planning import costs, stacks
from gem_ray.planning.advice import merged_config
from gem_ray.planning.allocation import PlannedPool
from gem_ray.planning.cards import CARDS, GIB
from gem_ray.planning.costs import (
    MATCHER_UTILISATION,
    PROCESS_OVERHEAD,
    UTILISATION,
    ModelNeed,
    Need,
    Workload,
    pool_need,
)
from gem_ray.planning.cpu_costs import CARRYING_SECONDS
from gem_ray.planning.model_facts import count_parameters, read_shape
from gem_ray.planning.plan import Plan, PlanError, make_plan
from gem_ray.planning.published import PUBLISHED
from gem_ray.planning.table import print_plan
from gem_ray.planning.workload import TWEETS
from gem_ray.pools import passes_of
from gem_ray.stages import STAGES, StageSpec
from gem_ray.tagger.checkpoint import load_tagger

# Of `nano`, each stage in actors of its own.
APART = "pipeline.pools=[{stages: [tag]}, {stages: [rerank]}, {stages: [ground]}]"
USABLE = 0.95
BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks"
Shape = dict[str, Any]


def pools_of(plan: Plan) -> dict[str, PlannedPool]:
    return {pool.name: pool for one in plan.passes for pool in one.pools}


def stage_need(stage: str, config: Config, card_memory: int = 0, work: Workload | None = None) -> Need:
    """Of a stage alone, with the batches of the pool that lists it."""
    (batch_size,) = [pool.batch_size for pool in config.pipeline.pools if stage in pool.stages]
    return pool_need([stage], config, batch_size, card_memory, work)


def refusal(config: Config, **cluster: float) -> str:
    with pytest.raises(PlanError) as caught:
        make_plan(config, **cluster).check()
    return str(caught.value)


# The presets with every model that they leave out, and with models of one's own.
FULL = (
    "knowledge.captioner=Salesforce/blip2-opt-2.7b",
    "tagger={model: models/tagger, max_length: 256, dtype: float16}",
    "reranker={enabled: true, adapter: models/reranker-lora}",
    "grounder.matcher.model=models/matcher",
    "pipeline.built_like={models/tagger: FacebookAI/roberta-large, models/matcher: Salesforce/blip-itm-large-coco}",
)
FULL_ARGUMENTS = [argument for override in FULL for argument in ("--set", override)]


def full(preset: str, *overrides: str) -> Config:
    """A preset with all stages."""
    return load_config(preset, overrides=[*FULL, *overrides])


# Sizes


def values_in(model: torch.nn.Module) -> int:
    """Parameters and buffers that are saved, each once however many names it has."""
    return sum({tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}.values())


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("nano:tagger", lambda path: load_tagger(path)[0]),
        ("nano:reranker", transformers.LlavaForConditionalGeneration.from_pretrained),
        ("nano:matcher", transformers.BlipForImageTextRetrieval.from_pretrained),
        ("nano:text-segmenter", transformers.CLIPSegForImageSegmentation.from_pretrained),
        ("nano:sam", load_sam),
    ],
)
def test_embedded_models_are_as_large_as_when_they_are_loaded(name: str, load) -> None:
    assert count_parameters(resolve(name)) == values_in(load(resolve(name)))


def llava(layers: int) -> torch.nn.Module:
    """A LLaVA-1.5-7B of fewer layers, without memory."""
    shape = PUBLISHED["llava-hf/llava-1.5-7b-hf"].shape
    with torch.device("meta"):
        return llava_of(shape | {"text_config": shape["text_config"] | {"num_hidden_layers": layers}})


def llava_of(shape: Shape) -> torch.nn.Module:
    vision = shape["vision_config"] | {"model_type": "clip_vision_model"}
    text = shape["text_config"] | {"model_type": "llama"}
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text))


def blip2_of(shape: Shape) -> torch.nn.Module:
    text = shape["text_config"] | {"model_type": "opt", "word_embed_proj_dim": shape["text_config"]["hidden_size"]}
    settings = transformers.Blip2Config(**shape | {"text_config": text}, image_token_index=50265)
    return transformers.Blip2ForConditionalGeneration(settings)


def roberta_of(shape: Shape) -> torch.nn.Module:
    sizes = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    return transformers.RobertaModel(transformers.RobertaConfig(**sizes, **shape))


def blip_of(shape: Shape) -> torch.nn.Module:
    vision = shape["vision_config"]
    text = shape["text_config"] | {"vocab_size": 30524, "encoder_hidden_size": vision["hidden_size"]}
    settings = transformers.BlipConfig(vision_config=vision, text_config=text, image_text_hidden_size=256)
    return transformers.BlipForImageTextRetrieval(settings)


def clipseg_of(shape: Shape) -> torch.nn.Module:
    vision = shape["vision_config"] | {"image_size": 224}  # its positions are interpolated to 352
    settings = transformers.CLIPSegConfig(vision_config=vision, use_complex_transposed_convolution=True)
    return transformers.CLIPSegForImageSegmentation(settings)


def grounding_dino_of(shape: Shape) -> torch.nn.Module:
    backbone = transformers.SwinConfig(out_indices=[2, 3, 4], **shape["backbone_config"])
    return transformers.GroundingDinoForObjectDetection(transformers.GroundingDinoConfig(backbone_config=backbone))


ARCHITECTURES = {
    "google-bert/bert": lambda shape: transformers.BertModel(transformers.BertConfig(**shape)),
    "FacebookAI/roberta": roberta_of,
    "Salesforce/blip2": blip2_of,
    "llava-hf/llava": llava_of,
    "Salesforce/blip-itm": blip_of,
    "sam_vit_b": lambda _: sam_model_registry["vit_b"](),
    "sam_vit_l": lambda _: sam_model_registry["vit_l"](),
    "sam_vit_h": lambda _: sam_model_registry["vit_h"](),
    "CIDAS/clipseg": clipseg_of,
    "IDEA-Research/grounding-dino": grounding_dino_of,
    "google/owlv2": lambda shape: transformers.Owlv2ForObjectDetection(transformers.Owlv2Config(**shape)),
    "facebook/sam3": lambda shape: transformers.Sam3Model(transformers.Sam3Config(**shape)),
    "meta-llama/": lambda shape: transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)),
}


def on_meta(reference: str) -> torch.nn.Module:
    """The published architecture, without memory, from the shape that the plan knows."""
    build = next(build for start, build in ARCHITECTURES.items() if reference.startswith(start))
    with torch.device("meta"):
        return build(PUBLISHED[reference].shape)


@pytest.mark.parametrize("reference", PUBLISHED)
def test_published_sizes_are_those_of_the_architecture(reference: str) -> None:
    assert PUBLISHED[reference].parameters == sum(weight.numel() for weight in on_meta(reference).parameters())


def test_weights_of_llava_are_two_bytes_for_each_of_its_published_parameters() -> None:
    (model, _adapter) = stage_need("rerank", full("one-gpu"), 24 * GIB).models
    assert model.weights == pytest.approx(7.06e9 * 2, rel=0.02)  # "7.06B params", says the hub


def test_an_adapter_of_vllm_is_as_large_as_peft_makes_it() -> None:
    from peft import LoraConfig, get_peft_model

    linear = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    with torch.device("meta"):
        model = get_peft_model(llava(layers=2), LoraConfig(r=64, target_modules=linear))
    (_llava, adapter) = stage_need("rerank", full("one-gpu"), 24 * GIB).models
    assert adapter.parameters == 16 * model.get_nb_trainable_parameters()[0]  # 32 layers
    several = full("one-gpu", "reranker.adapters={a: models/a, b: models/b}")
    (_llava, adapters) = stage_need("rerank", several, 24 * GIB).models
    assert adapters.parameters == 3 * adapter.parameters  # vLLM keeps a place for each


def test_cached_keys_and_values_by_hand() -> None:
    # A key and a value of 128 numbers for each of 32 heads in 32 layers, in two bytes, for 1,024 tokens.
    (model, _adapter) = stage_need("rerank", full("one-gpu"), 24 * GIB).models
    assert model.kv_cache == 2 * 128 * 32 * 32 * 2 * 1024 == GIB // 2
    # Eight heads share each key and value of Llama 3: 128 KiB a token.
    grouped = stacks.llama(PUBLISHED["meta-llama/Meta-Llama-3-8B-Instruct"].shape, tokens=1)
    assert grouped.kv_per_token * 2 == 128 * 1024


def test_a_captions_length_is_the_captioners() -> None:
    assert costs._CAPTION_LIMIT == captioner._MAX_NEW_TOKENS


# Memory and operations


class PeakMemory(TorchDispatchMode):
    """The most bytes of new tensors that existed at once."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.peak = 0
        self._weights = {each.untyped_storage()._cdata for each in [*model.parameters(), *model.buffers()]}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        new = [each.untyped_storage() for each in tree_leaves(output) if isinstance(each, torch.Tensor)]
        for storage in new:
            if storage._cdata not in self._weights:
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: value for key, value in self._live.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return output


def observed(model: torch.nn.Module, run) -> tuple[int, int]:
    """Operations and peak bytes of a forward pass."""
    flops, memory = FlopCounterMode(display=False), PeakMemory(model)
    with torch.no_grad(), torch.device("meta"), flops, memory:
        run(model)
    return flops.get_total_flops(), memory.peak


@pytest.mark.parametrize("reference", ["sam_vit_b_01ec64.pth", "sam_vit_l_0b3195.pth"])
def test_sams_operations_are_those_of_its_encoder(reference: str) -> None:
    flops, _ = observed(on_meta(reference), lambda model: model.image_encoder(torch.empty(2, 3, 1024, 1024)))
    layers = stacks.sam_encoder(PUBLISHED[reference].shape)
    assert 2 * sum(layer.flops for layer in layers) == pytest.approx(flops, rel=0.12)


def test_grounding_dinos_operations_are_those_of_its_backbone_on_the_largest_image() -> None:
    reference = "IDEA-Research/grounding-dino-tiny"
    backbone = on_meta(reference).model.backbone.conv_encoder.model
    flops, _ = observed(backbone, lambda model: model(torch.empty(1, 3, 800, 1333)))
    *stages, encoder = stacks.grounding_dino(PUBLISHED[reference].shape)
    assert sum(stage.flops for stage in stages) == pytest.approx(flops, rel=0.1)
    assert encoder.tokens == pytest.approx(100 * 167 + 50 * 84 + 25 * 42 + 13 * 21, rel=0.01)  # strides of 8 to 64


def figures_of_the_h200(name: str) -> dict[str, Any]:
    """What a benchmark measured there."""
    return json.loads((BENCHMARKS / f"{name}.json").read_text(encoding="utf-8"))


def needs_of_the_benchmark(stage: str, *overrides: str) -> dict[str, ModelNeed]:
    """Models of a stage for posts like those: each with an image and three entities, hard and seen."""
    posts = Workload(
        entities=3, with_entities=1, hard=3, with_hard=1, with_boxes=1, with_other_boxes=1, prompt_tokens=87
    )
    models = stage_need(stage, load_config("cluster", overrides=overrides), 0, posts).models
    return {model.role: model for model in models}


@pytest.mark.parametrize(
    ("role", "part", "batches"),
    [
        (
            "matcher",
            "match_trace",
            (
                "grounder.matcher.image_batch_size={0}",
                "grounder.matcher.batch_size={1}",
                "pipeline.pools.ground.batch_size={0}",
            ),
        ),
        ("sam", "sam_encoder", ("grounder.boxes.sam.batch_size={0}", "grounder.boxes.text_first=[]")),
    ],
)
def test_speed_and_memory_of_the_grounder_are_those_that_an_h200_had(
    role: str, part: str, batches: tuple[str, ...]
) -> None:
    rows = figures_of_the_h200("grounder-gpu")[part]
    for row in rows:
        settings = [each.format(row["batch"], 3 * row["batch"]) for each in batches]
        large = "grounder.matcher.model=Salesforce/blip-itm-large-coco"
        model = needs_of_the_benchmark("ground", large, *settings)[role]
        assert 1 / model.seconds(CARDS["h200"]) == pytest.approx(row["images_per_second"], rel=0.05)
        if row in rows[-3:]:
            assert (model.weights + model.activations) / 1e9 == pytest.approx(row["memory_gb"], rel=0.1)


def test_what_a_batch_reaches_of_a_card_lies_between_those_that_were_measured() -> None:
    def reached(batch: int) -> float:
        settings = [f"grounder.matcher.image_batch_size={batch}", f"grounder.matcher.batch_size={3 * batch}"]
        return needs_of_the_benchmark("ground", *settings)["matcher"].utilisation

    sizes = [1, 2, 4, 10, 16, 24, 32, 48, 64, 256, 512]
    shares = [reached(size) for size in sizes]
    assert shares == sorted(shares)
    assert reached(16) < reached(24) < reached(32)
    assert reached(256) == reached(512)


@pytest.mark.parametrize("kind", costs._TEXT_LIKE)
def test_what_every_text_segmenter_takes_of_a_core_is_counted(kind: str) -> None:
    boxes = {"text": {"kind": kind, "model": costs._TEXT_LIKE[kind]}}
    need = stage_need("ground", load_config("cluster", grounder={"boxes": boxes}))
    (segmenter,) = [model for model in need.models if model.role == "text_segmenter"]
    assert segmenter.cpu_seconds > 0


def test_speed_of_the_transformers_reranker_is_that_which_an_h200_had() -> None:
    fastest = max(point["entities_per_second"] for point in figures_of_the_h200("reranker-gpu")["curve"])
    model = needs_of_the_benchmark("rerank", "reranker.engine=transformers")["reranker"]
    assert 3 / model.seconds(CARDS["h200"]) == pytest.approx(fastest, rel=0.05)


def test_what_nobody_measured_is_planned_with_what_is_assumed() -> None:
    models = needs_of_the_benchmark("ground", "grounder.boxes.sam.dtype=float32")
    assert models["text_segmenter"].utilisation == models["sam"].utilisation == UTILISATION
    assert models["matcher"].utilisation == MATCHER_UTILISATION[32] != UTILISATION


def test_operations_of_a_language_model_are_those_of_its_layers() -> None:
    text = PUBLISHED["llava-hf/llava-1.5-7b-hf"].shape["text_config"]

    def run(model: torch.nn.Module) -> None:
        mask = torch.ones(1, 1, 768, 768, dtype=torch.bool)
        model.model.language_model(inputs_embeds=torch.empty(1, 768, 4096), attention_mask=mask, use_cache=False)

    flops, _ = observed(llava(layers=2), run)
    assert stacks.llama(text, 768).flops == pytest.approx(16 * flops, rel=0.02)  # 32 layers


def test_memory_and_operations_of_the_embedded_matchers_image_encoder() -> None:
    model = transformers.BlipForImageTextRetrieval.from_pretrained(resolve("nano:matcher")).to("meta")
    settings = model.config.vision_config
    side = settings.image_size
    flops, peak = observed(model, lambda each: each.vision_model(torch.empty(16, 3, side, side)))
    layers = stacks.vision(settings.to_dict(), stacks.EAGER)
    assert 16 * layers.flops == pytest.approx(flops, rel=0.1)
    assert 16 * 4 * layers.activations == pytest.approx(peak, rel=0.25)


def test_a_larger_batch_or_a_wider_dtype_needs_more() -> None:
    config = full("one-gpu")
    base = stage_need("ground", config).memory
    for change in ("grounder.boxes.sam.batch_size=16", "grounder.boxes.sam.dtype=float32"):
        assert stage_need("ground", full("one-gpu", change)).memory > 1.3 * base


# Fitting


def test_one_card_of_24_gb_holds_every_pass() -> None:
    plan = make_plan(full("one-gpu"), gpus=1, gpu_memory_gb=24)
    plan.check()
    assert [" ".join(one.stages) for one in plan.passes] == [
        "prepare knowledge",
        "tag load_image rerank",
        "load_image ground",
    ]
    for one in plan.passes:
        assert sum(pool.actors * pool.placement.num_gpus for pool in one.pools) <= 1
        held = sum(pool.actors * pool.need.held for pool in one.pools)
        assert held <= USABLE * 24 * GIB
    assert plan.bottleneck is not None
    rates = [one.posts_per_second for one in plan.passes]
    assert plan.posts_per_hour == pytest.approx(3600 / sum(1 / rate for rate in rates if rate))
    assert plan.gpu_hours_per_million == pytest.approx(1e6 / plan.posts_per_hour)


@pytest.mark.parametrize(("preset", "gpus", "memory_gb"), [("cpu", 0, None), ("one-gpu", 1, 24), ("cluster", 4, 80)])
def test_every_preset_fits_as_it_is_with_models_that_are_published(
    preset: str, gpus: int, memory_gb: float | None
) -> None:
    plan = make_plan(load_config(preset), gpus=gpus, gpu_memory_gb=memory_gb)
    plan.check()
    needs = [model for one in plan.passes for pool in one.pools for model in pool.need.models]
    assert [model.role for model in needs] == ["tagger", "matcher", "sam", "text_segmenter"]


@pytest.mark.parametrize("layout", [lambda folder: None, replicas.as_bin, replicas.as_shards])
def test_a_checkpoint_is_as_large_in_every_layout(tmp_path: Path, layout) -> None:
    replicas.sam_vit(tmp_path)
    layout(tmp_path)
    assert count_parameters(tmp_path) == values_in(load_sam(tmp_path))
    shape = {"width": 24, "depth": 2, "heads": 2, "window": 3, "image_size": 64, "patch_size": 8, "global_layers": [1]}
    assert read_shape(tmp_path) == shape


def test_a_card_of_12_gb_is_refused_with_numbers_and_what_would_fit() -> None:
    message = refusal(full("one-gpu"), gpus=1, gpu_memory_gb=12)
    assert "rerank needs 15.4 GiB" in message
    assert "weights 13.5" in message
    assert "a 12 GB card has 11.4 usable" in message
    assert "on a card of 24 GB" in message
    make_plan(full("one-gpu", "reranker.enabled=false"), gpus=1, gpu_memory_gb=12).check()


def test_the_smaller_settings_of_a_refusal_do_fit() -> None:
    wide = ["reranker.enabled=false", "grounder.boxes.sam.dtype=float32", "grounder.boxes.sam.batch_size=64"]
    message = refusal(full("one-gpu", *wide), gpus=1, gpu_memory_gb=12)
    changes = [word for before, word in zip(message.split(), message.split()[1:], strict=False) if before == "--set"]
    sam = [change.rstrip(",") for change in changes if "sam" in change]
    assert sam
    make_plan(full("one-gpu", *wide, *sam), gpus=1, gpu_memory_gb=12).check()


def test_stages_that_do_not_fit_at_once_are_refused_with_passes_that_do() -> None:
    at_once = [f"pipeline.pools.{stage}.pass_number=1" for stage in ("knowledge", "tag", "rerank", "ground")]
    message = refusal(full("one-gpu", *at_once), gpus=1, gpu_memory_gb=24)
    assert "pass 1 needs 3 GPUs or more" in message
    assert "It fits in 3 passes" in message
    (pools,) = re.findall(r"--set '([^']*)'", message)
    config = full("one-gpu", *at_once, pools)
    make_plan(config, gpus=1, gpu_memory_gb=24).check()
    assert config == full("one-gpu")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("pipeline.pools.ground.num_gpus=0.1", "set pipeline.pools.ground.num_gpus to 0.19 or more"),
        ("pipeline.pools.rerank.num_gpus=0.75", "pipeline.pools.rerank.num_gpus to 0.85 or more"),
        ("reranker.gpu_memory_utilization=1", "set reranker.gpu_memory_utilization to 0.80 or less"),
        ("reranker.gpu_memory_utilization=0.5", "set reranker.gpu_memory_utilization to 0.70 or more"),
    ],
)
def test_a_share_that_is_too_small_is_refused_with_the_one_that_is_not(override: str, says: str) -> None:
    assert says in refusal(full("one-gpu", override), gpus=1, gpu_memory_gb=24)


def test_no_card_at_all_is_refused_where_one_is_asked_for() -> None:
    assert "--gpus says 0" in refusal(full("one-gpu"))


def test_passes_are_proposed_with_all_that_the_pools_have_and_around_the_passes_that_there_are() -> None:
    pools = [
        "{stages: [knowledge], num_gpus: 1, batch_size: 8}",  # off
        "{stages: [tag], num_gpus: 0.2, batch_size: 256, threads: 3, pass_number: 2}",
        "{stages: [rerank], num_gpus: 0.85, num_cpus: 4, pass_number: 2}",
        "{stages: [ground], num_gpus: 0.5, pass_number: 3}",
    ]
    given = f"pipeline.pools=[{', '.join(pools)}]"
    off = "knowledge.captioner=null"
    message = refusal(full("one-gpu", off, given), gpus=1, gpu_memory_gb=24)
    assert "pass 1 needs 2 GPUs or more (tag 1 × 0.2, rerank 1 × 0.85)" in message
    (proposed,) = re.findall(r"It fits in 3 passes: --set '([^']*)'", message)
    config = full("one-gpu", off, proposed)
    plan = make_plan(config, gpus=1, gpu_memory_gb=24)
    plan.check()
    assert [[pool.name for pool in one.pools] for one in plan.passes] == [["tag"], ["rerank"], ["ground"]]
    before = full("one-gpu", off, given).pipeline.pools
    assert [pool.model_copy(update={"pass_number": 1}) for pool in config.pipeline.pools] == [
        pool.model_copy(update={"pass_number": 1}) for pool in before
    ]


def test_passes_are_not_proposed_where_a_pool_fits_in_none() -> None:
    message = refusal(full("one-gpu", "pipeline.pools.ground={min_actors: 2, max_actors: 2}"), gpus=1, gpu_memory_gb=24)
    assert message.endswith("Lower min_actors or num_gpus under `pipeline.pools`, or give it more")


# Stages that share actors

ALL = "pipeline.pools=[{stages: [knowledge, tag, rerank, ground], num_gpus: 1, batch_size: 32}]"


def test_stages_of_a_pool_keep_all_weights_and_the_largest_activations() -> None:
    config = full("one-gpu", ALL, "reranker.engine=transformers")
    together = pool_need(["knowledge", "tag", "rerank", "ground"], config, 32, 80 * GIB)
    alone = [pool_need([stage], config, 32, 80 * GIB) for stage in ("knowledge", "tag", "rerank", "ground")]
    kept = sum(model.weights + model.kv_cache for need in alone for model in need.models)
    assert together.memory == PROCESS_OVERHEAD + kept + max(need.activations for need in alone)
    assert [model.role for model in together.models] == [model.role for need in alone for model in need.models]
    card = CARDS["h100"]
    assert together.seconds(card) == pytest.approx(sum(need.seconds(card) for need in alone))


def test_each_engine_of_a_pool_is_a_process_of_its_own_beside_the_pools() -> None:
    config = full("cluster", IN_PROCESS, ALL)
    together = pool_need(["knowledge", "tag", "rerank", "ground"], config, 32, 80 * GIB)
    beside = [model for model in together.models if model.role not in ("explainer", "reranker", "reranker_adapter")]
    shares = (0.5 + 0.38) * 80 * GIB  # what the configuration lets vLLM take
    fixed = sum(model.weights + model.kv_cache for model in beside) + max(model.activations for model in beside)
    assert together.held == pytest.approx(PROCESS_OVERHEAD + fixed + shares, abs=2)
    assert together.overhead == 3 * PROCESS_OVERHEAD
    assert together.memory < together.held


def test_a_stage_that_the_plan_does_not_know_costs_nothing_and_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    before = make_plan(load_config())
    emoji = StageSpec("emoji", lambda config: list)
    monkeypatch.setattr("gem_ray.stages.STAGES", [*STAGES[:3], emoji, *STAGES[3:]])
    config = load_config(overrides=["pipeline.pools=[{stages: [tag, emoji, rerank, ground], max_actors: null}]"])
    plan = make_plan(config)
    plan.check()
    assert pools_of(plan)["tag-emoji-rerank-ground"].need == pools_of(before)["tag-rerank-ground"].need
    assert plan.notes == ("not in it: the stage emoji, of which the plan does not know what it needs",)


def test_a_pool_that_is_too_large_is_refused_with_one_for_each_stage() -> None:
    message = refusal(full("one-gpu", ALL), gpus=1, gpu_memory_gb=24)
    assert "knowledge-tag-rerank-ground needs" in message
    (proposed,) = re.findall(r"with a pool and a pass for each of its stages: --set '([^']*)'", message)
    config = full("one-gpu", proposed)
    plan = make_plan(config, gpus=1, gpu_memory_gb=24)
    plan.check()
    assert [one.stages for one in plan.passes] == [
        ["prepare", "knowledge"],
        ["tag"],
        ["load_image", "rerank"],
        ["load_image", "ground"],
    ]
    assert all(pool.batch_size == 32 for pool in config.pipeline.pools)


def test_a_pool_between_others_is_taken_apart_without_moving_a_stage_before_another() -> None:
    pools = "pipeline.pools=[{stages: [knowledge], num_gpus: 1}, {stages: [tag, rerank], num_gpus: 1}, \
{stages: [ground], num_gpus: 1}]"
    wide = ["reranker.gpu_memory_utilization=0.7", "tagger.batch_tokens=400000"]
    message = refusal(full("one-gpu", pools, *wide), gpus=3, gpu_memory_gb=24)
    (proposed,) = re.findall(r"for each of its stages: --set '([^']*)'", message)
    plan = make_plan(full("one-gpu", proposed, *wide), gpus=3, gpu_memory_gb=24)
    plan.check()
    names = [[pool.name for pool in one.pools] for one in plan.passes]
    assert names == [["knowledge"], ["tag"], ["rerank"], ["ground"]]


def test_a_pool_that_is_too_large_may_do_without_some_of_its_stages() -> None:
    message = refusal(full("one-gpu", ALL), gpus=1, gpu_memory_gb=24)
    ways = re.findall(r"--set ([a-z.]+=(?:null|false))", message.partition("do without: ")[2])
    assert ways == ["knowledge.captioner=null", "reranker.enabled=false"]
    for way in ways:
        plan = make_plan(full("one-gpu", ALL, way), gpus=1, gpu_memory_gb=24)
        assert not any("a 24 GB card has" in problem for problem in plan.problems)


@pytest.mark.parametrize("preset", ["nano", "cpu", "one-gpu", "cluster"])
def test_a_plan_given_back_as_configuration_has_the_same_stages_in_the_same_pools(preset: str) -> None:
    given = load_config(preset)
    overlay = make_plan(given, gpus=8, gpu_memory_gb=80).overlay()
    planned = load_config(preset, **overlay)
    assert [[pool.stages for pool in pools] for pools in passes_of(planned)] == [
        [pool.stages for pool in pools] for pools in passes_of(given)
    ]


# Sharing


def test_64_cards_make_all_stages_equally_fast() -> None:
    config = full("cluster")
    plan = make_plan(config, gpus=64, gpu_memory_gb=80)
    plan.check()
    pools = pools_of(plan)
    assert sum(pool.actors * pool.placement.num_gpus for pool in pools.values()) == pytest.approx(64, abs=0.5)
    rates = [pool.posts_per_second for pool in pools.values()]
    assert max(rates) / min(rates) < 1.25
    for name, pool in pools.items():
        (placement,) = [each for each in config.pipeline.pools if name in each.stages]
        assert placement.min_actors <= pool.actors <= placement.max_actors
        assert pool.source == "estimate"
    half = make_plan(config, gpus=32, gpu_memory_gb=80)
    assert plan.passes[0].posts_per_second == pytest.approx(2 * half.passes[0].posts_per_second, rel=0.1)


def test_the_planned_pools_can_be_run_as_configuration(tmp_path: Path) -> None:
    plan = make_plan(full("cluster"), gpus=16, gpu_memory_gb=80)
    file = tmp_path / "planned.yaml"
    file.write_text(json.dumps(plan.to_dict()["config"]))
    planned = load_config("cluster", file)
    actors = {name: pool.actors for name, pool in pools_of(plan).items()}
    assert {"-".join(pool.stages): pool.max_actors for pool in planned.pipeline.pools} == actors


def test_a_pool_never_outgrows_its_bound() -> None:
    config = full("cluster", "pipeline.pools.rerank.max_actors=3")
    plan = make_plan(config, gpus=64, gpu_memory_gb=80)
    assert pools_of(plan)["rerank"].actors == 3
    assert plan.bottleneck.name == "rerank"


def test_speeds_follow_the_card() -> None:
    config = full("cluster")
    slow, fast = (make_plan(config, gpus=8, card=card) for card in ("a100-80gb", "h100"))
    assert fast.gpu_memory_gb == 80
    ratio = fast.passes[0].posts_per_second / slow.passes[0].posts_per_second
    assert 1.6 < ratio < 989 / 312 + 0.2  # between their bandwidths and their operations
    assert make_plan(config, gpus=8, gpu_memory_gb=81).bottleneck is None  # no such card is known
    with pytest.raises(ConfigError, match="no such card 'voodoo'"):
        make_plan(config, gpus=8, card="voodoo")


# Without a card


def test_the_embedded_models_fit_on_cpus_at_speeds_that_nobody_claims_to_know() -> None:
    plan = make_plan(load_config())
    plan.check()
    assert {pool.source for pool in pools_of(plan).values()} == {"unknown"}
    assert plan.posts_per_hour is None


def test_too_few_cpus_are_refused() -> None:
    apart = load_config(overrides=[APART])
    assert "pass 1 needs 4 CPUs or more" in refusal(apart, cpus=3, gpus=1)
    make_plan(apart, cpus=4, gpus=1).check()
    assert "pass 1 needs 2 CPUs or more" in refusal(load_config(), cpus=1, gpus=1)
    make_plan(load_config(), cpus=2, gpus=1).check()


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 64])
@pytest.mark.parametrize("preset", ["nano", "cpu"])
def test_a_machine_runs_what_its_plan_says_whatever_its_cpus(
    preset: str, cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own Ray has as many logical CPUs as it takes; that of a cluster has those that it was started with."""
    unbounded = ["pipeline.pools.0.max_actors=null"]
    given: dict[str, int] = {}
    monkeypatch.setattr("gem_ray.pipeline.session.start_local_ray", given.update)
    monkeypatch.setattr("os.cpu_count", lambda: cpus)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for overrides in ([], unbounded):
        config = load_config(preset, overrides=overrides)
        session._start(config)
        monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": given["num_cpus"]})
        monkeypatch.setattr("ray.nodes", lambda: [{}])
        plan = make_plan(config, cpus=cpus)
        plan.check()
        assert not list(session._shortages(config))
        ((pool,),) = passes_of(config)
        runs = graph._actors(pool, [pool], config, blocks=1000).max_size
        assert [planned.actors for planned in pools_of(plan).values()] == [runs]
        assert any("a Ray cluster needs" in note for note in plan.notes) == (pool.placement.num_cpus + 1 > cpus)


@pytest.mark.parametrize("preset", ["nano", "cluster"])
@pytest.mark.parametrize("cpus", [2, 3, 5])
def test_too_few_cpus_are_answered_with_a_configuration_that_needs_no_more(preset: str, cpus: int) -> None:
    wide = [APART, *[f"pipeline.pools.{each}={{min_actors: 4, max_actors: 9}}" for each in ("tag", "rerank", "ground")]]
    cards = {"gpus": 8, "card": "h100"} if preset == "cluster" else {"gpus": 1}
    config = load_config(preset, overrides=wide if preset == "nano" else ["pipeline.pools.ground.min_actors=6"])
    plan = make_plan(config, cpus=cpus, **cards)
    assert plan.problems
    assert plan.advice is not None
    make_plan(merged_config(config, plan.advice), cpus=cpus, **cards).check()
    assert make_plan(config, cpus=1, **cards).advice is None  # which tasks need


def test_a_pool_that_waits_for_an_endpoint_counts_where_its_speed_is_known() -> None:
    explainer = "knowledge.explainer={base_url: http://127.0.0.1:9/v1}"
    off = ["reranker.enabled=false", "grounder.enabled=false"]
    config = load_config(overrides=["pipeline.pools=[{stages: [knowledge]}, {stages: [tag]}]", explainer, *off])
    for measured, slowest in (({"tag": 0.001}, "tag"), ({"tag": 0.001, "prepare": 0.0, "knowledge": 2.0}, "knowledge")):
        (one,) = make_plan(config, cpus=4, measured=measured).passes
        assert one.bottleneck.name == slowest


def test_more_cpus_go_to_the_slowest_stage_of_a_measured_run() -> None:
    measured = {"tag": 0.001, "rerank": 0.002, "ground": 0.008}
    wide = [f"pipeline.pools.{stage}.max_actors=16" for stage in ("tag", "rerank", "ground")]
    plan = make_plan(load_config(overrides=[APART, *wide]), cpus=11, measured=measured)
    assert {name: pool.actors for name, pool in pools_of(plan).items()} == {"tag": 1, "rerank": 2, "ground": 8}
    assert plan.passes[0].bottleneck.posts_per_second == pytest.approx(1000)
    assert plan.limit == "the 11 CPUs"  # which also read and write
    assert plan.posts_per_hour == pytest.approx(3600 * 11 / (0.011 + CARRYING_SECONDS))
    shared = make_plan(load_config(), cpus=11, measured=measured)
    assert {name: pool.actors for name, pool in pools_of(shared).items()} == {"tag-rerank-ground": 11}
    assert shared.passes[0].bottleneck.posts_per_second == pytest.approx(1000)  # 11 actors, 0.011 s


def test_a_pool_without_a_bound_is_bounded_by_what_it_reserves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert pools_of(make_plan(load_config()))["tag-rerank-ground"].actors == 6
    assert pools_of(make_plan(load_config(), cpus=4))["tag-rerank-ground"].actors == 4
    sharing = load_config(overrides=["pipeline.pools.tag.num_gpus=0.1"])
    assert pools_of(make_plan(sharing, gpus=2))["tag-rerank-ground"].actors == 20  # more than CPUs of this machine
    bounded = load_config(
        overrides=[APART, *[f"pipeline.pools.{each}.max_actors=9" for each in ("tag", "rerank", "ground")]]
    )
    assert [pool.actors for pool in pools_of(make_plan(bounded)).values()] == [9, 9, 9]


# What is not there


def test_an_unknown_model_is_named_with_its_key_and_a_remedy() -> None:
    plan = make_plan(load_config(overrides=["tagger.model=models/none"]))
    (note,) = plan.notes
    assert note.startswith("not in it: tagger.model: there is no model at 'models/none'")
    assert "pipeline.built_like={models/none: " in note
    assert plan.posts_per_hour is None
    known = ["tagger.model=models/none", "pipeline.built_like={models/none: FacebookAI/roberta-base}"]
    (tagger,) = pools_of(make_plan(load_config(overrides=[APART, *known])))["tag"].need.models
    assert tagger.parameters == PUBLISHED["FacebookAI/roberta-base"].parameters


def test_a_folder_without_weights_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it has no model\.safetensors, pytorch_model\.bin"):
        make_plan(load_config(overrides=[f"tagger.model={tmp_path}"]))


def test_an_explainer_behind_an_endpoint_is_noted_and_not_planned() -> None:
    explainer = "knowledge.explainer={base_url: http://127.0.0.1:9/v1, model: meta-llama/Meta-Llama-3-8B-Instruct}"
    plan = make_plan(load_config(overrides=[explainer]))
    assert "15.0 GiB" in plan.notes[0]
    assert plan.notes[0].endswith("about 1,000 questions for a thousand posts")
    reranker = "reranker={engine: endpoint, endpoint: {base_url: http://me:secret@127.0.0.1:9/v1, model: one}}"
    for work, questions in ((TWEETS, "1,314"), (replace(TWEETS, with_images=0.5), "657")):
        (note,) = make_plan(load_config(overrides=[reranker]), work=work).notes
        assert "the reranker, one behind http://***@127.0.0.1:9/v1, its speed" in note
        assert f"about {questions} questions" in note


LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"
ENGINES = "knowledge.explainer", "reranker"
IN_PROCESS = f"knowledge.explainer={{engine: vllm, model: {LLAMA}, dtype: bfloat16}}"


def test_an_explainer_in_the_process_is_planned_beside_the_captioner() -> None:
    config = full("cluster", IN_PROCESS, "pipeline.pools.knowledge.num_gpus=0.8")
    plan = make_plan(config, gpus=8, gpu_memory_gb=80)
    plan.check()
    assert plan.notes == ()
    need = pools_of(plan)["knowledge"].need
    captioner, explainer = need.models
    assert explainer.weights == 2 * PUBLISHED[LLAMA].parameters
    assert explainer.kv_cache == 4096 * 128 * 1024  # grouped keys and values: 128 KiB a token
    alone = stage_need("knowledge", full("cluster"), 80 * GIB)
    half = CARDS["a100-80gb"].memory // 2
    assert need.held == alone.memory + half  # what the captioner needs, and half a card for vLLM
    assert captioner.weights == alone.models[0].weights
    # Its answers are decoded token by token: the slowest stage, unless it gets more actors.
    assert explainer.seconds(CARDS["h100"]) > captioner.seconds(CARDS["h100"])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], "its share of 0.2 has 15.0 usable: set pipeline.pools.knowledge.num_gpus to 0.35"),
        (["pipeline.pools.knowledge.num_gpus=0.5"], "beside 8.5 GiB of the captioner"),
        (
            ["pipeline.pools.knowledge.num_gpus=1", "knowledge.explainer.gpu_memory_utilization=0.2"],
            "set knowledge.explainer.gpu_memory_utilization to 0.23 or more",
        ),
    ],
)
def test_an_explainer_without_room_is_refused_with_what_gives_it_some(overrides: list[str], says: str) -> None:
    assert says in refusal(full("cluster", IN_PROCESS, *overrides), gpus=8, gpu_memory_gb=80)


@pytest.mark.parametrize(
    ("preset", "memory_gb", "overrides"),
    [
        ("cluster", 80, [IN_PROCESS]),
        ("cluster", 80, [IN_PROCESS, "pipeline.pools.knowledge.num_gpus=0.35"]),
        ("cluster", 80, [IN_PROCESS, "knowledge.explainer.gpu_memory_utilization=1"]),
        ("cluster", 80, ["pipeline.pools.rerank.num_gpus=0.2", "reranker.gpu_memory_utilization=0.2"]),
        ("cluster", 80, ["pipeline.pools.rerank.num_gpus=0.1", "reranker.gpu_memory_utilization=1"]),
        ("one-gpu", 24, ["pipeline.pools.rerank.num_gpus=0.68", "reranker.gpu_memory_utilization=0.6"]),
        ("cluster", 80, [IN_PROCESS, ALL]),
        ("cluster", 80, [IN_PROCESS, ALL, "pipeline.pools.tag.num_gpus=0.2"]),
        ("cluster", 80, [IN_PROCESS, ALL, "reranker.gpu_memory_utilization=0.1"]),
        ("cluster", 80, [IN_PROCESS, ALL, *[f"{each}.gpu_memory_utilization=1" for each in ENGINES]]),
    ],
)
def test_who_follows_the_advice_gets_a_plan_that_fits(preset: str, memory_gb: int, overrides: list[str]) -> None:
    for _ in range(4):
        plan = make_plan(full(preset, *overrides), gpus=8, gpu_memory_gb=memory_gb)
        if not plan.problems:
            return
        advice = plan.problems[0].partition(": set ")[2].partition(", or ")[0]
        overrides = overrides + [f"{key}={value}" for key, value in re.findall(r"([a-z_.]+) to ([0-9.]+)", advice)]
    pytest.fail(f"still refused, with {overrides}: {plan.problems}")


def test_a_captioner_and_an_explainer_that_no_card_holds_may_each_be_left_out() -> None:
    says = refusal(full("one-gpu", IN_PROCESS), gpus=1, gpu_memory_gb=24)
    assert "--set knowledge.captioner=null, or --set knowledge.explainer=null" in says
    single = IN_PROCESS.replace("bfloat16", "float32")  # without the captioner it does not fit either
    says = refusal(full("one-gpu", single), gpus=1, gpu_memory_gb=24)
    assert says.endswith("or do without: --set knowledge.explainer=null")
    says = refusal(full("one-gpu", IN_PROCESS), gpus=1, gpu_memory_gb=8)  # neither is enough without the other
    assert "or do without: --set knowledge.captioner=null --set knowledge.explainer=null\n" in says
    says = refusal(full("one-gpu", ALL), gpus=1, gpu_memory_gb=1)  # the tagger alone is too large
    assert "do without" not in says


def test_an_explainer_of_unknown_size_is_noted_by_its_key() -> None:
    plan = make_plan(load_config(overrides=["knowledge.explainer={engine: vllm, model: models/llm}"]))
    assert "knowledge.explainer.model" in plan.notes[0]


# The command


def gem_ray(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gem_ray", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_prints_a_table_that_a_terminal_of_100_columns_holds() -> None:
    arguments = ["--preset", "one-gpu", "--gpus", "1", "--gpu-memory", "24", "--price", "0.5"]
    done = gem_ray(*arguments, *FULL_ARGUMENTS)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100
    for words in (
        "pass 3",
        "llava-1.5-7b-hf",
        "measured: on an H200",
        "assumed: ",
        "verdict: it fits",
        "bottleneck: rerank",
    ):
        assert words in " ".join(done.stdout.split())  # lines are wrapped


def test_the_table_says_what_shares_an_actor_and_what_is_behind_an_endpoint(capsys) -> None:
    asked = {"engine": "endpoint", "endpoint": {"base_url": "http://127.0.0.1:8000/v1", "model": "llava"}}
    explainer = {"base_url": "http://127.0.0.1:9/v1"}
    print_plan(make_plan(load_config(reranker=asked, knowledge={"explainer": explainer}), cpus=1))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    endpoint = ["behind", "its", "endpoint"]
    assert rows[1] == ["knowledge", *endpoint, "0.7", "0", "1", "?", "unknown"]
    assert rows[2] == ["+", "tag", "nano:tagger", "0.1", "0.0", "7"]
    assert rows[3] == ["+", "rerank", *endpoint]
    assert [row[-4] for row in rows[4:7]] == ["nano:matcher", "nano:sam", "nano:text-segmenter"]
    assert " ".join(rows[10]) == "pass 1: prepare + knowledge + tag + load_image + rerank + ground"


def test_the_command_gives_json() -> None:
    done = gem_ray("--preset", "cluster", "--gpus", "64", "--gpu-memory", "80", "--json", "-", *FULL_ARGUMENTS)
    plan = json.loads(done.stdout)
    assert plan["problems"] == []
    assert [pool["name"] for pool in plan["passes"][0]["pools"]] == ["knowledge", "tag", "rerank", "ground"]


def test_the_command_ends_with_2_where_it_does_not_fit() -> None:
    done = gem_ray("--preset", "one-gpu", "--gpus", "1", "--gpu-memory", "12", *FULL_ARGUMENTS)
    assert done.returncode == 2
    assert "verdict: it does not fit" in done.stdout
    assert "11.4 usable" in done.stderr


def test_a_plan_loads_no_heavy_library() -> None:
    code = (
        "import sys; from gem_ray.config import load_config; from gem_ray.planning.plan import make_plan; "
        "make_plan(load_config()); print(*{'torch', 'transformers', 'ray', 'vllm'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_a_reranker_behind_an_endpoint_needs_no_card() -> None:
    there = {"engine": "endpoint", "endpoint": {"base_url": "http://127.0.0.1:8000/v1"}}
    assert stage_need("rerank", load_config(reranker=there)).models == ()


def test_a_reranker_that_reads_captions_is_as_large_as_its_language_model(tmp_path: Path) -> None:
    shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, num_attention_heads=2))
    model.save_pretrained(tmp_path)
    config = load_config(reranker={"engine": "text", "model": str(tmp_path), "adapter": None, "dtype": "float16"})
    (reader,) = stage_need("rerank", config).models
    assert reader.weights == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert reader.flops > 0


def test_matchers_whose_needs_nobody_has_worked_out_are_noted_by_key() -> None:
    need = stage_need("ground", load_config(grounder={"matcher": {"kind": "llava"}}))
    assert "grounder.matcher.kind" in need.unknown[0]
    assert [model.role for model in need.models] == ["sam", "text_segmenter"]
