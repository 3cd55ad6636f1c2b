"""What the README shows is true."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_prints_what_is_shown_and_draws(capsys, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (shown,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(compile(code, "README.md", "exec"), namespace)
    assert _rounded(capsys.readouterr().out) == _rounded(shown)
    assert (tmp_path / "tuned.png").stat().st_size > 10_000
    losses = namespace["history"]["outer loss"]
    assert losses[-1] < 0.6 * losses[0]


def _rounded(text):
    """Numbers to three digits: other machines round otherwise."""
    return re.sub(r"\d+\.\d+", lambda number: f"{float(number.group()):.3g}", text)


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(targets) > 10
    for target in targets:
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_it_is_short():
    assert len(README.splitlines()) <= 90
