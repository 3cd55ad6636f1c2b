"""Generated pages are up to date, and what the written pages show is true."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
WRITTEN = sorted(path for path in DOCS.glob("*.md") if "```python" in path.read_text())
NEEDS = {"coming_from": ("torchopt", "jax", "jaxopt")}
FENCE = re.compile(r"^```(python|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("script", sorted(set(DOCS.glob("*.py")) - {DOCS / "conf.py"}), ids=lambda p: p.stem)
def test_page_is_what_its_script_writes(script):
    written = script.with_suffix(".md").read_text()
    assert runpy.run_path(str(script))["page"]() == written, f"run: python docs/{script.name}"


@pytest.mark.filterwarnings("ignore:JAXopt is no longer maintained:DeprecationWarning")
@pytest.mark.parametrize("page", WRITTEN, ids=lambda p: p.stem)
def test_code_prints_what_the_page_shows(page, capsys, tmp_path, monkeypatch):
    """The blocks of a page run in order in one namespace; a text block is what the python block before it printed."""
    for library in NEEDS.get(page.stem, ()):
        pytest.importorskip(library, reason=f"{library} comes with the extra bench", exc_type=ModuleNotFoundError)
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "page"}
    printed = None
    for kind, block in FENCE.findall(page.read_text()):
        if kind == "text":
            assert printed is not None, f"{page.name}: a text block follows no python block"
            assert _rounded(printed) == _rounded(block), page.name
            printed = None
            continue
        assert not printed, f"{page.name}: the page does not show what was printed: {printed}"
        exec(compile(block, page.name, "exec"), namespace)
        printed = capsys.readouterr().out
    assert not printed, f"{page.name}: the page does not show what was printed: {printed}"


def _rounded(text):
    """Numbers to three digits: other machines round otherwise. White space at the ends of lines is not shown."""
    text = re.sub(r"\d+\.\d+(e-?\d+)?", lambda number: f"{float(number.group()):.3g}", text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())
