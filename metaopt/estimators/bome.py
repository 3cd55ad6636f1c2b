r"""BOME: the penalty on the lower level's value function, with a multiplier that keeps it falling.

.. math::
    \hat q(\lambda, y) = L(y, \lambda) - L(w, \lambda), \qquad
    (\lambda, y) \leftarrow (\lambda, y) - \xi\, (\nabla L_{val} + \kappa \nabla \hat q), \qquad
    \kappa = \max\Bigl(\eta - \frac{\langle \nabla L_{val}, \nabla \hat q \rangle}{\|\nabla \hat q\|^2},\, 0\Bigr)

with the gradients over (λ, y) at fixed w: the dynamic barrier :math:`\langle \nabla \hat q, \nabla
L_{val} + \kappa \nabla \hat q \rangle \ge \phi = \eta \|\nabla \hat q\|^2`, so that :math:`\hat q`
falls at least as fast as its own gradient descent at rate :math:`\eta \xi`. Liu et al. 2022, "BOME!
Bilevel optimization made easy: a simple first-order approach", arXiv 2209.08709.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from metaopt import replay, tree
from metaopt.estimators import _noise
from metaopt.estimators._mixed_difference import lam_gradient
from metaopt.estimators._second_run import SecondRun
from metaopt.estimators.base import Terms, Traits
from metaopt.estimators.implicit import LastBatch
from metaopt.estimators.outer import OuterObjective, outer_gradient
from metaopt.inner import InnerState, Step
from metaopt.replay import Rng
from metaopt.tree import Tree


class BOMECarry(NamedTuple):
    """The second run's weights, the last batch, and the two terms where that run last was."""

    y: Tree
    last: LastBatch
    terms: Terms | None = None


class Barrier(NamedTuple):
    """What BOME reports: the multiplier κ, and ``L(y, λ) - L(w, λ)``, which is to vanish (below zero.

    The inner run lags behind).
    """

    multiplier: Tensor
    gap: Tensor


@dataclass(frozen=True)
class BOME(SecondRun):
    r"""The λ part of one joint first-order step; the y part is taken along the inner run.

    The inner run itself, with its own optimiser, stands for the paper's few lower-level steps from
    y: it solves the lower level, warm-started from its own past. Cost per inner step: one gradient
    of the outer loss, one of the inner loss at y, one with respect to λ at w; a hyper-step adds
    nothing. Memory: one more copy of the weights. Bias: none of its own hypergradients is
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

    rate: float = 0.01
    eta: float = 0.5

    def __post_init__(self) -> None:
        """Check the settings."""
        _noise.check_positive(self.rate, "BOME: rate")
        _noise.check_positive(self.eta, "BOME: eta")

    def init(self, step: Step, state: InnerState, lam: Tree) -> BOMECarry:
        """Both runs start at the same weights."""
        return BOMECarry(state.w, LastBatch())

    def observe(self, step: Step, outer: OuterObjective, state: InnerState, lam: Tree, carry: BOMECarry) -> BOMECarry:
        """The gradients at y, which a hyper-step here would use too, and the second run's step."""
        batch, rng = self._seen(carry)
        loss, outer_y, direct = outer_gradient(outer.loss, carry.y, lam, outer.batch)
        at_y, inner_y, inner_lam = _inner_gradient(step, carry.y, lam, batch, rng)
        at_w = lam_gradient(step, state.w, lam, batch, rng)
        penalty = tree.map(lambda a, b: None if a is None or b is None else a - b, inner_lam, at_w)
        multiplier = self._multiplier((outer_y, tree.filled(direct, lam)), (inner_y, tree.filled(penalty, lam)))
        y = tree.sub(carry.y, tree.scale(self.rate, tree.add(outer_y, tree.scale(multiplier, inner_y))))
        with replay.preserved(state), torch.no_grad():
            replay.restore(rng)
            gap = at_y - step.loss(state.w, lam, batch)
        terms = Terms(loss, direct, tree.scale(multiplier, penalty), info=Barrier(multiplier, gap))
        return carry._replace(y=y, terms=terms)

    def differentiate(self, step: Step, outer: OuterObjective, state: InnerState, lam: Tree, carry: BOMECarry) -> Terms:
        """The direct term at y, and κ times the difference; the outer loss reported is the one at y."""
        if carry.terms is None:
            raise ValueError("BOME has seen no inner step yet")
        return carry.terms

    def _multiplier(self, outer: Tree, penalty: Tree) -> Tensor:
        """κ; 0 where the penalty has no slope."""
        squared, along = tree.dot(penalty, penalty), tree.dot(outer, penalty)
        return torch.where(squared > 0, (self.eta - along / squared).clamp_min(0.0), torch.zeros_like(squared))


def _inner_gradient(step: Step, w: Tree, lam: Tree, batch: Any, rng: Rng) -> tuple[Tensor, Tree, Tree]:
    """``(L, ∂L/∂w, ∂L/∂λ)``; a leaf of λ that the loss does not see is ``None``."""
    with replay.preserved(w), torch.enable_grad():
        replay.restore(rng)
        w_, lam_ = tree.attach(w), tree.attach(lam)
        loss = step.loss(w_, lam_, batch)
        (w_flat, w_spec), (lam_flat, lam_spec) = tree.flatten(w_), tree.flatten(lam_)
        gradients = torch.autograd.grad(loss, w_flat + lam_flat, allow_unused=True)
    w_gradient = tree.filled(tree.unflatten(gradients[: len(w_flat)], w_spec), w)
    return loss.detach(), w_gradient, tree.unflatten(gradients[len(w_flat) :], lam_spec)
