"""`gem-ray nano build`: trains every embedded model from scratch, two at a time, and records what they reach."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path
from typing import Any

from gem_ray.nano.confidence import calibrate
from gem_ray.nano.scope import SCOPE

WEIGHTS = Path(__file__).parent / "weights"

# Model -> the function that trains it, longest first. Each takes (weights folder, seed, tweets) and returns its scores.
RECIPES: dict[str, str] = {
    "tagger": "gem_ray.nano.tagger:build",
    "matcher": "gem_ray.nano.blip:build",
    "reranker": "gem_ray.nano.llava:build",
    "text-segmenter": "gem_ray.nano.segmenters:build_text_segmenter",
    "sam": "gem_ray.nano.segmenters:build_sam",
}


# The folders of the models that know the generated corpus alone.
_VISION = {
    "matcher": ["matcher"],
    "reranker": ["reranker", "reranker-lora"],
    "text-segmenter": ["text-segmenter"],
    "sam": ["sam"],
}
FOLDERS = ("tagger", *(folder for folders in _VISION.values() for folder in folders))


def build(
    out: Path = WEIGHTS,
    *,
    tweets: Path,
    seed: int = 0,
    only: Sequence[str] = (),
    jobs: int = 2,
    on_done: Callable[[str, dict[str, Any]], None] = lambda name, scores: None,
) -> dict[str, dict[str, Any]]:
    """Train the embedded models, and calibrate them when all are there.

    Args:
        out: folder that gets one model directory each, and `scores.json`.
        tweets: a Twitter10000 root, for the tagger.
        seed: of initialisation, order and generated posts.
        only: names out of `RECIPES`; all if empty.
        jobs: models trained at a time, one thread each. Small models gain more from this than from more threads.
        on_done: called with a model's name and scores when it is ready.

    Returns:
        Each model's scores, and the seconds that it took, by the clock and of its own process.

    Raises:
        ValueError: `only` names an unknown model.
        FileNotFoundError: the tagger is asked for and `tweets` is not there.
    """
    names = list(only) or list(RECIPES)
    if unknown := set(names) - set(RECIPES):
        raise ValueError(f"no embedded model is called {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    if "tagger" in names and not tweets.is_dir():
        raise FileNotFoundError(f"the tagger is trained on the Twitter10000 data set, which is not at {tweets}")
    out.mkdir(parents=True, exist_ok=True)
    scores_file = out / "scores.json"
    scores: dict[str, dict[str, Any]] = json.loads(scores_file.read_text()) if scores_file.exists() else {}
    # Spawned, not forked: torch's threads do not survive a fork.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        pending = {pool.submit(_train_one, name, out, seed, tweets): name for name in names}
        for done in as_completed(pending):
            scores[pending[done]] = done.result()
            scores_file.write_text(json.dumps(scores, indent=2, sort_keys=True) + "\n")
            on_done(pending[done], scores[pending[done]])
    if all((out / folder).is_dir() for folder in FOLDERS):
        calibrate(out, seed)
    return {name: scores[name] for name in names}


def _train_one(name: str, out: Path, seed: int, tweets: Path) -> dict[str, Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(1)
    module, function = RECIPES[name].split(":")
    started = time.perf_counter()
    scores = getattr(import_module(module), function)(out, seed, tweets)
    for folder in _VISION.get(name, ()):
        SCOPE.save(out / folder)
    took = {"seconds": round(time.perf_counter() - started), "cpu_seconds": round(time.process_time())}
    return {**scores, **took}
