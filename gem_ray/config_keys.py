"""Facts about each key of a tree of settings: where it is, its type, its default, and what it does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from gem_ray.config import Config, section_type
from gem_ray.stages import LOAD_IMAGE

_POOL = "STAGE"  # in a path: the pool that lists this stage


@dataclass(frozen=True)
class Setting:
    """A key of the configuration, or a setting of a recipe.

    Attributes:
        path: `filter.gamma`; `pipeline.pools.STAGE.num_gpus` for a key that each pool has.
        type: as people write it, `number > 0 or null`.
        default: of the code, as JSON has it.
        is_required: it has no default.
        is_section: it has keys below it, and may be null or a list.
        changes_annotations: another value may change what is annotated.
        meaning: what it does.
    """

    path: str
    type: str
    default: Any
    is_required: bool
    is_section: bool
    changes_annotations: bool
    meaning: str

    def text(self, value: Any) -> str:
        """A value of this key, as JSON; "below" for a section that is not null."""
        return "below" if self.is_section and value else json.dumps(value, ensure_ascii=False)

    @property
    def default_text(self) -> str:
        """The default as `text`, or "required"."""
        return "required" if self.is_required else self.text(self.default)


@dataclass(frozen=True)
class Section:
    """Keys that stand under one path; that of the whole tree is empty."""

    path: str
    meaning: str
    keys: list[Setting]


def sections(kind: type[BaseModel], path: str = "", affects: bool = True) -> Iterator[Section]:
    """A tree of settings, section by section, each before those under it.

    Args:
        kind: the model of the section.
        path: where it is in the tree, `grounder.matcher`.
        affects: whether the section that it is in changes annotations.
    """
    properties = kind.model_json_schema()["properties"]
    keys, below = list[Setting](), list[Section]()
    for name, field in kind.model_fields.items():
        schema = properties[name]
        own_path = f"{path}.{name}".lstrip(".")
        changes = affects and schema.get("affects_output", True)
        section = section_type(field.annotation)
        if section is not None:
            below += sections(section, own_path + (f".{_POOL}" if schema.get("type") == "array" else ""), changes)
        if section is None or "$ref" not in schema:  # one that is always there needs no line of its own
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            keys.append(
                Setting(
                    own_path,
                    _type_text(schema),
                    to_jsonable_python(default),
                    field.is_required(),
                    section is not None,
                    changes,
                    schema.get("description", ""),
                )
            )
    yield Section(path, (kind.__doc__ or "").strip(), keys)
    yield from below


def settings(config: Config) -> Iterator[tuple[str, Setting, Any]]:
    """Every key as `--set` names it, with its value in a configuration; credentials are cut out.

    A pool is named by its first stage: `pipeline.pools.ground.num_gpus`. A key of a section that is null has the value
    that it would have if the section were set: its default.
    """
    tree = config.public()
    for section in sections(Config):
        for key in section.keys:
            yield from ((path, key, value) for path, value in _found(tree, key.path.split("."), key.default))


def _found(tree: Any, keys: list[str], default: Any) -> Iterator[tuple[str, Any]]:
    """The paths that `keys` stand for in a tree, and what is there."""
    if tree is None:
        yield ".".join(keys), default
        return
    first, *rest = keys
    pools = {_name_of_pool(pool, place): pool for place, pool in enumerate(tree)} if first == _POOL else None
    for name, child in (pools or {first: tree[first]}).items():
        if not rest:
            yield name, child
        else:
            yield from ((f"{name}.{path}", value) for path, value in _found(child, rest, default))


def _name_of_pool(pool: Mapping[str, Any], place: int) -> str:
    """A stage that this pool alone lists; else its place, from 0."""
    return next((name for name in pool["stages"] if name != LOAD_IMAGE), str(place))


def _type_text(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type_text(option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum") or [schema["const"]])
    if "$ref" in schema:
        return "section"
    if schema["type"] == "array":
        return f"list of {_type_text(schema['items'])}"
    if schema["type"] == "object":
        return f"mapping to {_type_text(schema['additionalProperties'])}"
    if schema.get("format") == "path":
        return "path"
    names = {"boolean": "true or false", "null": "`null`"}
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[name]:g}" for name, sign in limits.items() if name in schema]
    return " ".join([names.get(schema["type"], schema["type"]), ", ".join(bounds)]).strip()
