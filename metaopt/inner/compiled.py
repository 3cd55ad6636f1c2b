"""Φ and its adjoint as whole compiled functions."""

from __future__ import annotations

import re
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import replay, tree
from metaopt.inner import _passes
from metaopt.inner.contract import Linearized, Wrt
from metaopt.inner.state import InnerState
from metaopt.tree import Tree

Phi: TypeAlias = Callable[[Tree, Tree, Tree, Any, tuple[int, ...]], tuple[Tree, Tree]]
"""``(w, slots, lam, batch, numbers) -> (w', slots')``, pure.

``numbers`` are those of the steps it takes, 1 … T. An optimiser that does not look
at them is compiled once for all of them."""


class Compiled:
    r"""Functions that are compiled when they are first called, or never if the compiler refuses one of them.

    .. math::
        (w, v, \lambda) \mapsto \Phi, \qquad (w, v, \lambda, \bar w, \bar v) \mapsto (\alpha A,
        \alpha B)

    Each is one graph with nothing but its values going out: a compiled forward pass under
    autograd's eager double backward would raise. The adjoint evaluates the gradient again, so a
    step with its pullback takes two gradients and one contraction, as
    :class:`metaopt.trajectory.Full` does.

    Attributes:
        backend: of :func:`torch.compile`.
        seconds: what the first calls took, tracing and compiling included.
        refused: why nothing is compiled any more; ``None`` as long as all goes well.
    """

    def __init__(self, what: str, backend: str, *, dynamic: bool | None = None, join: bool = False) -> None:
        """Nothing is compiled yet; ``what`` stands in the warning if nothing can be.

        ``dynamic`` is torch's: ``False`` compiles for each shape and number, ``None`` in general
        from the second on; ``join``: what is computed more than once is computed once.
        """
        self.backend = backend
        self.seconds = 0.0
        self.refused: str | None = None
        self._what = what
        self._dynamic = dynamic
        self._join = join
        self._made: dict[str, Callable[..., Any]] = {}

    def __repr__(self) -> str:
        """The backend, and what became of it."""
        done = f"{len(self._made)} functions, {self.seconds:.1f} s" if self._made else "nothing compiled yet"
        return f"{type(self).__name__}({self.backend}, {self.refused or done})"

    def _run(self, name: str, method: Callable[..., Any], *arguments: Any, lean: bool = False) -> Any:
        """``method``, one of this object, compiled under its own name; ``None`` if it cannot be.

        ``lean`` computes again rather than hold.
        """
        if self.refused is not None:
            return None
        first = name not in self._made
        if first:
            self._made[name] = self._compiled(
                method, on_cpu=all(x.device.type == "cpu" for x in tree.floats(arguments)), lean=lean
            )
        start = time.perf_counter()
        try:
            with torch.no_grad():
                return self._made[name](*tree.map(_cut, arguments))
        except (
            Exception
        ) as error:  # whatever the compiler cannot do; the user's own mistakes are raised again by the eager function
            self.refused = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            warnings.warn(
                f"{self._what} cannot be compiled and runs eagerly instead ({self.refused})", UserWarning, stacklevel=4
            )
            return None
        finally:
            if first:
                self.seconds += time.perf_counter() - start

    def _compiled(self, method: Callable[..., Any], *, on_cpu: bool, lean: bool) -> Callable[..., Any]:
        # The compiler keeps its results, and counts them, per code object: one of our own keeps the
        # functions of a program apart.
        function = method.__func__  # pyright: ignore[reportFunctionMemberAccess]
        own = types.FunctionType(
            function.__code__.replace(),
            function.__globals__,
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        options: dict[str, Any] = {"guard_filter_fn": _worth_checking}
        if self.backend == "inductor":
            options["fallback_random"] = True  # draws what the eager function draws
            used = {
                _passes.spell_out: True,
                _passes.join: self._join,
                _passes.trim: True,
                _passes.recompute: lean,
                _passes.note: True,
            }
            options["joint_custom_pre_pass"] = _passes.passes(
                *(function for function, wanted in used.items() if wanted)
            )
            if on_cpu:  # even the calls are compiled; NHWC slows what is around convolutions more than it helps them
                options |= {"cpp_wrapper": True, "layout_optimization": False}
        return torch.compile(
            types.MethodType(own, self), fullgraph=True, dynamic=self._dynamic, backend=self.backend, options=options
        )


class Compilation(Compiled):
    """The compiled functions of one Φ.

    Attributes:
        unused: which leaves of λ Φ does not depend on (or are not floats); ``None`` before the first
            pullback.
    """

    def __init__(self, phi: Phi, backend: str, steps: Callable[[Any], int] | None = None) -> None:
        """``steps(batch)`` says how many steps Φ takes, if it is not one."""
        # within one step nothing is computed twice, and what is found equal elsewhere would only be
        # held longer
        super().__init__("the inner step", backend, join=steps is not None)
        self._phi = phi
        self._many = steps
        self.unused: list[bool] | None = None

    def next(self, state: InnerState, lam: Tree, batch: Any) -> InnerState | None:
        """Φ, or ``None`` if it cannot be compiled."""
        out = self._run("step", self._step, state.w, state.slots, lam, batch, self._numbers(state, batch))
        return None if out is None else InnerState(out[0], out[1], state.t + self._steps(batch))

    def pullback(
        self, state: InnerState, lam: Tree, batch: Any, cotangent: InnerState, wrt: str
    ) -> tuple[InnerState | None, list[Tensor]] | None:
        """``αA`` (unless only λ is asked for) and ``αB`` per float leaf of λ, zeros included.

        ``None`` if it cannot be compiled.
        """
        slots = tree.zeros_like(state.slots) if cotangent.slots is None else cotangent.slots
        seeds = tree.floats(cotangent.w) + tree.floats(slots)
        moving = "lam" if wrt == "lam" else "both"
        out = self._run(
            moving,
            self._adjoint,
            state.w,
            state.slots,
            lam,
            batch,
            self._numbers(state, batch),
            seeds,
            moving == "both",
            lean=True,
        )
        if out is None:
            return None
        supply = iter(out)
        at = tree.map(lambda x: next(supply) if tree.is_float(x) else x, state) if moving == "both" else None
        return at, list(supply)

    # -- what is compiled ------------------------------------------------------------------------
    def _step(self, w: Tree, slots: Tree, lam: Tree, batch: Any, numbers: tuple[int, ...]) -> tuple[Tree, Tree]:
        return self._phi(w, slots, lam, batch, numbers)

    def _adjoint(
        self,
        w: Tree,
        slots: Tree,
        lam: Tree,
        batch: Any,
        numbers: tuple[int, ...],
        seeds: list[Tensor],
        with_state: bool,
    ) -> tuple[Tensor, ...]:
        moving = (w, slots, lam) if with_state else (lam,)
        fixed = () if with_state else (w, slots)

        def phi(*values: Tensor) -> tuple[Tensor, ...]:
            supply = iter(values)
            at = (*fixed, *tree.map(lambda x: next(supply) if tree.is_float(x) else x, moving))
            return tuple(tree.floats(self._phi(at[0], at[1], at[2], batch, numbers)))

        pull = torch.func.vjp(phi, *tree.floats(moving))[1]
        return pull(tuple(seeds))

    # -- how -------------------------------------------------------------------------------------
    def _steps(self, batch: Any) -> int:
        return self._many(batch) if self._many else 1

    def _numbers(self, state: InnerState, batch: Any) -> tuple[int, ...]:
        return tuple(range(state.t + 1, state.t + 1 + self._steps(batch)))


class CompiledPoint(Linearized):
    """Φ at one point. No graph is kept: the pullback evaluates the gradient again.

    What is random is drawn by whichever is asked for first, and drawn again as it was by the
    others.
    """

    __slots__ = ("_at", "_batch", "_compilation", "_eager", "_graph", "_lam", "_rng", "_state")

    def __init__(
        self, compilation: Compilation, state: InnerState, lam: Tree, batch: Any, eager: Callable[[], Linearized]
    ) -> None:
        """``eager`` linearises without compiling, for when it has to be."""
        self._compilation = compilation
        self._eager = eager
        self._at = state
        self._lam = lam
        self._batch = batch
        self._rng: replay.Rng | None = None
        self._state: InnerState | None = None
        self._graph: Linearized | None = None

    @property
    @override
    def state(self) -> InnerState:
        if self._state is not None:
            return self._state
        with self._drawn():
            new = self._compilation.next(self._at, self._lam, self._batch)
            self._state = new = self._eager().state if new is None else new
        return new

    @override
    def pullback(
        self, cotangent: InnerState, wrt: Wrt = "both", *, last: bool = False
    ) -> tuple[InnerState | None, Tree]:
        """``(αA, αB)``; which leaves of λ play no part is found out eagerly, once."""
        with self._drawn():
            unused = self._compilation.unused
            out = (
                None if unused is None else self._compilation.pullback(self._at, self._lam, self._batch, cotangent, wrt)
            )
            if out is None:
                both = self._eager().pullback(cotangent, "both" if unused is None and wrt == "state" else wrt)
                if unused is None:
                    self._compilation.unused = [leaf is None for leaf in tree.leaves(both[1])]
                return both if wrt != "state" else (both[0], None)
        supply = iter(out[1])
        missing = iter(self._compilation.unused or [])

        def place(leaf: Any) -> Any:
            value = next(supply) if tree.is_float(leaf) else None
            return None if next(missing) and (value is None or not bool(value.any())) else value

        return out[0], tree.map(place, self._lam) if wrt != "state" else None

    @override
    def pushforward(
        self, state_dots: InnerState, lam_dots: Tree, *, columns_at_once: int | None = None, bound: float | None = None
    ) -> InnerState:
        """Eagerly, since the graph of the gradient is what columns share."""
        return self._kept().pushforward(state_dots, lam_dots, columns_at_once=columns_at_once, bound=bound)

    @property
    @override
    def columns_at_once(self) -> int:
        return self._kept().columns_at_once

    @property
    @override
    def products(self) -> int:
        return 0 if self._graph is None else self._graph.products

    # -- parts -----------------------------------------------------------------------------------
    def _kept(self) -> Linearized:
        if self._graph is None:
            with self._drawn():
                self._graph = self._eager()
                self._state = self._graph.state
        return self._graph

    @contextmanager
    def _drawn(self) -> Iterator[None]:
        if self._rng is None:
            self._rng = replay.snapshot(self._at.w)
            yield
        else:
            with replay.repeated(self._rng):
                yield


def _worth_checking(guards: Sequence[Any]) -> list[bool]:
    """Which of the compiler's assumptions are checked at every call.

    All but those on the code of torch and of this library, which stays what it is.

    On a small net those are most, and checking them takes a quarter of an online step.
    """
    return [_OF_THE_LIBRARIES.match(guard.name) is None for guard in guards]


_OF_THE_LIBRARIES = re.compile(r"G\['__import_(torch|metaopt)(_dot_[^']*)?'\]")


def _cut(leaf: Any) -> Any:
    """Without a graph. What has none stays the object it is, so that the compiler sees where two inputs are one."""
    return leaf.detach() if isinstance(leaf, torch.Tensor) and leaf.requires_grad else leaf
