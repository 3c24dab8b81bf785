"""What each stage's models need of a card: memory while they run, and operations for a post."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from gem_ray.config import Config, ExplainerConfig
from gem_ray.planning import stacks
from gem_ray.planning.cards import GIB, Card
from gem_ray.planning.cpu_costs import image_seconds
from gem_ray.planning.model_facts import ModelFacts, UnknownModelError, model_facts
from gem_ray.planning.workload import TWEETS, USUAL_CANDIDATES, Workload

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Assumed: the CUDA context, the libraries' workspaces and what the allocator holds back, for each process. Without a
# card: the interpreter with its libraries.
PROCESS_OVERHEAD = int(0.6 * GIB)
# Assumed: what a model reaches of a card's peak FLOP/s, and of its memory's bandwidth.
UTILISATION, BANDWIDTH_UTILISATION = 0.35, 0.6
# Measured instead, in bfloat16 on an H200, of the peak in its data sheet, by batch size (docs/benchmarks/
# grounder-gpu.json and reranker-gpu.json): matcher and trace of BLIP's large size, the image encoder of SAM ViT-H; and
# LLaVA-1.5-7B by the transformers engine at its best batch. Images are resized on CPUs, which is not in it.
MATCHER_UTILISATION = {1: 0.0086, 4: 0.0316, 16: 0.134, 32: 0.21, 64: 0.301, 128: 0.338, 256: 0.344}
SAM_UTILISATION = {1: 0.249, 2: 0.36, 4: 0.375, 8: 0.387, 16: 0.38, 32: 0.379}
LLAVA_UTILISATION = 0.42

# Of a candidate: tokens of its name in the prompt, and in the tree of answers. Estimated, for the 51 categories.
_TOKENS_OF_A_CANDIDATE = 9
# vLLM in mode `score` asks 11 questions about an entity with five candidates (seen on generated posts); of each, half a
# block of 16 tokens and the beginning of an answer are not in its cache. Estimated.
_QUESTIONS_OF_A_CANDIDATE, _UNCACHED_TOKENS, _ANSWER_TOKENS = 2.2, 12, 6
_CAPTION_LIMIT = 30  # new tokens, as the captioner asks for; from there it would bring torch
# vLLM's defaults of `max_num_batched_tokens` for its LLM class, on cards of 70 GiB and more and on others. An A100
# of 80 GB takes the smaller one; it is planned with the larger, which is on the safe side.
_VLLM_LARGE_CARD, _VLLM_TOKENS_LARGE, _VLLM_TOKENS = 70 * GIB, 16384, 8192
_TEXT_LIKE = {
    "clipseg": "CIDAS/clipseg-rd64-refined",
    "sam3": "facebook/sam3",
    "grounding-dino": "IDEA-Research/grounding-dino-base",
    "owlv2": "google/owlv2-base-patch16-ensemble",
}


@dataclass(frozen=True)
class ModelNeed:
    """A model in an actor. Bytes, and work for an average post.

    Attributes:
        stage: whose it is.
        role: as in the output's `models` column.
        name: short, of the model.
        source: where its size is from.
        parameters: weights.
        dtype: in which it is loaded.
        batch: what runs in one forward pass.
        weights, activations, kv_cache: bytes on the card.
        flops: operations for a post.
        traffic: bytes that decoding reads for a post, over and over, beside the operations.
        measured: the share of a card's peak FLOP/s in half precision that was measured; `None` if none was.
        cpu_seconds: of a core, for a post: what its processor does to images before the model sees them.
        tokens: of text that the reranker reads for an entity, those that it reads again counted again.
    """

    stage: str
    role: str
    name: str
    source: str
    parameters: int
    dtype: str
    batch: int
    weights: int
    activations: int
    kv_cache: int = 0
    flops: float = 0
    traffic: float = 0
    measured: float | None = None
    cpu_seconds: float = 0
    tokens: float = 0

    @property
    def utilisation(self) -> float:
        """The share of a card's peak FLOP/s that it is planned with."""
        return UTILISATION if self.measured is None or self.dtype == "float32" else self.measured

    def seconds(self, card: Card) -> float:
        """Estimated time of a whole card for a post."""
        computing = self.flops / (card.flops(self.dtype) * self.utilisation)
        return computing + self.traffic / (card.bandwidth * BANDWIDTH_UTILISATION)


@dataclass(frozen=True)
class EngineNeed:
    """A vLLM engine, in a process of its own.

    Attributes:
        key: of its section in the configuration.
        models: what it runs.
        reserved: bytes that it takes at the start, whatever it needs.
        fixed_cache: bytes for cached keys and values, where the configuration says how many; `None`: what is left.
    """

    key: str
    models: tuple[ModelNeed, ...]
    reserved: int
    fixed_cache: int | None = None

    @property
    def memory(self) -> int:
        """Bytes that it needs."""
        return _process(self.models)

    @property
    def kv_cache(self) -> int:
        """Bytes for cached keys and values: those that are fixed, or what is left of what it has."""
        return self.held - self.memory + self.least_cache if self.fixed_cache is None else self.fixed_cache

    @property
    def least_cache(self) -> int:
        """Bytes for the keys and values of the longest sequence."""
        return sum(model.kv_cache for model in self.models)

    @property
    def is_starved(self) -> bool:
        """Whether it has asked for less than it needs."""
        return self.reserved < self.memory or (self.fixed_cache is not None and self.fixed_cache < self.least_cache)

    @property
    def held(self) -> int:
        """Bytes that it has: it fills its share with cached keys and values, unless these are fixed."""
        fixed = 0 if self.fixed_cache is None else self.memory - self.least_cache + self.fixed_cache
        return max(self.memory, self.reserved, fixed)


@dataclass(frozen=True)
class Need:
    """The models of stages that share an actor's process and run one after the other; and those of its engines.

    Attributes:
        beside: models outside of engines.
        engines: each in a process of its own.
        unknown: models that are not in it, with what is missing.
    """

    beside: tuple[ModelNeed, ...] = ()
    engines: tuple[EngineNeed, ...] = ()
    unknown: tuple[str, ...] = ()

    def __add__(self, other: Need) -> Need:
        """Both in one actor."""
        return Need(self.beside + other.beside, self.engines + other.engines, self.unknown + other.unknown)

    @property
    def models(self) -> tuple[ModelNeed, ...]:
        """All of them."""
        return self.beside + tuple(model for engine in self.engines for model in engine.models)

    @property
    def overhead(self) -> int:
        """Bytes of its processes themselves."""
        return PROCESS_OVERHEAD * (len(self.engines) + bool(self.beside or not self.engines))

    @property
    def activations(self) -> int:
        """Bytes of its processes' largest activations."""
        return _activations(self.beside) + sum(_activations(engine.models) for engine in self.engines)

    @property
    def memory(self) -> int:
        """Bytes that an actor needs."""
        return self._memory_beside + sum(engine.memory for engine in self.engines)

    @property
    def held(self) -> int:
        """Bytes that an actor has, with what its engines take."""
        return self._memory_beside + sum(engine.held for engine in self.engines)

    @property
    def _memory_beside(self) -> int:
        return _process(self.beside) if self.beside or not self.engines else 0

    def seconds(self, card: Card) -> float:
        """Estimated time of a whole card for a post."""
        return sum(model.seconds(card) for model in self.models)

    @property
    def cpu_seconds(self) -> float:
        """Of a core, for a post."""
        return sum(model.cpu_seconds for model in self.models)


def _process(models: Sequence[ModelNeed]) -> int:
    """Bytes of a process: all weights and caches stay, activations are given back between models."""
    fixed = sum(model.weights + model.kv_cache for model in models)
    return PROCESS_OVERHEAD + fixed + _activations(models)


def _activations(models: Sequence[ModelNeed]) -> int:
    return max((model.activations for model in models), default=0)


def pool_need(
    stages: Iterable[str], config: Config, batch_size: int, card_memory: int = 0, work: Workload | None = None
) -> Need:
    """What an actor of some stages needs.

    Args:
        stages: their names; one that the plan does not know needs nothing.
        config: the models, batches and dtypes.
        batch_size: posts that the actor works on at a time.
        card_memory: bytes of a card, of which vLLM takes a share; 0: there is none.
        work: an average post.

    Raises:
        ConfigError: the files of a model cannot be read.
    """
    asked = _Asked(config, batch_size, card_memory, (work or TWEETS).under(config))
    return sum((_known(partial(_NEEDS[name], asked)) for name in stages if is_known(name)), Need())


@dataclass(frozen=True)
class _Asked:
    """What a stage's need depends on."""

    config: Config
    batch_size: int
    card_memory: int
    work: Workload


def _knowledge(asked: _Asked) -> Need:
    config, work = asked.config, asked.work
    settings = config.knowledge
    captioner = _known(lambda: Need((_captioner(config, work),))) if settings.captioner is not None else Need()
    explainer = settings.explainer
    if explainer is None or explainer.engine == "endpoint":
        return captioner
    return captioner + _known(lambda: Need(engines=(_explainer(asked, explainer),)))


def _known(need: Callable[[], Need]) -> Need:
    """What a model needs, or that it is not known."""
    try:
        return need()
    except UnknownModelError as error:
        return Need(unknown=(str(error),))


def _captioner(config: Config, work: Workload) -> ModelNeed:
    settings = config.knowledge
    assert settings.captioner is not None
    facts = _facts(config, "knowledge.captioner", settings.captioner, "Salesforce/blip2-opt-2.7b")
    size, batch = BYTES[settings.captioner_dtype], settings.captioner_batch_size
    images = stacks.vision(facts.shape["vision_config"])
    queries = stacks.encoder(facts.shape["qformer_config"], facts.shape["num_query_tokens"])
    prompt = facts.shape["num_query_tokens"] + 2  # a start token and a newline follow the image
    language = stacks.opt(facts.shape["text_config"], prompt)
    logits = 2 * facts.shape["text_config"]["vocab_size"]
    decoding = 2 * work.caption_tokens * language.parameters
    captions = work.with_images * (1 - work.captioned)
    return _model(
        facts,
        "knowledge",
        "captioner",
        settings.captioner_dtype,
        batch,
        activations=batch * size * max(images.activations, language.activations + logits),
        kv_cache=batch * size * (prompt + _CAPTION_LIMIT) * language.kv_per_token,
        flops=captions * (images.flops + queries.flops + language.flops + decoding),
        traffic=captions * work.caption_tokens * language.parameters * size / batch,
        processed=("blip2", captions),
    )


def _explainer(asked: _Asked, settings: ExplainerConfig) -> EngineNeed:
    """A post's question follows the worked examples, whose keys and values are there; an answer is decoded token by
    token, for which the weights are read for all posts of a batch together and the keys and values for each.
    """
    work, card_memory = asked.work, asked.card_memory
    facts = _facts(asked.config, "knowledge.explainer.model", settings.model, "meta-llama/Meta-Llama-3-8B-Instruct")
    size, batch = BYTES[settings.dtype], asked.batch_size
    tokens = _vllm_tokens(card_memory)
    question = stacks.llama(facts.shape, work.question_tokens)
    context = work.examples_tokens + work.question_tokens + work.answer_tokens
    asked_about, read = 1 - work.explained, question.parameters / batch + context * question.kv_per_token
    explainer = _model(
        facts,
        "knowledge",
        "explainer",
        settings.dtype,
        batch,
        activations=size * stacks.llama(facts.shape, tokens).activations,
        kv_cache=size * settings.max_model_len * question.kv_per_token,
        flops=asked_about * (question.flops + 2 * work.answer_tokens * question.parameters),
        traffic=asked_about * work.answer_tokens * size * read,
    )
    reserved = int(settings.gpu_memory_utilization * card_memory)
    return EngineNeed("knowledge.explainer", (explainer,), reserved, settings.kv_cache_bytes)


def _vllm_tokens(card_memory: int) -> int:
    """As many as vLLM runs at once."""
    return _VLLM_TOKENS_LARGE if card_memory >= _VLLM_LARGE_CARD else _VLLM_TOKENS


def _tag(asked: _Asked) -> Need:
    config, work = asked.config, asked.work
    settings = config.tagger
    facts = _facts(config, "tagger.model", settings.model, "google-bert/bert-base-uncased")
    longest = stacks.encoder(facts.shape, settings.max_length)
    usual = stacks.encoder(facts.shape, min(settings.max_length, work.text_tokens))
    batch = math.ceil(settings.batch_tokens / settings.max_length)
    tagger = _model(
        facts,
        "tag",
        "tagger",
        settings.dtype,
        batch,
        activations=batch * BYTES[settings.dtype] * longest.activations,
        flops=usual.flops,
    )
    return Need((tagger,))


def _rerank(asked: _Asked) -> Need:
    config, work = asked.config, asked.work
    settings = config.reranker
    if settings.engine == "endpoint":
        return Need()
    facts = _facts(config, "reranker.model", settings.model, "llava-hf/llava-1.5-7b-hf")
    size = BYTES[settings.dtype]
    # Nobody is asked about an entity without an image.
    hard, with_hard = work.hard * work.with_images, work.with_hard * work.with_images
    prompt = work.prompt_tokens + (config.filter.k - USUAL_CANDIDATES) * _TOKENS_OF_A_CANDIDATE
    if settings.engine == "text":
        longest = stacks.llama(facts.shape, settings.positions(0))
        usual = stacks.llama(facts.shape, prompt + work.caption_tokens)
        reader = _model(
            facts,
            "rerank",
            "reranker",
            settings.dtype,
            settings.batch_size,
            activations=settings.batch_size * size * (longest.activations + _logits(facts.shape)),
            flops=hard * usual.flops,
            tokens=prompt + work.caption_tokens,
        )
        return Need((reader,))
    images, text = stacks.vision(facts.shape["vision_config"]), facts.shape["text_config"]
    language = partial(stacks.llama, text)
    image_tokens = images.tokens - 1
    positions = settings.positions(image_tokens)
    whole, shared = language(image_tokens + prompt), language(prompt)
    model = partial(_model, facts, "rerank", "reranker", settings.dtype)
    # A post's questions share the image's prefix.
    flops = with_hard * (images.flops + whole.flops) + (hard - with_hard) * shared.flops
    processed = ("llava", with_hard)
    if settings.engine == "transformers":
        per_request = language(positions).activations + images.activations + _logits(text)
        reranker = model(
            settings.batch_size,
            activations=settings.batch_size * size * per_request,
            flops=flops,
            measured=LLAVA_UTILISATION,
            processed=processed,
            tokens=prompt,
        )
        return Need((reranker,))
    # vLLM runs as many tokens at once as it allows, and fills what is left of its share with cached keys and values.
    at_once, again = _vllm_tokens(asked.card_memory), _asked_again(config)
    reranker = model(
        at_once // positions,
        activations=size * (language(at_once).activations + at_once / image_tokens * images.activations),
        kv_cache=size * positions * whole.kv_per_token,
        flops=flops + hard * again * 2 * whole.parameters,
        processed=processed,
        tokens=prompt + again,
    )
    adapter = _adapter(config, language(1), size)
    reserved = int(settings.gpu_memory_utilization * asked.card_memory)
    return Need(engines=(EngineNeed("reranker", (reranker, *adapter), reserved, settings.kv_cache_bytes),))


def _asked_again(config: Config) -> float:
    """Tokens that vLLM reads again for an entity: a question for each place where the candidates' spellings part, each
    with what its prefix cache, which keeps whole blocks, does not have.
    """
    if config.reranker.mode == "generate":
        return _ANSWER_TOKENS
    return config.filter.k * _QUESTIONS_OF_A_CANDIDATE * _UNCACHED_TOKENS


def _logits(text: dict[str, int]) -> int:
    """Values of the logits, and their logarithms, of a request's answers: about six tokens for each of five."""
    return 2 * 30 * text["vocab_size"]


def _adapter(config: Config, language: stacks.Stack, size: int) -> tuple[ModelNeed, ...]:
    """vLLM holds the adapter beside the weights, padded to the largest rank; transformers merges it into them."""
    settings = config.reranker
    references = settings.adapter_references
    if not references:
        return ()
    ins_and_outs = 9 * language.width + 2 * language.kv_width + 3 * language.mlp  # of the seven linear layers
    parameters = len(references) * settings.max_lora_rank * language.layers * ins_and_outs
    name = ", ".join(name.rpartition("/")[2] for name in references)
    source = f"rank {settings.max_lora_rank} on the language model's linear layers"
    weights = size * parameters
    return (ModelNeed("rerank", "reranker_adapter", name, source, parameters, settings.dtype, 0, weights, 0),)


def _ground(asked: _Asked) -> Need:
    config, work = asked.config, asked.work
    boxes = config.grounder.boxes
    need = _known(lambda: Need((_matcher(asked),)))
    if boxes.sam is not None:
        need += _known(lambda: Need((_sam(config, work),)))
    if boxes.text is not None:
        need += _known(lambda: Need((_text_segmenter(config, work),)))
    return need


def _matcher(asked: _Asked) -> ModelNeed:
    config, work = asked.config, asked.work
    settings = config.grounder.matcher
    if settings.kind != "blip":
        raise UnknownModelError(
            f"grounder.matcher.kind: the plan does not know what {settings.kind} needs, only what blip does: what its "
            "image and text encoders compute for an entity is not worked out"
        )
    facts = _facts(config, "grounder.matcher.model", settings.model, "Salesforce/blip-itm-base-coco")
    size = BYTES[settings.dtype]
    images = stacks.vision(facts.shape["vision_config"], stacks.EAGER)
    text = stacks.encoder(facts.shape["text_config"], work.query_tokens)
    depth = text.layers
    # As `trace.middle_upper_layer`, which would bring torch.
    layer = min(round(depth * 7 / 12), depth - 1) if settings.layer is None else settings.layer
    # Each layer from the traced one up keeps the image's keys and values for the gradient, beside the image itself.
    traced = (2 * (depth - layer) + 4) * images.tokens * text.width
    kept = asked.batch_size * images.tokens * images.width
    cross_attention = 4 * images.tokens * images.width * text.width * depth  # keys and values, once an image
    return _model(
        facts,
        "ground",
        "matcher",
        settings.dtype,
        settings.image_batch_size,
        activations=size * (kept + max(settings.image_batch_size * images.activations, settings.batch_size * traced)),
        flops=work.judged * (images.flops + cross_attention) + work.entities * work.with_images * text.flops,
        measured=_at_batch(MATCHER_UTILISATION, settings.image_batch_size),
        processed=("blip", work.judged),
    )


def _at_batch(measured: dict[int, float], batch: int) -> float:
    """Between the batch sizes that were measured, in proportion to their logarithms; beyond them, as at the nearest."""
    return float(np.interp(math.log(batch), [math.log(each) for each in measured], [*measured.values()]))


def _sam(config: Config, work: Workload) -> ModelNeed:
    settings = config.grounder.boxes.sam
    assert settings is not None
    facts = _facts(config, "grounder.boxes.sam.model", settings.model, "sam_vit_h_4b8939.pth")
    layers = stacks.sam_encoder(facts.shape)
    images = work.with_other_boxes if _persons_first(config) else work.with_boxes
    size = BYTES[settings.dtype]
    return _model(
        facts,
        "ground",
        "sam",
        settings.dtype,
        settings.batch_size,
        activations=settings.batch_size * size * max(stack.activations for stack in layers),
        flops=images * sum(stack.flops for stack in layers),
        measured=_at_batch(SAM_UTILISATION, settings.batch_size),
        processed=("sam", images),
    )


def _text_segmenter(config: Config, work: Workload) -> ModelNeed:
    settings = config.grounder.boxes.text
    assert settings is not None
    facts = _facts(config, "grounder.boxes.text.model", settings.model, _TEXT_LIKE[settings.kind])
    layers, extra = _text_layers(settings.kind, facts)
    prompts = work.person_prompts if _persons_first(config) else 0
    size = BYTES[settings.dtype]
    return _model(
        facts,
        "ground",
        "text_segmenter",
        settings.dtype,
        settings.batch_size,
        activations=settings.batch_size * size * (max(stack.activations for stack in layers) + extra),
        flops=prompts * sum(stack.flops for stack in layers),
        processed=(settings.kind, prompts),
    )


def _text_layers(kind: str, facts: ModelFacts) -> tuple[list[stacks.Stack], float]:
    """The layers that cost most, and values that stay beside them."""
    shape = facts.shape
    if kind == "grounding-dino":
        return stacks.grounding_dino(shape), 0
    if kind == "sam3":
        encoder = shape["vision_config"]["backbone_config"]
        # Its pyramid is 256 wide and four times finer than the patches, and about three of that size exist at once.
        finest = 4 * encoder["image_size"] // encoder["patch_size"]
        return stacks.sam3_encoder(encoder), 3 * 256 * finest**2
    images = stacks.vision(shape["vision_config"])
    return [images], images.layers * images.tokens * images.width  # the states of all layers are kept


def _persons_first(config: Config) -> bool:
    boxes = config.grounder.boxes
    return boxes.text is not None and "person" in boxes.text_first


def _facts(config: Config, key: str, reference: str, like: str) -> ModelFacts:
    return model_facts(key, reference, like, config.pipeline.built_like)


def _model(
    facts: ModelFacts,
    stage: str,
    role: str,
    dtype: str,
    batch: int,
    *,
    activations: float,
    kv_cache: float = 0,
    flops: float = 0,
    traffic: float = 0,
    measured: float | None = None,
    processed: tuple[str, float] | None = None,
    tokens: float = 0,
) -> ModelNeed:
    """`processed`: the kind of processor, and how many images of a post it takes."""
    weights = facts.parameters * BYTES[dtype]
    return ModelNeed(
        stage,
        role,
        facts.name,
        facts.source,
        facts.parameters,
        dtype,
        batch,
        weights,
        int(activations),
        int(kv_cache),
        flops,
        traffic,
        measured,
        processed[1] * image_seconds(processed[0]) if processed else 0.0,
        tokens,
    )


def is_known(stage: str) -> bool:
    """Whether the plan knows what a stage needs."""
    return stage in _NEEDS


_NEEDS: dict[str, Callable[[_Asked], Need]] = {
    "knowledge": _knowledge,
    "tag": _tag,
    "rerank": _rerank,
    "ground": _ground,
}
