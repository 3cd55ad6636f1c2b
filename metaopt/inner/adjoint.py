r"""The second-order part of the step adjoint, in two modes.

With :math:`g = \nabla_w L(w, \lambda)` and a cotangent u of it,
:math:`(u^\top \partial^2 L/\partial w^2,\; u^\top \partial^2 L/\partial w\partial\lambda)` is

* one contraction of the gradient's own graph (**reverse over reverse**), or, by symmetry of second derivatives,
* the forward-mode derivative of :math:`(w, \lambda) \mapsto (\nabla_w L, \nabla_\lambda L)` along :math:`(u, 0)` (**forward over reverse**, the
  "mixed mode" of MixFlow-MG, arXiv 2505.00793): no graph of a backward pass is kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from metaopt import tree
from metaopt.inner import _engine
from metaopt.inner.state import InnerState
from metaopt.tree import Tree

Loss: TypeAlias = Callable[[Tree, Tree, Any], Tensor]
Products: TypeAlias = list[Tensor | None]


class Gradient(Protocol):
    """The gradient of the inner loss at one point, and its second-order products."""

    @property
    def g(self) -> Tree:
        """``∇_w L``, a pytree like w (it may carry a graph)."""
        ...

    def contract(
        self, u: list[Tensor], *, with_w: bool, with_lam: bool, last: bool = False
    ) -> tuple[Products, Products]:
        """``(uᵀ ∂²L/∂w², uᵀ ∂²L/∂w∂λ)``, per leaf of w and per float leaf of λ; ``None`` is zero.

        A part not asked for is empty.

        ``u`` has one entry per leaf of w. ``last`` promises that no further product is asked for:
        memory is then given back as the graph is swept.
        """
        ...

    def graph(self) -> GradientGraph:
        """The same with the gradient's graph at hand (for whoever needs other derivatives of it)."""
        ...


class Adjoint(Protocol):
    """A mode: how second-order products are taken."""

    def gradient(self, loss: Loss, w: Tree, lam: Tree, batch: Any) -> Gradient:
        """The gradient at a point, ready for products."""
        ...


def gradient_of(loss: Tensor, w: Tree, *, graph: bool) -> Tree:
    """``∇_w`` of a scalar, a pytree like w, with its own graph or without.

    Under autocast, torch keeps the cast of every autograd leaf until the context ends, and each
    step has leaves of its own: that memory would grow with the run, so the casts are let go here.

    Raises:
        ValueError: if the loss has no graph.
    """
    flat, spec = tree.flatten(w)
    return tree.unflatten(_gradients([loss], flat, graph=graph), spec)


def _gradients(losses: list[Tensor], ws: list[Tensor], *, graph: bool) -> list[Tensor]:
    """Of the losses, of which each has weights of its own, in one call of autograd."""
    for loss in losses:
        if not loss.requires_grad:
            raise ValueError(
                "inner_loss does not depend on the weights, or its graph was cut (detach, no_grad, .item(), an "
                "integer operation)"
            )
    gradients = _engine.products(losses, ws, [torch.ones_like(loss) for loss in losses], create_graph=graph)
    torch.clear_autocast_cache()
    return [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, ws, strict=True)]


def check_twice_differentiable(gradients: Iterable[Tensor | None], inputs: Iterable[Tensor] = ()) -> None:
    """Walk the graph from gradients to the inputs (about a microsecond a node).

    An operation whose backward is marked ``once_differentiable`` leaves a node there that is an
    error, and on no way to any input: autograd would leave it out, and whatever passes through it
    would be missing from every second-order product.

    Raises:
        RuntimeError: if there is such a node.
    """
    seen: set[Any] = {x.grad_fn for x in inputs}
    waiting: list[Any] = [x.grad_fn for x in gradients if x is not None]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("Error"):
            raise RuntimeError(
                "an operation of the inner step is differentiable once only (its backward is marked "
                "once_differentiable): a hypergradient would miss "
                "what passes through it. Write its backward in operations of torch, without that mark, or use "
                "another form of it"
            )
        waiting.extend([parent for parent, _ in node.next_functions])


@dataclass(frozen=True)
class ReverseOverReverse:
    """One contraction of the gradient's own graph.

    The default, faster and smaller on a CPU (see ``benchmarks/README.md``).

    Cost: a product is about two gradients. Memory: the graph of one gradient.

    Where an operation has no second derivative, :class:`ForwardOverReverse` is tried, and a warning
    says so.
    """

    def gradient(self, loss: Loss, w: Tree, lam: Tree, batch: Any) -> GradientGraph:
        """Cost: one gradient."""
        with torch.enable_grad():
            at = Point(w, lam, batch)
            g = _gradients([at.value(loss)], at.w_leaves, graph=True)
        return GradientGraph(loss, at, g)

    def gradients(
        self, loss: Loss, points: Iterable[tuple[InnerState, Any]], lam: Tree
    ) -> list[tuple[InnerState, GradientGraph]]:
        """The gradients at several ``(state, batch)``, beside the states, in one call of autograd.

        The loss is evaluated at a point before the next is asked for. Cost: one gradient each.
        Memory: all their graphs, which share nothing.
        """
        states: list[InnerState] = []
        ats: list[Point] = []
        losses: list[Tensor] = []
        with torch.enable_grad():
            for state, batch in points:
                at = Point(state.w, lam, batch)
                states.append(state)
                ats.append(at)
                losses.append(at.value(loss))
            supply = iter(_gradients(losses, [x for at in ats for x in at.w_leaves], graph=True))
        return [
            (state, GradientGraph(loss, at, [next(supply) for _ in at.w_leaves]))
            for state, at in zip(states, ats, strict=True)
        ]


class Point:
    """``(w, λ; batch)`` with fresh autograd leaves, which are at hand.

    On a small net walking the trees again takes as long as an operation.
    """

    __slots__ = ("batch", "lam", "lam_leaves", "w", "w_leaves")

    def __init__(self, w: Tree, lam: Tree, batch: Any) -> None:
        """The same values."""
        self.w, self.w_leaves = tree.attached(w)
        self.lam, self.lam_leaves = tree.attached(lam)
        self.batch = batch

    def value(self, loss: Loss) -> Tensor:
        """The loss here."""
        return loss(self.w, self.lam, self.batch)


class GradientGraph:
    """The gradient with its graph."""

    __slots__ = ("_at", "_g", "_loss")

    def __init__(self, loss: Loss, at: Point, g: list[Tensor]) -> None:
        """``g`` was computed from the autograd leaves of ``at``, one for each of w."""
        self._loss, self._at, self._g = loss, at, g

    @property
    def g(self) -> Tree:
        """With its graph."""
        return tree.unflatten(self._g, tree.Spec(self._at.w, len(self._g)))

    def contract(
        self, u: list[Tensor], *, with_w: bool, with_lam: bool, last: bool = False
    ) -> tuple[Products, Products]:
        """One backward pass through the gradient's graph, which stays unless this is the last."""
        w = self._at.w_leaves if with_w else []
        lam = self._at.lam_leaves if with_lam else []
        live = [(g, seed) for g, seed in zip(self._g, u, strict=True) if g.requires_grad]
        products: Any = [None] * (len(w) + len(lam))
        if live and products:
            try:
                products = _engine.products(
                    [g for g, _ in live], w + lam, [seed for _, seed in live], retain_graph=not last
                )
            except RuntimeError as error:
                return self._otherwise(error, u, with_w=with_w, with_lam=with_lam)
        return list(products[: len(w)]), list(products[len(w) :])

    def graph(self) -> GradientGraph:
        """Itself."""
        return self

    def _otherwise(
        self, error: RuntimeError, u: list[Tensor], *, with_w: bool, with_lam: bool
    ) -> tuple[Products, Products]:
        if "not implemented" not in str(error) and "double backward" not in str(error):
            raise error
        try:
            products = tangent_of_gradient(
                self._loss, self._at.w, self._at.lam, self._at.batch, u, with_w=with_w, with_lam=with_lam
            )
        except (NotImplementedError, RuntimeError) as other:
            raise RuntimeError(
                f"an operation of inner_loss has no second derivative in either mode (reverse: {_first_line(error)}; "
                f"forward: {_first_line(other)}). " + (_COMPILED if "torch.compile" in str(error) else _FUSED)
            ) from error
        warnings.warn(
            f"reverse over reverse is impossible here ({_first_line(error)}); using forward over reverse instead",
            UserWarning,
            stacklevel=2,
        )
        return products


@dataclass(frozen=True)
class ForwardOverReverse:
    """Mixed mode: the forward-mode derivative of the gradient along u.

    Cost: a product is about two gradients, but nothing is shared with the gradient itself, so that
    a step adjoint takes one gradient more than :class:`ReverseOverReverse`. Memory: activations and
    their tangents, and no graph of a backward pass.

    Where an operation has no forward derivative (GroupNorm, SiLU, Huber, attention, …),
    :class:`ReverseOverReverse` is used from then on, and a warning says so once. What is random is
    drawn again as it was.
    """

    refused: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def gradient(self, loss: Loss, w: Tree, lam: Tree, batch: Any) -> Gradient:
        """Cost: one gradient, without its graph."""
        if self.refused:
            return ReverseOverReverse().gradient(loss, w, lam, batch)
        random = RandomState(w)
        with torch.enable_grad():
            w_ = tree.attach(w)
            g = gradient_of(loss(w_, tree.detach(lam), batch), w_, graph=False)
        return GradientPoint(loss, w, lam, batch, g, random, self.refused)


class GradientPoint:
    """The gradient and where it was taken."""

    __slots__ = ("_at", "_g", "_loss", "_random", "_refused")

    def __init__(
        self, loss: Loss, w: Tree, lam: Tree, batch: Any, g: Tree, random: RandomState, refused: list[str]
    ) -> None:
        """Keep the point; ``refused`` is told if forward mode turns out to be impossible."""
        self._loss, self._at, self._g, self._random, self._refused = loss, (w, lam, batch), g, random, refused

    @property
    def g(self) -> Tree:
        """Without a graph."""
        return self._g

    def contract(
        self, u: list[Tensor], *, with_w: bool, with_lam: bool, last: bool = False
    ) -> tuple[Products, Products]:
        """One forward-mode derivative of one gradient."""
        if not self._refused:
            try:
                with self._random.again():
                    return tangent_of_gradient(self._loss, *self._at, u, with_w=with_w, with_lam=with_lam)
            except (NotImplementedError, RuntimeError) as error:
                self._refused.append(str(error))
                warnings.warn(
                    f"forward over reverse is impossible here ({_first_line(error)}); using reverse over reverse "
                    "instead",
                    UserWarning,
                    stacklevel=2,
                )
        return self.graph().contract(u, with_w=with_w, with_lam=with_lam, last=True)

    def graph(self) -> GradientGraph:
        """Computed again, with its graph. Cost: one gradient."""
        with self._random.again():
            graph = ReverseOverReverse().gradient(self._loss, *self._at)
        check_twice_differentiable(tree.leaves(graph.g))
        return graph


def tangent_of_gradient(
    loss: Loss, w: Tree, lam: Tree, batch: Any, u: list[Tensor], *, with_w: bool, with_lam: bool
) -> tuple[Products, Products]:
    """The derivative of ``(∇_w L, ∇_λ L)`` along ``(u, 0)``, with dual numbers.

    Batches get a zero tangent: with none, torch's in-place formulas for some losses (``mse_loss``)
    meet an immutable zero and fail.
    """
    with torch.enable_grad(), forward_ad.dual_level():
        w_, lam_ = tree.attach(w), tree.attach(lam)
        w_leaves, spec = tree.flatten(w_)
        dual = tree.unflatten(map(forward_ad.make_dual, w_leaves, u), spec)
        still = tree.map(lambda x: forward_ad.make_dual(x, torch.zeros_like(x)) if tree.is_float(x) else x, batch)
        inputs = (w_leaves if with_w else []) + (tree.floats(lam_) if with_lam else [])
        value = loss(dual, lam_, still)
        gradients = torch.autograd.grad(value, inputs, allow_unused=True) if inputs else ()
        torch.clear_autocast_cache()
        tangents = [None if g is None else _tangent(g) for g in gradients]
    split = len(w_leaves) if with_w else 0
    return tangents[:split], tangents[split:]


def dots_of(dot: Tree, like: Tree) -> list[Tensor]:
    """The leaves of a tangent where ``like`` has floating-point ones."""
    return [d for d, x in zip(tree.leaves(dot), tree.leaves(like), strict=True) if tree.is_float(x)]


def transposed_twice(outputs: list[Tensor], inputs: list[Tensor], dots: list[Tensor]) -> list[Tensor]:
    """The tangents of ``outputs`` along ``dots``, from their graph.

    The pullback is linear in its seeds, and its transpose is the tangent map.

    Cost: two backward passes, the second through the graph of the first. Call it with gradients
    enabled.
    """
    live = [x for x in outputs if x.requires_grad]
    seeds = [torch.zeros_like(x).requires_grad_() for x in live]
    bars = (
        torch.autograd.grad(live, inputs, seeds, create_graph=True, allow_unused=True) if live else [None] * len(inputs)
    )
    check_twice_differentiable(bars)
    terms = [(bar * dot).sum() for bar, dot in zip(bars, dots, strict=True) if bar is not None and bar.requires_grad]
    slopes = torch.autograd.grad(torch.stack(terms).sum(), seeds, allow_unused=True) if terms else [None] * len(seeds)
    of_live = iter(slopes)
    tangents = [next(of_live) if x.requires_grad else None for x in outputs]
    return [
        torch.zeros_like(x) if tangent is None else tangent.detach()
        for tangent, x in zip(tangents, outputs, strict=True)
    ]


_FUSED = "Use another form of it: for attention, run the loss under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
_COMPILED = "What torch.compile made cannot be differentiated twice: give the loss what it was made from"


def _tangent(g: Tensor) -> Tensor | None:
    tangent = forward_ad.unpack_dual(g).tangent
    return None if tangent is None else tangent.detach().clone()


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]


class RandomState:
    """Torch's random generators as they are now, so that the same can be drawn again."""

    __slots__ = ("_cpu", "_cuda", "_devices")

    def __init__(self, at: Tree) -> None:
        """``at`` tells which device matters."""
        self._devices = sorted({x.device.index for x in tree.floats(at) if x.is_cuda})
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(index) for index in self._devices]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draws what was drawn from here on, and leaves the generators as it found them."""
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._cpu)
            for index, state in zip(self._devices, self._cuda, strict=True):
                torch.cuda.set_rng_state(state, index)
            yield
