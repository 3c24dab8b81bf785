"""`gem-ray export`: annotations for other tools."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gem_ray.plurals import counted
from gem_ray.taxonomy import LabelSetName

app = typer.Typer()


class ExportFormat(StrEnum):
    """What other tools read."""

    COCO = "coco"
    JSONL = "jsonl"
    CONLL = "conll"
    LABEL_STUDIO = "label-studio"


@app.command(epilog="Example: `gem-ray export out/ tasks.json --format label-studio --images posts/`")
def export(
    context: typer.Context,
    annotations: Annotated[str, typer.Argument(help="An output folder of `annotate`, or a Parquet file of it.")],
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    format_: Annotated[ExportFormat, typer.Option("--format", "-f", help="Output format.")],
    images: Annotated[
        str | None,
        typer.Option(
            help="For `coco` and `label-studio`: the shards that were annotated, or a folder of images. Images in the "
            "shards become files in `images/` beside OUT; an `image_uri` is passed on."
        ),
    ] = None,
    labels: Annotated[LabelSetName | None, typer.Option(help="Label set; default: as in `run.json`.")] = None,
) -> None:
    """Export annotations as COCO boxes, JSON lines, CoNLL tags or Label Studio tasks."""
    import json

    from gem_ray.export.run import export_annotations
    from gem_ray.pipeline.progress import json_lines
    from gem_ray.taxonomy import LABEL_SETS

    as_json = context.obj["json_logs"]
    tally = export_annotations(
        annotations,
        out,
        format_.value,
        images=images,
        labels=LABEL_SETS[labels] if labels else None,
        report=json_lines() if as_json else None,
    )
    if as_json:
        typer.echo(json.dumps(vars(tally) | {"out": str(out)}))
        return
    posts, boxes = counted(tally.posts, "post"), counted(tally.boxes, "box", "boxes")
    typer.echo(f"{out}: {posts} read, {counted(tally.entities, 'entity', 'entities')} and {boxes} written")
    for remark, count in tally.remarks.items():
        typer.echo(f"{remark}: {count:,}")
