"""`gem-ray config`: every key of the configuration, with its value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gem_ray.commands.options import ConfigOption, JsonOption, PresetOption, SetOption, write_json

if TYPE_CHECKING:
    from gem_ray.config import ConfigError
    from gem_ray.config_keys import Setting

app = typer.Typer()


@app.command(epilog="Example: `gem-ray config --preset one-gpu filter grounder.matcher`")
def config(
    keys: Annotated[
        list[str] | None, typer.Argument(help="Sections or keys to show: `filter`, `filter.gamma`. Default: all.")
    ] = None,
    preset: PresetOption = "nano",
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = None,
) -> None:
    """Show every key of the configuration: its value, its type and what it does. Loads no model.

    Values are those of the preset, with `--config` and `--set` over it. Keys of a section that is null have the values
    that they would have if it were set. JSON has the default of the code, too, and whether a key changes annotations.
    """
    from gem_ray.config import load_config
    from gem_ray.config_keys import settings

    rows = _chosen(list(settings(load_config(preset, config, set_ or ()))), keys or [])
    if json is None:
        _print(rows)
        return
    write_json([_facts(*row) for row in rows], json)


def _chosen(rows: list[tuple[str, Setting, Any]], names: list[str]) -> list[tuple[str, Setting, Any]]:
    """Rows of these keys, and of those below them; all rows for no names.

    Raises:
        ConfigError: there is no such key.
    """
    paths = [path for path, _, _ in rows]
    for name in names:
        if name not in paths and not any(_is_below(path, name) for path in paths):
            raise _no_such_key(paths, name)
    return [row for row in rows if not names or any(row[0] == name or _is_below(row[0], name) for name in names)]


def _no_such_key(paths: list[str], name: str) -> ConfigError:
    """The error about a name, with those that its nearest section has."""
    from gem_ray.config import ConfigError, nearest

    section, known = name, list[str]()
    while not known:
        section, _, last = section.rpartition(".")
        known = [path[len(section) :].lstrip(".").partition(".")[0] for path in paths if _is_below(path, section)]
    return ConfigError(f"{name}: no such key; {nearest(last, list(dict.fromkeys(known)))}")


def _is_below(path: str, section: str) -> bool:
    return not section or path.startswith(f"{section}.")


def _print(rows: list[tuple[str, Setting, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from gem_ray.look.console import table_console

    table = Table("key", "value", "type", "what it does", box=None, padding=(0, 2, 0, 0))
    for path, key, value in rows:
        style = "bold" if value != key.default else ""
        plain = [each.replace("`", "") for each in (key.type, key.meaning)]
        table.add_row(Text(path, style), Text(key.text(value), style), *map(Text, plain))
    console = table_console()
    if console.is_terminal:
        table.caption, table.caption_justify = "bold: not the default of the code", "left"
    console.print(table)


def _facts(path: str, key: Setting, value: Any) -> dict[str, Any]:
    """A row of the JSON output."""
    default = {} if key.is_required else {"default": key.default}
    return {
        "key": path,
        "value": value,
        **default,
        "type": key.type,
        "changes_annotations": key.changes_annotations,
        "meaning": key.meaning,
    }
