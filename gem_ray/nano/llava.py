"""The embedded reranker's recipe: a small LLaVA learns to see, to answer, and to answer as the reranker asks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from gem_ray.config import ImageConfig, load_config
from gem_ray.data.emblems import EMBLEMS
from gem_ray.data.generated import Scene, generate, make_scene
from gem_ray.data.images import decode_image
from gem_ray.nano.fit import Fitting, batched, fit
from gem_ray.nano.llava_model import build_llava
from gem_ray.records import GoldEntity, Post
from gem_ray.rerank.candidates import training_candidates
from gem_ray.rerank.engine import Choice, Request
from gem_ray.rerank.engine_transformers import TransformersEngine
from gem_ray.rerank.llava import image_features, load_llava, pixel_values, save_llava
from gem_ray.rerank.prompts import INSTRUCTION, build_prompt
from gem_ray.rerank.recipe import RerankerTraining, load_reranker_recipe
from gem_ray.rerank.samples import SampleEncoder, TrainingSample
from gem_ray.rerank.tokenizer import train_tokenizer
from gem_ray.rerank.train_reranker import answer_loss, train_reranker
from gem_ray.taxonomy import FMNERG, GMNER
from gem_ray.training import OnLoss

_K = 5
_VOCABULARY = 1536  # tokens
_MOST_EMBLEMS = 4  # in a scene of the first step
# (a form of a name, its bearer's category) -> the category of the other bearer.
_NAMESAKES = {
    (surface, emblem.fine): other.fine
    for emblem in EMBLEMS
    for other in EMBLEMS
    if other.name == emblem.name and other != emblem
    for surface in emblem.surfaces
}
_P_PLAIN_LEFT_OUT = 0.6  # share of mentions of unshared names not asked about in the second step: text alone tells them
_COVERED = 0.2  # share of a patch that an emblem covers for the patch to be called by its name


@dataclass(frozen=True)
class LlavaRecipe:
    """How the small LLaVA is trained, in three steps: see, answer, and answer as the reranker asks.

    Args:
        posts: generated for the second and third step.
        scenes: drawn for the first step.
        scene_steps: optimizer steps of the first step.
        scene_batch: scenes in each.
        scene_rate: its highest learning rate.
        answer_steps: optimizer steps of the second step.
        answer_batch: questions in each.
        answer_rate: its highest learning rate.
        adapter: the third step.
        fresh_posts: on which the result is measured.
        report_every: steps between reports.
    """

    posts: int = 3_000
    scenes: int = 4_000
    scene_steps: int = 1_600
    scene_batch: int = 24
    scene_rate: float = 1.5e-3
    answer_steps: int = 600
    answer_batch: int = 48
    answer_rate: float = 1e-3
    adapter: RerankerTraining = field(default_factory=lambda: load_reranker_recipe("nano"))
    fresh_posts: int = 400
    report_every: int = 20


def build(weights: Path, seed: int, tweets: Path) -> dict[str, Any]:
    """Train the embedded reranker into `weights/reranker` and `weights/reranker-lora`; the `tweets` have no images."""
    return train(weights / "reranker", weights / "reranker-lora", seed)


def train(
    out: Path, adapter_out: Path, seed: int, recipe: LlavaRecipe | None = None, report: Callable[[str], None] = print
) -> dict[str, Any]:
    """Train the embedded reranker from scratch and measure it on fresh posts.

    Args:
        out: the LLaVA checkpoint to write.
        adapter_out: the adapter to write.
        seed: of weights, posts and order.
        recipe: how long.
        report: called with a line of progress now and then.

    Returns:
        The accuracies of `measure`, with the adapter and without it (`base_…`).
    """
    recipe = recipe or LlavaRecipe()
    # Seeds from 10,000 on are for training; the demo and the tests use lower ones.
    posts = list(generate(recipe.posts, 10_000 + seed))
    report(f"reranker: {recipe.posts} posts generated")
    build_llava(out, train_tokenizer(_texts(posts), _VOCABULARY), seed=seed)
    model, processor = load_llava(out), LlavaProcessor.from_pretrained(out)
    learn_to_see(model, processor, recipe, seed, report)
    learn_to_answer(model, processor, posts, recipe, seed, report)
    save_llava(model.half(), processor, out)
    result = train_reranker(
        posts,
        str(out),
        adapter_out,
        recipe.adapter,
        candidates=few_or_many_candidates,
        report=lambda step, loss: report(f"reranker, adapter: step {step}, loss {loss:.3f}"),
    )
    _halve(adapter_out / "adapter_model.safetensors")
    fresh = list(generate(recipe.fresh_posts, 20_000 + seed))
    result |= measure(fresh, out, adapter_out)
    result |= {f"base_{name}": value for name, value in measure(fresh, out, None).items()}
    report(f"reranker: {result}")
    return result


def learn_to_see(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    recipe: LlavaRecipe,
    seed: int,
    report: Callable[[str], None],
) -> None:
    """Teach vision tower and projector to say of each patch which emblem is there, in the words of the language model.

    It stands for what CLIP's pretraining and LLaVA's alignment do on hundreds of millions of images: a patch's feature
    comes to point where the language model's embeddings of the emblem's name and category point.
    """
    vision = model.config.vision_config
    rng = np.random.default_rng(seed)
    looks = [_look(make_random_scene(rng), vision.image_size, vision.patch_size) for _ in range(recipe.scenes)]
    report(f"reranker: {recipe.scenes} scenes drawn")
    words = _emblem_directions(model, processor)  # (E, D)

    def loss(batch: list[Look]) -> torch.Tensor:
        features = image_features(model, pixel_values(processor, [look.pixels for look in batch], "pad"))  # (I, P, D)
        # Where there is no emblem, a feature points nowhere; the constant is what it has to exceed to mean one.
        logits = F.pad(features @ words.T, (0, 1), value=2.0)  # (I, P, E + 1)
        emblems = torch.from_numpy(np.stack([look.emblems.flatten() for look in batch]))  # (I, P)
        # Every emblem of a scene counts the same, however few patches it covers, and so does the background.
        patches = F.one_hot(emblems, len(EMBLEMS) + 1).sum(dim=1)  # (I, E + 1)
        weights = 1 / patches.gather(1, emblems)  # (I, P)
        return (weights * F.cross_entropy(logits.mT, emblems, reduction="none")).sum() / weights.sum()

    weights = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    settings = _settings(recipe.scene_rate, recipe.report_every)
    batches = batched(_endless(looks, random.Random(seed)), recipe.scene_batch)
    fit(loss, batches, weights, recipe.scene_steps, settings, _reporter(report, "sight"))


def learn_to_answer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    posts: Sequence[Post],
    recipe: LlavaRecipe,
    seed: int,
    report: Callable[[str], None],
) -> None:
    """Teach the language model to choose categories, asked in few words: Table 7's instruction is left to the adapter.

    As in LLaVA's own recipe, the vision tower stays as it is; here the projector does too.
    """
    encoder = SampleEncoder(model, processor)

    def loss(samples: list[TrainingSample]) -> torch.Tensor:
        batch = encoder.collate(samples)
        return answer_loss(model(**batch), batch["labels"])

    batches = batched(_questions(posts, encoder, random.Random(seed)), recipe.answer_batch)
    settings = _settings(recipe.answer_rate, recipe.report_every)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    fit(loss, batches, model.parameters(), recipe.answer_steps, settings, _reporter(report, "answers"))


def few_or_many_candidates(post: Post, gold: GoldEntity, rng: random.Random) -> list[str]:
    """Two to five: who has only ever chosen among five answers out of turn when there are two."""
    return confusable_candidates(post, gold, rng, rng.randint(2, _K))


def confusable_candidates(post: Post, gold: GoldEntity, rng: random.Random, k: int = _K) -> list[str]:
    """The paper's training candidates; for a name that two entities share, both senses and siblings of either.

    The tagger offers both senses of such a name, and its other candidates do not tell which one is right: with siblings
    of the gold category only they would, and the image would not be looked at.
    """
    namesake = _NAMESAKES.get((_surface(post, gold), gold.fine))
    if namesake is None:
        return training_candidates(gold.fine, FMNERG, k, rng)
    senses = {gold.fine, namesake}
    near = {sibling for sense in senses for sibling in FMNERG.siblings(sense)} - senses
    return rng.sample(chosen := sorted(senses) + rng.sample(sorted(near), k - 2), len(chosen))


def measure(posts: Sequence[Post], model: Path, adapter: Path | None) -> dict[str, float]:
    """How often the reranker finds the gold category among five.

    Args:
        posts: generated, and not trained on.
        model: the LLaVA checkpoint.
        adapter: its adapter, or none.

    Returns:
        `accuracy` over all mentions; `ambiguous_accuracy` over those of a shared name whose bearer is in the image.
    """
    names = {"model": str(model), "adapter": str(adapter) if adapter else None}
    engine = TransformersEngine.from_config(load_config(reranker=names))
    rng = random.Random(0)
    requests, golds, ambiguous = [], [], []
    for post in posts:
        image = _image(post)
        for gold in post.gold or ():
            candidates = tuple(confusable_candidates(post, gold, rng))
            prompt = build_prompt(post.tokens, gold.word_start, gold.word_end, candidates)
            requests.append(Request(image, prompt, candidates))
            golds.append(gold.fine)
            ambiguous.append(bool(gold.boxes) and (_surface(post, gold), gold.fine) in _NAMESAKES)
    answers = engine.choose(requests, "score")
    right = np.array(
        [
            isinstance(answer, Choice) and request.choices[answer.index] == gold
            for answer, request, gold in zip(answers, requests, golds, strict=True)
        ]
    )
    return {"accuracy": float(right.mean()), "ambiguous_accuracy": float(right[np.array(ambiguous)].mean())}


def make_random_scene(rng: np.random.Generator) -> Scene:
    """A scene with one to four different emblems."""
    count = int(rng.integers(1, _MOST_EMBLEMS + 1))
    return make_scene(rng, [EMBLEMS[index] for index in rng.choice(len(EMBLEMS), count, replace=False)])


@dataclass(frozen=True)
class Look:
    """A scene as the vision tower gets it: `(S, S, 3)` uint8, and which emblem covers each patch, a square of indices.

    Patches without an emblem hold `len(EMBLEMS)`.
    """

    pixels: np.ndarray
    emblems: np.ndarray

    def mirrored(self) -> Look:
        """The same scene, left and right exchanged: emblems stay what they are."""
        return Look(np.ascontiguousarray(self.pixels[:, ::-1]), self.emblems[:, ::-1])


def _look(scene: Scene, image_size: int, patch_size: int) -> Look:
    side = image_size // patch_size
    emblems = np.full((side, side), len(EMBLEMS))
    for instance in scene.instances:
        mask = torch.from_numpy(instance.mask)[None].float()  # (1, H, W)
        covered = F.adaptive_avg_pool2d(mask, side)[0].numpy()  # (side, side)
        emblems[covered > _COVERED] = EMBLEMS.index(instance.emblem)
    square = Image.fromarray(scene.pixels).resize((image_size, image_size), Image.Resampling.BILINEAR)
    return Look(np.array(square), emblems)


def _endless(looks: Sequence[Look], rng: random.Random) -> Iterator[Look]:
    while True:
        for look in rng.sample(looks, len(looks)):
            yield look.mirrored() if rng.random() < 0.5 else look


def _emblem_directions(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> torch.Tensor:
    """`(E, D)`: where the language model's embeddings of each emblem's name and category point, together."""
    table = model.get_input_embeddings().weight.detach()

    def direction(text: str) -> torch.Tensor:
        ids = processor.tokenizer.encode(text, add_special_tokens=False)
        return F.normalize(table[ids].mean(dim=0), dim=0)

    return torch.stack([direction(f" {emblem.name}") + direction(emblem.fine) for emblem in EMBLEMS])


def _questions(posts: Sequence[Post], encoder: SampleEncoder, rng: random.Random) -> Iterator[TrainingSample]:
    """Without end; those about one post are adjacent."""
    while True:
        for post in rng.sample(posts, len(posts)):
            image = _image(post)
            for gold in post.gold or ():
                if (_surface(post, gold), gold.fine) not in _NAMESAKES and rng.random() < _P_PLAIN_LEFT_OUT:
                    continue
                candidates = confusable_candidates(post, gold, rng)
                prompt = build_prompt(post.tokens, gold.word_start, gold.word_end, candidates)
                if sample := encoder.sample(image, prompt.replace(f"{INSTRUCTION}\n", ""), gold.fine):
                    yield sample


def _surface(post: Post, gold: GoldEntity) -> str:
    return " ".join(post.tokens[gold.word_start : gold.word_end])


def _image(post: Post) -> np.ndarray:
    assert post.image_bytes is not None  # generated posts have one
    return decode_image(post.image_bytes, ImageConfig()).pixels


def _texts(posts: Sequence[Post]) -> Iterator[str]:
    """What the tokenizer should write in few tokens: prompts and answers."""
    rng = random.Random(0)
    for post in posts:
        for gold in post.gold or ():
            yield build_prompt(post.tokens, gold.word_start, gold.word_end, rng.sample(FMNERG.fine, _K))
            yield f" {gold.fine}"
    yield from (f" {fine}" for labels in (FMNERG, GMNER) for fine in labels.fine for _ in range(50))


def _settings(rate: float, report_every: int) -> Fitting:
    return Fitting(learning_rate=rate, warmup=0.1, weight_decay=0.01, report_every=report_every)


def _reporter(report: Callable[[str], None], step_name: str) -> OnLoss:
    return lambda step, loss: report(f"reranker, {step_name}: step {step}, loss {loss:.3f}")


def _halve(file: Path) -> None:
    """Store weights in half precision."""
    save_file({name: weight.half() for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})
