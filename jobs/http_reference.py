"""The page of the HTTP reference, from the service's OpenAPI document: routes, bodies, answers, problems by status."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_JSON = "application/json"
_URL = "http://127.0.0.1:8000"
_HEAD = """# HTTP: routes and bodies

{description}

Made from the document that every service answers at `/openapi.json` and shows at `/docs`.
[HTTP: behaviour and errors](../http-api.md) says what it cannot.
"""


def openapi() -> dict[str, Any]:
    """The service's OpenAPI document. Imports Ray, and starts nothing."""
    from gem_ray.config import load_config
    from gem_ray.pools import serving_pools
    from gem_ray.serving.api import create_api
    from gem_ray.serving.service import Service

    config = load_config()
    handles: dict[str, Any] = {pool.name: None for pool in serving_pools(config)[1]}
    return create_api(Service(config, handles, run_id="")).openapi()


def http_page(document: Mapping[str, Any]) -> str:
    """The reference of an OpenAPI document, in Markdown."""
    parts = [_HEAD.format(description=document["info"]["description"])]
    schemas = document["components"]["schemas"]
    for tag in document["tags"]:
        parts.append(f"\n## {tag['name'].capitalize()}\n\n{tag['description']}\n")
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if tag["name"] in operation["tags"]:
                    parts += _operation(method.upper(), path, operation, schemas)
    parts += _problems(document["components"]["responses"])
    parts.append("\n## Bodies\n")
    for name, schema in schemas.items():
        parts += _schema(name, schema)
    return "\n".join(parts) + "\n"


def _operation(method: str, path: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    yield f"\n### `{method} {path}`\n\n{operation['summary']}."
    if operation["security"]:
        yield "\nTakes `Authorization: Bearer KEY` where the service has API keys."
    parameters = operation.get("parameters", [])
    if parameters:
        rows = [
            (f"`{each['name']}`", _meaning(each), each["in"], type_text(each["schema"]), _default(each["schema"]))
            for each in parameters
        ]
        yield _table(("parameter", "meaning", "in", "type", "default"), rows)
    body = operation.get("requestBody", {}).get("content", {})
    if body:
        yield "\nBody: " + "; or ".join(f"`{kind}`, {type_text(each['schema'])}" for kind, each in body.items()) + "."
        yield from _example(path, body, schemas)
    answers = operation["responses"]
    for status, answer in answers.items():
        if kinds := answer.get("content", {}).items():
            told = "; or ".join(f"`{kind}`, {type_text(each['schema'])}" for kind, each in kinds)
            yield f"\nAnswer: `{status}`, {told}."
    refused = [f"[{status}](#{status})" for status, answer in answers.items() if "$ref" in answer]
    yield f"\nProblems: {', '.join(refused)}."


def _example(path: str, body: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    name = _name(body[_JSON]["schema"])
    for example in schemas[name].get("examples", ()):
        data = shlex.quote(json.dumps(example, ensure_ascii=False))
        yield f"\n```sh\ncurl -H 'Content-Type: {_JSON}' -d {data} {_URL}{path}\n```"


def _problems(answers: Mapping[str, Any]) -> Iterator[str]:
    yield "\n## Problems by status\n\nThe body of each is a [Problem](#problem), as `application/problem+json`.\n"
    rows = []
    for name, answer in answers.items():
        status = name.removeprefix("Problem")
        retry = "yes, after `Retry-After` seconds" if "Retry-After" in answer.get("headers", {}) else "no"
        rows.append((f'<span id="{status}">`{status}`</span>', answer["description"], retry))
    yield _table(("status", "meaning", "send it again"), rows)


def _schema(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield f"\n### `{name}`\n\n{schema.get('description', '')}"
    if "enum" in schema:
        yield "\n" + ", ".join(f"`{value}`" for value in schema["enum"])
        return
    required = schema.get("required", ())
    rows = [
        (f"`{field}`", _meaning(each), type_text(each), "required" if field in required else _default(each))
        for field, each in schema["properties"].items()
    ]
    yield _table(("field", "meaning", "type", "default"), rows)
    for example in schema.get("examples", ()):
        yield f"\n```json\n{json.dumps(example, indent=1, ensure_ascii=False)}\n```"


def type_text(schema: Mapping[str, Any]) -> str:
    """The type that a schema describes, with links to the bodies that are described on the page."""
    if "$ref" in schema:
        return f"[{_name(schema)}](#{_name(schema).lower()})"
    if "anyOf" in schema:
        return " or ".join(type_text(option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum") or [schema["const"]])
    if schema.get("type") == "array":
        return f"list of {type_text(schema['items'])}"
    if schema.get("type") == "object":
        return f"mapping to {type_text(schema['additionalProperties'])}"
    if schema.get("type") == "null":
        return "`null`"
    kind = schema.get("contentEncoding") or {"binary": "a file"}.get(schema.get("format", ""))
    return f"{schema['type']}, {kind}" if kind else str(schema["type"])


def _name(schema: Mapping[str, Any]) -> str:
    return str(schema["$ref"]).rpartition("/")[2]


def _default(schema: Mapping[str, Any]) -> str:
    return f"`{json.dumps(schema['default'])}`" if "default" in schema else "`null`"


def _meaning(described: Mapping[str, Any]) -> str:
    return str(described.get("description", "")).replace("\n", " ")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n" + "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
