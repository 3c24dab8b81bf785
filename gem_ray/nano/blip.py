"""The embedded matcher: a tiny BLIP that learns the generated corpus's emblems from presence alone, without boxes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertTokenizer, BlipForImageTextRetrieval

from gem_ray.data.emblems import EMBLEMS
from gem_ray.grounding.blip import encode_images
from gem_ray.grounding.matcher import ImageProcessor, MatchQuery, TextProcessor
from gem_ray.nano.blip_scores import decide, measure
from gem_ray.nano.scenes import Scenes, render_scenes
from gem_ray.nano.tiny_blip import BlipSize, build_blip, encode_names, match_logits
from gem_ray.taxonomy import LABEL_SETS

_STRANGERS = 256  # made-up names that no image shows


@dataclass(frozen=True)
class BlipRecipe:
    """How the tiny BLIP is trained: first contrast of patches and names, then whether an image shows what a name means.

    Args:
        size: dimensions of the model.
        scenes: images rendered ahead, from which batches are drawn.
        images: a batch.
        names: asked of each image: all that are present, those easily confused with them, a stranger, and random
            absent ones.
        warm_up_steps: of contrast alone.
        warm_up_rate: its highest learning rate.
        cycles: steps of image–text matching, each cycle with a rise and a fall of the learning rate.
        rate: its highest learning rate.
        present_weight: of present names in the losses, as most names asked are absent.
        looking_weight: of a loss that asks the first cross-attention to look at image patches for present names and at
            the class patch for absent ones. It says nothing of where, but names are found sooner and better with it.
            Higher layers could meet it anywhere: their queries know from the first one whether the name is present.
        contrast_weight: of the contrast, which goes on beside matching.
        dev_posts: generated posts that choose the threshold and the layer to trace.
        fresh_scenes: on which the result is measured.
        processes: that render.
    """

    size: BlipSize = field(default_factory=BlipSize)
    scenes: int = 20_000
    images: int = 32
    names: int = 16
    warm_up_steps: int = 700
    warm_up_rate: float = 2e-3
    cycles: tuple[int, ...] = (700, 2_000)
    rate: float = 1e-3
    present_weight: float = 4.0
    looking_weight: float = 0.5
    contrast_weight: float = 0.5
    dev_posts: int = 300
    fresh_scenes: int = 300
    processes: int = 2


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


def train(
    out: Path, seed: int, recipe: BlipRecipe | None = None, report: Callable[[str], None] = print
) -> dict[str, Any]:
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
    result = decide(out, recipe.dev_posts, seed + 1) | measure(model, out, recipe.fresh_scenes, seed + 1)
    report(f"matcher: {result}")
    return result


def name_bank(texts: TextProcessor, seed: int) -> NameBank:
    """Tokenise the queries that training asks."""
    of_emblem = _emblem_queries()
    rng = np.random.default_rng(seed)
    letters, categories = list("abcdefghijklmnopqrstuvwxyz"), LABEL_SETS["fmnerg"].fine
    strangers = [
        MatchQuery(0, "".join(rng.choice(letters, size=rng.integers(2, 5))), str(rng.choice(categories)))
        for _ in range(_STRANGERS)
    ]
    known = [query for group in of_emblem for query in group]
    batch = texts([*known, *strangers], torch.device("cpu"))
    starts = np.cumsum([0, *(len(group) for group in of_emblem)])
    rows = tuple(tuple(range(start, end)) for start, end in pairwise(starts.tolist()))
    return NameBank(batch.input_ids, batch.attention_mask, rows, len(known))


def _emblem_queries() -> list[list[MatchQuery]]:
    return [[MatchQuery(0, surface, emblem.fine) for surface in emblem.surfaces] for emblem in EMBLEMS]


class Trainer:
    """Both stages of training."""

    def __init__(
        self,
        model: BlipForImageTextRetrieval,
        images: ImageProcessor,
        bank: NameBank,
        scenes: Scenes,
        recipe: BlipRecipe,
        rng: np.random.Generator,
        report: Callable[[str], None],
    ) -> None:
        self.model, self.images, self.bank, self.scenes = model, images, bank, scenes
        self.recipe, self.rng, self.report = recipe, rng, report
        self.temperature = nn.Parameter(torch.tensor(10.0))

    def warm_up(self) -> list[float]:
        """Bring patches and the names of what they show together, by weak labels: some patch must look like a name.

        Returns:
            The loss of every step.
        """

        def loss_of(picked: np.ndarray) -> Tensor:
            return self._contrast(self._encode(picked), picked)

        return self._fit("warm-up", loss_of, self.recipe.warm_up_steps, self.recipe.warm_up_rate)

    def fit_matching(self) -> list[float]:
        """Train image–text matching, many names an image.

        Returns:
            The loss of every step.
        """
        return [loss for steps in self.recipe.cycles for loss in self.fit_cycle(steps)]

    def fit_cycle(self, steps: int) -> list[float]:
        """One cycle of matching."""
        weight = torch.tensor([1.0, self.recipe.present_weight])

        def loss_of(picked: np.ndarray) -> Tensor:
            asked = [ask_names(shows, self.bank, self.recipe.names, self.rng) for shows in self.scenes.shows[picked]]
            rows = torch.from_numpy(np.stack([rows for rows, _ in asked]))  # (B, N)
            present = torch.from_numpy(np.stack([present for _, present in asked])).long()
            states = self._encode(picked)
            logits, looking = match_logits(
                self.model, states, self.bank.input_ids[rows], self.bank.attention_mask[rows]
            )
            matching_loss = F.cross_entropy(logits.flatten(0, 1), present.flatten(), weight=weight)
            looking_loss = F.binary_cross_entropy(looking.clamp(1e-5, 1 - 1e-5), present.float(), weight[present])
            return (
                matching_loss
                + self.recipe.looking_weight * looking_loss / weight[present].mean()
                + self.recipe.contrast_weight * self._contrast(states, picked)
            )

        return self._fit("matching", loss_of, steps, self.recipe.rate)

    def _contrast(self, states: Tensor, picked: np.ndarray) -> Tensor:
        """BLIP's contrastive loss, of patches: how well scenes `(B, 1 + P, D)` tell the names of what they show.

        Emblems compete in a softmax. A binary loss for each stays at its base rate, as an image shows few of many.
        """
        canonical = [rows[0] for rows in self.bank.rows]
        names = encode_names(self.model, self.bank.input_ids[canonical], self.bank.attention_mask[canonical])  # (E, D)
        patches = F.normalize(self.model.vision_proj(states[:, 1:]), dim=-1)  # (B, P, D)
        logits = (self.temperature * patches @ names.T).logsumexp(dim=1)  # (B, E)
        shows = torch.from_numpy(self.scenes.shows[picked]).float()
        some = shows.any(dim=1)
        return F.cross_entropy(logits[some], shows[some] / shows[some].sum(dim=1, keepdim=True))

    def _encode(self, picked: np.ndarray) -> Tensor:
        """Encode scenes, half of them turned left to right: emblems are the same then."""
        squares = self.scenes.squares[picked]
        turned = self.rng.random(len(picked)) < 0.5
        squares[turned] = squares[turned, :, ::-1]
        return encode_images(self.model, self.images.normalize(torch.from_numpy(squares)))

    def _fit(self, stage: str, loss_of: Callable[[np.ndarray], Tensor], steps: int, rate: float) -> list[float]:
        parameters = [*self.model.parameters(), self.temperature]
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


# Of the same name, or of the same category and so of the same shape.
CONFUSABLE: tuple[tuple[int, ...], ...] = tuple(
    tuple(
        index
        for index, other in enumerate(EMBLEMS)
        if other != emblem and (other.name == emblem.name or other.fine == emblem.fine)
    )
    for emblem in EMBLEMS
)
