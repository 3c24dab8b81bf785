"""The embedded matcher: a tiny BLIP that learns the generated corpus's emblems from presence alone, without boxes."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertTokenizer, BlipForImageTextRetrieval

from gem_ray.data.emblems import EMBLEMS, Emblem
from gem_ray.data.generated import Scene, make_scene
from gem_ray.grounding.blip import encode_images
from gem_ray.grounding.matcher import ImageProcessor, Match, Matcher, Query, TextProcessor, resize_square
from gem_ray.grounding.trace import peak
from gem_ray.nano.tiny_blip import BlipSize, build_blip, match_logits, neighbours
from gem_ray.taxonomy import LABEL_SETS

Report = Callable[[str], None]

_STRANGERS = 256  # made-up names that no image shows


@dataclass(frozen=True)
class BlipRecipe:
    """How the tiny BLIP is trained: first what an image shows, then whether it shows what a name means.

    Args:
        size: dimensions of the model.
        scenes: images rendered ahead, from which batches are drawn.
        images: a batch.
        names: asked of each image: all that are present, those easily confused with them, a stranger, and random
            absent ones.
        warm_up_steps: of the image encoder alone.
        warm_up_rate: its highest learning rate.
        steps: of image–text matching.
        rate: its highest learning rate.
        present_weight: of present names in the losses, as most names asked are absent.
        looking_weight: of a loss that asks the first cross-attention to look at image patches for present names and at
            the class patch for absent ones. It says nothing of where, but names are found sooner and better with it.
            Higher layers could meet it anywhere: their queries know from the first one whether the name is present.
        fresh_scenes: on which the result is measured.
        processes: that render.
    """

    size: BlipSize = field(default_factory=BlipSize)
    scenes: int = 10_000
    images: int = 32
    names: int = 16
    warm_up_steps: int = 700
    warm_up_rate: float = 2e-3
    steps: int = 4_500
    rate: float = 1e-3
    present_weight: float = 4.0
    looking_weight: float = 0.5
    fresh_scenes: int = 300
    processes: int = 2


@dataclass(frozen=True)
class Scenes:
    """Rendered scenes: `squares` `(N, S, S, 3)` uint8, and `shows` `(N, E)` bool, which emblems each one shows."""

    squares: np.ndarray
    shows: np.ndarray


@dataclass(frozen=True)
class NameBank:
    """Tokenised queries for every emblem and for strangers.

    `input_ids` and `attention_mask` are `(R, T)`; `rows[e]` are the rows of emblem e, one for each way to write its
    name; the rows from `strangers` on are names that no image shows.
    """

    input_ids: Tensor
    attention_mask: Tensor
    rows: tuple[tuple[int, ...], ...]
    strangers: int


def build(weights: Path, seed: int, tweets: Path) -> dict[str, Any]:
    """Train the embedded matcher into `weights/matcher`; `tweets`, which others learn from, have no images."""
    return train(weights / "matcher", seed)


def train(out: Path, seed: int, recipe: BlipRecipe | None = None, report: Report = print) -> dict[str, Any]:
    """Train the embedded matcher from scratch and measure it on fresh scenes.

    Args:
        out: Hugging Face directory to write.
        seed: of weights, scenes and batches.
        recipe: how long, how large.
        report: called with a line of progress now and then.

    Returns:
        `balanced_accuracy`, `namesake_accuracy` and `peak_in_box`, a share for each cross-attention layer.
    """
    recipe = recipe or BlipRecipe()
    torch.manual_seed(seed)
    build_blip(out, [query.text for queries in _emblem_queries() for query in queries], recipe.size)
    model = BlipForImageTextRetrieval.from_pretrained(out)
    images = ImageProcessor.from_pretrained(out)
    bank = name_bank(TextProcessor(BertTokenizer.from_pretrained(out), model.config.text_config.vocab_size), seed)
    scenes = render_scenes(recipe.scenes, seed, recipe.size.image_side, recipe.processes)
    report(f"matcher: {recipe.scenes} scenes rendered")
    trainer = Trainer(model, images, bank, scenes, recipe, np.random.default_rng(seed), report)
    trainer.warm_up()
    trainer.fit_matching()
    model.save_pretrained(out)
    result = measure(model, out, recipe.fresh_scenes, seed + 1)
    report(f"matcher: {result}")
    return result


def render_scenes(count: int, seed: int, side: int, processes: int) -> Scenes:
    """Render scenes of none to four emblems, often with one whose name is ambiguous, in worker processes."""
    jobs = [(seed, index, side) for index in range(count)]
    # Workers start afresh: a fork of a process that has run torch may hang.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        rendered = pool.starmap(render_scene, jobs, chunksize=64)
    return Scenes(np.stack([square for square, _ in rendered]), np.stack([shows for _, shows in rendered]))


def render_scene(seed: int, index: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """One scene of `Scenes`: a function of seed and index."""
    rng = np.random.default_rng([seed, index])
    scene = make_scene(rng, _pick_emblems(rng))
    shown = {instance.emblem for instance in scene.instances}
    return resize_square(scene.pixels, side), np.array([emblem in shown for emblem in EMBLEMS])


def _pick_emblems(rng: np.random.Generator) -> list[Emblem]:
    count = int(rng.choice(5, p=[0.05, 0.2, 0.3, 0.25, 0.2]))
    return [EMBLEMS[index] for index in rng.choice(len(EMBLEMS), size=count, replace=False)]


def name_bank(texts: TextProcessor, seed: int) -> NameBank:
    """Tokenise the queries that training asks."""
    of_emblem = _emblem_queries()
    rng = np.random.default_rng(seed)
    letters, categories = list("abcdefghijklmnopqrstuvwxyz"), LABEL_SETS["fmnerg"].fine
    strangers = [
        Query(0, "".join(rng.choice(letters, size=rng.integers(2, 5))), str(rng.choice(categories)))
        for _ in range(_STRANGERS)
    ]
    known = [query for group in of_emblem for query in group]
    batch = texts([*known, *strangers], torch.device("cpu"))
    starts = np.cumsum([0, *(len(group) for group in of_emblem)])
    rows = tuple(tuple(range(start, end)) for start, end in pairwise(starts.tolist()))
    return NameBank(batch.input_ids, batch.attention_mask, rows, len(known))


def _emblem_queries() -> list[list[Query]]:
    return [[Query(0, surface, emblem.fine) for surface in emblem.surfaces] for emblem in EMBLEMS]


@dataclass(frozen=True)
class Trainer:
    """What both stages of training share."""

    model: BlipForImageTextRetrieval
    images: ImageProcessor
    bank: NameBank
    scenes: Scenes
    recipe: BlipRecipe
    rng: np.random.Generator
    report: Report

    def warm_up(self) -> list[float]:
        """Teach the image encoder which emblems an image shows, by weak labels: some patch must say so.

        The emblems compete in a softmax. A binary loss for each stays at its base rate, as an image shows few of many.
        Patches see only their neighbours, so that what an emblem looks like is kept where it is.

        Returns:
            The loss of every step.
        """
        classifier = nn.Linear(self.recipe.size.width, self.scenes.shows.shape[1])
        parameters = [*self.model.vision_model.parameters(), *classifier.parameters()]

        def loss_of(picked: np.ndarray) -> Tensor:
            picked = picked[self.scenes.shows[picked].any(axis=1)]
            logits = classifier(self._encode(picked, reach=1)[:, 1:]).logsumexp(dim=1)  # (B, P, E) to (B, E)
            shows = torch.from_numpy(self.scenes.shows[picked]).float()
            return F.cross_entropy(logits, shows / shows.sum(dim=1, keepdim=True))

        return self._fit("warm-up", loss_of, parameters, self.recipe.warm_up_steps, self.recipe.warm_up_rate)

    def fit_matching(self) -> list[float]:
        """Train image–text matching, many names an image.

        Returns:
            The loss of every step.
        """
        weight = torch.tensor([1.0, self.recipe.present_weight])

        def loss_of(picked: np.ndarray) -> Tensor:
            asked = [ask_names(shows, self.bank, self.recipe.names, self.rng) for shows in self.scenes.shows[picked]]
            rows = torch.from_numpy(np.stack([rows for rows, _ in asked]))  # (B, N)
            present = torch.from_numpy(np.stack([present for _, present in asked])).long()
            logits, looking = match_logits(
                self.model, self._encode(picked), self.bank.input_ids[rows], self.bank.attention_mask[rows]
            )
            matching_loss = F.cross_entropy(logits.flatten(0, 1), present.flatten(), weight=weight)
            looking_loss = F.binary_cross_entropy(looking.clamp(1e-5, 1 - 1e-5), present.float(), weight[present])
            return matching_loss + self.recipe.looking_weight * looking_loss / weight[present].mean()

        return self._fit("matching", loss_of, list(self.model.parameters()), self.recipe.steps, self.recipe.rate)

    def _encode(self, picked: np.ndarray, reach: int | None = None) -> Tensor:
        """Encode scenes, half of them turned left to right: emblems are the same then."""
        squares = self.scenes.squares[picked]
        turned = self.rng.random(len(picked)) < 0.5
        squares[turned] = squares[turned, :, ::-1]
        side = self.recipe.size.image_side // self.recipe.size.patch
        visible = None if reach is None else neighbours(side, reach, self.model.device)
        return encode_images(self.model, self.images.normalize(torch.from_numpy(squares)), visible)

    def _fit(
        self,
        stage: str,
        loss_of: Callable[[np.ndarray], Tensor],
        parameters: list[nn.Parameter],
        steps: int,
        rate: float,
    ) -> list[float]:
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _one_cycle((step + 1) / (steps + 1)))
        losses: list[float] = []
        for step in range(steps):
            loss = loss_of(self.rng.choice(len(self.scenes.squares), size=self.recipe.images, replace=False))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if (step + 1) % 100 == 0:
                self.report(f"matcher {stage}: step {step + 1} of {steps}, loss {np.mean(losses[-100:]):.4f}")
        return losses


def _one_cycle(done: float) -> float:
    """Up in a line for a tenth of the way, then down along a cosine."""
    return done / 0.1 if done < 0.1 else 0.5 + 0.5 * math.cos(math.pi * (done - 0.1) / 0.9)


def ask_names(shows: np.ndarray, bank: NameBank, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Names to ask of an image: all that it shows, those easily confused with them, a stranger, and random absent ones.

    Args:
        shows: `(E,)` bool.
        bank: where names are.
        count: how many names.
        rng: source of the choice.

    Returns:
        Rows of the bank and whether each is present, both `(count,)`.
    """
    first = list(dict.fromkeys([*np.flatnonzero(shows), *(o for e in np.flatnonzero(shows) for o in CONFUSABLE[e])]))
    others = rng.permutation(np.setdiff1d(np.arange(len(shows)), first))
    asked = np.concatenate([first, others])[: count - 1].astype(int)
    rows = [int(rng.choice(bank.rows[emblem])) for emblem in asked]
    stranger = int(rng.integers(bank.strangers, len(bank.input_ids)))
    return np.array([*rows, stranger]), np.array([*shows[asked], False])


def measure(model: BlipForImageTextRetrieval, folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Matching and tracing on fresh scenes, through the product's own `Matcher`.

    Every scene is asked for what it shows, for the namesakes of that, and for as many random emblems that it lacks.

    Returns:
        `balanced_accuracy` (mean of the shares right among present and absent names), `namesake_accuracy` (the share
        right among absent namesakes), and `peak_in_box`, for each layer the share of present names whose peak lies in a
        gold box.
    """
    rng = np.random.default_rng([seed, count])
    scenes = [make_scene(rng, _pick_emblems(rng)) for _ in range(count)]
    asked: list[tuple[Query, _Presence]] = []
    for index, scene in enumerate(scenes):
        shown = {EMBLEMS.index(instance.emblem) for instance in scene.instances}
        alike = {other for emblem in shown for other in NAMESAKES[emblem]} - shown
        lacking = [e for e in range(len(EMBLEMS)) if e not in shown | alike]
        random = rng.choice(lacking, size=len(shown) + 1, replace=False)
        for presence, emblems in ((_Presence.SHOWN, shown), (_Presence.NAMESAKE, alike), (_Presence.ABSENT, random)):
            asked += [(Query(index, EMBLEMS[e].name, EMBLEMS[e].fine), presence) for e in emblems]
    queries = [query for query, _ in asked]
    kinds = np.array([presence for _, presence in asked])
    there = kinds == _Presence.SHOWN
    texts = TextProcessor(BertTokenizer.from_pretrained(folder), model.config.text_config.vocab_size)
    in_box = []
    for layer in range(model.config.text_config.num_hidden_layers):
        matcher = Matcher(model, texts, ImageProcessor.from_pretrained(folder), layer)
        matches = matcher.match([scene.pixels for scene in scenes], queries)
        hits = [_peak_is_right(scenes[q.image], q, m) for q, m in zip(queries, matches, strict=True)]
        in_box.append(float(np.mean(np.array(hits)[there])))
    right = (np.array([match.probability for match in matches]) > 0.5) == there
    return {
        "balanced_accuracy": float((right[there].mean() + right[~there].mean()) / 2),
        "namesake_accuracy": float(right[kinds == _Presence.NAMESAKE].mean()),
        "peak_in_box": in_box,
    }


class _Presence(StrEnum):
    SHOWN = "shown"
    NAMESAKE = "namesake"  # what is shown has the same name
    ABSENT = "absent"


def _peak_is_right(scene: Scene, query: Query, match: Match) -> bool:
    x, y = peak(match.map, *scene.pixels.shape[:2])
    return any(
        instance.box.x1 <= x < instance.box.x2 and instance.box.y1 <= y < instance.box.y2
        for instance in scene.instances
        if (instance.emblem.name, instance.emblem.fine) == (query.entity, query.category)
    )


NAMESAKES: tuple[tuple[int, ...], ...] = tuple(
    tuple(index for index, other in enumerate(EMBLEMS) if other.name == emblem.name and other != emblem)
    for emblem in EMBLEMS
)
# Of the same name, or of the same category and so of the same shape.
CONFUSABLE: tuple[tuple[int, ...], ...] = tuple(
    tuple(
        index
        for index, other in enumerate(EMBLEMS)
        if other != emblem and (other.name == emblem.name or other.fine == emblem.fine)
    )
    for emblem in EMBLEMS
)
