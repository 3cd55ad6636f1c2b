"""The verification kit: its references agree, it passes what is right, and it fails, and says where, what is planted wrong."""

import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import metaopt as mo
from metaopt import tree
from metaopt.cli import app
from metaopt.estimators import Estimator, Response
from metaopt.estimators.reverse import sweep
from metaopt.inner import InnerState
from metaopt.verify import cases, check, command, formulas, loops, reference, subjects

CASES = pytest.mark.parametrize("make", cases.CLOSED_FORMS, ids=lambda make: make.__name__)
DRAWS = {
    "size": st.integers(1, 4),
    "conditioning": st.floats(1.0, 20.0),
    "seed": st.integers(0, 1000),
    "T": st.integers(1, 5),
}


def exact_error(problem, T, estimator):
    hg = mo.hypergradient(
        problem.step, problem.outer_loss, problem.w0, problem.lam, problem.batches, None, estimator=estimator, horizon=T
    )
    want = reference.vector(problem.exact(T))
    return float((reference.vector(hg.total) - want).norm() / want.norm().clamp_min(1.0))


@CASES
@given(**DRAWS)
def test_closed_forms_are_autograd_through_the_loop(make, size, conditioning, seed, T):
    problem = make(size, conditioning, seed, T)
    torch.testing.assert_close(reference.through_loop(problem, T), problem.exact(T), rtol=1e-10, atol=1e-10)


@CASES
@given(**DRAWS)
def test_rmd_and_truncated_rmd_are_the_closed_forms(make, size, conditioning, seed, T):
    problem = make(size, conditioning, seed, T)
    assert exact_error(problem, T, mo.RMD()) < 1e-10
    assert exact_error(problem, T, mo.TruncatedRMD(T)) < 1e-10


@CASES
def test_closed_forms_are_finite_differences_within_their_error(make):
    estimate = reference.finite_differences(make(horizon=4), 4)
    want = reference.vector(make(horizon=4).exact(4))
    assert float((estimate.value - want).abs().max()) <= estimate.error < 1e-4
    assert want.norm() > 1e-3


@given(size=DRAWS["size"], conditioning=DRAWS["conditioning"], seed=DRAWS["seed"])
def test_evograds_truth_is_implicit_differentiation(size, conditioning, seed):
    problem = cases.population(size, conditioning, seed)
    (H, mixed), _ = torch.autograd.functional.hessian(
        lambda w, lam: problem.step.inner_loss(w, lam, None), (problem.w0, problem.lam)
    )
    implicit = -2 * (problem.w0 - 0.5) @ torch.linalg.solve(H, mixed)
    torch.testing.assert_close(implicit, (problem.lam - 1) / (problem.lam + 1) ** 3, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(implicit, problem.exact(10_000), rtol=1e-10, atol=1e-12)


@given(seed=DRAWS["seed"])
def test_evograds_limit_is_its_gaussian_integral(seed):
    problem = cases.population(1, 1.0, seed)
    noise = torch.linspace(-9, 9, 401, dtype=torch.float64)
    lam = problem.lam.clone().requires_grad_()
    theta = problem.w0 + noise
    weight = (-(noise**2) / 2 - 2 * ((theta - 1) ** 2 + lam * theta**2)).softmax(0)
    (slope,) = torch.autograd.grad(((weight * theta).sum() - 0.5) ** 2, lam)
    torch.testing.assert_close(slope, problem.evograd_limit(1), rtol=1e-10, atol=1e-10)


def test_evograd_tends_to_its_limit():
    problem = cases.population(2, 3.0, seed=1)
    estimator = mo.EvoGrad(copies=200_000, sigma=1.0, temperature=0.5, noise="gaussian")
    hg = mo.hypergradient(
        problem.step, problem.outer_loss, problem.w0, problem.lam, problem.batches, None, estimator=estimator, horizon=1
    )
    want = problem.evograd_limit(1)
    assert (want - problem.exact(1)).norm() > 0.1 * want.norm()
    torch.testing.assert_close(hg.total, want, rtol=0.03, atol=0.003)


@pytest.mark.parametrize("name", [subject.name for subject in subjects.subjects()])
def test_every_public_part_passes(name, capsys):
    assert command.run(name), capsys.readouterr().out


def test_a_loop_in_plain_torch_uses_nothing_of_the_engine():
    def refuse(state, lam, batch):
        raise AssertionError("a step of the engine was taken")

    for loop in loops.loops():
        truth = loop.truth(4)
        broken = replace(loop, problem=replace(loop.problem, step=mo.custom_step(refuse))).truth(4)
        torch.testing.assert_close(broken.total, truth.total, rtol=0, atol=0)
        assert truth.total.norm() > 1e-3
        assert truth.initial.norm() > 1e-3


SIZES = {"sigma": st.floats(0.05, 1.0), "seed": st.integers(0, 1000)}


@given(
    copies=st.integers(2, 4),
    temperature=st.floats(0.1, 2.0),
    around=st.sampled_from(["before", "after"]),
    unit=st.booleans(),
    **SIZES,
)
def test_evograd_is_its_formula_at_every_setting(copies, temperature, around, unit, sigma, seed):
    estimator = mo.EvoGrad(copies, sigma, temperature, noise="gaussian", around=around, unit_rate=unit, seed=seed)
    assert check(estimator, problems=[cases.log_l2], seed=seed).passed


@given(kind=st.sampled_from([mo.TruncatedES, mo.PES]), pairs=st.integers(1, 3), window=st.integers(1, 6), **SIZES)
def test_windowed_evolution_is_its_formula_at_every_setting(kind, pairs, window, sigma, seed):
    assert check(
        kind(pairs=pairs, sigma=sigma, window=window, seed=seed), problems=[cases.momentum, cases.schedule], seed=seed
    ).passed


@given(rate=st.floats(0.01, 0.3), multiplier=st.floats(1.0, 100.0), seed=st.integers(0, 1000))
def test_f2sa_is_its_formula_at_every_setting(rate, multiplier, seed):
    assert check(mo.F2SA(rate, multiplier), problems=[cases.log_l2, cases.non_commuting], seed=seed).passed


@given(rate=st.floats(0.01, 0.3), eta=st.floats(0.1, 5.0), seed=st.integers(0, 1000))
def test_bome_is_its_formula_at_every_setting(rate, eta, seed):
    assert check(mo.BOME(rate, eta), problems=[cases.log_l2, cases.non_commuting], seed=seed).passed


@given(sketches=st.integers(1, 3), seed=st.integers(0, 1000))
def test_uoro_is_its_formula_at_every_setting(sketches, seed):
    assert check(mo.UORO(sketches, seed), problems=[cases.momentum, cases.learning_rate], seed=seed).passed


def test_an_estimator_without_a_row_fails(monkeypatch):
    monkeypatch.delitem(formulas.ENTRIES, mo.DrMAD)
    assert not command.run("DrMAD")


@pytest.mark.parametrize(
    ("table", "name"), [("TRAJECTORIES", "Full"), ("OPTIMIZERS", "SGD"), ("SOLVERS", "GMRES")], ids=lambda x: x
)
def test_a_part_without_a_row_fails(table, name, monkeypatch, capsys):
    left = [case for case in getattr(subjects, table) if case.name.split(",")[0] != name]
    monkeypatch.setattr(subjects, table, left)
    assert not command.run(name)
    assert f"{name} has no row in metaopt.verify.tables" in capsys.readouterr().out


def test_a_report_says_why_nothing_was_checked():
    class Mine(mo.FirstOrder):
        pass

    unknown = type("Unknown", (Estimator,), {name: lambda *_: None for name in ("init", "advance", "respond")})()
    for report, why in [
        (check(unknown), "Unknown has no formula and does not claim to be exact: add"),
        (check(mo.IFT(), problems=[cases.schedule]), "cannot see"),
        (check(mo.HyperDistill(), problems=[cases.non_commuting]), "one batch that repeats"),
        (check(mo.RMD(), problems=[]), "no problem was given"),
    ]:
        assert not report.passed
        assert "nothing was checked" in repr(report)
        assert why in repr(report)
        assert why in report._repr_html_()
    assert "nothing was checked" not in repr(check(Mine()))


def test_the_first_failure_stops_the_command(monkeypatch, capsys):
    row = formulas.ENTRIES[mo.DrMAD]
    monkeypatch.setitem(formulas.ENTRIES, mo.DrMAD, row._replace(indirect=lambda *args: 1.01 * row.indirect(*args)))
    assert not command.run("DrMAD", first=True)
    assert capsys.readouterr().out.count("DrMAD failed on") == 1


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="nothing is called 'Nonsense'; there are"):
        command.run("Nonsense")


def test_the_command_line_prints_a_line_per_check():
    result = CliRunner().invoke(app, ["verify", "DrMAD"])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines() if "T=6" in line]
    assert len(lines) == 10 + 6  # A and B are constant in six of them
    assert all(line[0] == "ok" for line in lines)
    assert "DrMAD: passed, 52 of 52 checks" in result.output
    assert "A, B constant" in result.output
    assert max(len(line) for line in result.output.splitlines()) <= 80


def test_the_command_line_fails_where_an_estimator_does(monkeypatch):
    row = formulas.ENTRIES[mo.DrMAD]
    monkeypatch.setitem(formulas.ENTRIES, mo.DrMAD, row._replace(indirect=lambda *args: 1.01 * row.indirect(*args)))
    result = CliRunner().invoke(app, ["verify", "DrMAD"])
    assert result.exit_code == 1
    assert "DrMAD failed on quadratic, T=1 against own formula" in result.output


def test_the_command_line_as_a_process_knows_no_other_names():
    result = subprocess.run(
        [sys.executable, "-m", "metaopt", "verify", "Nonsense"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "Nonsense" in result.stderr
    assert all(name in result.stderr for name in ("RMD", "DrMAD", "EvoGrad"))


def test_importing_metaopt_loads_no_front_end():
    code = "import sys, metaopt; print([name for name in ('rich', 'typer', 'hypothesis') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# -- planted faults ------------------------------------------------------------------------------
class Planted(mo.RMD):
    """RMD whose response a fault has changed."""

    def change(self, response, step, state, lam, carry, alpha):
        raise NotImplementedError

    def respond(self, step, state, lam, carry):
        point, pullback = super().respond(step, state, lam, carry)
        return point, lambda alpha: self.change(pullback(alpha), step, state, lam, carry, alpha)


class SignError(Planted):
    def change(self, response, step, state, lam, carry, alpha):
        return response._replace(lam=tree.scale(-1.0, response.lam))


class DroppedTerm(Planted):
    def change(self, response, step, state, lam, carry, alpha):
        moments = list(self.remembered.moments(carry, step, state))
        if len(moments) == 1:
            return response
        *_, (total, _) = sweep(step, iter(moments[:-1]), InnerState(alpha, None, state.t), lam, to_start=False)
        return Response(total)


class AscendingOrder(Planted):
    def change(self, response, step, state, lam, carry, alpha):
        moments = list(self.remembered.moments(carry, step, state))[::-1]
        *_, (total, _) = sweep(step, iter(moments), InnerState(alpha, None, state.t), lam, to_start=False)
        return Response(total)


class ConstantMomentum(Planted):
    def respond(self, step, state, lam, carry):
        return super(Planted, self).respond(mo.inner.ConstantSlots(step), state, lam, carry)


class OffByOneDrMAD(mo.DrMAD):
    def respond(self, step, state, lam, carry):
        def pullback(alpha):
            T = len(carry.given)
            moments = list(self.remembered.moments(carry, step, state))
            shifted = [
                m._replace(state=tree.lerp(carry.first, state, (T - i) / T)._replace(t=m.state.t), linearized=None)
                for i, m in enumerate(moments)
            ]
            *_, (total, _) = sweep(step, iter(shifted), InnerState(alpha, None, state.t), lam, to_start=False)
            return Response(total)

        return state.w, pullback


@dataclass(frozen=True)
class ReversedWeights(mo.HyperDistill):
    def respond(self, step, state, lam, carry):
        d = carry.distillate
        return mo.HyperDistill(gamma=1.0, theta=self.theta * self.memory_size(d.t) / d.t).respond(
            step, state, lam, carry
        )

    def memory_size(self, t):
        return sum(self.gamma ** (-i) for i in range(t))


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        (SignError(), "quadratic"),
        (DroppedTerm(), "quadratic"),
        (AscendingOrder(), "non-commuting Hessians"),
        (ConstantMomentum(), "momentum"),
        (OffByOneDrMAD(), "log-L2, direct term"),
        (ReversedWeights(gamma=0.8), "quadratic"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Estimator) else "",
)
def test_a_planted_fault_in_an_estimator_is_found(fault, where):
    report = check(fault)
    assert not report.passed
    assert any(row.case.startswith(where) for row in report.failures)
    assert "FAIL " in repr(report)


def test_an_ascending_product_fails_only_where_order_matters():
    failures = check(AscendingOrder()).failures
    assert failures
    assert not any("T=1" in row.case or row.case.startswith(("quadratic", "ridge")) for row in failures)


W = torch.tensor([0.3, -1.2], dtype=torch.float64)
LAM = {"a": torch.tensor([0.4, 0.8], dtype=torch.float64)}


def descent(state, lam, batch):
    (g,) = torch.autograd.grad((torch.cosh(state.w - lam["a"])).sum(), state.w, create_graph=True)
    return InnerState(state.w - 0.1 * g)


def test_a_right_step_passes():
    report = check(mo.custom_step(descent), W, LAM)
    assert report.passed, report
    assert check(
        mo.inner_step(lambda w, lam, _: torch.cosh(w - lam["a"]).sum(), mo.optim.SGD(lr=0.1, momentum=0.9)), W, LAM
    ).passed


def failing(step):
    return [row.case for row in check(step, W.clone(), tree.clone(LAM)).failures]


def test_a_step_that_ignores_lam_is_found():
    def ignores(state, lam, batch):
        return descent(state, tree.detach(lam), batch)

    report = check(mo.custom_step(ignores), W, LAM)
    assert "uses lam" in [row.case for row in report.failures]
    assert "Φ ignores lam at ['a']" in repr(report)


def test_a_step_that_writes_into_its_inputs_is_found():
    def writes(state, lam, batch):
        with torch.no_grad():
            lam["a"] += 1
        return descent(state, lam, batch)

    assert "purity" in failing(mo.custom_step(writes))


def test_a_step_with_hidden_state_is_found():
    calls = []

    def counts(state, lam, batch):
        calls.append(1)
        new = descent(state, lam, batch)
        return new._replace(w=new.w * (1 + len(calls)))

    assert failing(mo.custom_step(counts)) == ["replay"]


def test_a_wrong_derivative_is_found():
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return 3 * g

    def wrong(state, lam, batch):
        return descent(state, lam, batch)._replace(w=Scale.apply(descent(state, lam, batch).w))

    assert failing(mo.custom_step(wrong)) == ["jvp"]


def test_a_step_needs_its_point_in_float64():
    with pytest.raises(ValueError, match="needs w"):
        check(mo.custom_step(descent))
    with pytest.raises(ValueError, match=r"lam at \['a'\] is torch.float32"):
        check(mo.custom_step(descent), W, {"a": torch.ones(2)})


@given(seed=st.integers(0, 1000))
def test_checks_pass_for_every_seed(seed):
    assert check(mo.DrMAD(), seed=seed, problems=cases.CLOSED_FORMS[:4]).passed
