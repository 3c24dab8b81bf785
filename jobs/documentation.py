"""Pages of the documentation that are made from the code, as a hook of MkDocs: `make docs`.

They are the reference of the configuration, of the training recipes, of the commands, of the HTTP API and of the Python
API, the pages that the repository has outside `docs/`, and a page with the text of each file that another page links
to. A link to a name in a Python file, `crf.py#LinearChainCRF`, leads to the line of its definition, and one to an
equation, `model.py#eq-9`, to the line with its number. Neither torch nor Ray is imported, but for the HTTP API when the
site is built.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from typer.cli import get_docs_for_click
from typer.main import get_command

import gem_ray
from gem_ray.cli import app
from gem_ray.config import Config
from gem_ray.config_keys import Section, sections
from gem_ray.grounding.matcher_recipe import MatcherTraining
from gem_ray.grounding.text_segmenter_recipe import TextSegmenterTraining
from gem_ray.rerank.recipe import RerankerTraining
from gem_ray.tagger.recipe import TaggerTraining
from jobs.http_reference import http_page, openapi

ROOT = Path(__file__).parents[1]
RECIPES: dict[str, type[BaseModel]] = {
    "tagger": TaggerTraining,
    "reranker": RerankerTraining,
    "matcher": MatcherTraining,
    "text-segmenter": TextSegmenterTraining,
}
INCLUDED = {
    "changelog.md": "CHANGELOG.md",
    "clusters.md": "clusters/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "examples.md": "examples/README.md",
}
"""Page of the site -> page of the repository outside `docs/`."""
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
"""The target of a Markdown link or image to a file: its path and its fragment."""

_LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".toml": "toml", ".sh": "bash", ".md": "markdown"}
_CONFIGURATION = """# Configuration

Every key of the configuration. Start from a preset (`--preset one-gpu`), put a YAML file over it (`--config my.yaml`),
or set one key (`--set filter.gamma=0.3`). The tree is checked before anything starts; an unknown key is an error that
names the nearest one. The defaults below are those of the code; `nano` and the other presets change some of them:
`gem-ray config --preset one-gpu` shows the values of a preset.

The column *annotations* says whether the key changes what is annotated. A run refuses to resume with another value of
such a key; only `--only-problems` takes [other limits](../resume.md#failed-rows-only-problems), of `image` and `text`.
The others change where and how fast posts are annotated, and may differ between two starts. How to choose γ is said
[here](../evaluate.md#choose).
"""
_RECIPES = """# Training recipes

Every setting of `gem-ray train`. `--recipe-set epochs=3` changes one, `--recipe` starts from those that come with the
package ([tagger](../../gem_ray/presets/tagger/paper-roberta.yaml),
[reranker](../../gem_ray/presets/reranker/paper.yaml)).
"""
_PYTHON = """# Python API

What `gem_ray` exports, stable within a minor version. Names are imported on first use: `import gem_ray` loads neither
torch nor Ray.
"""


def configuration_page() -> str:
    """The reference of every key of the configuration."""
    return _CONFIGURATION + "".join(_section_text(section, with_effect=True) for section in sections(Config))


def recipes_page() -> str:
    """The reference of every setting of a training."""
    shown = (
        f"\n## {name.capitalize()}\n" + "".join(_section_text(each, with_effect=False) for each in sections(kind))
        for name, kind in RECIPES.items()
    )
    return _RECIPES + "".join(shown)


def _section_text(section: Section, with_effect: bool) -> str:
    """A heading and a table; every row has its path as an anchor."""
    head = ["key", "meaning", "default", "type", *(["annotations"] if with_effect else [])]
    lines = [
        f"\n## `{section.path}`\n" if section.path else "",
        section.meaning,
        "",
        _row(head),
        _row(["---"] * len(head)),
    ]
    for key in section.keys:
        effect = ["changes" if key.changes_annotations else "–"] if with_effect else []
        name = f'<span id="{key.path}">`{key.path}`</span>'
        default = key.default_text
        lines.append(
            _row(
                [
                    name,
                    key.meaning,
                    f"`{default}`" if default not in ("below", "required") else default,
                    key.type,
                    *effect,
                ]
            )
        )
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def commands_page() -> str:
    """The reference of every command and option, as `typer utils docs` writes it."""
    command = get_command(app)
    return get_docs_for_click(obj=command, ctx=typer.Context(command), name="gem-ray", title="Commands")


def python_page() -> str:
    """The reference of what the package exports, for mkdocstrings."""
    return _PYTHON + "".join(f"\n::: gem_ray.{name}\n" for name in gem_ray.__all__)


def included_page(source: Path, docs: Path) -> str:
    """A page of the repository with its links as from the folder `docs`."""

    def moved(match: re.Match[str]) -> str:
        path = os.path.relpath(source.parent / match.group(1), docs)
        return path + (match.group(2) or "")

    return LINK.sub(moved, source.read_text(encoding="utf-8"))


def line_of(name: str, file: Path) -> int:
    """The line, from 1, in which a Python file defines a function or class, or has an equation's number as a comment.

    Args:
        name: of a definition, or `eq-9` for `# eq. 9`, `eq-5-numerator` for `# eq. 5, numerator`.
        file: the Python file.

    Raises:
        ValueError: there is no such line.
    """
    comment = r"\W+".join(name.split("-"))
    wanted = re.compile(rf"# {comment}\b" if name.startswith("eq-") else rf"^\s*(?:def|class) {re.escape(name)}\b")
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if wanted.search(line):
            return number
    raise ValueError(f"{file.relative_to(ROOT)} defines no {name}")


def linked_files(text: str, folder: Path) -> Iterator[Path]:
    """Files that a Markdown text links to, by their path from `folder`; fragments are left out."""
    fences = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)
    for match in LINK.finditer(fences.sub("", text)):
        yield Path(os.path.normpath(folder / match.group(1)))


def source_page(file: Path) -> str:
    """A page with the text of a file of the repository, which the search leaves out; of a notebook, its cells."""
    name = file.relative_to(ROOT).as_posix()
    if file.suffix == ".ipynb":
        return notebook_page(json.loads(file.read_text(encoding="utf-8")))
    fence = f'`````{_LANGUAGES.get(file.suffix, "text")} linenums="1"'
    text = file.read_text(encoding="utf-8").rstrip("\n")
    return f"---\nsearch: {{exclude: true}}\n---\n# `{name}`\n\n{fence}\n{text}\n`````\n"


def notebook_page(notebook: dict[str, Any]) -> str:
    """A notebook's texts, code and stored pictures."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        pictures = [output["data"].get("image/png") for output in cell.get("outputs", ())]
        parts += [
            f'<img alt="what the cell shows" src="data:image/png;base64,{each.strip()}">' for each in pictures if each
        ]
    return "\n\n".join(parts) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from the code."""
    docs = Path(config.docs_dir)
    made = {
        "reference/configuration.md": configuration_page(),
        "reference/recipes.md": recipes_page(),
        "reference/commands.md": commands_page(),
        "reference/python.md": python_page(),
        "reference/http.md": http_page(openapi()),
    }
    made |= {uri: included_page(ROOT / source, docs) for uri, source in INCLUDED.items()}
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    pages = [file for file in files if file.is_documentation_page()]
    linked = {path for file in pages for path in linked_files(file.content_string, (docs / file.src_uri).parent)}
    for path in sorted(linked):
        if path.is_file() and path.is_relative_to(ROOT) and not path.is_relative_to(docs):
            files.append(File.generated(config, _source_uri(path), content=source_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Links to files of the repository lead to the pages with their text."""
    docs, here = Path(config.docs_dir), posixpath.dirname(page.file.src_uri)

    def inside(match: re.Match[str]) -> str:
        path = Path(os.path.normpath(docs / here / match.group(1)))
        if not path.is_file() or path.is_relative_to(docs):
            return match.group()
        fragment = match.group(2)
        title = f' "line {line_of(fragment[1:], path)}"' if fragment else ""
        return posixpath.relpath(_source_uri(path), here or ".") + title

    return LINK.sub(inside, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Links with a line as their title lead to it and show it. MkDocs checks anchors before, and knows none in code."""
    return re.sub(
        r'([\w.]+)\.html" title="line (\d+)">(.*?)</a>',
        r'\1.html#__codelineno-0-\2">\3, <code>\1:\2</code></a>',
        html,
    )


def _source_uri(path: Path) -> str:
    return f"source/{path.relative_to(ROOT).as_posix()}.md"
