"""How the site is built: ``sphinx-build -W -b html docs docs/_build``. Everything it needs is installed; nothing is fetched."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils.nodes import Element
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

import metaopt as mo

HERE = Path(__file__).parent
ROOT = HERE.parent

project = "metaopt"
author = "The metaopt authors"
release = version = mo.__version__
html_title = "metaopt"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_show_copyright = False
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
autodoc_inherit_docstrings = False  # what a method does is said once, at the contract
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
    """The notebooks and the examples they link to live at the top of the repository; the site shows copies."""
    target = HERE / "tutorials"
    target.mkdir(exist_ok=True)
    for notebook in sorted((ROOT / "tutorials").glob("*.ipynb")):
        shutil.copyfile(notebook, target / notebook.name)
    shutil.copytree(ROOT / "tutorials" / "examples", target / "examples", dirs_exist_ok=True)


def leave_out_fields(app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """The fields of a NamedTuple are described in its docstring; Python's own words for them say nothing."""
    return True if (getattr(value, "__doc__", None) or "").startswith("Alias for field number") else None


def find_by_last_name(app: Sphinx, env: BuildEnvironment, node: Element, contents: Element) -> Element | None:
    """Lead a reference to the one page that documents the name, whichever of its names the docstring uses."""
    if node.get("refdomain") != "py":
        return None
    parts = node["reftarget"].split(".")
    found = []
    for name, _, kind, page, anchor, priority in env.domains["py"].get_objects():
        length = 2 if kind in ("method", "property", "attribute") else 1  # those go by the name of their class, too
        if priority >= 0 and name.split(".")[-length:] == parts[-length:]:
            found.append((page, anchor))
    if len(found) != 1:
        return None
    page, anchor = found[0]
    return make_refnode(app.builder, node["refdoc"], page, anchor, contents)


def setup(app: Sphinx) -> None:
    """Hooks of the build."""
    app.connect("autodoc-skip-member", leave_out_fields)
    app.connect("missing-reference", find_by_last_name)
    app.connect("builder-inited", copy_tutorials)
    app.connect("env-check-consistency", check_every_public_name_has_a_page)
