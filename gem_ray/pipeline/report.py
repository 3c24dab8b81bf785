"""`_run/report.html` and `_run/report.json`: what became of the posts, and why some failed, with examples."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, Template

from gem_ray.data.storage import as_json
from gem_ray.plurals import counted

if TYPE_CHECKING:
    from gem_ray.pipeline.run_directory import RunDirectory

_FACTS = ("run_id", "rows", "statuses", "problems", "examples", "left_out", "unread", "unread_rows", "account")


def write_report(directory: RunDirectory, summary: Mapping[str, Any]) -> None:
    """Write both files.

    Args:
        directory: of the run.
        summary: what `run.json` says.
    """
    directory.storage.write("_run/report.json", as_json({name: summary[name] for name in _FACTS}))
    directory.storage.write("_run/report.html", _page().render(run=summary).encode())


@cache
def _page() -> Template:
    environment = Environment(loader=PackageLoader("gem_ray.pipeline", "."), autoescape=True, trim_blocks=True)
    environment.globals["counted"] = counted
    return environment.get_template("report.html.j2")
