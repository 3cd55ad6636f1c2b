"""Ten jobs in a few lines each, and the same job written in higher's idiom or as a plain loop: equal to 1e-9."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "tutorials" / "examples"
JOBS = sorted(path.stem for path in FOLDER.glob("*.py"))
LINES = 20


def test_there_are_ten():
    assert len(JOBS) == 10


@pytest.fixture(params=JOBS)
def job(request, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(request.param, FOLDER / f"{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    spec.loader.exec_module(module)
    yield module
    for name in set(sys.modules) - before:
        if name in JOBS:
            del sys.modules[name]


def test_both_codes_give_the_same(job):
    ours, theirs = job.compared()
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", JOBS)
def test_ours_is_at_most_twenty_lines(name):
    code = ast.parse((FOLDER / f"{name}.py").read_text())
    (ours,) = [node for node in code.body if isinstance(node, ast.FunctionDef) and node.name == "ours"]
    assert ours.end_lineno - ours.lineno <= LINES
