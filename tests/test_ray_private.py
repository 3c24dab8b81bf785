"""Private names of libraries: only where they are listed, and the installed Ray has those that we use."""

import ast
import inspect
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import worker
from ray._private.parameter import RayParams

from gem_ray.ray_private import core
from gem_ray.ray_private.core import SYSTEM_CONFIG

ROOT = Path(__file__).parents[1]
HOME = ROOT / "gem_ray" / "ray_private"
FILES = [file for folder in ("gem_ray", "jobs") for file in sorted((ROOT / folder).rglob("*.py"))]
# Documented in spite of their names, or (the last two, of transformers) without a public counterpart.
ALLOWED = {"_replace", "_exit", "_n_gpu", "_from_config"}

_EXECUTION = "ray.data._internal.execution"
_ACTOR_POOL = f"{_EXECUTION}.operators.actor_pool_map_operator:ActorPoolMapOperator"
_BACKPRESSURE = f"{_EXECUTION}.backpressure_policy:DownstreamCapacityBackpressurePolicy"
PINNED = [
    ("ray._private:worker", "_global_node"),
    ("ray._private:worker", "print_to_stdstream"),
    ("ray._private.node:Node", "kill_monitor"),
    ("ray._private.node:Node", "kill_log_monitor"),
    (_BACKPRESSURE, "OBJECT_STORE_BUDGET_UTIL_THRESHOLD"),
    (f"{_EXECUTION}.execution_callback:ExecutionCallback", "on_execution_step"),
    (f"{_EXECUTION}.streaming_executor:StreamingExecutor", "_topology"),
    (f"{_EXECUTION}.operators.map_operator:MapOperator", "_output_blocks_stats"),
    (_ACTOR_POOL, "_map_transformer_ref"),
    (_ACTOR_POOL, "_data_context_ref"),
    (_ACTOR_POOL, "_map_transformer"),
    (_ACTOR_POOL, "data_context"),
    ("ray.data.dataset:Dataset", "_logical_plan"),
    ("ray.data._internal.logical.interfaces:LogicalPlan", "dag"),
    ("ray.data._internal.logical.operators:StreamingRepartition", "ray_remote_args"),
    ("ray.data._internal.logical.operators:MapBatches", "ray_remote_args"),
    ("ray.serve.context:_get_global_client", "__call__"),
    ("ray.serve.context:_get_serve_request_context", "__call__"),
    ("ray.serve.context:_set_request_context", "__call__"),
    ("ray.serve._private.client:ServeControllerClient", "deploy_apps"),
    ("ray.serve._private.http_util:MessageQueue", "__call__"),
    ("ray.serve._private.http_util:MessageQueue", "close"),
    ("ray.serve._private.http_util:MessageQueue", "get_messages_nowait"),
    ("ray.serve._private.http_util:MessageQueue", "wait_for_message"),
    ("ray.serve._private.proxy:MessageQueue", "__call__"),
]


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _private_names(file: Path) -> list[str]:
    """Private modules and names that are imported, and private attributes of what the file has not defined itself."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    own |= {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    own |= {
        node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls")
    }
    found = []
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "") != "__future__":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [f"{node.module}: {name}" for name in names if _is_private(name)]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if any(map(_is_private, alias.name.split(".")))]
        elif isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in own | ALLOWED:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_private_names_stand_in_one_place(file: Path):
    if not file.is_relative_to(HOME):
        assert _private_names(file) == [], f"use what is public, or wrap it in {HOME.relative_to(ROOT)} and pin it here"


def test_the_rule_catches_what_it_is_for(tmp_path: Path):
    file = tmp_path / "x.py"
    file.write_text(
        "import ray._private.worker\nfrom ray.data._internal.plan import P\nfrom ray.serve.context import _client\n"
        "class A:\n    def _own(self, other):\n        return self._x, other._own, dataset._plan\n"
    )
    assert _private_names(file) == [
        "ray._private.worker",
        "ray.data._internal.plan: _internal",
        "ray.serve.context: _client",
        "dataset._plan",
    ]


def _has(owner: Any, attribute: str) -> bool:
    """True if it has it, or is a class whose instances have: a field, or what a method assigns to `self`."""
    if hasattr(owner, attribute) or attribute in getattr(owner, "__dataclass_fields__", ()):
        return True
    sources = (inspect.getsource(base) for base in getattr(owner, "__mro__", ()) if base.__module__.startswith("ray."))
    return any(f"self.{attribute}{end}" in source for source in sources for end in (" =", ":"))


@pytest.mark.parametrize(("owner", "attribute"), PINNED)
def test_installed_ray_has_the_private_names_that_we_use(owner: str, attribute: str):
    module, _, name = owner.partition(":")
    found = getattr(import_module(module), name, None) if find_spec(module) else None
    assert _has(found, attribute), (
        f"Ray {ray.__version__} has no {attribute} of {owner}; gem_ray/ray_private says what it is used for: find what "
        "has taken its place, or do without"
    )


def test_a_name_that_is_gone_is_missed():
    from ray.data.dataset import Dataset

    assert not _has(Dataset, "_no_such_plan")


@pytest.mark.parametrize("owner", [ray.init, RayParams])  # a node of a `Cluster` takes those of `RayParams`
def test_ray_takes_settings_of_its_own_processes(owner: Any):
    assert SYSTEM_CONFIG in inspect.getsource(owner)


def test_a_proxy_makes_its_queues_of_the_name_that_we_replace():
    from ray.serve._private.proxy import HTTPProxy

    assert "= MessageQueue()" in inspect.getsource(HTTPProxy)


def test_what_ray_says_of_deaths_is_not_among_results(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`listen_error_messages` prints it, by the name that we replace, and would to standard output."""
    assert "print_to_stdstream" in worker.listen_error_messages.__code__.co_names
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)  # as it is put back afterwards
    monkeypatch.setattr(
        ray,
        "init",
        lambda **_: worker.print_to_stdstream(
            {"lines": ["A worker died"], "pid": "raylet", "is_err": False}, ignore_prefix=False
        ),
    )
    core._init()
    said = capsys.readouterr()
    assert not said.out
    assert "A worker died" in said.err
    core.be_silent()
    ray.init()
    assert capsys.readouterr() == ("", "")
