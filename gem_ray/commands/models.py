"""Commands about models: what a configuration needs, and fetching it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gem_ray.commands.options import ConfigOption, PresetOption, SetOption, configured

if TYPE_CHECKING:
    from gem_ray.planning.needs import ModelNeeded

app = typer.Typer(help="List or download the models that a configuration needs.", no_args_is_help=True)


@app.command("list", epilog="Example: `gem-ray models list --preset one-gpu`")
def list_(preset: PresetOption = "nano", config: ConfigOption = None, set_: SetOption = None) -> None:
    """List what a configuration loads: size, licence, revision, and where it is. Downloads nothing.

    Sizes are of what is loaded, not of whole repositories; ≈ marks those computed because the hub cannot be asked.
    """
    from rich.table import Table

    from gem_ray.look.console import table_console
    from gem_ray.planning.needs import models_needed

    needs = list(models_needed(configured(preset, config, set_)))
    table = Table("model", "key", "reference", "size", "licence", "revision", "where", box=None, pad_edge=False)
    for need in needs:
        table.add_row(
            need.role,
            ".".join(need.key),
            need.reference,
            _size(need),
            need.licence or "not known",
            (need.revision or "")[:12],
            need.place,
        )
    console = table_console()
    console.print(table)
    total = sum(need.size or 0 for need in needs if need.place == "missing")
    console.print(f"to fetch: {'' if all(need.is_exact for need in needs) else '≈ '}{total / 1e9:.2f} GB")
    for need in needs:
        if need.reason:
            console.print(f"{need.role}: {need.reason}", highlight=False)


@app.command(epilog="Example: `gem-ray models fetch --preset one-gpu --to s3://bucket/models > models.yaml`")
def fetch(
    preset: PresetOption = "nano",
    config: ConfigOption = None,
    set_: SetOption = None,
    to: Annotated[
        str | None, typer.Option(help="Folder or `s3://` prefix for copies; default: the caches of this machine.")
    ] = None,
) -> None:
    """Download what a configuration loads and nothing else, for clusters without internet.

    With `--to`, prints the settings that use the copies: save them, and give them to `annotate --config`.
    """
    import yaml

    from gem_ray.planning.needs import fetch_models

    settings = fetch_models(configured(preset, config, set_), to, lambda line: typer.echo(line, err=True))
    if settings:
        typer.echo(yaml.safe_dump(settings, sort_keys=False), nl=False)


def _size(need: ModelNeeded) -> str:
    if need.size is None:
        return "not known"
    return f"{'' if need.is_exact else '≈ '}{need.size / 1e9:.3f} GB"
