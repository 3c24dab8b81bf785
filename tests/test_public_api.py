"""What `gem_ray` exports: exactly these names, from where they are defined, and only when they are used."""

import ast
import inspect
import re
import subprocess
import sys
from importlib import import_module

import pytest

import gem_ray

HEAVY = {"torch", "transformers", "ray", "pyarrow", "pydantic", "httpx"}
PUBLIC = [
    "ANNOTATION_SCHEMA",
    "Annotation",
    "Annotator",
    "AsyncClient",
    "Box",
    "Candidate",
    "Client",
    "ClientError",
    "Config",
    "ConfigError",
    "Entity",
    "GoldEntity",
    "HeatMap",
    "INPUT_SCHEMA",
    "Point",
    "Post",
    "Problem",
    "ProblemKind",
    "RunError",
    "RunSummary",
    "SCHEMA_VERSION",
    "Status",
    "annotate_dataset",
    "load_config",
    "read_posts",
]


def _loaded_by(code: str) -> set[str]:
    """Heavy libraries that a fresh process has loaded after `code`."""
    code += f"\nimport sys; print(*set(sys.modules) & {HEAVY!r})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def _seen_by_type_checkers() -> dict[str, str]:
    """Name -> module, of the imports under `if TYPE_CHECKING`."""
    block = next(node for node in ast.parse(inspect.getsource(gem_ray)).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(block.body)
    # `import A as A` is what makes the name part of the interface.
    return {alias.asname or "": f"{node.module}:{alias.name}" for node in imports for alias in node.names}


def test_public_names_are_exactly_these():
    """A name that is added or taken away belongs into CHANGELOG.md."""
    assert gem_ray.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(gem_ray))


def test_type_checkers_see_the_same_names_from_the_same_modules():
    homes = {name: f"gem_ray.{module}:{name}" for name, module in gem_ray._HOMES.items()}
    assert _seen_by_type_checkers() == homes


@pytest.mark.parametrize("name", PUBLIC)
def test_names_are_those_of_their_modules(name):
    value = getattr(gem_ray, name)
    assert value is getattr(import_module(f"gem_ray.{gem_ray._HOMES[name]}"), name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__module__ == f"gem_ray.{gem_ray._HOMES[name]}"
        assert inspect.getdoc(value)


def test_every_name_is_in_the_docstring_and_nothing_else():
    words = set(re.findall(r"`(\w+)`", gem_ray.__doc__))
    assert words == set(PUBLIC)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'gem_ray' has no attribute 'Anotator'"):
        gem_ray.Anotator  # noqa: B018


def test_importing_the_package_loads_no_library():
    assert _loaded_by("import gem_ray; dir(gem_ray)") == set()
    assert _loaded_by("import gem_ray; gem_ray.Client") == {"httpx"}
    assert _loaded_by("import gem_ray; gem_ray.load_config") == {"pydantic"}
