"""The cost model against measured counts and bytes, and the suggestions that follow from it."""

import pytest
import torch

import metaopt as mo
from metaopt.diagnose.suggest import Sizes, predicted_cost, states_held, suggest_estimator
from metaopt.verify import cases

T = 12
STATE = 1000 * 8
ASKED = {
    "RMD": {"memory": T * STATE},
    "Checkpointed": {"memory": 4 * STATE},
    "FMD": {"memory": 2 * STATE, "hyperparameters": 2},
    "HyperDistill": {"memory": T * STATE, "online": True},
    "HyperDistill, offline": {"memory": STATE, "horizon": 50},
    "OneStep": {"memory": 0, "online": True},
    "IFT": {"memory": 0, "solved": True},
    "AntitheticES": {"memory": 2 * STATE, "differentiable": False},
    "NRES": {"memory": 2 * STATE, "differentiable": False, "online": True},
}


def suggested(name, horizon=T):
    asked = dict(ASKED[name])
    sizes = Sizes(asked.pop("horizon", horizon), asked.pop("hyperparameters", 50), STATE)
    return suggest_estimator(sizes, **asked)


@pytest.mark.parametrize("name", ASKED)
def test_a_suggestion_is_the_one_its_reason_gives_and_fits(name):
    found = suggested(name)
    assert name.split(",")[0] in repr(found.estimator)
    assert found.state_bytes <= max(ASKED[name]["memory"], STATE)
    assert found.reason in str(found)


@pytest.mark.filterwarnings("ignore::metaopt.NotConvergedWarning")
@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("horizon", [1, 2, 7, 12])
def test_the_model_is_what_is_counted(name, horizon):
    estimator = suggested(name, horizon).estimator
    p = cases.log_l2(horizon=horizon, size=3)
    found = mo.hypergradient(p.step, p.outer_loss, p.w0, p.lam, p.batches, None, estimator=estimator).cost
    assert found == predicted_cost(estimator, horizon, 3)


@pytest.mark.parametrize("slots", [1, 2, 3, 20])
def test_repeated_steps_are_counted(slots):
    for horizon in range(1, 20):
        p = cases.log_l2(horizon=horizon, size=1)
        estimator = mo.RMD(mo.trajectory.Checkpointed(slots=slots, horizon=horizon))
        found = mo.hypergradient(p.step, p.outer_loss, p.w0, p.lam, p.batches, None, estimator=estimator).cost
        assert found == predicted_cost(estimator, horizon, 1)


def test_memory_follows_the_states_held():
    def peak(estimator):
        step = mo.inner_step(lambda w, lam, b: 0.5 * (lam * w * w).sum(), mo.optim.SGD(lr=0.1))
        w0 = torch.ones(1000, dtype=torch.float64)
        lam = torch.tensor(0.5, dtype=torch.float64)
        problem = mo.Problem(step, lambda w, lam, b: w.sum(), w0, lam, [None] * 30, name="big")
        return mo.diagnose.costs(estimator, problem, repeats=0).expenses[0].peak_bytes

    few, many = (mo.RMD(mo.trajectory.Checkpointed(slots=c, horizon=30)) for c in (4, 12))
    held = states_held(many, 30, 1) - states_held(few, 30, 1)
    assert peak(many) - peak(few) == pytest.approx(held * STATE, rel=0.01)


def test_sizes_are_those_of_a_problem():
    problem = cases.momentum(size=4, horizon=6)
    sizes = Sizes.of(problem)
    assert sizes == Sizes(6, problem.lam.numel(), 2 * 4 * 8)  # weights and momentum
    assert suggest_estimator(problem) == suggest_estimator(sizes)


def test_bad_sizes_and_unknown_estimators_are_errors():
    with pytest.raises(ValueError, match="horizon=0"):
        suggest_estimator(Sizes(0, 1, 1), memory=1)
    with pytest.raises(ValueError, match="no cost model for DrMAD"):
        predicted_cost(mo.DrMAD(), 3, 1)
