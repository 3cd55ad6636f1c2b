"""metaopt: exact RMD over each trajectory, and DrMAD."""

from functools import partial
from weakref import WeakKeyDictionary

from torch import Tensor, nn

import metaopt as mo
from benchmarks.problem import Problem

WRAPPED: WeakKeyDictionary[nn.Module, mo.FunctionalModel] = WeakKeyDictionary()  # once, as a user would


def parts(problem: Problem, adjoint: mo.inner.Adjoint = mo.inner.ReverseOverReverse()):
    """``(step, loss, w, lam)``."""
    model = WRAPPED.get(problem.module) or WRAPPED.setdefault(problem.module, mo.functional(problem.module))
    w, lam = mo.partition(model.params, problem.weights)

    def loss(w, lam, batch):
        return problem.criterion(model(mo.merge(w, lam), batch[0]), batch[1])

    return mo.inner_step(loss, mo.optim.SGD(lr=problem.lr, momentum=problem.momentum), adjoint=adjoint), loss, w, lam


def trained(step: mo.inner.InnerStep, w, lam, batches):
    """The weights after plain training, no hypergradient."""
    state = step.init(w, lam)
    for batch in batches:
        state = step(state, lam, batch)
    return state.w


def gradient(
    problem: Problem, estimator: mo.Estimator, adjoint: mo.inner.Adjoint = mo.inner.ReverseOverReverse()
) -> list[Tensor]:
    step, loss, w, lam = parts(problem, adjoint)
    return list(
        mo.hypergradient(step, loss, w, lam, problem.batches, problem.outer_batch, estimator=estimator).total.values()
    )


TRAJECTORIES = {
    "Full": mo.trajectory.Full(),
    "Graphs": mo.trajectory.Graphs(),
    "Checkpointed (17 slots)": mo.trajectory.Checkpointed(),
    "Checkpointed (sqrt)": mo.trajectory.Checkpointed("sqrt"),
    "Budgeted (512 MiB)": mo.trajectory.Budgeted(512 << 20),
}
ENGINES = {
    **{
        f"ours: RMD, {name}": partial(gradient, estimator=mo.RMD(trajectory))
        for name, trajectory in TRAJECTORIES.items()
    },
    "ours: RMD, Full, mixed mode": partial(gradient, estimator=mo.RMD(), adjoint=mo.inner.ForwardOverReverse()),
    "ours: DrMAD": partial(gradient, estimator=mo.DrMAD()),
    "RMD, Full, once more": partial(gradient, estimator=mo.RMD()),  # what the same differs from itself by
}
