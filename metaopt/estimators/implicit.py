"""Implicit differentiation at the state reached."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from metaopt import checks, tree
from metaopt.estimators._last_step import FromLastStep, Remembered
from metaopt.estimators.base import Pullback, Response, Traits
from metaopt.inner.contract import Linearized, Stationary, Step
from metaopt.inner.state import InnerState
from metaopt.linsolve import GMRES, ConjugateGradient, Solution, Solver, solve_from
from metaopt.trajectory import Moment
from metaopt.tree import Tree


class NotConvergedWarning(UserWarning):
    """Implicit differentiation where its assumption does not hold.

    Away from a minimum, or with a linear system that is not solved.
    """


ITERATIONS = 100
"""Of the default solver, at most."""


@dataclass(frozen=True)
class IFT(FromLastStep):
    r"""``α (I - A)^{-1} B`` at the last weights and the last batch, by a linear solver.

    .. math::
        \frac{dw^*}{d\lambda} = (I - A)^{-1} B, \qquad\text{with gradient descent's } A, B:\quad
        -\alpha H^{-1} \frac{\partial^2 L}{\partial w\, \partial \lambda}

    Lorraine et al. 2020, `arXiv 1911.02590 <https://arxiv.org/abs/1911.02590>`__ (Neumann series);
    Pedregosa 2016, `arXiv 1602.02355 <https://arxiv.org/abs/1602.02355>`__.

    ``A`` and ``B`` are those of gradient descent on the inner loss, whatever optimiser ran (a
    custom Φ is taken as its own fixed-point map), so the optimiser's memory plays no part. Cost:
    one gradient, the solver's products and one more. Memory: one graph, and the solver's. Bias:
    right only at a stationary point of the inner loss; elsewhere it answers another question. May
    be used online near convergence. The hypergradient's ``info`` is the solver's
    :class:`~metaopt.linsolve.Solution`.

    Args:
        solver: from :mod:`metaopt.linsolve`. Default: conjugate gradients on the Hessian of the
            inner loss, and for a custom Φ, whose derivative is not symmetric, GMRES. Both are right
            at a solution whatever the learning rate was.
        converged: warn where the inner gradient's norm (a custom Φ: ``‖w - Φ(w)‖``) is larger;
            ``None``: it is meant to be used there.
        solved: warn where the solver's relative residual, which is measured, is larger; ``None``: it
            is meant. At 1 the answer is as bad as none.
        warm_start: solve for the correction of the last hyper-step's solution; the pullback is then
            affine in α.
        start: ``info`` of an earlier hypergradient to start from.

    Raises:
        ValueError: if a hyperparameter enters through the optimiser alone (a learning rate): the
            solution does not move with it.

    Warns:
        NotConvergedWarning: see ``converged`` and ``solved``.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 30)
    >>> problem.hypergradient(mo.IFT()).total  # dw*/dλ = 1, at the solution
    tensor([1.])
    """

    traits: ClassVar[Traits] = Traits(
        sees="a solution", high_dimensional=True, bias="away from a solution; the solver's residual"
    )

    sees_optimizer = False

    solver: Solver | None = None
    converged: float | None = 1e-2
    solved: float | None = 0.1
    warm_start: bool = False
    start: Solution | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("converged", "solved"):
            if getattr(self, name) is not None:
                checks.non_negative(self, name, getattr(self, name))
        checks.flag(self, "warm_start", self.warm_start)
        if self.solver is not None:
            checks.provides(self, "solver", self.solver, "solve", "for instance mo.linsolve.GMRES()")

    @override
    def start_of(self, state: InnerState, lam: Tree) -> Solution | None:
        return self.start

    @override
    def respond(self, step: Step, state: InnerState, lam: Tree, carry: Remembered) -> tuple[Tree, Pullback]:
        """The weights, and the implicit pullback; all its calls share one graph."""
        at = self.last_of(carry)._replace(lam=lam)
        kept: list[tuple[Solver, InnerState, Linearized]] = []

        def pullback(alpha: Tree) -> Response:
            tree.check_like(alpha, state.w, "alpha", "w")
            if not kept:
                kept.append(self._fixed_point(step, at))
            solver, seen, linearized = kept[0]

            def operator(v: InnerState) -> InnerState:
                product, _ = linearized.pullback(v, "state")
                return tree.sub(v, product)

            cotangent = InnerState(alpha, tree.zeros_like(seen.slots), seen.t)
            found = solve_from(solver, operator, cotangent, carry.own)
            self._check_solved(solver, found.residual)
            _, product = linearized.pullback(found.x, "lam")
            _check_seen(step, at, alpha, product)
            return Response(product, info=found)

        return state.w, pullback

    def reuse(self, carry: Remembered, info: Solution) -> Remembered:
        """The solution is where the next hyper-step starts from, with ``warm_start``."""
        return carry._replace(own=info) if self.warm_start else carry

    def _fixed_point(self, step: Step, at: Moment) -> tuple[Solver, InnerState, Linearized]:
        """The solver and the fixed-point map at the last weights, and a warning where they are not a fixed point."""
        stationary = step.stationary(at.state, 1.0 if self.solver is None else self.solver.descent_rate)
        solver = self.solver
        if solver is None:
            solver = ConjugateGradient(ITERATIONS) if stationary.symmetric else GMRES(ITERATIONS)
        with at.replayed():
            linearized = stationary.step.linearize(stationary.state, at.lam, at.batch)
        if self.converged is not None:
            self._check_converged(gradient_norm(stationary, linearized), self.converged)
        return solver, stationary.state, linearized

    def _check_converged(self, norm: Tensor, bound: float) -> None:
        if not bool(norm <= bound):
            warnings.warn(
                f"IFT: the inner gradient's norm is {float(norm):.3g} on the last batch, above converged={bound:g}: "
                "this is not a solution of the inner "
                "problem, and the implicit function theorem does not hold there. Train longer, put weight decay into "
                "the loss instead of the "
                "optimiser, use RMD or HyperDistill, or say that it is meant: IFT(..., converged=None)",
                NotConvergedWarning,
                stacklevel=5,
            )

    def _check_solved(self, solver: Solver, residual: Tensor) -> None:
        if self.solved is not None and not bool(residual <= self.solved):
            warnings.warn(
                f"IFT: the linear system is not solved: {type(solver).__name__}'s relative residual is "
                f"{float(residual):.3g}, above "
                f"solved={self.solved:g}. More iterations, a smaller rate, damping, or a solver for indefinite "
                "systems (MINRES); "
                "IFT(..., solved=None) if it is meant",
                NotConvergedWarning,
                stacklevel=4,
            )


def gradient_norm(stationary: Stationary, linearized: Linearized) -> Tensor:
    """``‖w - Φ(w)‖ / rate``: the inner gradient's norm, from the step that is there already."""
    return tree.norm(tree.sub(stationary.state.w, linearized.state.w)) / stationary.rate


def _check_seen(step: Step, at: Moment, alpha: Tree, product: Tree) -> None:
    """Raise if the real Φ depends on a leaf of λ that its fixed points do not.

    Costs a product, and only where a leaf is missing.
    """
    missing = [i for i, leaf in enumerate(tree.leaves(product)) if leaf is None]
    if not missing:
        return
    with at.replayed():
        _, real = step.vjp(at.state, at.lam, at.batch, InnerState(alpha, None, at.state.t), wrt="lam")
    names = tree.names(at.lam)
    leaves = tree.leaves(real)
    through_optimizer = [names[i] for i in missing if leaves[i] is not None]
    if through_optimizer:
        raise ValueError(
            f"lam at {', '.join(through_optimizer)} enters only through the optimiser: the solution of the inner "
            "problem does not move with it, so implicit differentiation has nothing to say about it. Use RMD, FMD, "
            "OneStep or HyperDistill, or take it out of lam"
        )
