"""The outer optimiser: λ as ``torch.optim`` parameters, without touching what the user handed over."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer as TorchOptimizer

from metaopt import checks, tree
from metaopt.estimators.base import Estimator
from metaopt.estimators.hypergradient import check_lam
from metaopt.meta._packed import described
from metaopt.tree import Tree

MakesOptimizer: TypeAlias = Callable[[Iterable[Tensor]], TorchOptimizer] | TorchOptimizer
"""``params -> torch.optim optimiser``, e.g. ``functools.partial(torch.optim.Adam, lr=1e-3)``.

Or a configured optimiser over the leaves of
``lam``, of which a copy is used."""

Scheduler: TypeAlias = Callable[[TorchOptimizer], Any]
"""``optimizer -> torch.optim.lr_scheduler``, e.g. ``lambda o: LinearLR(o, 1.0, 0.0, total_iters=1000)``."""


_PROPORTIONAL = (torch.optim.SGD, torch.optim.ASGD, torch.optim.LBFGS)


class SizeWarning(UserWarning):
    """A hypergradient of another size than the true one goes to an outer optimiser whose step is proportional to it."""


class OuterOptimizer:
    """λ and its optimiser. One of two places in the library that hold changing state; the other is autograd.

    Args:
        lam: hyperparameters; copied.
        optimizer: see :data:`MakesOptimizer`.
        scheduler: learning-rate schedule of the outer optimiser; :meth:`end_run` steps it.
        clip_norm: bound on the global norm of each hypergradient, or ``None``.
        project: ``lam -> lam``, applied after every update (bounds, simplex, …), or ``None``.
    """

    def __init__(
        self,
        lam: Tree,
        optimizer: MakesOptimizer,
        *,
        scheduler: Scheduler | None = None,
        clip_norm: float | None = None,
        project: Callable[[Tree], Tree] | None = None,
    ) -> None:
        check_lam(lam)
        if clip_norm is not None:
            checks.positive(self, "clip_norm", clip_norm)
        if project is not None:
            checks.function(self, "project", project, "lam -> lam")
        originals, self._spec = tree.flatten(lam)
        self._params = [leaf.detach().clone().requires_grad_() for leaf in originals]
        self.optimizer = _bind(optimizer, originals, self._params)
        self.scheduler = scheduler(self.optimizer) if scheduler is not None else None
        self._clip_norm = clip_norm
        self._project = project
        self.lam: Tree = self._read()

    def check_size(self, estimator: Estimator) -> None:
        """Warn where the estimator's size is its own, and the optimiser known not to be scale-free."""
        if estimator.own_size and isinstance(self.optimizer, _PROPORTIONAL):
            name = type(estimator).__name__
            optimizer = type(self.optimizer).__name__
            warnings.warn(
                f"{name}'s hypergradient has another size than the gradient, and a step of {optimizer} is proportional "
                "to it: lam may hardly move. Use a scale-free outer optimiser (Adam), "
                f"{name}(unit_rate=True), or {name}(check_size=False) if it is meant",
                SizeWarning,
                stacklevel=4,
            )

    def update(self, hypergradient: Tree) -> Tree:
        """One outer step; returns the new λ (fresh tensors: the old ones keep their values)."""
        tree.check_like(hypergradient, self.lam, "the hypergradient", "lam")
        for parameter, gradient in zip(self._params, tree.leaves(hypergradient), strict=True):
            parameter.grad = gradient.clone() if self._clip_norm is not None else gradient
        if self._clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._params, self._clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._project is not None:
            projected = self._project(self._read())
            tree.check_like(projected, self.lam, "what project returned", "lam")
            with torch.no_grad():
                for parameter, value in zip(self._params, tree.leaves(projected), strict=True):
                    parameter.copy_(value)
        self.lam = self._read()
        return self.lam

    def end_run(self) -> None:
        """Tell the scheduler that an inner run has ended."""
        if self.scheduler is not None:
            self.scheduler.step()

    def settings(self) -> dict[str, Any]:
        """What tells this optimiser from another, as plain data: class, rates, schedule, bounds."""
        return {
            "optimizer": type(self.optimizer).__name__,
            "defaults": described(self.optimizer.defaults),
            "scheduler": None if self.scheduler is None else type(self.scheduler).__name__,
            "clip_norm": self._clip_norm,
            "project": described(self._project),
        }

    def state_dict(self) -> dict[str, Any]:
        """λ, the optimiser's and the scheduler's state: a copy, which later updates do not change."""
        scheduler = self.scheduler.state_dict() if self.scheduler is not None else None
        return copy.deepcopy(
            {"lam": tree.leaves(self.lam), "optimizer": self.optimizer.state_dict(), "scheduler": scheduler}
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken."""
        with torch.no_grad():
            for parameter, value in zip(self._params, state["lam"], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.lam = self._read()

    def _read(self) -> Tree:
        return tree.unflatten([p.detach().clone() for p in self._params], self._spec)


def _bind(optimizer: MakesOptimizer, originals: list[Tensor], params: list[Tensor]) -> TorchOptimizer:
    """The optimiser over our copies of λ; a configured one is copied, with its groups and state."""
    if not isinstance(optimizer, TorchOptimizer):
        if not callable(optimizer):
            raise TypeError(
                "optimizer must be a function params -> torch.optim optimiser, e.g. "
                f"lambda params: torch.optim.Adam(params, lr=1e-3); got {optimizer!r}"
            )
        built = optimizer(params)
        _check_steps_once(built)
        if not isinstance(built, TorchOptimizer):
            raise TypeError(
                "optimizer must make a torch.optim optimiser from parameters, e.g. "
                f"functools.partial(torch.optim.Adam, lr=1e-3); got {built!r}"
            )
        return built
    _check_steps_once(optimizer)
    ours = {id(original): param for original, param in zip(originals, params, strict=True)}
    for group in optimizer.param_groups:
        if any(id(p) not in ours for p in group["params"]):
            raise ValueError(
                "the outer optimiser holds tensors that are not leaves of lam; build it over the leaves of lam, or "
                "pass a function params -> optimiser"
            )
    bound = copy.copy(optimizer)
    bound.param_groups = [
        {**group, "params": [ours[id(p)] for p in group["params"]]} for group in optimizer.param_groups
    ]
    bound.state = type(optimizer.state)(dict)
    for p, slots in optimizer.state.items():
        bound.state[ours[id(p)]] = copy.deepcopy(slots)
    return bound


def _check_steps_once(optimizer: Any) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "LBFGS evaluates its loss several times in one step, and here a step has one hypergradient: take "
            "torch.optim.SGD or torch.optim.Adam"
        )
