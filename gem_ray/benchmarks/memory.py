"""Peak memory of the driver over inputs of different lengths: it must not grow with them."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gem_ray.benchmarks.standins import PassThrough
from gem_ray.config import load_config
from gem_ray.pipeline.run import annotate_dataset

TEXT_ONLY = ("reranker.enabled=false", "grounder.enabled=false")

_ROWS_PER_FILE = 5_000
_TEXT = "Lyon won again tonight in the rain while everyone watched the game at home"


def measure_memory(folder: Path, rows: tuple[int, ...]) -> dict[str, Any]:
    """Peak resident memory of the driver, in MiB, for text-only inputs of so many rows.

    Stages with models are passed through: the driver sees the same blocks with and without them. Each run is a process
    of its own, because a process' peak does not go down.
    """
    peaks = {}
    for count in rows:
        write_texts(folder / f"posts-{count}", count)
        command = [sys.executable, "-m", "gem_ray.benchmarks.memory", str(folder), str(count)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[count] = json.loads(done.stdout.splitlines()[-1])["peak_mib"]
    return {"peak_mib": peaks, "growth": peaks[rows[-1]] / peaks[rows[0]] - 1}


def write_texts(folder: Path, rows: int, per_file: int = _ROWS_PER_FILE) -> None:
    """Parquet shards of short posts without images."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, rows, per_file):
        numbers = range(first, min(first + per_file, rows))
        texts = [f"{_TEXT} {number}" for number in numbers]
        table = pa.table({"post_id": [str(number) for number in numbers], "text": texts})
        pq.write_table(table, folder / f"part-{first // per_file:05d}.parquet")


def _run(folder: Path, rows: int) -> None:
    config = load_config(overrides=TEXT_ONLY)
    annotate_dataset(folder / f"posts-{rows}", folder / f"out-{rows}", config, actor=PassThrough)
    print(json.dumps({"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


if __name__ == "__main__":
    _run(Path(sys.argv[1]), int(sys.argv[2]))
