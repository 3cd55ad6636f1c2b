"""A step Φ held to the contract of a step: pure, replayable, and with the derivatives that it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaopt import replay, tree
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.tree import Tree, unvector, vector
from metaopt.verify.reference import jacobians
from metaopt.verify.report import Report, Row, relative_error

DIFFERENCES = 1e-6
"""What extrapolated finite differences are good for."""

HIDDEN = (
    "two calls with the same arguments and random state differ: hidden state, or randomness that does not arrive "
    "with the batch"
)


def check_step(step: Step, w: Tree, lam: Tree, batch: Any = None, *, tolerance: float = 1e-10, seed: int = 0) -> Report:
    """Every property of a step at ``(w, lam, batch)``, after one step from there.

    Purity, exact replay, use of λ; ``vjp`` against dense Jacobians and in its parts, its linearity,
    ``jvp`` against finite differences, and both against each other.

    Args:
        step: Φ.
        w: float64 weights to start from.
        lam: float64 hyperparameters.
        batch: a batch.
        tolerance: relative error allowed.
        seed: of the random directions.

    Raises:
        ValueError: without weights or hyperparameters, or for another dtype than float64.
    """
    _check_float64(w, lam)
    state = step.init(w, lam)
    rows = [_purity(step, state, lam, batch), _replay(step, state, lam, batch)]
    if all(row.passed for row in rows):  # derivatives of an impure step mean nothing
        with replay.preserved(state):
            state = step(state, lam, batch)  # a state whose slots are not all zero
        rows += derivative_rows(step, state, lam, batch, tolerance=tolerance, seed=seed)
    return Report(_name(step), tuple(rows))


def derivative_rows(
    step: Step, state: InnerState, lam: Tree, batch: Any, *, tolerance: float = 1e-10, seed: int = 0
) -> list[Row]:
    """The derivatives of a step at one state, held to references that do not use them."""
    with replay.preserved(state):
        rng = replay.snapshot(state)
        generator = torch.Generator().manual_seed(seed)
        probe = _Probe(step, state, lam, batch, rng, generator)
        return list(_derivatives(probe, tolerance))


def _purity(step: Step, state: InnerState, lam: Tree, batch: Any) -> Row:
    given = (state, lam, batch)
    before = tree.clone(given)
    with replay.preserved(state):
        step(state, lam, batch)
    pairs = zip(tree.names(given), tree.leaves(before), tree.leaves(given), strict=True)
    changed = [name for name, x, y in pairs if isinstance(x, Tensor) and not torch.equal(x, y)]
    note = ""
    if changed:
        note = f"changed (state, lam, batch){', '.join(changed)}"
    return Row("purity", "its own inputs", float(len(changed)), 0.0, note)


def _replay(step: Step, state: InnerState, lam: Tree, batch: Any) -> Row:
    rng = replay.snapshot(state)
    with replay.preserved(state):
        first = step(state, lam, batch)
        replay.restore(rng)
        second = step(state, lam, batch)
    differences = (vector(first) - vector(second)).abs()
    error = float(differences.max())
    return Row("replay", "a second call", error, 0.0, HIDDEN if error else "")


@dataclass(frozen=True)
class _Probe:
    """A step at one point, and random directions there."""

    step: Step
    state: InnerState
    lam: Tree
    batch: Any
    rng: replay.Rng
    generator: torch.Generator

    def again(self) -> None:
        """Restore the random state, so that the step draws the same numbers."""
        replay.restore(self.rng)

    def noise(self, like: Tree) -> Tree:
        """A normal random direction for the tensors of a pytree."""
        return tree.map(self._noise, like)

    def _noise(self, x: Any) -> Any:
        if not tree.is_float(x):
            return x
        return torch.randn(x.shape, generator=self.generator, dtype=x.dtype)

    def direction(self) -> InnerState:
        """A direction for the state.

        Slots move by a share of themselves: a second moment is tiny, and must stay positive in the
        differences.
        """

        def share(x: Any, d: Any) -> Any:
            if not tree.is_float(x):
                return x
            return x.abs() * d

        dot = self.noise(self.state)
        slots = tree.map(share, self.state.slots, dot.slots)
        return dot._replace(slots=slots)

    def pulled(self, cotangent: InnerState) -> tuple[Tensor, Tree]:
        """``(αA, αB)`` as one vector, and ``αB`` as it came."""
        self.again()
        state_bar, lam_bar = self.step.vjp(self.state, self.lam, self.batch, cotangent)
        assert state_bar is not None
        return self._joined(state_bar, lam_bar), lam_bar

    def parts(self, cotangent: InnerState) -> Tensor:
        """``(αA, αB)`` as one vector, each part from a separate call."""
        self.again()
        state_bar, _ = self.step.vjp(self.state, self.lam, self.batch, cotangent, wrt="state")
        self.again()
        _, lam_bar = self.step.vjp(self.state, self.lam, self.batch, cotangent, wrt="lam")
        return self._joined(state_bar, lam_bar)

    def _joined(self, state_bar: Tree, lam_bar: Tree) -> Tensor:
        filled = tree.filled(lam_bar, self.lam)
        return torch.cat([vector(state_bar), vector(filled)])

    def value(self, point: Tensor) -> Tensor:
        """The new state, flattened, at flattened ``(state, λ)``."""
        self.again()
        n = vector(self.state).numel()
        state = unvector(point[:n], self.state)
        lam = unvector(point[n:], self.lam)
        new = self.step(state, lam, self.batch)
        return vector(new)


def _derivatives(probe: _Probe, tolerance: float) -> Iterator[Row]:
    step = probe.step
    state = probe.state
    lam = probe.lam
    batch = probe.batch
    one = probe.noise(state)
    two = probe.noise(state)
    state_dot = probe.direction()
    lam_dot = probe.noise(lam)
    bar, lam_bar = probe.pulled(one)
    yield _uses_lam(lam, lam_bar)

    probe.again()
    pushed = vector(step.jvp(state, lam, batch, state_dot, lam_dot))
    dots = torch.cat([vector(state_dot), vector(lam_dot)])
    left = (bar @ dots)[None]
    right = (vector(one) @ pushed)[None]
    yield Row("dot product", "vjp · x = y · jvp", relative_error(left, right), tolerance)

    probe.again()
    A, B = jacobians(step, state, lam, batch)
    J = torch.cat([A, B], 1)
    dense = vector(one) @ J
    parts = probe.parts(one)
    yield Row("vjp", "dense Jacobian", relative_error(bar, dense), tolerance)
    yield Row("vjp, in parts", "dense Jacobian", relative_error(parts, dense), tolerance)

    no_slots = one._replace(slots=tree.zeros_like(one.slots))
    dense = vector(no_slots) @ J
    weights_only, _ = probe.pulled(one._replace(slots=None))
    yield Row("vjp, slots None", "dense Jacobian", relative_error(weights_only, dense), tolerance)

    slope = _slope(probe, dots)
    yield Row("jvp", "differences", relative_error(pushed, slope), max(tolerance, DIFFERENCES))

    both = tree.add(tree.scale(2.0, one), two)
    of_both, _ = probe.pulled(both._replace(t=state.t))
    of_two, _ = probe.pulled(two)
    yield Row("pullback", "linearity", relative_error(of_both, 2.0 * bar + of_two), tolerance)


def _uses_lam(lam: Tree, lam_bar: Tree) -> Row:
    pairs = zip(tree.names(lam), tree.leaves(lam_bar), strict=True)
    unused = [name for name, leaf in pairs if leaf is None or not bool(leaf.any())]
    note = ""
    if unused:
        note = f"Φ ignores lam at {', '.join(unused)}"
    return Row("uses lam", "every leaf", float(len(unused)), 0.0, note)


def _slope(probe: _Probe, dots: Tensor, radius: float = 1e-5) -> Tensor:
    """Central differences along ``dots`` at two radii, extrapolated: the error is of fourth order."""
    at = torch.cat([vector(probe.state), vector(probe.lam)])

    def central(h: float) -> Tensor:
        above = probe.value(at + h * dots)
        below = probe.value(at - h * dots)
        return (above - below) / (2 * h)

    coarse = central(radius)
    fine = central(radius / 2)
    return fine + (fine - coarse) / 3


def _name(step: Step) -> str:
    fn: Callable[..., Any] | None = getattr(step, "fn", None)
    kind = type(step).__name__
    name = getattr(fn, "__name__", kind)
    return f"step {name}"


def _check_float64(w: Tree, lam: Tree) -> None:
    for what, value in (("w", w), ("lam", lam)):
        if not tree.floats(value):
            raise ValueError(f"checking a step needs {what}: verify.check(step, w, lam, batch)")
        for name, leaf in zip(tree.names(value), tree.leaves(value), strict=True):
            if tree.is_float(leaf) and leaf.dtype != torch.float64:
                raise ValueError(
                    f"{what} at {name} is {leaf.dtype}: finite differences and 1e-10 need float64, use .double()"
                )
