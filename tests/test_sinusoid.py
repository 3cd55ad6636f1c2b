"""The sinusoid experiment: its tasks, its command, and that the same seed gives the same numbers."""

import json
import math
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from metaopt.cli import app
from metaopt.experiments import sinusoid
from metaopt.experiments.statistics import summarise
from metaopt.tasks import Sinusoid

SMALL = sinusoid.SinusoidConfig(meta_iterations=2, horizon=5, meta_batch=2, test_tasks=4)


def test_tasks_are_sinusoids_and_reproducible():
    a = Sinusoid(10, 50).sample(20, seed=3)
    b = Sinusoid(10, 50).sample(20, seed=3)
    assert torch.equal(a.train.x, b.train.x) and torch.equal(a.test.y, b.test.y)
    assert not torch.equal(a.train.y, Sinusoid(10, 50).sample(20, seed=4).train.y)
    assert a.test.x.abs().max() <= 5 and a.train.y.abs().max() <= 5
    # y = A sin(x - phi) = c sin x + d cos x fits every task exactly
    x = a.test.x[..., 0].double()
    y = a.test.y.double()
    basis = torch.stack([x.sin(), x.cos()], -1)
    fitted = basis @ torch.linalg.lstsq(basis, y).solution
    assert (fitted - y).abs().max() < 1e-4


def test_tasks_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    Sinusoid().sample(3, seed=0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("method", sinusoid.METHODS, ids=lambda m: m.key)
def test_same_seed_same_numbers(method):
    before = torch.get_rng_state()
    first = sinusoid.run(method, SMALL, seed=1)
    second = sinusoid.run(method, SMALL, seed=1)
    assert replace(first, seconds=0.0) == replace(second, seconds=0.0)
    assert first.curve != sinusoid.run(method, SMALL, seed=2).curve
    assert torch.equal(before, torch.get_rng_state())


def test_products_are_what_the_methods_say():
    T = SMALL.horizon
    M = SMALL.meta_iterations
    products = {method.key: sinusoid.run(method, SMALL, seed=0).products for method in sinusoid.METHODS}
    assert products["fo"] == 0
    assert products["drmad"] == 2 * T - 1
    assert products["rmd"] == 2 * T
    assert products["one-step"] == T + 1  # the first step's also gives the cotangent of w_0
    assert products["ift-5-5"] == 5 * (5 + 1)
    assert products["hyperdistill"] == T + (3 * T - 1) / M  # one calibration
    assert products["hyperdistill-refitted"] == T + 3 * T - 1  # one in every run


def test_command_writes_table_picture_and_json(tmp_path):
    result = CliRunner().invoke(
        app,
        [
            "compare",
            "sinusoid",
            "--estimators",
            "fo,hyperdistill",
            "--meta-iterations",
            "1",
            "--seeds",
            "2",
            "--workers",
            "1",
            "--out",
            str(tmp_path),
        ],
    )
    assert result.exit_code == 0, result.output
    assert "HyperDistill" in result.output and "DrMAD" not in result.output
    runs = json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert [(run["method"], run["seed"]) for run in runs] == [
        ("fo", 0),
        ("fo", 1),
        ("hyperdistill", 0),
        ("hyperdistill", 1),
    ]
    assert (tmp_path / "convergence.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_estimator_is_named():
    result = CliRunner().invoke(app, ["compare", "sinusoid", "--estimators", "fo,nonsense"])
    assert result.exit_code != 0
    with pytest.raises(ValueError, match=r"nonsense.*there are fo"):
        sinusoid.EXPERIMENT.select(["nonsense"])


def test_a_failed_seed_is_counted_and_left_out_of_the_mean():
    summary = summarise([0.5, 0.7, math.nan, 5.0], failed_at=3.0)
    assert summary.failed == 2 and summary.mean == pytest.approx(0.6) and summary.median == math.inf
    # t(0.975, 1 degree of freedom) = 12.706; s = 0.1 √2
    assert summary.half_width == pytest.approx(12.706 * 0.1 * math.sqrt(2) / math.sqrt(2), rel=1e-3)
