"""The embedded SAM and CLIPSeg: their sizes, and the recipes that train them on generated scenes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPSegTextConfig,
    CLIPSegVisionConfig,
    CLIPTokenizer,
    ViTImageProcessor,
)

from gem_ray.data.emblems import EMBLEMS
from gem_ray.data.generated import PlacedEmblem, Scene, make_scene
from gem_ray.grounding.one_cycle import OneCycle
from gem_ray.grounding.sam import SamSegmenter, save_sam
from gem_ray.grounding.sam_build import SamSizes
from gem_ray.grounding.sam_build import build_sam as untrained_sam
from gem_ray.grounding.text_segmenter import CLIPSeg, category_prompt, mask_box
from gem_ray.grounding.text_segmenter_recipe import TextSegmenterTraining
from gem_ray.grounding.train_sam import PointTarget, SamSample, batch_loss
from gem_ray.grounding.train_text_segmenter import PromptSample, fit_clipseg
from gem_ray.records import Box
from gem_ray.taxonomy import FMNERG, GMNER
from gem_ray.training import OnLoss

SAM_SIZES = SamSizes(image_size=256, patch_size=16, width=96, depth=4, window=4, global_layers=(1, 3))
_CLIPSEG_SIDE, _CLIPSEG_PATCH = 144, 8
_SMALL = 1 / 50  # of the image's area, as the evaluation cuts it
_PER_SCENE = 4  # emblems drawn into a training scene, if there is room


def build_sam(weights: Path, seed: int, tweets: Path) -> dict[str, Any]:
    """Train the embedded SAM into `weights/sam`; the `tweets`, which others learn from, have no images."""
    return train_sam(weights / "sam", seed)


def build_text_segmenter(weights: Path, seed: int, tweets: Path) -> dict[str, Any]:
    """Train the embedded CLIPSeg into `weights/text-segmenter`; the `tweets` have no images."""
    return train_clipseg(weights / "text-segmenter", seed)


def train_sam(
    out: Path,
    seed: int = 0,
    steps: int = 3000,
    batch_size: int = 4,
    learning_rate: float = 1e-3,
    points: int = 8,
    report: OnLoss = lambda step, loss: None,
) -> dict[str, float]:
    """Train the embedded SAM from scratch and write its model directory.

    Args:
        out: where `config.json` and `model.safetensors` go.
        seed: of weights and scenes.
        steps: optimizer steps.
        batch_size: scenes in a step.
        learning_rate: the peak of the schedule.
        points: points in a scene.
        report: called with the step and the mean loss since the last report.

    Returns:
        `measure_sam` on fresh scenes, and the last loss.
    """
    torch.manual_seed(seed)
    model = untrained_sam(SAM_SIZES)
    settings = OneCycle(steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    losses = settings.fit(model, sam_samples(seed, points), partial(batch_loss, model), report)
    save_sam(model, SAM_SIZES, out)
    return {"loss": float(np.mean(losses[-50:])), **measure_sam(SamSegmenter(model), seed + 1)}


def sam_samples(seed: int, points: int) -> Iterator[SamSample]:
    """Points of generated scenes without end."""
    rng = np.random.default_rng(seed)
    for scene in scenes(rng):
        chosen = rng.integers(len(scene.instances), size=points)
        yield SamSample(scene.pixels, tuple(_point_target(rng, scene.instances[index]) for index in chosen))


def scenes(rng: np.random.Generator) -> Iterator[Scene]:
    """Scenes with at least one emblem, without end."""
    while True:
        count = int(rng.integers(1, _PER_SCENE + 1))
        scene = make_scene(rng, [EMBLEMS[index] for index in rng.choice(len(EMBLEMS), count, replace=False)])
        if scene.instances:
            yield scene


def _point_target(rng: np.random.Generator, instance: PlacedEmblem) -> PointTarget:
    """A point on an emblem, and its right answers: the emblem and, as real SAM also gives, the part that it is on."""
    rows, columns = np.nonzero(instance.mask)
    pixel = rng.integers(len(rows))
    y, x = int(rows[pixel]), int(columns[pixel])
    parts = [part for part in instance.parts if part[y, x]]
    return PointTarget(x, y, np.stack([instance.mask, *parts]))


def measure_sam(sam: SamSegmenter, seed: int, count: int = 100) -> dict[str, float]:
    """How well the box of SAM's best mask fits, prompted with a random point of each emblem of fresh scenes."""
    rng = np.random.default_rng(seed)
    drawn = [scene for scene, _ in zip(scenes(rng), range(count), strict=False)]
    targets = [[_point_target(rng, instance) for instance in scene.instances] for scene in drawn]
    answers = sam.masks([scene.pixels for scene in drawn], [[(t.x, t.y) for t in row] for row in targets])
    figures = _Figures()
    for scene, row in zip(drawn, answers, strict=True):
        for instance, answer in zip(scene.instances, row, strict=True):
            figures.add(scene, instance, mask_box(answer.masks[answer.best]))
    return figures.summary()


def build_clipseg() -> tuple[CLIPSegForImageSegmentation, CLIPSegProcessor]:
    """An untrained CLIPSeg of under a million parameters, and a processor whose words are the categories'."""
    tokenizer = _category_tokenizer()
    text = CLIPSegTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPSegVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=_CLIPSEG_SIDE,
        patch_size=_CLIPSEG_PATCH,
    )
    config = CLIPSegConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        projection_dim=64,
        extract_layers=[1, 3],
        reduce_dim=64,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=128,
    )
    size = {"height": _CLIPSEG_SIDE, "width": _CLIPSEG_SIDE}
    images = ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    return CLIPSegForImageSegmentation(config), CLIPSegProcessor(images, tokenizer)


def _category_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a byte-level vocabulary in which each word of a category is one token."""
    prompts = [category_prompt(fine) for labels in (FMNERG, GMNER) for fine in labels.fine]
    merges = _merges({word for prompt in prompts for word in prompt.split()})
    letters = sorted(ByteLevel.alphabet())
    symbols = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    symbols += ["<|startoftext|>", "<|endoftext|>"]  # last, as in CLIP's own vocabulary
    vocabulary = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    return CLIPTokenizer(vocabulary, merges, model_max_length=16)


def _merges(words: set[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make each word one symbol.

    A word is encoded with the merges so far, and what is left of it is joined from left to right. Later merges rank
    after all that an earlier word needs, so they do not change it. The library's trainer breaks ties at random.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in sorted(words):
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        while len(symbols) > 1:
            rank, first = min((ranks.get(pair, len(ranks)), first) for first, pair in enumerate(pairwise(symbols)))
            ranks.setdefault((symbols[first], symbols[first + 1]), rank)
            symbols[first : first + 2] = ["".join(symbols[first : first + 2])]
    return list(ranks)


def train_clipseg(
    out: Path,
    seed: int = 0,
    steps: int = 1800,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    absent: int = 2,
    report: OnLoss = lambda step, loss: None,
) -> dict[str, float]:
    """Train the embedded CLIPSeg from scratch and write its model directory.

    Args:
        out: where model and processor go.
        seed: of weights and scenes.
        steps: optimizer steps.
        batch_size: scenes in a step.
        learning_rate: the peak of the schedule.
        absent: categories asked of each scene that it does not show.
        report: called with the step and the mean loss since the last report.

    Returns:
        `measure_clipseg` on fresh scenes, and the last loss.
    """
    torch.manual_seed(seed)
    model, processor = build_clipseg()
    settings = TextSegmenterTraining(
        steps=steps,
        batch_size=batch_size,
        absent=absent,
        learning_rate=learning_rate,
        train_backbone=True,
        seed=seed,
    )
    losses = fit_clipseg(model, processor, prompt_samples(seed), settings, report, _shown_prompts())
    model.save_pretrained(out)
    processor.save_pretrained(out)
    segmenter = CLIPSeg(model, processor, threshold=0.5, batch_size=16)
    return {"loss": float(np.mean(losses[-50:])), **measure_clipseg(segmenter, seed + 1)}


def prompt_samples(seed: int) -> Iterator[PromptSample]:
    """Generated scenes without end, with the mask of each category in them."""
    for scene in scenes(np.random.default_rng(seed)):
        masks: dict[str, np.ndarray] = {}
        for instance in scene.instances:
            prompt = category_prompt(instance.emblem.fine)
            masks[prompt] = masks.get(prompt, np.zeros_like(instance.mask)) | instance.mask
        yield PromptSample(scene.pixels, masks)


def _shown_prompts() -> list[str]:
    return sorted({category_prompt(emblem.fine) for emblem in EMBLEMS})


def measure_clipseg(segmenter: CLIPSeg, seed: int, count: int = 100) -> dict[str, float]:
    """How well the instance that holds a random point of an emblem fits it, and how often an absent category is found.

    Without an instance that holds the point, the emblem counts as missed.
    """
    rng = np.random.default_rng(seed)
    drawn = [scene for scene, _ in zip(scenes(rng), range(count), strict=False)]
    shown = [(row, instance) for row, scene in enumerate(drawn) for instance in scene.instances]
    found = segmenter.instances(
        [scene.pixels for scene in drawn], [(row, category_prompt(instance.emblem.fine)) for row, instance in shown]
    )
    figures = _Figures()
    for (row, instance), answers in zip(shown, found, strict=True):
        target = _point_target(rng, instance)
        holding = next((answer.box for answer in answers if answer.holds(target.x, target.y)), None)
        figures.add(drawn[row], instance, holding)
    return {**figures.summary(), "found_absent": _found_absent(segmenter, drawn, rng)}


def _found_absent(segmenter: CLIPSeg, drawn: list[Scene], rng: np.random.Generator) -> float:
    """The share of absent categories, one a scene, of which an instance is found."""
    pairs = []
    for row, scene in enumerate(drawn):
        present = {category_prompt(instance.emblem.fine) for instance in scene.instances}
        absent = [prompt for prompt in _shown_prompts() if prompt not in present]
        pairs.append((row, absent[rng.integers(len(absent))]))
    found = segmenter.instances([scene.pixels for scene in drawn], pairs)
    return float(np.mean([bool(answers) for answers in found]))


class _Figures:
    """IoU of predicted and gold boxes, by the size of the gold box."""

    def __init__(self) -> None:
        self._ious: list[float] = []
        self._shares: list[float] = []
        self._persons: list[bool] = []

    def add(self, scene: Scene, instance: PlacedEmblem, box: Box | None) -> None:
        height, width = scene.pixels.shape[:2]
        self._ious.append(box.iou(instance.box) if box else 0.0)
        self._shares.append(instance.box.area / (height * width))
        self._persons.append(instance.emblem.coarse == "person")

    def summary(self) -> dict[str, float]:
        """Mean IoU and the share over 0.5: of all, of small boxes and the others, of persons and the others."""
        ious, small, persons = np.array(self._ious), np.array(self._shares) < _SMALL, np.array(self._persons)
        groups = {"all": small | ~small, "small": small, "large": ~small, "persons": persons, "others": ~persons}
        figures: dict[str, float] = {}
        for name, group in groups.items():
            figures[f"iou_{name}"] = float(ious[group].mean())
            figures[f"over_half_{name}"] = float((ious[group] > 0.5).mean())
        return figures
