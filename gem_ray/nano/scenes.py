"""Generated scenes with weak labels: images, and which emblems each one shows."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass

import numpy as np

from gem_ray.data.emblems import EMBLEMS, Emblem
from gem_ray.data.generated import make_scene
from gem_ray.grounding.matcher import resize_square


@dataclass(frozen=True)
class Scenes:
    """Rendered scenes: `squares` `(N, S, S, 3)` uint8, and `shows` `(N, E)` bool, which emblems each one shows."""

    squares: np.ndarray
    shows: np.ndarray


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
    scene = make_scene(rng, pick_emblems(rng))
    shown = {instance.emblem for instance in scene.instances}
    return resize_square(scene.pixels, side), np.array([emblem in shown for emblem in EMBLEMS])


def pick_emblems(rng: np.random.Generator) -> list[Emblem]:
    """None to four different emblems."""
    count = int(rng.choice(5, p=[0.05, 0.2, 0.3, 0.25, 0.2]))
    return [EMBLEMS[index] for index in rng.choice(len(EMBLEMS), size=count, replace=False)]
