"""BOME: the penalty on the lower level's value function, with a multiplier that keeps it falling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import checks, tree
from metaopt.estimators._last_step import AlongOneOuterLoss, Remembered
from metaopt.estimators._mixed_difference import lam_gradient
from metaopt.estimators.base import Terms, Traits
from metaopt.estimators.outer import OuterObjective
from metaopt.inner import InnerState, Step
from metaopt.trajectory import Moment
from metaopt.tree import Tree


class Second(NamedTuple):
    """The second run's weights, and the two terms where that run last was."""

    y: Tree
    terms: Terms | None = None


class Barrier(NamedTuple):
    """What BOME reports about itself.

    Attributes:
        multiplier: κ.
        gap: ``L(y, λ) - L(w, λ)``, which is to vanish; below zero the inner run lags behind.
    """

    multiplier: Tensor
    gap: Tensor


@dataclass(frozen=True)
class BOME(AlongOneOuterLoss):
    r"""The λ part of one joint first-order step; the y part is taken along the inner run.

    .. math::
        \hat q(\lambda, y) = L(y, \lambda) - L(w, \lambda), \qquad
        (\lambda, y) \leftarrow (\lambda, y) - \xi\, (\nabla L_{val} + \kappa \nabla \hat q), \qquad
        \kappa = \max\Bigl(\eta - \frac{\langle \nabla L_{val}, \nabla \hat q \rangle}{\|\nabla \hat q\|^2},\, 0\Bigr)

    with the gradients over (λ, y) at fixed w: the dynamic barrier :math:`\langle \nabla \hat q,
    \nabla L_{val} + \kappa \nabla \hat q \rangle \ge \phi = \eta \|\nabla \hat q\|^2`, so that
    :math:`\hat q` falls at least as fast as its own gradient descent at rate :math:`\eta \xi`. Liu
    et al. 2022, "BOME! Bilevel optimization made easy: a simple first-order approach", `arXiv
    2209.08709 <https://arxiv.org/abs/2209.08709>`__.

    The inner run itself, with its own optimiser, stands for the paper's few lower-level steps from
    y: it solves the lower level, warm-started from its own past. Cost per inner step: one gradient
    of the outer loss, one of the inner loss at y, one with respect to λ at w; a hyper-step adds
    nothing. Memory: one more copy of the weights. Bias: none of its hypergradients is
    dL_val/dλ; the joint run goes to a solution, for an outer optimiser that is gradient descent at
    ``rate``, with an error of the order of that rate. Sees no hyperparameter that enters through
    the optimiser alone. In a stacked meta-batch there is one barrier for the sum over tasks.
    ``info`` is a :class:`Barrier`.

    Args:
        rate: ξ, of the second run.
        eta: η of the barrier.

    Raises:
        ValueError: for settings that are not positive.
        TypeError: for a custom step, whose loss is not known.
    """

    traits: ClassVar[Traits] = Traits(
        sees="a solution", high_dimensional=True, bias="of the order of the rate, where the joint run ends"
    )

    sees_optimizer = False

    rate: float = 0.01
    eta: float = 0.5

    def __post_init__(self) -> None:
        checks.positive(self, "rate", self.rate)
        checks.positive(self, "eta", self.eta)

    @override
    def start_of(self, state: InnerState, lam: Tree) -> Second:
        return Second(state.w)  # both runs start at the same weights

    @override
    def observe(self, step: Step, outer: OuterObjective, state: InnerState, lam: Tree, carry: Remembered) -> Remembered:
        """The gradients at y, which a hyper-step here would use too, and the second run's step."""
        at = self.last_of(carry)._replace(lam=lam)
        y = carry.own.y
        loss, outer_y, direct = outer.gradient(y, lam)
        at_y, inner_y, inner_lam = _inner_gradient(step, at.moved(y))
        at_w = lam_gradient(step, at)

        penalty = tree.map(lambda a, b: None if a is None or b is None else a - b, inner_lam, at_w)
        slope_of_outer = (outer_y, tree.filled(direct, lam))
        slope_of_penalty = (inner_y, tree.filled(penalty, lam))
        multiplier = self._multiplier(slope_of_outer, slope_of_penalty)
        with at.replayed(), torch.no_grad():
            gap = at_y - step.loss(state.w, lam, at.batch)
        terms = Terms(loss, direct, tree.scale(multiplier, penalty), info=Barrier(multiplier, gap))

        descent = tree.add(outer_y, tree.scale(multiplier, inner_y))
        new_y = tree.sub(y, tree.scale(self.rate, descent))
        return carry._replace(own=Second(new_y, terms))

    @override
    def differentiate(
        self, step: Step, outer: OuterObjective, state: InnerState, lam: Tree, carry: Remembered
    ) -> Terms:
        """The direct term at y, and κ times the difference; the outer loss reported is the one at y."""
        self.last_of(carry)
        return carry.own.terms

    def _multiplier(self, outer: Tree, penalty: Tree) -> Tensor:
        """κ; 0 where the penalty has no slope."""
        squared = tree.dot(penalty, penalty)
        along = tree.dot(outer, penalty)
        wanted = (self.eta - along / squared).clamp_min(0.0)
        return torch.where(squared > 0, wanted, torch.zeros_like(squared))


def _inner_gradient(step: Step, at: Moment) -> tuple[Tensor, Tree, Tree]:
    """``(L, ∂L/∂w, ∂L/∂λ)``; a leaf of λ that the loss does not see is ``None``."""
    with at.replayed(), torch.enable_grad():
        w, lam = tree.attach((at.state.w, at.lam))
        loss = step.loss(w, lam, at.batch)
        flat, spec = tree.flatten((w, lam))
        gradient = torch.autograd.grad(loss, flat, allow_unused=True)
        by_w, by_lam = tree.unflatten(gradient, spec)
    return loss.detach(), tree.filled(by_w, at.state.w), by_lam
