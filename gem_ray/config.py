"""Everything that can be set, as one tree of checked models; presets are YAML files of the same shape."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gem_ray.pools import serving_pools
from gem_ray.redaction import redacted
from gem_ray.stages import LOAD_IMAGE, find_stage, in_order, stage_names
from gem_ray.strict import load_yaml
from gem_ray.taxonomy import LabelSetName

Probability = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
DType = Literal["float32", "bfloat16", "float16"]
M = TypeVar("M", bound=BaseModel)


def _as_ray_shares_them(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError("more than one GPU are whole ones: Ray gives nobody a card and a half")
    if 0 < gpus < 0.0001:
        raise ValueError("Ray shares a GPU out in parts of 0.0001")
    return gpus


Gpus = Annotated[float, Field(ge=0), AfterValidator(_as_ray_shares_them)]
CandidateOrder = Literal["probability", "name", "shuffled"]
ImageFit = Literal["pad", "crop"]
DEFAULT_PRESET = "nano"
_AFFECTS = "affects_output"  # the mark of a field; unmarked ones do


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, what was expected and the nearest name."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    if not TYPE_CHECKING:  # else mypy would take every name for a key

        def __setattr__(self, name: str, value: Any) -> None:
            # In place of pydantic's `validate_assignment`, which keeps what the rules about several keys refuse.
            checked = parse_settings(type(self), dict(self) | {name: value})
            super().__setattr__(name, getattr(checked, name))


def _speed(default: Any, description: str, **limits: Any) -> Any:
    """A key, or a whole section, that decides where and how fast posts are annotated, not how."""
    return Field(default, description=description, json_schema_extra={_AFFECTS: False}, **limits)


_SHARE_OF_CARD = _speed(0.5, "vLLM: share of the card's memory", gt=0, le=1)
_KV_CACHE_BYTES = _speed(
    None,
    "vLLM: size of the KV cache, which `plan --json` computes for models that share a card; null means what is left of "
    "`gpu_memory_utilization`",
)


class TextConfig(_Section):
    """What a post's text may be."""

    max_chars: PositiveInt = Field(10_000, description="longer texts are rejected")


class ImageConfig(_Section):
    """What a post's image may be, and where it may come from."""

    max_bytes: PositiveInt = Field(32 * 2**20, description="encoded size over which an image is refused")
    max_pixels: PositiveInt = Field(120_000_000, description="width × height over which an image is refused")
    max_decoding_bytes: PositiveInt = Field(
        2**30,
        description="memory for the images that a process decodes at once; an image that needs more alone is refused",
    )
    max_side: PositiveInt = Field(1024, description="decoded images are scaled down to this longer side, in pixels")
    # Absolute, because workers and later starts have other working directories.
    root: Annotated[Path, AfterValidator(Path.absolute)] | None = Field(
        None, description="folder that relative `image_uri` paths start from and may not leave"
    )
    allow_http: bool = Field(False, description="fetch `https://` image URIs")
    http_hosts: list[str] | None = Field(
        None,
        description="hosts (`host`, `host:port`) to fetch from and to be redirected to; null means any public one",
    )
    timeout_s: float = _speed(
        10, "time for one try to fetch an image; S3 is tried six times, a web server three times", gt=0
    )
    fetch_concurrency: PositiveInt = _speed(16, "images of a batch that are fetched at once")


class EndpointConfig(_Section):
    """An OpenAI-compatible chat endpoint."""

    # No default: posts go to no address that nobody wrote down.
    base_url: str | None = Field(
        None, pattern=r"^https?://", description="OpenAI-compatible endpoint, for example http://127.0.0.1:8000/v1"
    )
    model: str = Field("gpt-3.5-turbo", description="model name sent to the endpoint; for vLLM, a checkpoint")
    api_key_env: str = Field("OPENAI_API_KEY", description="environment variable that holds the key")
    api_key_header: str = _speed(
        "Authorization",
        "header of the key: a bearer token in `Authorization`, the key alone in any other, as Azure's `api-key`",
        pattern=r"^[A-Za-z0-9-]+$",
    )
    concurrency: PositiveInt = _speed(8, "questions asked at once, by each actor")
    requests_per_minute: float | None = _speed(
        None, "rate limit of each actor, evenly spaced; null means unlimited", gt=0
    )
    max_tokens: PositiveInt = Field(256, description="length of an answer")
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = _speed(
        "max_tokens", "what the endpoint calls this length; OpenAI's newer models take the latter alone"
    )
    temperature: float | None = Field(
        0,
        ge=0,
        description="of the sampling; null leaves it to the endpoint, for models that take no other than theirs",
    )
    timeout_s: float = _speed(60, "time for one try", gt=0)
    retries: int = _speed(4, "further tries when the endpoint is busy, broken, slow or gone", ge=0)
    max_pause_s: float = _speed(30, "longest pause before a retry, whatever the endpoint asks for", ge=0)


class ExplainerConfig(EndpointConfig):
    """Where auxiliary knowledge comes from (§3.2.1)."""

    engine: Literal["endpoint", "vllm"] = Field("endpoint", description="`vllm`: a model in this process, no address")
    dtype: DType = Field("float32", description="vLLM: precision of the model")
    max_model_len: PositiveInt = Field(4096, description="vLLM: tokens of question and answer; the examples take 800")
    gpu_memory_utilization: float = _SHARE_OF_CARD
    kv_cache_bytes: PositiveInt | None = _KV_CACHE_BYTES

    @model_validator(mode="after")
    def _knows_whom_to_ask(self) -> ExplainerConfig:
        if self.engine == "endpoint" and self.base_url is None:
            raise ValueError("base_url must be set, or engine must be vllm")
        if self.engine == "vllm" and self.max_tokens >= self.max_model_len:
            raise ValueError(f"max_tokens ({self.max_tokens}) leaves no room in max_model_len ({self.max_model_len})")
        return self


class KnowledgeConfig(_Section):
    """Captions and auxiliary knowledge (§3.2.1). Columns that the data brings are always used first."""

    captioner: str | None = Field(None, description="BLIP-2 checkpoint; null means no captions are made")
    captioner_batch_size: PositiveInt = _speed(8, "images in one forward pass")
    captioner_dtype: DType = Field("float32", description="precision of the captioner")
    explainer: ExplainerConfig | None = Field(None, description="null means no knowledge is asked for")
    cache: Path | None = Field(None, description="folder that keeps answers across runs")


class TaggerConfig(_Section):
    """The dual-path CRF tagger (§3.2)."""

    model: str = Field("nano:tagger", description="tagger checkpoint, as `gem-ray train tagger` writes it")
    batch_tokens: PositiveInt = _speed(8192, "subwords in one forward pass, padding included")
    max_length: PositiveInt = Field(256, description="subwords of text and knowledge together")
    dtype: DType = Field("float32", description="precision of the encoder; heads and CRFs stay in float32")
    compile: bool = _speed(False, "compile the encoder at the start: takes a minute, and needs a C++ compiler")


class FilterConfig(_Section):
    """The uncertainty filter and the reranker's candidates (§3.3.1)."""

    gamma: float = Field(
        0.2,
        ge=0,
        description="γ: entropy in nats (eq. 10) above which an entity is hard, and reranked; lower reranks more; "
        "ignored with `routing.threshold`",
    )
    max_share: Probability | None = Field(
        None, description="largest share of entities that may be hard; a run measures the γ for it and ignores `gamma`"
    )
    k: PositiveInt = Field(5, description="candidate categories; of GMNER's four, always all")


class PromiseConfig(_Section):
    """A confidence above which a precision is promised."""

    threshold: Probability | None = Field(None, description="lowest `confidence` that the promise covers")
    precision: Probability | None = Field(None, description="precision promised for the entities from `threshold` on")
    delta: Probability | None = Field(None, description="highest probability that the promise is broken")
    tagger: str | None = Field(
        None, description="the tagger (`reference@hash`) that this was measured with; any other is refused"
    )


class RoutingConfig(PromiseConfig):
    """Which entities the tagger decides alone; `gem-ray calibrate --target` writes this section."""

    threshold: Probability | None = Field(
        None, description="the tagger's `confidence` below which an entity is hard; null means that `filter` decides"
    )


class AcceptanceConfig(PromiseConfig):
    """Which entities are good enough to go unchecked; `gem-ray calibrate --accept` writes this section."""

    threshold: Probability | None = Field(
        None, description="lowest `confidence` of an `accepted` entity; null leaves `accepted` null"
    )


class RerankerEndpointConfig(EndpointConfig):
    """A model that is prompted with worked examples instead of a trained one (§5.1)."""

    max_tokens: PositiveInt = Field(16, description="length of an answer: a category's name")
    image: bool = Field(True, description="send the image; false sends the caption instead")
    hint: bool = Field(False, description="include the tagger's probabilities in the prompt")


class RerankerConfig(_Section):
    """The LLaVA reranker (§3.3.2), or another in its place (§5.1)."""

    enabled: bool = Field(True, description="false leaves hard entities with the tagger's category")
    engine: Literal["transformers", "vllm", "text", "endpoint"] = Field(
        "transformers",
        description="`text`: a language model that reads the caption; `endpoint`: an OpenAI-compatible API",
    )
    endpoint: RerankerEndpointConfig | None = Field(None, description="for the engine `endpoint`")
    model: str = Field("nano:reranker", description="LLaVA checkpoint, or the language model of engine `text`")
    adapter: str | None = Field(
        "nano:reranker-lora", description="LoRA adapter, or a name in `adapters`; null means the base model"
    )
    # Which of them is in use is part of a run's models.
    adapters: dict[str, str] = _speed({}, "adapters loaded side by side, by name")
    template: str | None = Field(
        None,
        pattern=r"\{question\}",
        description="conversation around `{question}`, image first; default: the model's own, else LLaVA-1.5's",
    )
    mode: Literal["generate", "score"] = Field(
        "score",
        description="`generate`: greedy decoding, constrained to the candidates; `score`: the candidate of the highest "
        "likelihood",
    )
    decision: Literal["calibrated", "answer"] = Field(
        "calibrated",
        description="`calibrated`: of the tagger's category and the reranker's answer, the one more probable by both, "
        "weighed by the reranker's `confidence.json`; without that file, as `answer`: the reranker decides (the paper)",
    )
    candidate_order: CandidateOrder = Field("probability", description="of the candidates in the prompt")
    batch_size: PositiveInt = _speed(16, "entities in one forward pass (transformers engine)")
    dtype: DType = Field("float32", description="precision of the model")
    image_fit: ImageFit = Field(
        "pad",
        description="LLaVA-1.5: pad images to a square, as it was trained, or crop, as its published processor does",
    )
    max_model_len: PositiveInt | None = Field(
        None,
        description="tokens of prompt, image and answer; longer ones are not reranked; default: 1,024, or 448 more "
        "than an image of `image.max_side` takes",
    )
    merge_adapter: bool | None = _speed(
        None, "vLLM: serve a copy of the model with its only adapter merged; default: only without a GPU"
    )
    max_lora_rank: PositiveInt = Field(64, description="vLLM: the largest adapter rank")
    gpu_memory_utilization: float = _SHARE_OF_CARD
    kv_cache_bytes: PositiveInt | None = _KV_CACHE_BYTES
    concurrency: PositiveInt = _speed(
        3, "vLLM: batches of posts that overlap in an actor, so that none waits for the slowest row"
    )

    @model_validator(mode="after")
    def _knows_whom_to_ask(self) -> RerankerConfig:
        if self.engine == "endpoint" and (self.endpoint is None or self.endpoint.base_url is None):
            raise ValueError("engine endpoint needs endpoint.base_url")
        return self

    def positions(self, image_tokens: int) -> int:
        """Of prompt, image and answer: `max_model_len`, or what leaves room for a text beside so large an image."""
        return self.max_model_len or max(1024, image_tokens + 448)

    @property
    def adapter_references(self) -> dict[str, str]:
        """Every adapter to load: name -> where it is."""
        alone = {self.adapter: self.adapter} if self.adapter is not None else {}
        return alone | self.adapters


class MatcherConfig(_Section):
    """BLIP matching and its Grad-CAM trace (§3.4.1, §3.4.2), or another model's in its place (§5.2)."""

    kind: Literal["blip", "blip2", "llava"] = Field("blip", description="architecture of the model")
    model: str = Field("nano:matcher", description="checkpoint of that architecture")
    batch_size: PositiveInt = _speed(32, "entities in one pass through the text encoder, at most")
    image_batch_size: PositiveInt = _speed(16, "images in one pass through the image encoder, at most")
    threshold: Probability | None = Field(
        None, description="P_T above which an entity is grounded; default: as stored with the model, else ½"
    )
    layer: int | None = Field(
        None, ge=0, description="cross-attention layer; default: as stored with the model, else the middle-upper one"
    )
    tokens: Literal["all", "inner", "words"] = Field(
        "all", description="text tokens that eq. 11 sums over: all, without the special ones, the entity's own"
    )
    target: Literal["probability", "logit"] = Field("probability", description="what eq. 11 differentiates")
    image_fit: ImageFit = Field("pad", description="kind `llava`: as `reranker.image_fit`")
    subpatch_peak: bool = Field(False, description="interpolate the peak between patches by parabolas")
    save_heatmaps: bool = Field(False, description="keep the map with each grounded entity, 8 bits a patch")
    dtype: DType = Field("float32", description="precision of the model")


class TextSegmenterConfig(_Section):
    """The text-prompted segmenter (§3.4.3)."""

    kind: Literal["clipseg", "sam3", "grounding-dino", "owlv2"] = Field(
        "clipseg", description="architecture of the model"
    )
    model: str = Field("nano:text-segmenter", description="checkpoint of that architecture")
    threshold: Probability = Field(0.5, description="score above which a pixel (CLIPSeg) or an instance is kept")
    batch_size: PositiveInt = _speed(16, "images, or pairs of image and prompt, in one forward pass")
    dtype: DType = Field("float32", description="precision of the model")


class SamConfig(_Section):
    """SAM with the peak as a point prompt (§3.4.3)."""

    model: str = Field("nano:sam", description="a model directory, or a published `sam_vit_*.pth`")
    batch_size: PositiveInt = _speed(8, "images in one pass through the image encoder")
    dtype: DType = Field("float32", description="precision of the image encoder")


class BoxConfig(_Section):
    """From the peak to a box (§3.4.3)."""

    sam: SamConfig | None = Field(default_factory=SamConfig, description="null means no SAM")
    text: TextSegmenterConfig | None = Field(
        default_factory=TextSegmenterConfig, description="null means no text-prompted segmenter"
    )
    text_first: list[str] = Field(
        default_factory=lambda: ["person"],
        description="coarse or fine categories whose text-prompted instance wins over SAM's mask",
    )
    largest_component: bool = Field(False, description="bound only the largest connected region of SAM's mask")
    sam_mask: Literal["iou", "map"] = Field(
        "iou", description="of SAM's three masks: that of the highest predicted IoU, or the one most like the map"
    )
    min_sam_score: float = Field(
        0.0, ge=0, le=1, description="SAM's predicted IoU below which a text-prompted instance at the peak wins"
    )
    refine_boxes: bool = Field(False, description="tighten a detector's boxes around what SAM cuts out of them")


class GrounderConfig(_Section):
    """Matching, tracing and boxes (§3.4)."""

    enabled: bool = Field(True, description="false leaves `seen` null, and makes no boxes")
    matcher: MatcherConfig = Field(default_factory=MatcherConfig)
    boxes: BoxConfig = Field(default_factory=BoxConfig)


class _Pool(_Section):
    """Consecutive stages that share processes."""

    stages: list[str] = Field(
        min_length=1,
        description="in order; a stage that no pool lists shares the pool of the next one that is listed, or the last, "
        f"and `{LOAD_IMAGE}` runs in every pool that looks at images",
    )
    batch_size: PositiveInt = Field(64, description="posts that a process works on at a time")
    threads: PositiveInt = Field(1, description="CPU threads of torch in each process")

    @field_validator("stages")
    @classmethod
    def _are_stages(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in stage_names():
                raise ValueError(f"there is no stage {name!r}; {nearest(name, list(stage_names()))}")
        if names != in_order(names):
            raise ValueError(f"stages come once and in order: {', '.join(in_order(names))}")
        return names


class StagePool(_Pool):
    """Stages that share actors, which keep their models loaded."""

    num_cpus: float = Field(1, gt=0, description="CPUs each actor reserves")
    num_gpus: Gpus = Field(0, description="GPUs each actor reserves; fractions share a card")
    min_actors: PositiveInt = Field(1, description="fewest actors")
    max_actors: PositiveInt | None = Field(1, description="null means as many as CPUs and GPUs allow")
    pass_number: PositiveInt = Field(
        1, description="pools of one number run together; those of the next start when a group of posts is through"
    )

    @model_validator(mode="after")
    def _is_a_range(self) -> StagePool:
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ValueError(f"max_actors ({self.max_actors}) is below min_actors ({self.min_actors})")
        return self


P = TypeVar("P", bound=_Pool)


def _of_one_pool(given: Any) -> Any:
    """A mapping that changes some pools, where there is no list that it could change: of the one that is there then."""
    return _merge_pools([{"stages": _all_stages()}], given) if isinstance(given, Mapping) else given


def _consecutive(pools: list[P]) -> list[P]:
    """Every stage in one pool, and the pools in the order of the stages; `load_image` may be in several."""
    listed = [name for pool in pools for name in pool.stages if name != LOAD_IMAGE]
    if listed != in_order(listed):
        raise ValueError(f"together the pools must list stages once and in order: {', '.join(in_order(listed))}")
    return pools


def _all_stages() -> list[str]:
    return [name for name in stage_names() if find_stage(name).has_model]


class PipelineConfig(_Section):
    """The Ray Data graph."""

    rows_per_block: PositiveInt | None = Field(
        None,
        description="posts in a block, the unit of streaming and of resuming; default: 64 where a stage looks at "
        "images or asks a language model, else 64 to 512, more for longer inputs",
    )
    rows_per_group: PositiveInt = Field(1_000_000, description="posts that are published together")
    pools: Annotated[list[StagePool], Field(min_length=1)] = Field(
        default_factory=lambda: [StagePool(stages=_all_stages())],
        description="which stages share processes, and what those reserve; `--set pipeline.pools.ground.num_gpus=1` "
        "sets a key of the pool with that stage",
    )
    built_like: dict[str, str] = Field(
        default_factory=dict,
        description="for `plan`, of models that are not there yet: reference -> published model of the same shape",
    )

    _are_listed = field_validator("pools", mode="before")(_of_one_pool)

    @field_validator("pools")
    @classmethod
    def _are_consecutive(cls, pools: list[StagePool]) -> list[StagePool]:
        numbers = [pool.pass_number for pool in pools]
        if numbers != sorted(numbers):
            raise ValueError("pass_number must not fall from one pool to the next")
        return _consecutive(pools)


class ReplicaPlacement(_Section):
    """A deployment of Ray Serve: what each replica reserves, and how many there are."""

    num_cpus: float = Field(1, ge=0, description="CPUs each replica reserves")
    num_gpus: Gpus = Field(0, description="GPUs each replica reserves; fractions share a card")
    min_replicas: PositiveInt = Field(1, description="fewest replicas")
    max_replicas: PositiveInt = Field(1, description="most replicas")
    target_ongoing: float = Field(16, gt=0, description="concurrent requests per replica that autoscaling aims at")

    @model_validator(mode="after")
    def _is_a_range(self) -> ReplicaPlacement:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) is below min_replicas ({self.min_replicas})")
        return self


class IngressReplicas(ReplicaPlacement):
    """The deployment that answers HTTP."""

    num_cpus: float = Field(0.5, ge=0, description="CPUs each replica reserves")
    target_ongoing: float = Field(32, gt=0, description="concurrent requests per replica that autoscaling aims at")


class ReplicaPool(_Pool, ReplicaPlacement):
    """The deployment of stages that share replicas."""

    batch_size: PositiveInt = Field(16, description="posts in a batch; those that wait at the same time share one")


class ServingConfig(_Section):
    """The online service: its limits, and its deployments."""

    api_keys_file: Path | None = Field(
        None, description="file with a line for each API key: its SHA-256 in hex, and a name if you like"
    )
    api_keys_env: str = Field(
        "GEM_RAY_API_KEYS", description="environment variable with such hashes, in addition to the file"
    )
    max_body_bytes: PositiveInt = Field(24 * 2**20, description="size of a request's body")
    max_bodies_bytes: PositiveInt = Field(
        256 * 2**20,
        description="size of all bodies that an ingress replica holds at once, three quarters of it for one API key or "
        "host; above that it answers 429",
    )
    body_timeout_s: float = Field(
        5, gt=0, description="time for a body to arrive after its first 64 KiB; `min_body_rate` adds to it"
    )
    min_body_rate: PositiveInt = Field(
        64 * 2**10,
        description="bytes per second with which a body must keep up; it may fall behind by `body_timeout_s`",
    )
    max_image_pixels: PositiveInt = Field(
        25_000_000,
        description="width × height over which a request's image is refused; `image.max_pixels` applies too",
    )
    max_batch_posts: PositiveInt = Field(32, description="posts of a batch request")
    max_in_flight: PositiveInt = Field(64, description="posts in each ingress replica, above which it answers 429")
    max_in_flight_per_key: PositiveInt | None = Field(
        None,
        description="posts of one API key in each ingress replica; default: if there are several keys, "
        "three quarters of `max_in_flight`, and at least a batch",
    )
    retry_after_s: PositiveInt = Field(1, description="least `Retry-After` of a 429 or 503")
    access_log: Path | None = Field(
        None, description="file to which an ingress replica appends a line for each request"
    )
    timeout_s: float = Field(60, gt=0, description="time for a post")
    image_hosts: list[str] = Field(
        default_factory=list, description="hosts from which `image_url` is fetched; empty: image URLs are refused"
    )
    stage_calls: PositiveInt | None = Field(
        1,
        description="concurrent calls of an ingress replica to each replica that a stage may have; posts that arrive "
        "meanwhile share the next call; null means unlimited, for many ingress replicas",
    )
    linger_s: float = Field(
        0.1,
        ge=0,
        description="how long a call that is less than half full waits for more posts, while the ingress replica holds "
        "more posts than a batch; with fewer, calls do not wait",
    )
    drain_s: float = Field(30, ge=0, description="time a stopping replica has to finish its requests")
    health_check_s: float = Field(5, gt=0, description="time between two health checks of a replica")
    ingress: IngressReplicas = Field(default_factory=IngressReplicas)
    pools: Annotated[list[ReplicaPool], Field(min_length=1)] = Field(
        default_factory=lambda: [ReplicaPool(stages=_all_stages())],
        description="which stages share a deployment; stages before the first model run in the ingress",
    )

    _are_listed = field_validator("pools", mode="before")(_of_one_pool)

    @field_validator("pools")
    @classmethod
    def _are_consecutive(cls, pools: list[ReplicaPool]) -> list[ReplicaPool]:
        return _consecutive(pools)

    @property
    def places_of_a_key(self) -> int:
        """Posts of one API key in each ingress replica."""
        return self.max_in_flight_per_key or max(self.max_batch_posts, self.max_in_flight * 3 // 4)

    @property
    def bytes_of_a_key(self) -> int:
        """Size of the bodies of one API key, or of one host, that an ingress replica holds at once."""
        return max(self.max_body_bytes, self.max_bodies_bytes * 3 // 4)

    @model_validator(mode="after")
    def _admits_a_batch(self) -> ServingConfig:
        if self.max_batch_posts > self.max_in_flight:
            raise ValueError(f"max_batch_posts ({self.max_batch_posts}) is above max_in_flight ({self.max_in_flight})")
        return self

    @model_validator(mode="after")
    def _holds_a_body(self) -> ServingConfig:
        if self.max_body_bytes > self.max_bodies_bytes:
            raise ValueError(
                f"max_body_bytes ({self.max_body_bytes}) is above max_bodies_bytes ({self.max_bodies_bytes})"
            )
        return self


class Config(_Section):
    """The whole system. `gem-ray annotate --set filter.gamma=0.3` sets one key."""

    labels: LabelSetName = Field("fmnerg", description="label set: FMNERG's 51 fine categories, or the four of GMNER")
    device: str = _speed("auto", "`auto`, `cpu`, `cuda`, `cuda:1`")
    text: TextConfig = Field(default_factory=TextConfig)
    image: ImageConfig = Field(default_factory=ImageConfig)
    knowledge: KnowledgeConfig = Field(default_factory=KnowledgeConfig)
    tagger: TaggerConfig = Field(default_factory=TaggerConfig)
    filter: FilterConfig = Field(default_factory=FilterConfig)
    routing: RoutingConfig = Field(default_factory=RoutingConfig)
    acceptance: AcceptanceConfig = Field(default_factory=AcceptanceConfig)
    reranker: RerankerConfig = Field(default_factory=RerankerConfig)
    grounder: GrounderConfig = Field(default_factory=GrounderConfig)
    pipeline: PipelineConfig = Field(default_factory=PipelineConfig, json_schema_extra={_AFFECTS: False})
    serving: ServingConfig = Field(default_factory=ServingConfig, json_schema_extra={_AFFECTS: False})

    @property
    def online_image(self) -> ImageConfig:
        """Limits of images that come with requests: a person waits for the answer, and strangers send them."""
        pixels = min(self.image.max_pixels, self.serving.max_image_pixels)
        return self.image.model_copy(update={"max_pixels": pixels})

    def public(self) -> dict[str, Any]:
        """The tree to store and show: credentials are cut out."""
        return redacted(self.model_dump(mode="json"))

    def checked(self) -> Config:
        """A copy that is known to be right: sections know nothing of one another, nor of what is put into their lists.

        Raises:
            ConfigError: as `parse_settings`.
        """
        return parse_config(self.model_dump(warnings=False))

    @model_validator(mode="after")
    def _routes_one_way(self) -> Config:
        if self.routing.threshold is not None and self.filter.max_share is not None:
            raise ValueError("routing.threshold and filter.max_share both say which entities are hard: set one of them")
        return self

    @model_validator(mode="after")
    def _can_scale(self) -> Config:
        """Autoscaling goes by the calls that a pool has at once, of which an ingress makes only so many."""
        serving = self.serving
        for each in serving_pools(self)[1]:
            pool = each.placement
            if each.overlapping(self) > 1:
                continue  # its engine is asked without a limit
            if serving.stage_calls is None or pool.max_replicas == pool.min_replicas:
                continue
            calls = serving.stage_calls * pool.max_replicas * serving.ingress.max_replicas
            aim = pool.target_ongoing * pool.min_replicas
            if calls <= aim:
                raise ValueError(
                    f"the pool of {', '.join(pool.stages)} in serving.pools would never have more than min_replicas: "
                    f"the ingress makes {calls} calls at once, and target_ongoing (target_ongoing_requests in a Serve "
                    f"config) allows {aim:g}; lower it, or set serving.stage_calls to null"
                )
        return self


def affecting(values: Mapping[str, Any], kind: type[BaseModel] = Config) -> dict[str, Any]:
    """The part of a configuration that decides the annotations: the tree without the keys that are marked otherwise.

    Args:
        values: as `Config.public` gives them, or as an earlier version did.
        kind: whose fields they are.
    """
    kept = {}
    for name, value in values.items():
        field = kind.model_fields.get(name)
        if field is None:  # of an earlier version
            kept[name] = value
        elif (field.json_schema_extra or {}).get(_AFFECTS, True):  # type: ignore[union-attr]
            section = section_type(field.annotation)
            kept[name] = affecting(value, section) if section and isinstance(value, Mapping) else value
    return kept


def preset_names() -> list[str]:
    """The presets that come with the package."""
    folder = resources.files("gem_ray") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(
    preset: str = DEFAULT_PRESET, file: Path | str | None = None, overrides: Iterable[str] = (), **sections: Any
) -> Config:
    """A preset, then a YAML file over it, then `key.path=value` overrides, then keyword sections.

    A list of pools may be given whole, or as a mapping that changes some: `pools: {ground: {num_gpus: 1}}`.

    Raises:
        ConfigError: an unknown preset, a file without a mapping, an unknown key or a value of the wrong kind.
    """
    if preset not in preset_names():
        raise ConfigError(f"unknown preset {preset!r}; {nearest(preset, preset_names())}")
    values = _read_mapping(resources.files("gem_ray") / "presets" / f"{preset}.yaml")
    if file is not None:
        if not (path := Path(file)).is_file():
            raise ConfigError(f"there is no config file {file}")
        values = merge_trees(values, _read_mapping(path))
    for override in (overrides,) if isinstance(overrides, str) else overrides:
        values = merge_trees(values, parse_override(override))
    return parse_config(merge_trees(values, sections))


def parse_config(values: Mapping[str, Any]) -> Config:
    """Check a mapping against the tree.

    Raises:
        ConfigError: as `parse_settings`.
    """
    return parse_settings(Config, values)


def parse_settings(kind: type[M], values: Mapping[str, Any]) -> M:
    """Check a mapping against a tree of settings: the configuration, or a training's recipe.

    Raises:
        ConfigError: with a line for every key that is unknown or wrong.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(kind, dict(item)) for item in error.errors())) from None


def _read_mapping(file: Any) -> dict[str, Any]:
    try:
        values = load_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold a mapping, not {type(values).__name__}")
    return values


def parse_override(override: str) -> dict[str, Any]:
    """The tree that holds the one leaf of a `key.path=value` override.

    Raises:
        ConfigError: it is none.
    """
    path, equals, value = override.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys) or "://" in path:
        raise ConfigError(f"--set takes key.path=value, not {redacted(override)!r}")
    nested = parse_value(override, value)
    for key in reversed(keys):
        nested = {key: nested}
    return nested


def parse_value(override: str, value: str) -> Any:
    """The value of a `key=value` override.

    Raises:
        ConfigError: it is no YAML.
    """
    try:
        return load_yaml(value)
    except yaml.YAMLError:
        raise ConfigError(
            f"--set {redacted(override)}: what follows the = is not a YAML value; quote it if it is meant as text"
        ) from None


def merge_trees(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A tree with the leaves of another put over it."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = merge_trees(below, value)
        elif isinstance(value, Mapping) and isinstance(below, list) and key == "pools":
            merged[key] = _merge_pools(below, value)
        else:
            merged[key] = value
    return merged


def _merge_pools(pools: list[Any], over: Mapping[Any, Any]) -> list[Any]:
    """Pools with keys of some of them put over: each is named by one of its stages, or by its place from 0.

    Raises:
        ConfigError: there is no such pool.
    """
    merged = list(pools)
    for name, values in over.items():
        places = [place for place, pool in enumerate(pools) if str(name) in (str(place), *_stages(pool))]
        if not places:
            listed = "; ".join(", ".join(_stages(pool)) for pool in pools)
            raise ConfigError(f"no pool lists the stage {name!r}; the pools are {listed}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"pools.{name} is a pool, of which keys can be set, as pools.{name}.batch_size")
        for place in places:
            merged[place] = merge_trees(merged[place], values) if isinstance(merged[place], Mapping) else merged[place]
    return merged


def _stages(pool: Any) -> list[str]:
    """What a pool lists, as it was given; nothing where that is wrong, and will be refused."""
    names = pool.get("stages") if isinstance(pool, Mapping) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def _explain(kind: type[BaseModel], error: dict[str, Any]) -> str:
    path = [str(part) for part in error["loc"]]
    message = f"{error['msg']} (got {_under(path, error['input'])!r})"
    if error["type"] == "extra_forbidden":
        message = f"no such key; {nearest(path[-1], _keys_at(kind, path[:-1]))}"
    elif error["type"] == "missing":
        message = "must be set"
    elif error["type"] == "value_error":  # raised by a section about several keys at once
        message = str(error["ctx"]["error"])
    return redacted(": ".join([".".join(path), message] if path else [message]))


def _under(path: list[str], value: Any) -> Any:
    """What was given for a key, as it may be shown."""
    *_, shown = redacted({path[-1] if path else "": value}).values()
    return shown


def _keys_at(kind: type[BaseModel], path: list[str]) -> list[str]:
    section = kind
    for part in path:
        if part in section.model_fields:
            section = section_type(section.model_fields[part].annotation) or section
    return list(section.model_fields)


def section_type(annotation: Any) -> type[BaseModel] | None:
    """The model of a field that is a section, a list of sections, or one of these or None; None for other fields."""
    if get_origin(annotation) is list:
        (annotation,) = get_args(annotation)
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def nearest(name: str, known: list[str]) -> str:
    """For a message about an unknown name: the nearest one, and all that there are."""
    close = difflib.get_close_matches(name, known, n=1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}expected one of {', '.join(known)}"
