"""`gem-ray reranker-tables`: what the reranker is worth on a labelled data set with images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gem_ray.commands.options import (
    ConfigOption,
    DataOption,
    ImagesOption,
    PresetOption,
    SetOption,
    labelled_posts,
    refuse_without_root,
)
from gem_ray.plurals import counted

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer()


@app.command("reranker-tables", epilog="Example: `gem-ray reranker-tables --data posts/ --out out/reranker`")
def reranker_tables(
    context: typer.Context,
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder for `reranker.json`.")],
    split: Annotated[str, typer.Option(help="Split of a Twitter10000 root.")] = "dev",
    images: ImagesOption = None,
    preset: PresetOption = "nano",
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Compare reranker and tagger by entropy (Figure 5), over K (Figure 6), and with other images or none."""
    from gem_ray.config import load_config
    from gem_ray.data.files import whole_text
    from gem_ray.evaluation.rerank_tables import measure_reranker
    from gem_ray.look.console import table_console

    refuse_without_root(context, data)
    settings = load_config(preset, config, set_ or ())
    result = measure_reranker(labelled_posts(data, split, images, settings.labels), settings)
    with whole_text(out / "reranker.json") as file:
        file.write(json.dumps(result, indent=2) + "\n")
    console = table_console()
    console.print(
        f"{counted(result['entities'], 'entity', 'entities')}, {result['hard_entities']} with H > {result['gamma']:g}"
    )
    console.print(_by_entropy(result["by_entropy"]))
    rows = [("tagger alone", result["tagger"])]
    rows += [(f"K = {row['k']}", row) for row in result["by_k"]]
    rows += [(f"K = {row['k']}, {row['seen']} image", row) for row in result["by_image"]]
    console.print(_scores(rows))
    typer.echo(f"figures: {out / 'reranker.json'}")


def _by_entropy(bins: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table("H", "entities", "tagger", "reranker", title="Right categories by entropy, %")
    for each in bins:
        shares = (f"{100 * each[name]['value']:.1f}" for name in ("accuracy", "reranked"))
        table.add_row(f"{each['low']:.1f}–{each['high']:.1f}", str(each["share"]["right"]), *shares)
    return table


def _scores(rows: list[tuple[str, dict[str, Any]]]) -> Table:
    from rich.table import Table

    names = ("fine_f1", "hard_f1", "hard_accuracy", "gold_offered")
    table = Table("", *(name.replace("_", " ") for name in names), title="Fine F1 of all and of hard entities, %")
    for title, row in rows:
        table.add_row(title, *(f"{100 * row[name]:.1f}" for name in names))
    return table
