"""Generated pages are up to date."""

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("script", sorted(set(DOCS.glob("*.py")) - {DOCS / "conf.py"}), ids=lambda p: p.stem)
def test_page_is_what_its_script_writes(script):
    written = script.with_suffix(".md").read_text()
    assert runpy.run_path(str(script))["page"]() == written, f"run: python docs/{script.name}"
