"""The one call that uses an estimator, and what it checks."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from metaopt import replay, tree
from metaopt.estimators._along import along, check_at, terms_along
from metaopt.estimators._arguments import check_arguments
from metaopt.estimators._beginning import begin
from metaopt.estimators._non_finite import first_non_finite
from metaopt.estimators.base import Estimator, Terms
from metaopt.estimators.cost import Cost, CountedStep
from metaopt.estimators.outer import OuterLoss, OuterObjective
from metaopt.estimators.reverse import RMD
from metaopt.inner._first_look import warn_of
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.table import Table
from metaopt.tree import Tree

Batches: TypeAlias = Iterable[Any] | Callable[[int], Any]
"""A list, a ``DataLoader``, an iterator, or ``t -> batch`` for t = 1 … T together with ``horizon=T``."""


class UnusedHyperparameterWarning(UserWarning):
    """Part of λ influences neither the inner run nor the outer loss; its hypergradient is zero."""


class ZeroHypergradientWarning(UserWarning):
    """The estimator drops the indirect term and the outer loss does not see λ: the result is zero."""


class Hypergradient(NamedTuple):
    """A hypergradient and where it comes from.

    ``print`` shows the outer loss, the norm of each leaf and the cost.

    Attributes:
        total: ``direct + indirect``, a pytree like λ.
        direct: ``∂L_val/∂λ`` at fixed weights.
        indirect: the estimator's ``α · dw_T/dλ``.
        initial: ``dL_val/dw_0`` where the estimator has it, else ``None``.
        outer_loss: ``L_val`` (detached scalar).
        state: the inner state reached.
        cost: what it took (of the whole run for :func:`hypergradient`; since the last hyper-step in
            an online loop).
        info: what the method reports about itself: of :class:`~metaopt.estimators.IFT` the linear
            solver's solution, with its residual.
    """

    total: Tree
    direct: Tree
    indirect: Tree
    initial: Tree | None
    outer_loss: Tensor
    state: InnerState
    cost: Cost
    info: Any = None

    @property
    def table(self) -> Table:
        """The norms of each leaf of λ, or of the initial weights where there is no λ."""
        title = f"Hypergradient: outer loss {float(self.outer_loss):.6g} after {self.state.t} steps, {self.cost}"
        if not tree.floats(self.total):
            return Table(title, ("w0", "|initial|"), tuple(_norms(self.initial)))
        totals = _norms(self.total)
        directs = _norms(self.direct)
        indirects = _norms(self.indirect)
        rows = []
        for (name, total), (_, direct), (_, indirect) in zip(totals, directs, indirects, strict=True):
            rows.append((name, total, direct, indirect))
        return Table(title, ("lam", "|total|", "|direct|", "|indirect|"), tuple(rows))

    def __repr__(self) -> str:
        """The table as plain text."""
        return self.table.text()

    def _repr_html_(self) -> str:
        return self.table.html()


def _norms(values: Tree) -> list[tuple[str, float]]:
    """Name and norm of each leaf."""
    names = tree.dotted_names(values)
    return [(name or "lam", float(x.norm())) for name, x in zip(names, tree.floats(values), strict=True)]


def hypergradient(
    step: Step,
    outer_loss: OuterLoss,
    w0: Tree,
    lam: Tree,
    batches: Batches,
    outer_batch: Any,
    *,
    estimator: Estimator = RMD(),
    at: Sequence[int] | None = None,
    horizon: int | None = None,
) -> Hypergradient:
    """Run the inner loop from ``w0`` and differentiate the outer loss at its end with respect to ``lam``.

    Args:
        step: Φ, from :func:`metaopt.inner_step` or :func:`metaopt.custom_step`.
        outer_loss: ``(w, lam, batch) -> scalar``.
        w0: initial weights, or an :class:`InnerState` to go on from (its slots and its step count).
        lam: hyperparameters, any pytree of floating-point tensors; ``None`` where only the initial
            weights learn: ``initial`` is then the answer.
        batches: one batch per inner step: a list, a ``DataLoader``, an iterator,
            ``mo.cycle(loader)``, or ``t -> batch`` (t = 1 … T) with ``horizon=T``.
        outer_batch: what the outer loss is evaluated on.
        at: steps ``t`` of the run (1 … T, increasing) whose outer losses are summed, instead of the
            last one's; ``outer_batch`` is then one batch for each, in a sequence or ``t -> batch``.
            Exact reverse mode takes one sweep for all of them; other estimators respond at each.
        estimator: default ``mo.RMD()``, the exact gradient.
        horizon: T; default: as many steps as there are batches.

    Returns:
        The gradient, ``.total``, a pytree like ``lam``; its two terms ``.direct`` and
        ``.indirect``; ``.initial``, the gradient with respect to the initial weights (or state)
        where the estimator has it; ``.outer_loss``, the ``.state`` that was reached, and the
        ``.cost``.

    Raises:
        ValueError: bad shapes, empty batches, integer λ, a loss that is not a scalar, λ that
            influences nothing at all.
        FloatingPointError: if the outer loss or the hypergradient is not finite.

    >>> import torch, metaopt as mo
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> hg = hypergradient(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 2, None)
    >>> hg.total  # 1 - (1 - 0.5)^2
    tensor([0.7500])
    """
    check_arguments(step, w0, lam, batches, estimator, outer_loss)
    check_lam(lam, estimator)
    lam = tree.detach(lam)
    counted = CountedStep(step, Cost())
    rng = replay.snapshot(w0)
    first, stream = opened(batches, horizon, step.steps_at_once)
    beginning = begin(counted, w0, lam, estimator, first)
    try:
        if at is not None:
            outers = along(outer_loss, outer_batch, check_at(at, estimator))
            state, terms = terms_along(counted, outers, beginning.state, lam, stream, estimator)
        else:
            outer = OuterObjective(outer_loss, outer_batch, look=True)
            state, terms = terms_at_end(counted, outer, beginning.state, lam, stream, estimator)
        return result(counted, state, lam, estimator, beginning.complete(terms, estimator))
    except FloatingPointError as error:
        if isinstance(batches, Iterator):  # which cannot be read again
            raise
        where = first_non_finite(step, beginning.state, lam, opened(batches, horizon, step.steps_at_once)[1], rng)
        if where is None:
            raise
        raise FloatingPointError(f"{error}. The first number that is not finite is in {where}") from error


def terms_at_end(
    step: Step, outer: OuterObjective, state: InnerState, lam: Tree, batches: Iterator[Any], estimator: Estimator
) -> tuple[InnerState, Terms]:
    """The run, and the two terms at its end."""
    carry = estimator.init(step, state, lam)
    for batch in batches:
        state, carry = estimator.advance(step, state, lam, batch, carry)
        carry = estimator.observe(step, outer, state, lam, carry)
    return state, estimator.differentiate(step, outer, state, lam, carry)


def evaluate(
    step: CountedStep,
    outer_loss: OuterLoss,
    state: InnerState,
    lam: Tree,
    outer_batch: Any,
    estimator: Estimator,
    carry: Any,
    *,
    look: bool = False,
) -> Hypergradient:
    """The hypergradient at the state that an online run has reached."""
    terms = estimator.differentiate(step, OuterObjective(outer_loss, outer_batch, look), state, lam, carry)
    if terms.initial is not None:
        terms = terms._replace(initial=terms.initial.w)
    return result(step, state, lam, estimator, terms, look=look)


def result(
    step: CountedStep, state: InnerState, lam: Tree, estimator: Estimator, terms: Terms, *, look: bool = True
) -> Hypergradient:
    """The hypergradient, with an error where it is not finite or λ has no influence."""
    if look:
        warn_of(step.undeclared)
    _check_used(terms.direct, terms.indirect, lam, estimator)
    direct = tree.filled(terms.direct, lam)
    indirect = tree.filled(terms.indirect, lam)
    total = tree.add(direct, indirect)
    check_finite(total, indirect, state, estimator)
    return Hypergradient(total, direct, indirect, terms.initial, terms.outer_loss, state, step.cost, terms.info)


def each(batches: Batches, horizon: int | None = None, name: str = "batches") -> Iterator[Any]:
    """The batches of steps 1 … T.

    Raises:
        ValueError: if there are none, too few, or no way to know how many.
        TypeError: if it is not something that gives batches.
    """
    if horizon is not None and horizon < 1:
        raise ValueError(
            f"horizon must be at least 1, got {horizon}: without an inner step nothing depends on lam indirectly"
        )
    if callable(batches):
        if horizon is None:
            raise ValueError("batches is a function of t, so horizon=T must say how many inner steps to take")
        return (batches(t) for t in range(1, horizon + 1))
    if isinstance(batches, (str, bytes, Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{name} gives one batch per inner step: a list, a DataLoader, an iterator, or a function t -> batch with "
            f"horizon=T; got {type(batches).__name__}"
        )
    if isinstance(batches, cycle) and horizon is None:
        raise ValueError("mo.cycle never ends, so horizon=T must say how many inner steps to take")
    return _counted(batches, horizon, name)


def _counted(batches: Iterable[Any], horizon: int | None, name: str) -> Iterator[Any]:
    count = 0
    for batch in itertools.islice(batches, horizon):
        count += 1
        yield batch
    if not count:
        raise ValueError(f"{name} is empty: one batch per inner step is needed")
    if horizon is not None and count < horizon:
        raise ValueError(
            f"horizon is {horizon}, but there are only {count} batches in {name}: mo.cycle(loader) starts again"
        )


@dataclass(frozen=True)
class cycle:  # noqa: N801  (used as a function is)
    """The batches of a loader, without end; a shuffling loader shuffles each time round.

    >>> list(itertools.islice(cycle([1, 2]), 5))
    [1, 2, 1, 2, 1]
    """

    loader: Iterable[Any]

    def __iter__(self) -> Iterator[Any]:
        """From the start, without end.

        Raises:
            ValueError: if there is nothing in the loader.
        """
        while True:
            empty = True
            for batch in self.loader:
                empty = False
                yield batch
            if empty:
                raise ValueError("mo.cycle: the loader gives no batch")


def opened(batches: Batches, horizon: int | None = None, at_once: int | None = None) -> tuple[Any, Iterator[Any]]:
    """The first batch, and all of them; in lists of ``at_once`` where a step takes several."""
    stream = each(batches, horizon)
    if at_once is not None:
        stream = _grouped(stream, at_once)
    first = next(stream)
    return first, itertools.chain([first], stream)


def _grouped(stream: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while group := list(itertools.islice(stream, size)):
        yield group


def check_lam(lam: Tree, estimator: Estimator | None = None) -> None:
    """Raise a ``ValueError`` that names the first leaf of λ which cannot have a gradient.

    Where there is an estimator, and it knows the cotangent of the initial weights, there may be no
    λ at all.
    """
    flat = [] if lam is None else tree.leaves(lam)
    if not flat:
        if estimator is not None and estimator.gives_initial:
            return
        because = "" if estimator is None else f", since {type(estimator).__name__} has no gradient of initial weights"
        raise ValueError(f"lam has no leaves: there is nothing to differentiate with respect to{because}")
    for i, leaf in enumerate(flat):
        if not tree.is_float(leaf):
            kind = f"a tensor of {leaf.dtype}" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__} ({leaf!r})"
            raise ValueError(
                f"lam at {tree.names(lam)[i]} is {kind}; hyperparameters are floating-point tensors, e.g. "
                "torch.tensor(0.1)"
            )


def _check_used(direct: Tree, indirect: Tree, lam: Tree, estimator: Estimator) -> None:
    if not tree.floats(lam):
        return
    if estimator.drops_indirect and all(leaf is None for leaf in tree.leaves(direct)):
        warnings.warn(
            f"outer_loss does not see lam, and {type(estimator).__name__} drops the indirect term: the hypergradient "
            "is zero by construction. "
            "Use an estimator with an indirect term (OneStep, RMD, HyperDistill, …)",
            ZeroHypergradientWarning,
            stacklevel=4,
        )
    parts = zip(tree.leaves(direct), tree.leaves(indirect), strict=True)
    unused = [i for i, (d, ind) in enumerate(parts) if d is None and ind is None]
    if not unused:
        return
    names = tree.names(lam)
    where = ", ".join(names[i] for i in unused)
    if not estimator.sees_optimizer:
        what = f"{type(estimator).__name__} sees no influence of lam at {where}"
        why = (
            "it looks at the losses alone, and not at what enters through the optimiser (a learning rate): "
            "use OneStep, TruncatedRMD or RMD for that"
        )
    else:
        what = f"lam at {where} influences neither the inner step nor the outer loss"
        why = "use it in the losses or in the optimiser's hyperparameters, and check that nothing detaches it"
    if len(unused) == len(names):
        raise ValueError(f"{what}, and nothing else is in lam: {why}")
    warnings.warn(f"{what}; its hypergradient is zero: {why}", UnusedHyperparameterWarning, stacklevel=4)


def check_finite(total: Tree, indirect: Tree, state: InnerState, estimator: Estimator) -> None:
    """Raise a ``FloatingPointError`` that names the first leaf of λ whose hypergradient is not finite."""
    if tree.is_finite(total):
        return
    part = "indirect" if tree.first_non_finite(indirect) else "direct"
    where = (
        f"lam{tree.first_non_finite(total)} (its {part} term, after {state.t} inner steps, {type(estimator).__name__})"
    )
    raise FloatingPointError(
        f"the hypergradient is not finite at {where}: the sweep overflowed (shorter horizon, TruncatedRMD, smaller "
        "inner learning "
        "rate), or an operation has an infinite derivative (sqrt or norm at 0)"
    )
