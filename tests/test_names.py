"""One name is one thing, and names that docstrings mention are there."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "gem_ray").rglob("*.py"))
LIBRARIES = {"Dataset"}  # whose classes docstrings mention without an import
CLIENT = ROOT / "gem_ray" / "client.py"  # is a package of its own too, and has the answers' types itself


def defined(tree: ast.Module) -> set[str]:
    """Public classes, aliases and type variables of a module: names in capitals and small letters."""
    names = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    names |= {target.id for node in assigned for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in names if re.fullmatch(r"[A-Z]\w*[a-z]\w*", name)}


def docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def dangling(text: str, homes: dict[str, list[str]]) -> list[str]:
    """Members that docstrings of a module name, and that the modules which define their classes do not have."""
    tree = ast.parse(text)
    imported = {each.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for each in node.names}
    missing = []
    for docstring in docstrings(tree):
        for owner, member in re.findall(r"`([A-Z]\w*[a-z]\w*)\.(\w+)`", docstring):
            is_there = any(re.search(rf"\b{member}\b", home) for home in homes.get(owner, ()))
            if not is_there and (owner in homes or owner not in imported | LIBRARIES):
                missing.append(f"{owner}.{member}")
    return missing


def test_no_two_modules_give_one_name_to_different_things() -> None:
    homes = defaultdict(list)
    for file in FILES:
        if file != CLIENT:
            for name in defined(ast.parse(file.read_text(encoding="utf-8"))):
                homes[name].append(file.relative_to(ROOT).as_posix())
    assert len(homes) > 200
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


def test_members_that_docstrings_name_are_there() -> None:
    texts = {file: file.read_text(encoding="utf-8") for file in FILES}
    homes = defaultdict(list)
    for text in texts.values():
        for name in defined(ast.parse(text)):
            homes[name].append(text)
    assert {str(file): found for file, text in texts.items() if (found := dangling(text, homes))} == {}
    wrong = '"""See `Report.tasks`, `ScoreReport.tsks`, `ScoreReport.tasks` and `Trainer.train`."""\n'
    assert dangling(wrong + "from transformers import Trainer", homes) == ["Report.tasks", "ScoreReport.tsks"]
