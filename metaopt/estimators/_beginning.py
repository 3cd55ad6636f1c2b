"""Where a run begins: at weights, or at a state that an earlier run has reached."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch

from metaopt import tree
from metaopt.estimators.base import Estimator, Terms
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.inner.tasks import Stacked, for_all_tasks
from metaopt.tree import Tree


class DroppedInitWarning(UserWarning):
    """λ shapes the initial state, and the estimator leaves that part of the hypergradient out."""


class Beginning(NamedTuple):
    """The first state of a run, and how it came about.

    Attributes:
        state: ``s_0``, detached.
        live: the same with its graph, where slots were made from the weights or from λ.
        w: the initial weights that ``live`` is made from.
        lam: the hyperparameters that ``live`` is made from.
        resumed: whether a state was given, and not weights.
        reads_lam: whether λ shapes it.
    """

    state: InnerState
    live: InnerState | None
    w: Tree
    lam: Tree
    resumed: bool = False
    reads_lam: bool = False

    def complete(self, terms: Terms, estimator: Estimator) -> Terms:
        """The terms with the way from ``s_0`` back to the weights and λ added."""
        if terms.initial is None:
            if self.reads_lam:
                speak_of_dropped(estimator)
            return terms
        if self.live is None and not self.resumed:
            return terms._replace(initial=terms.initial.w)
        bar = filled(terms.initial, self.state)
        if self.live is None:
            return terms._replace(initial=bar)
        pairs = zip(tree.floats(self.live), tree.floats(bar), strict=True)
        outputs, bars = zip(*[(x, b) for x, b in pairs if x.requires_grad], strict=True)
        inputs = (self.w, self.lam)
        found = torch.autograd.grad(outputs, tree.floats(inputs), bars, retain_graph=True, allow_unused=True)
        supply = iter(found)
        w_bar, lam_bar = tree.map(lambda x: next(supply) if tree.is_float(x) else None, inputs)
        return terms._replace(initial=tree.filled(w_bar, self.w), indirect=tree.add(terms.indirect, lam_bar))


def begin(step: Step, w0: Tree, lam: Tree, estimator: Estimator, batch: Any) -> Beginning:
    """The first state; ``w0`` is the initial weights, or an :class:`InnerState` to go on from.

    The first ``batch`` tells how many tasks there are, where weights of one task are given to all.

    Raises:
        ValueError: if the state does not belong to this step, or if λ shapes the first state and an
            exact estimator cannot see that.
    """
    if isinstance(w0, InnerState):
        check_resumed(step, w0, lam)
        return Beginning(tree.detach(w0), None, None, None, resumed=True)
    with torch.enable_grad():
        w_ = tree.attach(w0)
        lam_ = tree.attach(lam)
        live = step.init(for_all_tasks(step, w_, batch), lam_)
        w_ = w_.w if isinstance(w_, Stacked) else w_
    state = tree.detach(live)
    given = {id(x) for x in tree.leaves(w_)}
    same_weights = all(id(x) in given for x in tree.leaves(live.w))
    if same_weights and not tree.requires_grad(live._replace(w=None)):
        return Beginning(state, None, w_, lam_)
    reads_lam = reads(live, lam_)
    if reads_lam and estimator.exact and not estimator.gives_initial:
        speak_of_dropped(estimator)
    return Beginning(state, live, w_, lam_, reads_lam=reads_lam)


def check_resumed(step: Step, state: InnerState, lam: Tree) -> None:
    """Raise a ``ValueError`` if the state is not one of this step's."""
    fresh = step.init(tree.detach(state.w), lam)
    tree.check_like(state.slots, fresh.slots, "slots of the state given as w0", "those of the step's optimiser")


def reads(live: InnerState, lam: Tree) -> bool:
    """Whether the state depends on λ."""
    leaves = [x for x in tree.floats(lam) if x.requires_grad]
    if not leaves:
        return False
    sums = [x.sum().double() for x in tree.floats(live)]
    total = torch.stack(sums).sum()
    found = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
    return any(x is not None for x in found)


def speak_of_dropped(estimator: Estimator) -> None:
    """Refuse, or warn, since the estimator has no cotangent of the initial state."""
    name = type(estimator).__name__
    what = f"lam shapes the initial state (custom_step(init=...)), and {name} does not see that part"
    if estimator.exact:
        raise ValueError(f"{what}: use RMD, or start from a state that does not depend on lam")
    warnings.warn(f"{what} of the hypergradient; RMD takes it in", DroppedInitWarning, stacklevel=4)


def filled(cotangent: InnerState, like: InnerState) -> InnerState:
    """The cotangent with zeros for slots that are ``None``."""
    zeros = tree.zeros_like(like)
    fields = {name: z if (x := getattr(cotangent, name)) is None else x for name, z in zeros._asdict().items()}
    return InnerState(**fields)
