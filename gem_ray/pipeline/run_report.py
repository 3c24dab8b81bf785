"""`_run/report.html` and `_run/report.json`: what became of the posts, and why some failed, with examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gem_ray.data.storage import as_json
from gem_ray.look.pages import page
from gem_ray.redaction import redacted

if TYPE_CHECKING:
    from gem_ray.pipeline.output_folder import OutputFolder

_FACTS = (
    "run_id",
    "rows",
    "statuses",
    "problems",
    "examples",
    "confidences",
    "left_out",
    "unread",
    "unread_rows",
    "account",
)


def write_run_report(directory: OutputFolder, summary: Mapping[str, Any]) -> None:
    """Write both files.

    Args:
        directory: of the run.
        summary: what `run.json` says.
    """
    summary = redacted(summary)
    directory.storage.write("_run/report.json", as_json({name: summary[name] for name in _FACTS}))
    html = page("gem_ray.pipeline", "run_report.html.j2").render(title=f"Run {summary['run_id']}", run=summary)
    directory.storage.write("_run/report.html", html.encode())
