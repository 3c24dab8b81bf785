"""How far the embedded reranker and grounder can be trusted: calibrations of generated posts that none learnt from."""

from __future__ import annotations

from pathlib import Path

from gem_ray.config import load_config
from gem_ray.data.generated import generate
from gem_ray.evaluation.confidences import store_reranker
from gem_ray.evaluation.grounder_confidence import store_grounder

POSTS, FIRST_SEED = 800, 41_000  # training takes posts of seeds from 10,000 on, its scores from 20,000 on


def calibrate(weights: Path, seed: int) -> None:
    """Fit the calibrations of the models in a weights folder, and keep them there.

    Args:
        weights: with all embedded models, and the tagger's own calibration.
        seed: of the build.
    """
    config = load_config(
        "nano",
        tagger={"model": str(weights / "tagger")},
        reranker={"model": str(weights / "reranker"), "adapter": str(weights / "reranker-lora")},
        grounder={
            "matcher": {"model": str(weights / "matcher")},
            "boxes": {
                "sam": {"model": str(weights / "sam")},
                "text": {"model": str(weights / "text-segmenter")},
            },
        },
    )
    posts = list(generate(POSTS, FIRST_SEED + seed))
    fitted_on = f"{POSTS} generated posts of seed {FIRST_SEED + seed}"
    store_reranker(posts, config, fitted_on)
    store_grounder(posts, config, fitted_on)
