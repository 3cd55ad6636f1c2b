r"""Several inner steps as one.

.. math::
    \Phi_{[k]}(s, \lambda; (D_1, \dots, D_k)) = \Phi(\cdots \Phi(s, \lambda; D_1) \cdots, \lambda; D_k)

The chain rule does not care how a run is cut: an exact sweep over chunks is exact. What changes is
the price. A trajectory remembers one state per chunk, the sweep holds the graphs of one chunk at a
time, and a compiled chunk pays for being called once instead of k times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import Tensor

from metaopt import tree
from metaopt.inner.compiled import Compilation, CompiledPoint
from metaopt.inner.contract import Linearized, Stationary, Step, Wrt
from metaopt.inner.state import InnerState
from metaopt.inner.step import InnerStep
from metaopt.inner.tangents import Tangents
from metaopt.inner.tasks import is_stacked
from metaopt.tree import Tree


@dataclass(frozen=True)
class Chunk:
    """As many steps as its batch, a sequence, has entries. Build it with :func:`chunked`.

    Attributes:
        step: the single step.
        compilation: the compiled functions of a whole chunk, where the single step is compiled.
    """

    step: Step
    compilation: Compilation | None = field(default=None, repr=False, compare=False)

    @property
    def stacked(self) -> bool:
        """Whether the weights have a task axis first."""
        return is_stacked(self.step)

    def init(self, w: Tree, lam: Tree) -> InnerState:
        """As the single step."""
        return self.step.init(w, lam)

    def __call__(self, state: InnerState, lam: Tree, batch: Sequence[Any]) -> InnerState:
        """All steps. Cost: one gradient each."""
        if self.compilation is not None and (new := self.compilation.next(state, lam, _checked(batch))) is not None:
            return new
        for part in _checked(batch):
            state = self.step(state, lam, part)
        return state

    def linearize(self, state: InnerState, lam: Tree, batch: Sequence[Any]) -> Linearized:
        """All steps, each with its graph; compiled, no graph is kept."""
        if self.compilation is not None and self.compilation.refused is None:
            return CompiledPoint(self.compilation, state, lam, _checked(batch), lambda: self._graphs(state, lam, batch))
        return self._graphs(state, lam, batch)

    def vjp(
        self, state: InnerState, lam: Tree, batch: Sequence[Any], cotangent: InnerState, *, wrt: Wrt = "both"
    ) -> tuple[InnerState | None, Tree]:
        """The chunk's adjoint. Cost: that of its steps, whose graphs are held together."""
        return self.linearize(state, lam, batch).pullback(cotangent, wrt)

    def jvp(
        self, state: InnerState, lam: Tree, batch: Sequence[Any], state_dot: InnerState, lam_dot: Tree
    ) -> InnerState:
        """The tangent, rolled forward."""
        for part in _checked(batch):
            state_dot = self.step.jvp(state, lam, part, state_dot, lam_dot)
            state = self.step(state, lam, part)
        return state_dot

    def tangents(self, state: InnerState, lam: Tree, batch: Sequence[Any]) -> Tangents:
        """The tangent maps of all steps."""
        return ChunkTangents(self.step, state, lam, _checked(batch))

    def stationary(self, state: InnerState, rate: float | None) -> Stationary:
        """Not of a chunk."""
        _refuse("implicit differentiation")

    def loss(self, w: Tree, lam: Tree, batch: Any) -> Tensor:
        """Not of a chunk."""
        _refuse("an estimator that evaluates the inner loss itself")

    def adapt(self, state: InnerState, lam: Tree, batch: Any, alpha: Tree) -> tuple[Tree, Tree]:
        """Not of a chunk."""
        _refuse("an estimator that looks into the optimiser's update")

    def pure(
        self, w: Tree, slots: Tree, lam: Tree, batch: Sequence[Any], numbers: tuple[int, ...]
    ) -> tuple[Tree, Tree]:
        """All steps for a compiler to trace; ``numbers`` are theirs."""
        assert isinstance(self.step, InnerStep)
        for i, part in enumerate(batch):
            w, slots = self.step.pure(w, slots, lam, part, numbers[i : i + 1])
        return w, slots

    def _graphs(self, state: InnerState, lam: Tree, batch: Sequence[Any]) -> ChunkLinearized:
        parts = []
        for part in _checked(batch):
            parts.append(self.step.linearize(state, lam, part))
            state = parts[-1].state
        return ChunkLinearized(parts, state)


def chunked(step: Step) -> Chunk:
    """Several of ``step``'s inner steps as one; its batch is a sequence of batches, one for each.

    The run gets its batches in groups, too: ``mo.hypergradient(mo.inner.chunked(step), ...,
    mo.inner.in_chunks(batches, 10), ...)``. The result of an exact estimator is the same. What an
    estimator counts in steps (the horizon of :class:`~metaopt.TruncatedRMD`, the slots of a
    trajectory, the interpolation of :class:`~metaopt.DrMAD`) it then counts in chunks.

    Of a step built with ``inner_step(..., compile=True)`` a whole chunk is compiled: on a small
    net, where calls take the time and not arithmetic, chunks of twenty made exact RMD three to six
    times as fast as compiled steps (``benchmarks/README.md``). The compiler takes a few seconds per
    step of a chunk, once per length. Compiled or not, the sweep holds the activations of one chunk.
    """
    compiled = step.compilation if isinstance(step, InnerStep) else None
    whole = Chunk(step)
    return whole if compiled is None else Chunk(step, Compilation(whole.pure, compiled.backend, len))


def in_chunks(batches: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Batches in groups of ``size``; the last may be shorter.

    >>> in_chunks([1, 2, 3, 4, 5], 2)
    [[1, 2], [3, 4], [5]]
    """
    if size < 1:
        raise ValueError(f"a group holds at least one batch, got size {size}")
    return [batches[start : start + size] for start in range(0, len(batches), size)]


class ChunkLinearized:
    """A chunk at one point: the graphs of its steps."""

    __slots__ = ("_parts", "_state")

    def __init__(self, parts: list[Linearized], state: InnerState) -> None:
        """Keep them."""
        self._parts, self._state = parts, state

    @property
    def state(self) -> InnerState:
        """After the last step."""
        return self._state

    def pullback(self, cotangent: InnerState, wrt: Wrt = "both") -> tuple[InnerState | None, Tree]:
        """The steps' pullbacks, last step first; ``αA`` of the first one only where it is asked for."""
        total: Tree = None
        state_bar: InnerState | None = None
        for i in range(len(self._parts) - 1, -1, -1):
            state_bar, product = self._parts[i].pullback(cotangent, wrt if i == 0 or wrt == "state" else "both")
            total = tree.add(total, product)
            cotangent = cotangent if state_bar is None else state_bar
        return state_bar, total


class ChunkTangents:
    """The tangent maps of a chunk's steps."""

    __slots__ = ("_parts", "_state")

    def __init__(self, step: Step, state: InnerState, lam: Tree, batch: Sequence[Any]) -> None:
        """Cost: one gradient per step, whose graphs are kept."""
        self._parts: list[Tangents] = []
        for part in batch:
            self._parts.append(step.tangents(state, lam, part))
            state = self._parts[-1].state
        self._state = state

    @property
    def state(self) -> InnerState:
        """After the last step."""
        return self._state

    @property
    def products(self) -> int:
        """Of all steps."""
        return sum(part.products for part in self._parts)

    @property
    def columns_at_once(self) -> int:
        """As the first step."""
        return self._parts[0].columns_at_once

    def push(
        self, state_dots: InnerState, lam_dots: Tree, *, chunk_size: int, bound: float | None = None
    ) -> InnerState:
        """Through one step after the other."""
        for part in self._parts:
            state_dots = part.push(state_dots, lam_dots, chunk_size=chunk_size, bound=bound)
        return state_dots


def _checked(batch: Any) -> Sequence[Any]:
    if not isinstance(batch, (list, tuple)) or not batch:
        raise TypeError(
            f"the batch of a chunk is a list with one batch per inner step, got {type(batch).__name__}: "
            "mo.inner.in_chunks makes them"
        )
    return batch


def _refuse(what: str) -> NoReturn:
    raise TypeError(
        f"{what} needs single inner steps, and this step is a chunk of them: use the step that the chunk was made of"
    )
