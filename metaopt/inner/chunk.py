"""Several inner steps as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from typing_extensions import override

from metaopt import checks, tree
from metaopt.inner.compiled import Compilation, CompiledPoint
from metaopt.inner.contract import Linearized, Step, Wrt
from metaopt.inner.state import InnerState
from metaopt.inner.step import InnerStep
from metaopt.tree import Tree


@dataclass(frozen=True)
class Chunk(Step):
    r"""As many steps as its batch, a sequence, has entries. Build it with :func:`chunked`.

    .. math::
        \Phi_{[k]}(s, \lambda; (D_1, \dots, D_k)) = \Phi(\cdots \Phi(s, \lambda; D_1) \cdots, \lambda; D_k)

    The chain rule does not care how a run is cut: an exact sweep over chunks is exact. What changes
    is the price. A trajectory remembers one state per chunk, the sweep holds the graphs of one
    chunk at a time, and a compiled chunk pays for being called once instead of k times.

    Attributes:
        step: the single step.
        steps_at_once: how many batches a run puts into a group; ``None``: they come in groups.
        compilation: the compiled functions of a whole chunk, where the single step is compiled.
    """

    step: Step
    steps_at_once: int | None = None  # pyright: ignore[reportIncompatibleMethodOverride]
    compilation: Compilation | None = field(default=None, repr=False, compare=False)

    @property
    @override
    def stacked(self) -> bool:
        return self.step.stacked

    @property
    @override
    def undeclared(self) -> list[str]:
        return self.step.undeclared

    @override
    def init(self, w: Tree, lam: Tree) -> InnerState:
        return self.step.init(w, lam)

    def __call__(self, state: InnerState, lam: Tree, batch: Sequence[Any]) -> InnerState:
        """All steps. Cost: one gradient each."""
        compilation = self._compilation(state, lam, batch)
        if compilation is not None and (new := compilation.next(state, lam, batch)) is not None:
            return new
        for part in _checked(batch):
            state = self.step(state, lam, part)
        return state

    @override
    def linearize(self, state: InnerState, lam: Tree, batch: Sequence[Any]) -> Linearized:
        """All steps, each with its graph; compiled, no graph is kept."""
        compilation = self._compilation(state, lam, batch)
        if compilation is not None and compilation.refused is None:
            return CompiledPoint(compilation, state, lam, batch, lambda: self._graphs(state, lam, batch))
        return self._graphs(state, lam, batch)

    @override
    def steps_in(self, batch: Sequence[Any]) -> int:
        return len(batch)

    def pure(
        self, w: Tree, slots: Tree, lam: Tree, batch: Sequence[Any], numbers: tuple[int, ...]
    ) -> tuple[Tree, Tree]:
        """All steps for a compiler to trace; ``numbers`` are theirs."""
        assert isinstance(self.step, InnerStep)
        for i, part in enumerate(batch):
            w, slots = self.step.pure(w, slots, lam, part, numbers[i : i + 1])
        return w, slots

    @override
    def _refusal(self, what: str) -> TypeError:
        return TypeError(f"a chunk of steps has no {what}: this estimator needs single inner steps (mo.inner_step)")

    def _compilation(self, state: InnerState, lam: Tree, batch: Sequence[Any]) -> Compilation | None:
        if self.compilation is not None:
            assert isinstance(self.step, InnerStep)
            self.step.look(state, lam, _checked(batch)[0])
        return self.compilation

    def _graphs(self, state: InnerState, lam: Tree, batch: Sequence[Any]) -> ChunkLinearized:
        parts = []
        for part in _checked(batch):
            parts.append(self.step.linearize(state, lam, part))
            state = parts[-1].state
        return ChunkLinearized(parts, state)


def chunked(step: Step, steps_at_once: int | None = None) -> Chunk:
    """Several of ``step``'s inner steps as one; its batch is a sequence of batches, one for each.

    The result of an exact estimator is the same. What an estimator counts in steps (the ``steps``
    of :class:`~metaopt.TruncatedRMD`, the slots of a trajectory, the interpolation of
    :class:`~metaopt.DrMAD`) it then counts in chunks. The sweep holds the activations of one chunk.
    Of a compiled step (:func:`metaopt.compiled`) a whole chunk is compiled.

    Args:
        step: the single step.
        steps_at_once: with it, a run groups its batches by itself. Default: they come in groups,
            from :func:`in_chunks` for instance.
    """
    if steps_at_once is not None:
        checks.count("chunked", "steps_at_once", steps_at_once)
    compiled = step.compilation if isinstance(step, InnerStep) else None
    whole = Chunk(step, steps_at_once)
    return whole if compiled is None else replace(whole, compilation=Compilation(whole.pure, compiled.backend, len))


def in_chunks(batches: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Batches in groups of ``size``; the last may be shorter.

    >>> in_chunks([1, 2, 3, 4, 5], 2)
    [[1, 2], [3, 4], [5]]
    """
    if size < 1:
        raise ValueError(f"a group holds at least one batch, got size {size}")
    return [batches[start : start + size] for start in range(0, len(batches), size)]


class ChunkLinearized(Linearized):
    """A chunk at one point: the graphs of its steps."""

    __slots__ = ("_parts", "_state")

    def __init__(self, parts: list[Linearized], state: InnerState) -> None:
        self._parts = parts
        self._state = state

    @property
    @override
    def state(self) -> InnerState:
        return self._state

    @override
    def pullback(
        self, cotangent: InnerState, wrt: Wrt = "both", *, last: bool = False
    ) -> tuple[InnerState | None, Tree]:
        """The steps' pullbacks, last step first; ``αA`` of the first one only where it is asked for."""
        total: Tree = None
        state_bar: InnerState | None = None
        for i in range(len(self._parts) - 1, -1, -1):
            wanted = wrt if i == 0 or wrt == "state" else "both"
            state_bar, product = self._parts[i].pullback(cotangent, wanted, last=last)
            total = tree.add(total, product)
            cotangent = cotangent if state_bar is None else state_bar
        return state_bar, total

    @override
    def pushforward(
        self, state_dots: InnerState, lam_dots: Tree, *, columns_at_once: int | None = None, bound: float | None = None
    ) -> InnerState:
        """Through one step after the other."""
        for part in self._parts:
            state_dots = part.pushforward(state_dots, lam_dots, columns_at_once=columns_at_once, bound=bound)
        return state_dots

    @property
    @override
    def columns_at_once(self) -> int:
        return self._parts[0].columns_at_once

    @property
    @override
    def products(self) -> int:
        return sum(part.products for part in self._parts)


def _checked(batch: Any) -> Sequence[Any]:
    if not isinstance(batch, (list, tuple)) or not batch:
        raise TypeError(
            f"the batch of a chunk is a list with one batch per inner step, got {type(batch).__name__}: "
            "mo.inner.in_chunks makes them"
        )
    return batch
