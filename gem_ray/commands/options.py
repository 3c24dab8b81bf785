"""Options that several commands have, and how their values are read."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from gem_ray.config import Config
    from gem_ray.records import Post

EXIT_FAILED, EXIT_USAGE, EXIT_REJECTED = 1, 2, 3
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143  # as a shell reports Ctrl-C and SIGTERM

MAX_PROBLEM_SHARE = 0.5  # of posts with problems of one kind, over which `annotate` fails

PresetOption = Annotated[str, typer.Option("--preset", "-p", help="Preset to start from.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file that overrides the preset.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", "-s", help="Set a key: `filter.gamma=0.3`. Repeatable.")]
ProtocolOption = Annotated[Literal["strict", "text-key"], typer.Option(help="How mentions are matched.")]
SeedOption = Annotated[int, typer.Option(help="Random seed.", min=0)]
UnseenNamesOption = Annotated[
    float, typer.Option(help="Share of entities whose names were not in training.", min=0, max=1)
]
MapOption = Annotated[
    list[str] | None, typer.Option("--map", help="Columns with other names: `text=tweet,post_id=id`. Repeatable.")
]
SkipOption = Annotated[
    bool, typer.Option("--skip-bad-files", help="Skip files that cannot be read, and count their rows.")
]


def finite(value: float | None) -> float | None:
    """An option's number as it is; the bounds of an option let `nan` through, and `inf` where there is no upper one."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no number to count with")
    return value


PriceOption = Annotated[
    float | None,
    typer.Option(help="Price of an hour of a GPU, used or not; without GPUs, of a machine.", min=0, callback=finite),
]
RequestPriceOption = Annotated[
    float, typer.Option(help="What a million S3 requests for images cost, beside --price.", min=0, callback=finite)
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="JSON file to write; `-` prints JSON alone.")]
PerShardOption = Annotated[int, typer.Option(help="Posts in a shard.", min=1)]

DataOption = Annotated[Path, typer.Option(help="Shards with a `gold` column, or a Twitter10000 root.")]
OutOption = Annotated[Path, typer.Option(help="The model directory to write.")]
SplitOption = Annotated[str, typer.Option(help="Split of a Twitter10000 root to learn from.")]
ImagesOption = Annotated[Path | None, typer.Option(help="Images of a Twitter10000 root, named by image id.")]
RecipeSetOption = Annotated[
    list[str] | None, typer.Option("--recipe-set", help="Override one setting of the recipe: `epochs=3`. Repeatable.")
]


def configured(preset: str, file: Path | None, overrides: list[str] | None, unused: str = "") -> Config:
    """The configuration of a command.

    Raises:
        ConfigError: as `load_config` and `refuse_unread`.
    """
    from gem_ray.config import load_config
    from gem_ray.unread_keys import refuse_unread

    config = load_config(preset, file, overrides or ())
    refuse_unread(config, overrides or (), unused)
    return config


def refuse(context: typer.Context, *names: str, because: str) -> None:
    """Refuse options that were given and would do nothing.

    Args:
        context: of the command.
        names: of its parameters.
        because: why they do nothing, in words after the option's name.

    Raises:
        ConfigError: one of them was given.
    """
    from gem_ray.config import ConfigError

    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name in names and source is not None and source.name != "DEFAULT":
            raise ConfigError(f"{parameter.opts[0]} {because}")


def refuse_without_root(context: typer.Context, data: Path, dev: Path | None = None) -> None:
    """Refuse options that choose from a Twitter10000 root where there is none.

    Args:
        context: of the command.
        data: what `--data` names.
        dev: what `--dev` names.

    Raises:
        ConfigError: one of them was given.
    """
    from gem_ray.data.twitter10000 import is_root

    of_dev = data if dev is None else dev
    if not is_root(data):
        refuse(
            context, "split", because=f"is of a Twitter10000 root, which {data} is not: give the shards of the split"
        )
    if not is_root(of_dev):
        refuse(context, "dev_split", because=f"is of a Twitter10000 root, which {of_dev} is not: --dev takes shards")
    if not (is_root(data) or is_root(of_dev)):
        refuse(context, "images", because=f"is for a Twitter10000 root, which {data} is not: shards hold their images")


def write_json(values: Any, to: Path | None) -> bool:
    """Do what `--json` asks for.

    Returns:
        Whether the values were printed, and nothing else may be.
    """
    import json

    from gem_ray.data.files import whole_text

    if str(to) == "-":
        typer.echo(json.dumps(values, indent=2))  # in ASCII, which every terminal has
        return True
    if to is not None:
        with whole_text(to) as file:
            file.write(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    return False


def labelled_posts(data: Path, split: str, images: Path | None = None, labels: str = "fmnerg") -> list[Post]:
    """Posts with gold, from shards or from a Twitter10000 root."""
    from gem_ray.data.convert import embedded
    from gem_ray.data.shards import read_labelled
    from gem_ray.data.twitter10000 import is_root, read_split
    from gem_ray.taxonomy import LABEL_SETS

    if not is_root(data):
        return read_labelled(data, LABEL_SETS[labels])
    posts = read_split(data, split, LABEL_SETS[labels], images)
    return list(embedded(posts, images)) if images else posts


def parse_columns(mappings: list[str] | None) -> dict[str, str]:
    """Field of an input row -> the column that holds it, of `--map` arguments.

    Raises:
        ConfigError: a mapping that is no `field=column`, of an unknown field, or of one twice.
    """
    from gem_ray.config import ConfigError, nearest
    from gem_ray.records import INPUT_SCHEMA

    columns: dict[str, str] = {}
    for mapping in ",".join(mappings or ()).split(",") if mappings else ():
        field, equals, column = (part.strip() for part in mapping.partition("="))
        if not equals or not column:
            raise ConfigError(f"--map takes field=column, not {mapping!r}")
        if field not in INPUT_SCHEMA.names:
            raise ConfigError(f"--map: there is no field {field!r}; {nearest(field, INPUT_SCHEMA.names)}")
        if field in columns:
            raise ConfigError(f"--map names {field} twice")
        columns[field] = column
    return columns


def parse_recipe_settings(overrides: list[str] | None) -> dict[str, Any]:
    """Values of the `key=value` arguments of `--recipe-set`.

    Raises:
        ConfigError: an override that is no `key=value`, or whose value is no YAML.
    """
    from gem_ray.config import ConfigError, parse_value
    from gem_ray.redaction import redacted

    values: dict[str, Any] = {}
    for override in overrides or ():
        name, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"--recipe-set takes key=value, not {redacted(override)!r}")
        values[name.strip()] = parse_value(override, value)
    return values


def same_command(arguments: Collection[str]) -> str:
    """The command that continues one that was stopped, also while it still counted its input.

    Once there is progress, what was begun anew or taken in is part of the run.

    Args:
        arguments: of the command that was stopped.
    """
    flag = next((flag for flag in ("--fresh", "--update") if flag in arguments), None)
    return f"the same command without {flag} (with it, if no progress was shown yet)" if flag else "the same command"
