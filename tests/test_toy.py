"""Adding an estimator: one file, one export (of the room and the front door), one row; what is missing is named."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILE = '''"""Toy: the direct term, and the last step's own part."""

from __future__ import annotations

from dataclasses import dataclass

from metaopt.estimators.reverse import TruncatedRMD


@dataclass(frozen=True)
class Toy(TruncatedRMD):
    """The sweep over the last two steps."""

    steps: int = 2
'''
EXPORT = (
    "metaopt/estimators/__init__.py",
    "from metaopt.estimators.uoro import UORO\n",
    "from metaopt.estimators.toy import Toy\n",
)
NAME = ("metaopt/estimators/__init__.py", '    "TruncatedES",\n', '    "Toy",\n')
FRONT = ("metaopt/__init__.py", "    SOBA,\n", "    Toy,\n")
FRONT_NAME = ("metaopt/__init__.py", '    "SOBA",\n', '    "Toy",\n')
ROW = (
    "tests/cases.py",
    "ESTIMATORS: list[EstimatorCase] = [\n",
    '    EstimatorCase("Toy", lambda T: mo.estimators.Toy()),\n',
)
STEPS = {"export": (EXPORT, NAME, FRONT, FRONT_NAME), "row": (ROW,)}
SAID = {
    "file": "No module named 'metaopt.estimators.toy'",
    "export": "toy.py is not imported by estimators",
    "row": "add a row to tests",
}


def house(tmp_path, missing=None):
    """The tests of the house, and of every estimator, in a copy that holds the toy but for one of the steps."""
    for folder in ("metaopt", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "metaopt/estimators/toy.py").write_text(FILE)
    for step, edits in STEPS.items():
        for file, after, line in edits if step != missing else ():
            path = tmp_path / file
            text = path.read_text()
            assert after in text
            path.write_text(text.replace(after, after + line, 1))
    wanted = ["tests/test_house.py", "tests/test_limits.py", "-k", "row or door or Toy"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *wanted]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


def test_one_file_one_export_one_row(tmp_path):
    found = house(tmp_path)
    assert found.returncode == 0, found.stdout[-2000:]


@pytest.mark.parametrize("missing", ["export", "row"])
def test_what_is_missing_is_named(missing, tmp_path):
    found = house(tmp_path, missing)
    assert found.returncode != 0
    assert SAID[missing] in found.stdout + found.stderr
