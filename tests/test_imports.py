"""The layers of the package: who may import whom, and what must stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gem_ray"

# A module may import what lies below its own layer, and its own part. Parts of one layer do not know each other.
LAYERS = [
    {
        "records",
        "taxonomy",
        "config",
        "config_keys",
        "unread_keys",
        "recipes",
        "redaction",
        "atomic",
        "cache",
        "clock",
        "model_paths",
        "hub",
        "model_references",
        "model_files",
        "model_kind",
        "device",
        "loading",
        "scope",
        "stages",
        "pools",
        "s3",
        "training",
        "turns",
        "chat",
        "pace",
        "prometheus",
        "ray_private",
        "noise",
        "logistic",
        "confidence",
        "client",
        "strict",
        "plurals",
        "tally",
        "look",
        "process_exit",
        "process_start",
        "standard_streams",
        "vllm_on_cpu",
    },
    {"data"},
    {"knowledge", "tagger", "rerank", "grounding"},
    {"annotator"},
    {"planning", "model_check"},
    {"pipeline", "serving", "evaluation"},
    {"cluster"},
    {"benchmarks", "experiments", "export"},
    {"nano", "review"},
    {"commands"},
    {"cli"},
    {"__main__"},
    {"entrypoint"},
    {"jobs"},
]
LAYER_OF = {part: number for number, layer in enumerate(LAYERS) for part in layer}
HEAVY = ("torch", "transformers", "vllm", "ray", "peft", "torchvision")


def _modules() -> list[tuple[str, Path]]:
    """Every module's dotted name, and its file; the jobs' too, which are scripts outside the package."""
    files = sorted(PACKAGE.rglob("*.py")) + sorted((ROOT / "jobs").glob("*.py"))
    return [(".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), file) for file in files]


MODULES = _modules()


def _part(module: str) -> str:
    """`gem_ray.data.images` -> `data`; empty for the package itself."""
    parts = module.split(".")
    return parts[0] if parts[0] != "gem_ray" else ".".join(parts[1:2])


def _imported(module: str, file: Path) -> set[str]:
    """Dotted names of everything that a module imports anywhere in it, also inside functions."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from gem_ray import model_paths` imports a module, `from gem_ray.config import Config` a name of one.
            names |= {f"{source}.{alias.name}" if source == "gem_ray" else source for alias in node.names}
    return names


def _is_allowed(importer: str, imported: str) -> bool:
    if importer == imported or not imported:
        return True
    if LAYER_OF[importer] == LAYER_OF[imported] == 0:
        return True  # what is under all parts is one part
    return LAYER_OF[imported] < LAYER_OF[importer]


def test_every_part_has_a_layer():
    assert {_part(name) for name, _ in MODULES} - {""} <= set(LAYER_OF)


# The package itself exports names of many parts, when they are used: tests/test_public_api.py.
@pytest.mark.parametrize(("module", "file"), MODULES[1:], ids=[name for name, _ in MODULES[1:]])
def test_imports_go_one_way(module, file):
    importer = _part(module)
    parts = {_part(name) for name in _imported(module, file) if name.split(".")[0] == "gem_ray"}
    parts = {part for part in parts if part in LAYER_OF}  # not `gem_ray.__version__`
    wrong = sorted(part for part in parts if not _is_allowed(importer, part))
    assert not wrong, f"{module} ({importer}) may not import {', '.join(wrong)}"


def test_the_rule_catches_what_it_is_for(tmp_path):
    """Otherwise the test above could pass by seeing nothing."""
    file = tmp_path / "images.py"
    file.write_text(
        "def f():\n    from ..tagger import model\n    from gem_ray import annotator\n    import gem_ray.cli\n"
    )
    assert _imported("gem_ray.data.images", file) == {"gem_ray.tagger", "gem_ray.annotator", "gem_ray.cli"}
    assert not _is_allowed("data", "tagger")
    assert not _is_allowed("tagger", "rerank")
    assert not _is_allowed("records", "data")
    assert not _is_allowed("pipeline", "evaluation")
    assert _is_allowed("annotator", "tagger")
    assert _is_allowed("model_paths", "config")


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("*/**/__init__.py")), ids=lambda file: file.parent.name)
def test_inits_of_parts_hold_a_docstring_and_nothing_else(file):
    (docstring,) = ast.parse(file.read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(docstring.value, ast.Constant)


@pytest.mark.parametrize(
    "module",
    [
        "records",
        "taxonomy",
        "config",
        "config_keys",
        "unread_keys",
        "model_paths",
        "hub",
        "model_references",
        "cli",
        "data.images",
        "knowledge.provider",
        "tagger.recipe",
    ],
)
def test_light_modules_load_no_heavy_library(module):
    """`gem-ray --help` answers at once, and workers that only read rows stay small."""
    if not (PACKAGE / f"{module.replace('.', '/')}.py").is_file():
        pytest.skip(f"there is no gem_ray.{module}")
    code = f"import sys, gem_ray.{module}; print(*sorted(set(sys.modules) & set({HEAVY!r})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.split() == []
