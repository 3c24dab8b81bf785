"""Every command in the documentation exists, with its options; cheap ones are run, the others say where they are."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from gem_ray.cli import app
from gem_ray.commands.options import parse_recipe_settings
from gem_ray.config import ConfigError, load_config
from gem_ray.data.shards import read_posts
from jobs.documentation import RECIPES

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "clusters/README.md", "client/README.md")),
    ROOT / "examples" / "README.md",
]
JOBS = {f"jobs/{name}.py": name for name in ("benchmark", "load_test")}

EXAMPLES = {f"python examples/{file.name}" for file in (ROOT / "examples").glob("*.py")}
"""Run by tests/test_examples.py."""
RUN = {"gem-ray shards jsonl", "gem-ray plan", "gem-ray new-key"}
"""Commands of code blocks that are run here, as they stand."""
NOT_RUN = {
    "gem-ray annotate": "tests/test_cli.py",
    "gem-ray calibrate": "tests/evaluation/test_calibration.py",
    "gem-ray errors": "tests/evaluation/test_predictions.py",
    "gem-ray evaluate": "tests/evaluation/test_predictions.py",
    "gem-ray experiment": "tests/test_cli.py",
    "gem-ray export": "tests/test_cli.py",
    "gem-ray gallery": "tests/evaluation/test_predictions.py",
    "gem-ray models fetch": "tests/planning/test_needs.py",
    "gem-ray models list": "tests/planning/test_needs.py",
    "gem-ray nano build": "trains all embedded models, for hours",
    "gem-ray reranker-tables": "tests/evaluation/test_rerank_tables.py",
    "gem-ray review certify": "tests/review/test_review.py",
    "gem-ray review read": "tests/review/test_review.py",
    "gem-ray review sample": "tests/review/test_review.py",
    "gem-ray serve": "tests/serving/conftest.py",
    "gem-ray shards generated": "tests/test_cli.py",
    "gem-ray shards twitter10000": "needs its data; tests/data/test_twitter10000.py reads them as it does",
    "gem-ray submit": "tests/jobs/test_scripts.py",
    "gem-ray train candidates": "trains a tagger on each fold; tests/rerank/test_train_reranker.py calls what it calls",
    "gem-ray train matcher": "tests/grounding/test_train_matcher.py",
    "gem-ray train reranker": "trains for minutes; tests/rerank/test_train_reranker.py calls what it calls",
    "gem-ray train tagger": "tests/test_cli.py",
    "gem-ray train text-segmenter": "trains for minutes; tests/nano calls what it calls",
    "make demo": "takes minutes; tests/nano calls what it calls",
    "make docs": "tests/test_documentation.py",
    "make install": "CI runs it before the tests",
    "make lint": "CI runs it",
    "make quick": "runs other tests",
    "make test": "runs this test",
    ".": "activates the environment that runs this test",
    "aws": "needs AWS",
    "clusters/local.sh": "tests/jobs/conftest.py",
    "curl": "needs a service; tests/serving/test_api.py sends the same form",
    "docker": "needs a container builder",
    "export": "sets a variable of a shell",
    "jq": "another program",
    "kubectl": "needs Kubernetes",
    "ray": "needs a workstation or AWS",
}
"""The other commands of code blocks: the test that runs them, or why none does."""
LEFT_OUT = re.compile(r"Missing (argument|option)|requires an argument")
"""What a sentence may leave out."""
_SHELL = {"for", "do", "done"}


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        words: as a shell would pass them.
        is_block: stands in a code block, to be copied as it is; else in a sentence, which may leave arguments out.
    """

    words: tuple[str, ...]
    is_block: bool

    def __str__(self) -> str:
        return shlex.join(self.words)


def commands_of(text: str) -> Iterator[Command]:
    """Commands of a Markdown text: those of its shell blocks, and those in a sentence that begin as ours do."""
    fence = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
    for match in fence.finditer(text):
        if match[2] in ("sh", "bash", "shell"):
            for line in match[3].replace("\\\n", " ").splitlines():
                yield from (Command(words, True) for words in commands_of_line(line))
    for code in re.findall(r"`((?:gem-ray|make|python jobs/\w+\.py) [^`]+)`", fence.sub("", text)):
        yield from (Command(words, False) for words in commands_of_line(code.replace("\n", " ")))


def commands_of_line(line: str) -> Iterator[tuple[str, ...]]:
    """The simple commands of a line of shell; `[--seeds 3]` stands for an option that may be left out."""
    line = re.sub(r"\[(-[^\]]*)\]", r"\1", line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if not set(word) <= set("&|;"):
            words.append(word)
            continue
        if words and words[0] not in _SHELL and "=" not in words[0]:
            yield tuple(words[: words.index(">")] if ">" in words else words)
        words = []


def fault_of(command: Command, folder: Path) -> str:
    """What is wrong with a command; empty if it would start."""
    program, *arguments = command.words
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return "" if set(arguments) <= set(targets) else f"no such target: {arguments}"
    if program == "gem-ray":
        before, _, after = " ".join(map(shlex.quote, arguments)).partition(" -- ")
        if before.startswith("submit ") and after:
            job = shlex.split(before)[1]
            return _parse(app, arguments, command, folder) or _parse(app, [job, *shlex.split(after)], command, folder)
        return _parse(app, arguments, command, folder)
    if program == "python" and arguments[0] in JOBS:
        job = import_module(f"jobs.{JOBS[arguments[0]]}")
        return _parse(job.app, arguments[1:], command, folder)
    if program == "python" and arguments[0] != "-m":
        return "" if (ROOT / arguments[0]).is_file() else f"no such file: {arguments[0]}"
    return ""


def _parse(typer_app: Any, arguments: list[str], command: Command, folder: Path) -> str:
    """Parse as the command line does, with callbacks that check the configuration and do nothing else."""
    for word in arguments:  # files that have to be there
        path = folder / word
        if not word.startswith("-") and "://" not in word and path.is_relative_to(folder) and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch() if path.suffix else path.mkdir()
    said, errors = io.StringIO(), io.StringIO()
    with chdir(folder), redirect_stdout(said), redirect_stderr(errors):
        try:
            _without_callbacks(typer_app).main(arguments, prog_name="gem-ray")
        except ConfigError as error:
            return str(error)
        except SystemExit as end:
            is_group = "Usage" in said.getvalue()
            may_be = not command.is_block and (is_group or LEFT_OUT.search(errors.getvalue()))
            return "" if not end.code or may_be else errors.getvalue() or f"{command} is incomplete"
    return ""


@cache
def _without_callbacks(typer_app: Any) -> Any:
    root = get_command(typer_app)
    for _, each in _leaves(root, ""):
        each.callback = _check_keys
    return root


def _leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Names of all commands, groups too, and the commands."""
    yield name, command
    for part, child in getattr(command, "commands", {}).items():
        yield from _leaves(child, f"{name} {part}".strip())


def _check_keys(
    preset: str | None = None, set_: list[str] | None = None, recipe_set: list[str] | None = None, **_: Any
) -> None:
    """In place of a command: that `--set` names keys of the configuration, and `--recipe-set` settings of a recipe."""
    load_config(preset or "nano", overrides=set_ or ())
    settings = {key for recipe in RECIPES.values() for key in recipe.model_fields}
    if wrong := parse_recipe_settings(recipe_set).keys() - settings:
        raise ConfigError(f"no recipe has the settings {wrong}")


def key_of(command: Command) -> str:
    """Name of a command in the tables above: its program, with the parts of its name where it has several."""
    program, *arguments = command.words
    if program in ("make", "python"):
        return f"{program} {arguments[0]}"
    names = [name for name, _ in _leaves(_without_callbacks(app), "")] if program == "gem-ray" else []
    ours = [name for name in names if name and " ".join(arguments).startswith(name)]
    return f"{program} {max(ours, key=len)}" if ours else program


def _documented() -> list[tuple[str, Command]]:
    pages = [(page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8")) for page in PAGES]
    return [(name, command) for name, text in pages for command in commands_of(text)]


def test_every_command_of_the_documentation_exists_with_its_options(tmp_path: Path) -> None:
    documented = _documented()
    assert len(documented) > 100
    assert {f"{page}: {command}": fault for page, command in documented if (fault := fault_of(command, tmp_path))} == {}


def test_commands_that_made_figures_say_all_that_they_need(tmp_path: Path) -> None:
    """Elsewhere in a sentence, arguments may be left out."""
    rows = re.findall(r"^\|.*\|$", (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), re.MULTILINE)
    made = [Command(each.words, True) for line in rows for each in commands_of(line) if each.words[0] == "python"]
    assert len(made) > 10
    assert {str(command): fault for command in made if (fault := fault_of(command, tmp_path))} == {}


def test_examples_of_the_help_exist_with_their_options(tmp_path: Path) -> None:
    examples = [each.epilog for _, each in _leaves(_without_callbacks(app), "") if each.epilog]
    commands = [Command(each.words, True) for text in examples for each in commands_of(text)]
    assert len(commands) > 20
    assert {str(command): fault for command in commands if (fault := fault_of(command, tmp_path))} == {}


def test_commands_to_copy_are_run_or_listed_with_the_reason() -> None:
    keys = {key_of(command) for _, command in _documented() if command.is_block}
    assert keys == RUN | EXAMPLES | NOT_RUN.keys()
    for key, where in NOT_RUN.items():
        if where.endswith(".py"):
            assert key.split()[-1] in (ROOT / where).read_text(encoding="utf-8"), (key, where)


def test_cheap_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (posts,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"), re.DOTALL)
    Path("posts.jsonl").write_text(posts, encoding="utf-8")
    ran = set()
    for command in dict.fromkeys(command for _, command in _documented() if command.is_block):
        if (key := key_of(command)) in RUN:
            ran.add(key)
            done = CliRunner().invoke(app, command.words[1:], catch_exceptions=False)
            assert done.exit_code == 0, (command, done.output)
    assert ran == RUN
    assert [post.post_id for post in read_posts("posts")] == ["1", "2"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("gem-ray anotate posts/ out/", "No such command 'anotate'"),
        ("gem-ray annotate posts/", "Missing argument 'output'"),
        ("gem-ray annotate posts/ out/ more/", "unexpected extra argument"),
        ("gem-ray annotate posts/ out/ --frehs", "No such option: --frehs"),
        ("gem-ray annotate posts/ out/ --limit many", "Invalid value for '--limit'"),
        ("gem-ray annotate posts/ out/ --set filter.gama=1", "filter.gama"),
        ("gem-ray annotate posts/ out/ --preset one-gpus", "one-gpu"),
        ("gem-ray train tagger --data posts/ --out out/ --recipe-set epoch=3", "settings {'epoch'}"),
        ("gem-ray submit annotate -- posts/ out/ --limits 5", "No such option: --limits"),
        ("gem-ray review", "incomplete"),
        ("gem-ray plan && gem-ray plans", "No such command 'plans'"),
        ("gem-ray plan \\\n  --gpu 1", "No such option: --gpu"),
        ("gem-ray plan [--gpu 1]", "No such option: --gpu"),
        ("make dcos", "no such target"),
        ("python jobs/benchmark.py thruput", "No such command 'thruput'"),
        ("python examples/none.py", "no such file"),
    ],
)
def test_a_wrong_command_is_found(line: str, fault: str, tmp_path: Path) -> None:
    faults = [fault_of(command, tmp_path) for command in commands_of(f"```sh\n{line}  # a comment\n```\n")]
    assert fault in "".join(faults)


def test_commands_are_found_in_blocks_and_sentences() -> None:
    text = (
        "Run `gem-ray serve` or `gem-ray plan\n--json`, not `make`.\n\n"
        "1. A list:\n\n   ```sh\n   gem-ray plan --out 'a b' > plan.txt  # why\n   cd x && make docs\n   ```\n\n"
        "```python\ngem-ray no command\n```\n"
    )
    assert list(commands_of(text)) == [
        Command(("gem-ray", "plan", "--out", "a b"), True),
        Command(("cd", "x"), True),
        Command(("make", "docs"), True),
        Command(("gem-ray", "serve"), False),
        Command(("gem-ray", "plan", "--json"), False),
    ]


def test_a_sentence_may_leave_arguments_out_but_not_misspell_options(tmp_path: Path) -> None:
    faults = [
        fault_of(command, tmp_path)
        for command in commands_of("`gem-ray annotate --update`, `gem-ray annotate --updat`")
    ]
    assert faults[0] == ""
    assert "No such option: --updat" in faults[1]
