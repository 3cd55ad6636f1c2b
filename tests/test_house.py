"""The house's edges: who may import whom, and that nothing is missing from the front door or the tables."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from cases import ESTIMATORS, OPTIMIZERS, SOLVERS, TRAJECTORIES

import metaopt as mo

ROOT = Path(mo.__file__).parent

# room -> rooms it may import; a room may always import itself
ALLOWED = {
    "tree": set(),
    "checks": set(),
    "table": set(),
    "files": set(),
    "replay": {"tree"},
    "layers": set(),
    "skeleton": {"layers"},
    "functional": {"skeleton", "layers", "tree"},
    "optim": {"checks", "tree"},
    "inner": {"checks", "optim", "functional", "replay", "tree"},
    "trajectory": {"checks", "inner", "optim", "replay", "tree"},
    "linsolve": {"checks", "inner", "replay", "tree"},
    "estimators": {"table", "checks", "trajectory", "linsolve", "inner", "optim", "replay", "tree"},
    "meta": {"files", "table", "checks", "estimators", "trajectory", "linsolve", "inner", "optim", "replay", "tree"},
    "models": {"checks", "inner", "optim", "functional", "layers", "tree"},
    "tasks": {"checks", "tree", "_torchvision"},
    "_torchvision": set(),
    "problem": {"table", "meta", "estimators", "inner", "tree"},
    "diagnose": {
        "table",
        "checks",
        "problem",
        "verify",
        "estimators",
        "trajectory",
        "linsolve",
        "inner",
        "optim",
        "replay",
        "tree",
    },
    "verify": {
        "table",
        "checks",
        "problem",
        "estimators",
        "trajectory",
        "linsolve",
        "inner",
        "optim",
        "replay",
        "tree",
    },
    "interop": {"checks", "optim", "inner", "functional", "tree"},
    "experiments": {
        "files",
        "checks",
        "table",
        "meta",
        "models",
        "tasks",
        "estimators",
        "problem",
        "diagnose",
        "verify",
        "trajectory",
        "linsolve",
        "inner",
        "optim",
        "functional",
        "replay",
        "tree",
    },
    "cli": {"experiments", "verify", "__version__"},
    "__main__": {"cli"},
}
# classes of a room that are no method of their own: bases, states, results
NOT_METHODS = {
    "estimators": {
        "Estimator",
        "Hypergradient",
        "NotConvergedWarning",
        "OuterObjective",
        "CompiledLoss",
        "Response",
        "Cost",
        "UnusedHyperparameterWarning",
        "UndeclaredTensorWarning",
        "ZeroHypergradientWarning",
    },
    "trajectory": {
        "Moment",
        "Trajectory",
        "Distillate",
        "Distilled",
        "Placement",
        "Store",
        "ByReference",
        "OnDevice",
        "OnDisk",
    },
    "linsolve": {"Operator", "PowerIteration", "Sketch", "Solution", "Solver", "Spectrum"},
    "optim": {"Wrapper", "PerTask", "Hyper", "Optimizer", "Interval"},
}
TABLES = {"estimators": ESTIMATORS, "trajectory": TRAJECTORIES, "linsolve": SOLVERS, "optim": OPTIMIZERS}


def _room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(node: ast.AST):
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module.split(".")[0] == "metaopt")


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path):
    room = _room(path)
    if room == "__init__":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        for name in _imports(node):
            parts = name.split(".")
            if parts[0] == "metaopt" and len(parts) > 1:
                assert parts[1] == room or parts[1] in ALLOWED[room], f"{path.name}: {room} must not import {parts[1]}"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_import_of_our_own_inside_a_function(path):
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                assert not any(name.startswith("metaopt") for name in _imports(node)), f"{path}: {function.name}"


def test_only_tree_walks_pytrees():
    users = [p.name for p in ROOT.rglob("*.py") if "_pytree" in p.read_text()]
    assert users == ["tree.py"]


@pytest.mark.parametrize("room", TABLES)
def test_every_method_has_a_row(room):
    methods = {
        name for name in getattr(mo, room, __import__(f"metaopt.{room}", fromlist=["x"])).__all__ if name[0].isupper()
    }
    rows = {case.name.split("(")[0].split(",")[0].strip() for case in TABLES[room]}
    assert methods - NOT_METHODS[room] <= rows, "add a row to tests/cases.py"


@pytest.mark.parametrize(
    "room",
    [
        "estimators",
        "trajectory",
        "linsolve",
        "inner",
        "optim",
        "meta",
        "models",
        "tasks",
        "diagnose",
        "verify",
        "interop",
    ],
)
def test_every_file_is_behind_its_front_door(room):
    front = {name for node in ast.walk(ast.parse((ROOT / room / "__init__.py").read_text())) for name in _imports(node)}
    for path in (ROOT / room).glob("*.py"):
        public = path.stem != "__init__" and not path.stem.startswith("_")
        assert not public or f"metaopt.{room}.{path.stem}" in front, f"{path.name} is not imported by {room}"


def test_estimators_are_at_the_front_door():
    for name in mo.estimators.__all__:
        assert hasattr(mo, name)


def test_files_are_not_too_long():
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, f"{path} has two jobs"


def test_importing_does_not_wait_for_the_compiler():
    loaded = "import sys, metaopt; print([m for m in ('torch._inductor.compile_fx', 'torch._dynamo.convert_frame') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout.strip()
        == "[]"
    )
