"""The house style: a method looks the same everywhere, one point is seen, names of lines do not overlap, tables fit."""

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from metaopt.experiments import diagnose_sinusoid, many_shot_report, pictures, rotation, sinusoid
from metaopt.experiments.image_data import Source
from metaopt.experiments.many_shot import ManyShotRun
from metaopt.experiments.many_shot_settings import configure

NAMES = [method.title for method in sinusoid.METHODS]


def test_a_method_has_the_same_colour_in_every_figure():
    everything = pictures.styles(NAMES)
    for name in NAMES:
        assert pictures.styles([name])[name].color == everything[name].color
    of_figure_3 = pictures.styles([*diagnose_sinusoid.METHODS, "HyperDistill"])
    assert of_figure_3["HyperDistill"].color == everything["HyperDistill, γ=.9"].color
    assert of_figure_3["1-step"].color == everything["1-step"].color


def test_methods_of_a_figure_are_told_apart():
    for experiment in (sinusoid.EXPERIMENT, rotation.EXPERIMENT):
        styles = pictures.styles([method.title for method in experiment.methods])
        assert len(set(styles.values())) == len(styles)


def drawn(curves, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: kept.append(figure))
    pictures.draw_curves(curves, tmp_path / "x.png", title="what is seen", ylabel="y")
    return kept[0].axes[0]


def test_a_curve_of_one_point_is_drawn_as_a_point(tmp_path, monkeypatch):
    axes = drawn({"FO": [[1.0], [2.0]], "1-step": [[1.0, 2.0]]}, tmp_path, monkeypatch)
    # the shorter curve counts as infinite from there, so that one point is left
    assert [line.get_marker() for line in axes.lines] == ["o", "None"]
    assert axes.get_title().startswith("what is seen")


def test_few_lines_are_named_at_their_ends_and_many_in_a_legend(tmp_path, monkeypatch):
    few = {"FO": [[1.0, 2.0]], "1-step": [[1.0, 2.0]], "DrMAD": [[3.0, 1.99]]}
    axes = drawn(few, tmp_path, monkeypatch)
    assert sorted(text.get_text() for text in axes.texts) == sorted(few)
    heights = sorted(text.xy[1] for text in axes.texts)
    assert np.diff(heights).min() > 0.05 and 0 <= heights[0] and heights[-1] <= 1
    assert axes.get_legend() is None
    many = drawn({name: [[1.0, 2.0]] for name in NAMES}, tmp_path, monkeypatch)
    assert [text.get_text() for text in many.get_legend().get_texts()] == NAMES


def test_panels_have_letters_where_there_are_several():
    _, grid = pictures.panels(4, 4, 2, 2)
    assert [axes.get_title(loc="left") for axes in grid.flat] == ["(a)", "(b)", "(c)", "(d)"]
    _, ((single,),) = pictures.panels(4, 4)
    assert single.get_title(loc="left") == ""


RUN = sinusoid.SinusoidRun(method="", seed=0, seconds=0.1, test_error=0.5, curve=[1.0], products=3.0)


@pytest.mark.parametrize("width", [80, 120])
def test_a_table_shows_every_name_and_number_whole(width):
    runs = [replace(RUN, method=method.key, seed=seed) for method in sinusoid.METHODS for seed in range(2)]
    console = Console(width=width, file=io.StringIO())
    console.print(pictures.fitted(sinusoid.table(sinusoid.METHODS, runs, sinusoid.SinusoidConfig()), console))
    shown = console.file.getvalue()
    lines = shown.splitlines()
    assert max(map(len, lines)) <= width
    tables = shown.count("method")
    assert tables == {80: 2, 120: 1}[width]
    for name in NAMES:
        assert sum(name in line.split("│")[1] for line in lines if "│" in line) >= tables
    for number in ("0.500 ± 0.000", "1.086 ± .176", "products / run"):
        assert number in shown


@pytest.mark.parametrize(("name", "published"), [("tinyimagenet", True), ("glyphs", False), ("cifar100", False)])
def test_the_papers_column_is_shown_on_the_papers_data_only(name, published):
    run = ManyShotRun(
        method="fo", seed=0, seconds=1.0, accuracy=0.5, curve=[], validation=[], theta=[], products=0.0, weights=[]
    )
    methods = many_shot_report.METHODS[:1]
    table = many_shot_report.table(methods, [run], configure("anil", Source(name)))
    assert ("paper" in [column.header for column in table.columns]) == published
