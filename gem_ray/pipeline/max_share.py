"""A budget for the reranker in the place of γ: a run measures which γ keeps to it, on a sample of its own rows.

A threshold that follows the entropies as they stream by would depend on the order of the batches: a run that is killed
and resumed would rerank other entities. So γ is fixed before the first row is annotated, from rows that depend on the
input alone, and is kept with the run. Then every entity is decided by itself, and nothing waits for other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gem_ray.config import Config
from gem_ray.pipeline.inputs import InputFile, InputReader
from gem_ray.pipeline.source import PostSource
from gem_ray.rerank.uncertainty import gamma_for_share

if TYPE_CHECKING:
    from gem_ray.pipeline.execution import RayExecutor
    from gem_ray.pipeline.output_folder import RunFolder

_SAMPLE_FILES, _SAMPLE_ROWS = 16, 1024


def with_gamma(
    config: Config,
    folder: RunFolder,
    reader: InputReader,
    files: Sequence[InputFile],
    models: dict[str, str],
    executor: RayExecutor,
) -> Config:
    """The configuration with γ for its budget; as it is if it has none.

    Args:
        config: of the run.
        folder: of the run; keeps γ for the next start.
        reader: of the input.
        files: the input.
        models: what the run began with.
        executor: tags the sample.

    Raises:
        RunError: the sample could not be tagged.
    """
    budget = config.filter.max_share
    if budget is None:
        return config
    facts = folder.read("gamma")
    if facts is None:
        entropies = executor.entropies(PostSource(reader, files, sample_ids(files)), config, models)
        facts = {"gamma": gamma_for_share(entropies, budget), "entities": len(entropies)}
        if not folder.create("gamma", facts):
            facts = folder.read("gamma") or facts  # what was measured first counts
    settings = config.filter.model_copy(update={"gamma": facts["gamma"], "max_share": None})
    return config.model_copy(update={"filter": settings})


def sample_ids(files: Sequence[InputFile]) -> np.ndarray:
    """Ids of about a thousand rows, sorted: the first ones of some files that are evenly spread over the input."""
    chosen = [files[index * len(files) // _SAMPLE_FILES] for index in range(_SAMPLE_FILES)]
    distinct = {file.number: file for file in chosen}
    rows = -(-_SAMPLE_ROWS // len(distinct))
    return np.concatenate([file.row_ids[:rows] for file in distinct.values()])
