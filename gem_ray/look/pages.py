"""Self-contained HTML pages: one file each, which asks the network for nothing and runs no script but its own.

A page is a Jinja template beside its caller (and in `package-data` of pyproject.toml), over the theme that all share;
`page("gem_ray.pipeline", "run_report.html.j2").render(title="Run 7", run=run)` gives its HTML:

    {% extends "look/page.html.j2" %}
    {% import "look/charts.html.j2" as charts %}
    {% block main %}
    <div class="report"><section class="card"><h2>…</h2> {{ charts.bars(rows, ["kind", "posts"]) }}</section></div>
    {% endblock %}

`page.html.j2` has the blocks `lead` (under the title), `style`, `main`, and for pages with a script `data`. The
service's page is static files, which take the same `theme.css` and modules from `static`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, TypeVar

from jinja2 import Environment, PackageLoader, PrefixLoader, StrictUndefined, Template
from jinja2.loaders import ChoiceLoader
from markupsafe import Markup
from PIL import Image

from gem_ray.plurals import counted

if TYPE_CHECKING:
    import numpy as np

_Value = TypeVar("_Value")
_JPEG_QUALITY = 78
_IMPORT = re.compile(r'^import \{[^}]*\} from "\./([\w-]+\.js)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export ", re.MULTILINE)


@cache
def page(package: str, template: str, script: str | None = None) -> Template:
    """A page's template; `title` is the one value that all of them are rendered with.

    Args:
        package: whose folder holds the template, and what it includes.
        template: name of the file, as `run_report.html.j2`.
        script: a module of the package that the page runs, with those that it imports.
    """
    shared = PackageLoader("gem_ray.look", "templates")
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, ""), PrefixLoader({"look": shared})]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"named": named, "percent": percent}
    environment.policies["json.dumps_kwargs"] = {}  # a row's columns in their own order
    code = bundle(package, script) if script else ""
    environment.globals |= {
        "counted": counted,
        "tenths": tenths,
        "theme": Markup(_static("theme.css")),
        "gem": Markup(_static("gem.svg")),
        "script": Markup(code),
        "script_hash": base64.b64encode(hashlib.sha256(code.encode()).digest()).decode(),
    }
    return environment.get_template(template)


def named(category: str) -> str:
    """A category, kind or stage as people write it: `sports_team` is `sports team`."""
    return category.replace("_", " ")


def tenths(values: Sequence[_Value]) -> list[tuple[str, _Value]]:
    """Ten values, one for each tenth from 0 to 1, as the rows of a chart: `0.0 – 0.1` and so on."""
    return [(f"{at / 10:.1f} – {(at + 1) / 10:.1f}", value) for at, value in enumerate(values)]


def percent(ratio: float) -> str:
    """A ratio as the field prints it: 0.5955 is `59.55`."""
    return f"{100 * ratio:.2f}"


def bundle(package: str, entry: str) -> str:
    """A module, behind those that it imports, as one script: a page in a file cannot import.

    Args:
        package: whose folder holds the module; what is not there is one of this package.
        entry: name of the module. Names at the top level of modules must differ.
    """
    texts: dict[str, str] = {}

    def add(name: str) -> None:
        own = resources.files(package) / name
        text = own.read_text(encoding="utf-8") if own.is_file() else _static(name)
        for imported in _IMPORT.findall(text):
            if imported not in texts:
                add(imported)
        texts[name] = _EXPORT.sub("", _IMPORT.sub("", text))

    add(entry)
    return "".join(texts.values())


def jpeg(pixels: np.ndarray) -> str:
    """A small picture inside of a page.

    Args:
        pixels: (h, w, 3), uint8.

    Returns:
        The encoded image in base64.
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


def colour(name: str) -> str:
    """A colour of the light theme, as `#rrggbb`; its name is without the dashes.

    Raises:
        KeyError: the theme has no such colour.
    """
    return dict(re.findall(r"--(\w+): light-dark\((#\w{6}),", _static("theme.css")))[name]


def _static(name: str) -> str:
    return (resources.files("gem_ray.look") / "static" / name).read_text(encoding="utf-8")
