"""Figures 3 and 4: what they are made of."""

import json

import pytest
import torch

import metaopt as mo
from metaopt.diagnose import alignment
from metaopt.experiments import diagnose, diagnose_sinusoid
from metaopt.experiments.decayed_sum import DecayedSum
from metaopt.experiments.sinusoid import SinusoidConfig
from metaopt.verify import cases


def test_equation_7_is_exact_where_the_jacobian_is_a_number_and_one_step_where_gamma_is_zero():
    problem = cases.isotropic(horizon=4)
    assert max(p.total.relative_error for p in alignment(DecayedSum(problem.contraction), problem).points) < 1e-10
    general = cases.log_l2(horizon=4)
    one, none = (alignment(e, general, at=[4]).points[0].total for e in (mo.OneStep(), DecayedSum(0.0)))
    assert one == pytest.approx(none, abs=1e-12)


def test_size_samples_lie_on_the_truth_where_distillation_is_exact(tmp_path):
    problems = [cases.isotropic(seed=seed, horizon=3) for seed in range(2)]
    problems = [mo.Problem(p.step, p.outer_loss, p.w0, p.lam, p.batches, name=p.name) for p in problems]
    gamma = cases.isotropic().contraction
    stages = diagnose.diagnose(
        {"only": problems}, {"1-step": mo.OneStep()}, mo.HyperDistill(gamma=gamma), tmp_path, gammas=[gamma]
    )
    ((x, y),) = stages[0].truth
    assert [abs(v) for v in y] == pytest.approx(x)
    assert {row["method"]: row["products"] for row in diagnose.summary(stages)} == {"1-step": 1, "HyperDistill": 1}
    assert stages[0].theta == pytest.approx(1, abs=0.2)
    assert json.loads((tmp_path / "diagnosis.json").read_text())[0]["stage"] == "only"
    assert (tmp_path / "figure3.png").stat().st_size > 10_000
    assert (tmp_path / "figure4.png").stat().st_size > 10_000


def test_a_stage_needs_a_problem_to_calibrate_on(tmp_path):
    with pytest.raises(ValueError, match="set aside for calibration"):
        diagnose.diagnose({"one": [cases.isotropic()]}, {}, mo.HyperDistill(), tmp_path)


def test_the_sinusoid_is_diagnosed_without_touching_the_random_state(tmp_path):
    before = torch.get_rng_state()
    config = SinusoidConfig(meta_iterations=1, horizon=2, meta_batch=2)
    stages = diagnose_sinusoid.run(config, tmp_path, problems=1, every=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert [stage.name for stage in stages] == ["before meta-training", "after 1 runs"]
    assert len(diagnose.summary(stages)) == 10


def test_preflight_reads_the_direction_of_a_tiny_hypergradient():
    step = mo.inner_step(lambda w, lam, _: lam * ((w - 1) ** 2).sum(), mo.optim.SGD(lr=0.1))
    outer = lambda w, lam, _: 1e-12 * (w.sum() - 9) ** 2  # noqa: E731
    problem = mo.Problem(step, outer, torch.zeros(3), torch.tensor(1.0), [None] * 4)
    assert "cosine 1.000" in repr(mo.diagnose.preflight(problem))
