"""The package as it is installed: what importing it brings along, what it calls itself, what its archives hold."""

import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from typer.testing import CliRunner

import metaopt as mo
from metaopt.cli import app

ROOT = Path(mo.__file__).parents[1]


def loaded_by(statement: str) -> set[str]:
    program = f"import sys, torch; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(found.stdout.split())


@pytest.mark.parametrize("heavy", ["matplotlib", "higher", "scipy.sparse", "PIL", "pandas", "hypothesis", "rich"])
def test_importing_does_not_bring_along(heavy):
    assert heavy not in loaded_by("import metaopt")


def test_rooms_with_other_libraries_come_on_demand():
    assert "higher" in loaded_by("import metaopt; metaopt.interop")
    assert "PIL" in loaded_by("import metaopt; metaopt.tasks")


def test_the_front_door_lists_its_names_only():
    assert dir(mo) == sorted(mo.__all__)
    for name in mo.__all__:
        getattr(mo, name)
    with pytest.raises(AttributeError, match="no_such_name"):
        mo.no_such_name  # noqa: B018


def test_version():
    shown = CliRunner().invoke(app, ["--version"])
    assert shown.exit_code == 0
    assert shown.output.split() == ["metaopt", mo.__version__]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {mo.__version__}\n" in citation


def test_the_distribution_has_a_name_of_its_own():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "torch-metaopt"
    assert project["scripts"] == {"metaopt": "metaopt.cli:main"}
