"""The documentation says what every key and option is for, its links lead somewhere, and the site needs no network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import markdown
import pytest
from pydantic import BaseModel, Field
from typer.main import get_command

from gem_ray.cli import app
from gem_ray.config import Config, affecting
from gem_ray.data.prepare import post_from_row
from gem_ray.pipeline.account import Account
from gem_ray.pipeline.summary import RunSummary
from gem_ray.records import ANNOTATION_SCHEMA, ENTITY_TYPE, INPUT_SCHEMA, Problem, ProblemKind
from gem_ray.tally import Tally
from jobs.documentation import INCLUDED, RECIPES, ROOT, line_of, linked_files, sections
from jobs.http_reference import openapi

PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("*.md")),
    *(ROOT / folder / "README.md" for folder in ("clusters", "examples")),
]
LONGEST_LINE = 125
FETCHED = re.compile(
    r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(?:https?:)?//|<link(?![^>]*rel=\"?canonical)[^>]*href=\"?(?:https?:)?//"
)


@pytest.mark.parametrize("kind", [Config, *RECIPES.values()], ids=["configuration", *RECIPES])
def test_every_key_says_what_it_is_for(kind):
    assert _undescribed(kind) == []


def test_a_key_without_a_description_is_found():
    class Below(BaseModel):
        silent: int = 1

    class Tree(BaseModel):
        told: int = Field(1, description="what it does")
        below: list[Below] = Field([], description="more")

    assert _undescribed(Tree) == ["the section below.STAGE", "below.STAGE.silent"]


def _undescribed(kind: type[BaseModel]) -> list[str]:
    missing = []
    for section in sections(kind):
        missing += [] if section.meaning or not section.path else [f"the section {section.path}"]
        missing += [key.path for key in section.keys if not key.meaning]
    return missing


def test_the_reference_has_every_key_and_says_whether_it_changes_annotations():
    """As `affecting` does, by which a run that is resumed is judged."""
    shown = {key.path: key.changes_annotations for section in sections(Config) for key in section.keys}
    values = Config().model_dump(mode="json")
    deciding = dict(_leaves(affecting(values)))
    for path, _ in _leaves(values):
        if path not in shown:
            assert path in {section.path for section in sections(Config)}, path
        else:
            assert shown[path] == (path in deciding), path
    assert shown["filter.gamma"]
    assert not shown["reranker.batch_size"]
    assert not shown["pipeline.pools.STAGE.num_gpus"]


def _leaves(values: dict, path: str = "") -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        here = f"{path}.{name}".lstrip(".")
        if isinstance(value, dict) and value:
            yield from _leaves(value, here)
        else:
            yield here, value


def test_every_command_argument_and_option_says_what_it_is_for():
    missing = []
    for name, command in _commands(get_command(app), "gem-ray"):
        missing += [] if command.help else [name]
        missing += [f"{name} {param.opts[0]}" for param in command.params if not param.help]
    assert missing == []


def _commands(command, name):
    yield name, command
    for part, below in getattr(command, "commands", {}).items():
        yield from _commands(below, f"{name} {part}")


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_files_that_a_page_links_to_are_there(page):
    """Between pages, the strict build below looks at anchors too."""
    made = {ROOT / "docs" / name for name in INCLUDED}
    missing = {path for path in linked_files(page.read_text(encoding="utf-8"), page.parent) if not path.exists()} - made
    assert {path for path in missing if path.parent != ROOT / "docs" / "reference"} == set()


def problems_of(text: str) -> list[str]:
    """What a reader of a Markdown text would stumble over: marks that are no marks, and long lines of prose."""
    fences = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)
    prose = fences.sub("", text)
    html = re.sub(r"<(code|pre)>.*?</\1>", "", markdown.markdown(prose, extensions=["tables"]), flags=re.DOTALL)
    left = re.findall(r".{,30}(?:\]\(|\[\[|\*\*|`).{,30}", re.sub(r"<[^>]+>", "", html))
    long = [line for line in prose.splitlines() if len(line) > LONGEST_LINE and not line.lstrip().startswith("|")]
    return left + long


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_marks_are_closed_and_prose_is_wrapped(page):
    """Tables that commands write have the lines that they have."""
    text = page.read_text(encoding="utf-8")
    problems = problems_of(text)
    is_written = page.is_relative_to(ROOT / "docs" / "experiments")
    assert [each for each in problems if not is_written or len(each) <= LONGEST_LINE] == []


@pytest.mark.parametrize(
    "text",
    ["See [[Speed](a.md)](a.md#speed).", "It is **fast.", "Run `gem-ray plan.", "word " * 26],
)
def test_a_mark_that_is_not_closed_or_a_long_line_is_found(text):
    assert problems_of(text)
    assert problems_of(f"```\n{text}\n```\n\n| `a[[` | [b](c.md) |\n| --- | --- |\n| **c** | {'x' * 200} |\n") == []


NAMED_FILE = r"`((?:gem_ray|tests|docs|clusters|jobs|examples|client|serve_configs)/[^`\s]*)`"


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_files_that_are_named_exist_and_hold_what_they_are_said_to_hold(page):
    if page.name == "CHANGELOG.md":
        return  # of what was
    text = page.read_text(encoding="utf-8")
    paths = {path for path in re.findall(NAMED_FILE, text) if "NAME" not in path}
    assert [path for path in sorted(paths) if not list(ROOT.glob(path))] == []
    for name, path in re.findall(rf"`([\w.]+)`\s+(?:in|of)\s+{NAMED_FILE}", text):
        for part in name.split("."):
            definition = rf"^\s*(?:(?:async )?def |class )?{part}\b\s*[(:=]"
            assert re.search(definition, (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), (name, path)


def test_the_page_of_results_links_every_file_of_figures():
    docs = ROOT / "docs"
    linked = set(linked_files((docs / "results.md").read_text(encoding="utf-8"), docs))
    assert {*(docs / "benchmarks").glob("*.json"), *(docs / "experiments").rglob("table.md")} <= linked


def test_a_link_to_a_name_leads_to_its_definition():
    file = ROOT / "gem_ray" / "rerank" / "uncertainty.py"
    line = file.read_text(encoding="utf-8").splitlines()[line_of("entropy", file) - 1]
    assert line.startswith("def entropy(")
    with pytest.raises(ValueError, match="defines no entrop"):
        line_of("entrop", file)


def test_the_output_page_has_every_column_and_every_field_of_an_entity():
    page = (ROOT / "docs" / "output.md").read_text(encoding="utf-8")
    row, entity, example = re.split(r"\n## (?:An entity|An example)\n", page.split("\n## A row\n")[1])
    assert _first_cells(row) == ANNOTATION_SCHEMA.names
    fields = [ENTITY_TYPE.field(place).name for place in range(ENTITY_TYPE.num_fields)]
    assert _first_cells(entity) == fields
    shown = json.loads(example.partition("```json")[2].partition("```")[0])
    assert list(shown) == ANNOTATION_SCHEMA.names
    assert [list(each) for each in shown["entities"]] == [fields, fields]
    assert [each["seen"] for each in shown["entities"]] == [True, False]


def test_the_output_page_has_every_kind_of_problem_and_the_status_that_it_leaves():
    page = (ROOT / "docs" / "output.md").read_text(encoding="utf-8")
    rows = page.partition("\n## Problems\n")[2].partition("\n## ")[0].partition("| --- |")[2]
    told = dict(re.findall(r"^\| `(\w+)` \| (\w+)", rows, re.MULTILINE))
    assert told == {kind: Problem("ground", kind, "").status for kind in ProblemKind}


def test_the_output_page_has_every_key_of_a_runs_facts():
    page = (ROOT / "docs" / "output.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`[^|]+) \|", page.partition("\n## run.json\n")[2], re.MULTILINE)
    told = [key for cell in cells for key in re.findall(r"`(\w+)`", cell)]
    summary = RunSummary("", "", "", "", 1.0, 0, Account(), 0.0, Tally(), {}, {})
    assert sorted(told) == sorted(summary.to_dict())


def test_every_training_has_its_settings_in_the_reference():
    commands = get_command(app).commands["train"].commands  # those of `candidates` are the tagger's
    tuned = {name for name, each in commands.items() if any("--recipe-set" in param.opts for param in each.params)}
    assert tuned - {"candidates"} == set(RECIPES)


def test_the_input_page_has_every_column_and_an_example_with_gold():
    page = (ROOT / "docs" / "input.md").read_text(encoding="utf-8")
    assert _first_cells(page) == INPUT_SCHEMA.names
    (example,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    post = post_from_row(json.loads(example) | {"image": None})
    assert post.problems == []
    assert [len(mention.boxes) for mention in post.gold] == [1, 0]


def _first_cells(text: str) -> list[str]:
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


def test_the_reference_loads_no_heavy_library():
    code = "import sys, jobs.documentation; print(*sorted({'torch', 'ray', 'transformers', 'vllm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built strictly: a dead link or anchor between pages is an error."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    return out


def test_the_site_asks_the_network_for_nothing(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 10
    assert [page.name for page in pages if FETCHED.search(page.read_text(encoding="utf-8"))] == []
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.search(r"url\([\"']?(?:https?:)?//", styles)


def test_no_list_is_running_text(site):
    """MkDocs, unlike GitHub, begins a list only after an empty line."""
    running = []
    for page in site.rglob("*.html"):
        text = re.sub(r"<pre.*?</pre>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        running += [(str(page.relative_to(site)), item) for item in re.findall(r"\n *(?:[-*+]|\d+\.) .{,60}", text)]
    assert running == []


def test_titles_are_the_names_in_the_navigation(site):
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = re.findall(r'^      - "?([^"\n]+)"?: (\S+)\.md$', navigation, re.MULTILINE)
    assert len(pages) > 20
    for name, page in pages:
        html = (site / f"{page}.html").read_text(encoding="utf-8")
        assert re.search(r"<h1[^>]*>([^<]+)", html)[1] == name


def test_the_site_has_an_entry_for_each_key(site):
    page = (site / "reference" / "configuration.html").read_text(encoding="utf-8")
    for section in sections(Config):
        for key in section.keys:
            assert f'id="{key.path}"' in page


def test_equations_lead_to_the_lines_that_compute_them(site):
    link = r'href="source/([^"#]+)\.html#(__codelineno-0-(\d+))">[^"]*?, <code>([^<]+)</code></a>'
    computed = set()
    for file, anchor, number, shown in re.findall(link, (site / "paper.html").read_text(encoding="utf-8")):
        assert shown == f"{Path(file).name}:{number}"
        assert f'id="{anchor}"' in (site / "source" / f"{file}.html").read_text(encoding="utf-8"), (file, anchor)
        line = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        computed |= {int(equation) for equation in re.findall(r"# eq\. (\d+)", line)}
    assert computed == {*range(3, 12)}


def test_the_site_has_every_route_status_and_field_of_the_http_api(site):
    document = openapi()
    page = (site / "reference" / "http.html").read_text(encoding="utf-8")
    cells = set(re.findall(r"<td>(?:<span[^>]*>)?<code>([^<]+)</code>", page))
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert f"<code>{method.upper()} {path}</code>" in page
            assert {each["name"] for each in operation.get("parameters", ())} <= cells
    assert {name.removeprefix("Problem") for name in document["components"]["responses"]} <= cells
    for name, schema in document["components"]["schemas"].items():
        assert f'id="{name.lower()}"' in page
        assert schema.get("properties", {}).keys() <= cells


@pytest.mark.parametrize(
    ("asked", "page", "answer"),
    [
        ("how to resume", "resume.html", "The same command on the same output continues where it stopped"),
        ("what filter.gamma does", "reference/configuration.html", 'id="filter.gamma"'),
        ("where equation 9 is", "source/gem_ray/tagger/model.py.html", "eq. 9"),
        ("how to add an exporter", "contributing.html", 'id="add-an-exporter"'),
        ("how to add a stage", "new-stage.html", "LanguageFilter"),
        ("what an HTTP answer holds", "reference/http.html", 'id="entityout"'),
        ("an example with S3", "source/examples/s3.py.html", "s3://bucket/posts/"),
    ],
)
def test_an_answer_is_two_clicks_from_the_start(site, asked, page, answer):
    """By links of the texts alone; the navigation and the search are there besides."""
    first = _links(site / "index.html")
    second = {target for link in first if link.suffix == ".html" for target in _links(link)}
    assert site / page in first | second, asked
    assert answer in (site / page).read_text(encoding="utf-8"), asked


def _links(page: Path) -> set[Path]:
    """Files of the site that the text of a page links to."""
    article = page.read_text(encoding="utf-8").partition("<article")[2].partition("</article>")[0]
    hrefs = [href for href in re.findall(r'href="([^"#]+)', article) if ":" not in href]
    return {Path(os.path.normpath(page.parent / href)) for href in hrefs}
