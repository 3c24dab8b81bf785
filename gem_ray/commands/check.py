"""`gem-ray check`: what `annotate` will find, before anything is paid for."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from gem_ray.commands.options import (
    EXIT_REJECTED,
    EXIT_USAGE,
    MAX_PROBLEM_SHARE,
    ConfigOption,
    JsonOption,
    MapOption,
    PresetOption,
    SetOption,
    SkipOption,
    configured,
    parse_columns,
    write_json,
)
from gem_ray.plurals import counted

if TYPE_CHECKING:
    from gem_ray.data.check import InputCheck

_SHOWN = 5

app = typer.Typer()


@app.command(epilog="Example: `gem-ray check posts/ --map text=tweet`")
def check(
    input: Annotated[str, typer.Argument(help="Parquet or WebDataset shards: a file or a folder.")],
    map_: MapOption = None,
    skip_bad_files: SkipOption = False,
    sample: Annotated[int, typer.Option(help="Posts to sample.", min=1)] = 200,
    json: JsonOption = None,
    preset: PresetOption = "nano",
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Show what is in an input, and what `annotate` would leave out or refuse. Loads no model.

    Exit code 2: `annotate` would refuse the input. 3: posts of the sample cannot be annotated, or files are skipped.
    """
    from gem_ray.data.check import check_input

    settings = configured(preset, config, set_, unused="serving")
    found = check_input(input, settings, parse_columns(map_), sample, skip_bad_files)
    if not write_json(found.to_dict(), json):
        _print(found)
    if found.refused:
        raise typer.Exit(EXIT_USAGE)
    if found.skipped or (found.sample and found.sample.rejected):
        raise typer.Exit(EXIT_REJECTED)


def _print(found: InputCheck) -> None:
    from rich.table import Table

    from gem_ray.look.console import table_console

    for reason in found.refused:
        typer.secho(f"refused: {reason}", fg="red")
    for reason in found.skipped:
        typer.secho(f"not read: {reason}", fg="red")
    for remark in found.remarks:
        typer.secho(remark, fg="yellow")
    typer.echo(f"{counted(found.rows, 'post')} in {counted(found.files, 'file')}")
    if found.columns:
        unread = f"; not read: {', '.join(found.unread_columns)}" if found.unread_columns else ""
        typer.echo(f"columns: {', '.join(f'{field} {column}' for field, column in found.columns.items())}{unread}")
    if found.sample is None:
        return
    sample = found.sample
    table = Table(title=f"{counted(sample.posts, 'post')} of them", title_justify="left")
    table.add_column("what")
    table.add_column("posts", justify="right")
    table.add_column("share", justify="right")
    parts = [
        ("cannot be annotated", sample.rejected),
        ("image", sample.images),
        ("image unusable", sample.unusable),
        ("repeated", +sample.repeated),
        ("script", sample.scripts),
    ]
    if sample.rejected.total() > MAX_PROBLEM_SHARE * sample.posts:
        share = f"{sample.rejected.total() / sample.posts:.0%}"
        typer.secho(f"{share} of the sample cannot be annotated: see --max-problem-share of annotate", fg="yellow")
    for what, counts in parts:
        for name, count in Counter(counts).most_common(_SHOWN):
            table.add_row(f"{what}: {name}", f"{count:,}", f"{count / sample.posts:.0%}")
    table_console().print(table)
