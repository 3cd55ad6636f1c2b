"""Generated pages are up to date, and what stands on the others runs."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("script", sorted(set(DOCS.glob("*.py")) - {DOCS / "conf.py"}), ids=lambda p: p.stem)
def test_page_is_what_its_script_writes(script):
    written = script.with_suffix(".md").read_text()
    assert runpy.run_path(str(script))["page"]() == written, f"run: python docs/{script.name}"


PAGES = sorted(page for page in DOCS.glob("*.md") if "```python" in page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_blocks_of_a_page_run(page, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for library in ("jax", "torchopt", "higher"):
        if any(f"import {library}" in block for block in blocks):
            pytest.importorskip(library)
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks))
    command = [sys.executable, "-W", "error::UserWarning:metaopt", str(script)]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
