"""How the site is built: ``sphinx-build -W -b html docs docs/_build``. Everything it needs is installed; nothing is fetched."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import metaopt as mo

HERE = Path(__file__).parent
ROOT = HERE.parent

project = "metaopt"
author = "The metaopt authors"
copyright = "2026, the metaopt authors"
release = version = mo.__version__
html_title = "metaopt"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "images", "jupyter_execute"]
templates_path: list[str] = []

# notebooks are executed by the tests, and stored with what they print
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": False, "show-inheritance": False}
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


ROOMS = ("optim", "inner", "trajectory", "linsolve", "meta", "models", "tasks", "verify", "diagnose", "interop")


def public_names() -> dict[str, Any]:
    """Every name of the front door and of the rooms behind it, as a user writes it."""
    found = {f"metaopt.{name}": getattr(mo, name) for name in mo.__all__}
    for room in ROOMS:
        module = getattr(mo, room)
        found |= {f"metaopt.{room}.{name}": getattr(module, name) for name in module.__all__}
    return {name: value for name, value in found.items() if not isinstance(value, ModuleType)}


def check_every_public_name_has_a_page(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn, which fails a strict build, of what no page documents under any of its names."""
    documented = {name for name, *_ in env.domains["py"].get_objects()}
    places: dict[int, list[str]] = {}
    for name, value in public_names().items():
        places.setdefault(id(value), []).append(name)
    for names in places.values():
        if not documented.intersection(names):
            logging.getLogger(__name__).warning("no page documents %s", " or ".join(names))


def copy_tutorials(app: Sphinx) -> None:
    """The notebooks live at the top of the repository; the site shows copies."""
    target = HERE / "tutorials"
    target.mkdir(exist_ok=True)
    for notebook in sorted((ROOT / "tutorials").glob("*.ipynb")):
        shutil.copyfile(notebook, target / notebook.name)
    shutil.copytree(ROOT / "tutorials" / "examples", target / "examples", dirs_exist_ok=True)


def write_api(app: Sphinx) -> None:
    """A page for each room, with every public name of it that no earlier page has."""
    target = HERE / "api"
    target.mkdir(exist_ok=True)
    seen: set[int] = set()
    front = {name: getattr(mo, name) for name in mo.__all__}
    own = {name: value for name, value in front.items() if not isinstance(value, ModuleType)}
    (target / "metaopt.md").write_text(_page("The front door: `metaopt`", mo.__doc__, "metaopt", own, seen))
    for room in ROOMS:
        module = getattr(mo, room)
        names = {name: getattr(module, name) for name in module.__all__}
        (target / f"{room}.md").write_text(_page(f"`metaopt.{room}`", module.__doc__, f"metaopt.{room}", names, seen))


def _page(title: str, said: str | None, prefix: str, names: dict[str, Any], seen: set[int]) -> str:
    lines = [f"# {title}", "", (said or "").strip(), ""]
    for name, value in names.items():
        if isinstance(value, ModuleType) or id(value) in seen:
            continue
        seen.add(id(value))
        kind = "autoclass" if isinstance(value, type) else "autofunction" if callable(value) else "autodata"
        lines += ["```{eval-rst}", f".. {kind}:: {prefix}.{name}", *_members(value), "```", ""]
    return "\n".join(lines)


def _members(value: Any) -> list[str]:
    """Public methods are shown with a class; an inherited one is shown where it is written."""
    return ["   :members:"] if isinstance(value, type) else []


def setup(app: Sphinx) -> None:
    """Hooks of the build."""
    app.connect("builder-inited", copy_tutorials)
    app.connect("builder-inited", write_api)
    app.connect("env-check-consistency", check_every_public_name_has_a_page)
