"""`_run/report.html` and `_run/report.json`: what became of the posts, and why some failed, with examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader

if TYPE_CHECKING:
    from gem_ray.pipeline.run_directory import RunDirectory

_FACTS = ("run_id", "rows", "statuses", "problems", "examples")


def write_report(directory: RunDirectory, summary: Mapping[str, Any]) -> None:
    """Write both files.

    Args:
        directory: of the run.
        summary: what `run.json` says.
    """
    directory.write_json("_run/report.json", {name: summary[name] for name in _FACTS})
    page = Environment(loader=PackageLoader("gem_ray.pipeline", "."), autoescape=True, trim_blocks=True)
    directory.write_bytes("_run/report.html", page.get_template("report.html.j2").render(run=summary).encode())
