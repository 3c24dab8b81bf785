"""What an interruption costs: a run that is killed half-way and started again, against one that is left alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from gem_ray.benchmarks.driver import committed_rows, start_driver, wait_for
from gem_ray.benchmarks.memory import TEXT_ONLY, write_texts
from gem_ray.pipeline.output_folder import OutputFolder


def measure_resume(folder: Path, rows: int) -> dict[str, Any]:
    """Kill a run's driver when half of its rows are done, start it again, and time both.

    Rows pass through stages without models: what is left is the cost of finding out what is done, and of doing again
    what was under way.

    Args:
        folder: gets posts and annotations.
        rows: text-only posts.

    Returns:
        `seconds` of each part, `cost_seconds`: of both parts together beyond the undisturbed run; and
        `first_row_seconds`: from a start to its first finished row, in a new run and in one that resumes.
    """
    write_texts(folder / "posts", rows)
    whole = _timed(folder, "undisturbed", rows)
    half = _timed(folder, "killed", rows // 2, kill=True)
    rest = _timed(folder, "killed", rows)
    return {
        "rows": rows,
        "seconds": {"undisturbed": whole["seconds"], "until_killed": half["seconds"], "resumed": rest["seconds"]},
        "cost_seconds": half["seconds"] + rest["seconds"] - whole["seconds"],
        "first_row_seconds": {"new": whole["first_row_seconds"], "resumed": rest["first_row_seconds"]},
        "rows_done_when_killed": half["done"],
        "rows_done_after": (OutputFolder(str(folder / "killed")).summary() or {})["annotated"],
    }


def _timed(folder: Path, name: str, until: int, kill: bool = False) -> dict[str, Any]:
    kept = committed_rows(str(folder / name))
    started = time.perf_counter()
    driver = start_driver(str(folder / "posts"), str(folder / name), TEXT_ONLY, "pass-through")
    wait_for(driver, kept + 1)
    first_row = time.perf_counter() - started
    done = wait_for(driver, until)
    if kill:
        driver.kill()
    driver.wait()
    return {"seconds": time.perf_counter() - started, "first_row_seconds": first_row, "done": done}
