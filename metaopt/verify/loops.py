r"""Training written out in plain torch: the reference that shares no line with the engine.

A :class:`Loop` holds one bilevel problem twice: as a :class:`Case`, and as a function ``(w, lam,
batches) -> w_T`` in which every update is spelled out and autograd keeps the whole graph. Nothing
in that function comes from ``metaopt.optim``, ``metaopt.inner`` or a trajectory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from metaopt import tree
from metaopt.inner.constant_slots import ConstantSlots
from metaopt.inner.custom import custom_step
from metaopt.inner.reweighted import reweighted
from metaopt.inner.state import InnerState
from metaopt.inner.step import inner_step
from metaopt.optim.adam import Adam
from metaopt.optim.sgd import SGD
from metaopt.tree import Tree, vector
from metaopt.verify.case import Case

Parts: TypeAlias = list[Tensor]
"""Weights, and whatever the rule keeps beside them, as flat lists."""

HORIZON = 20
"""More than sixteen, so that the rows of a trajectory take a second block."""


class Truth(NamedTuple):
    """What autograd gives through the plain loop.

    Attributes:
        total: the hypergradient, flattened.
        initial: the gradient with respect to the initial weights, flattened.
        reached: the last weights, flattened.
        generator: torch's random state after the run.
    """

    total: Tensor
    initial: Tensor
    reached: Tensor
    generator: Tensor


@dataclass(frozen=True)
class Loop:
    """One problem, and the same training in plain torch.

    Attributes:
        problem: for metaopt.
        start: weights to the parts before the first step.
        update: ``(parts, lam, batch, t) -> parts``; the weights come first.
        momentum_sgd: whether Φ is momentum SGD, which a reversible trajectory needs.
        draws: seed of the random draws during the run; ``None`` where there are none.
    """

    problem: Case
    start: Callable[[Tree], list[Parts]]
    update: Callable[[list[Parts], Tree, Any, int], list[Parts]]
    momentum_sgd: bool = False
    draws: int | None = None

    def truth(self, horizon: int, last: int | None = None) -> Truth:
        """Autograd through the loop; with ``last``, the state before the last steps is a constant."""
        if self.draws is not None:
            torch.manual_seed(self.draws)
        p = self.problem
        with torch.enable_grad():
            lam = tree.attach(p.lam)
            w0 = tree.attach(p.w0)
            parts = self.start(w0)
            for t in range(1, horizon + 1):
                if last is not None and t == horizon - last + 1:
                    parts = [_detached(part) for part in parts]
                batch = p.batches(t) if callable(p.batches) else p.batches[t - 1]
                parts = self.update(parts, lam, batch, t)
            generator = torch.get_rng_state()

            w = _shaped(parts[0], w0)
            loss = p.outer_loss(w, lam, p.outer_batch)
            inputs = tree.floats(lam) + tree.floats(w0)
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True)

        filled = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, inputs, strict=True)]
        count = len(tree.floats(lam))
        total = vector(filled[:count])
        initial = vector(filled[count:])
        return Truth(total, initial, vector(tree.detach(w)), generator)


# -- update rules --------------------------------------------------------------------------------
def gradient(loss: Callable[[Tree, Tree, Any], Tensor], w: Parts, like: Tree, lam: Tree, batch: Any) -> Parts:
    """The inner gradient with its graph."""
    w = [x if x.requires_grad else x.requires_grad_() for x in w]
    value = loss(_shaped(w, like), lam, batch)
    return list(torch.autograd.grad(value, w, create_graph=True))


def heavy_ball(w: Parts, v: Parts, g: Parts, *, lr: Any, momentum: Any, decay: Any, damp: float, t: int) -> list[Parts]:
    """``torch.optim.SGD``'s documented update: decay into the gradient; dampening from the second step on."""
    g = [x + decay * y for x, y in zip(g, w, strict=True)]
    share = 1.0 if t == 1 else 1.0 - damp
    v = [momentum * x + share * y for x, y in zip(v, g, strict=True)]
    w = [x - lr * y for x, y in zip(w, v, strict=True)]
    return [w, v]


def adaptive(w: Parts, m: Parts, s: Parts, g: Parts, *, lr: Any, betas: Any, eps: float, t: int) -> list[Parts]:
    """Adam's documented update (Kingma and Ba 2015, algorithm 1)."""
    one, two = betas
    m = [one * x + (1 - one) * y for x, y in zip(m, g, strict=True)]
    s = [two * x + (1 - two) * y * y for x, y in zip(s, g, strict=True)]
    new = []
    for x, first, second in zip(w, m, s, strict=True):
        mean = first / (1 - one**t)
        square = second / (1 - two**t)
        new.append(x - lr * mean / (square.sqrt() + eps))
    return [new, m, s]


# -- problems ------------------------------------------------------------------------------------
def small_net(*, learned: bool, dropout: float = 0.3, lazy: bool = False) -> Loop:
    """A tanh net under momentum SGD with weight decay and dampening.

    Args:
        learned: whether rate and momentum are part of λ, or plain numbers.
        dropout: of the hidden units; drawn from torch's global generator.
        lazy: whether each batch is drawn from the global generator when its step begins.
    """
    loss, outer_loss, w0, lam = _net(dropout)
    if learned:
        lam = {**lam, "lr": _number(0.2), "momentum": _number(0.8)}

    def setting(lam: Tree, name: str, fixed: float) -> Any:
        return lam[name] if learned else fixed

    def update(parts: list[Parts], lam: Tree, batch: Any, t: int) -> list[Parts]:
        w, v = parts
        g = gradient(loss, w, w0, lam, batch)
        lr = setting(lam, "lr", 0.2)
        momentum = setting(lam, "momentum", 0.75)
        return heavy_ball(w, v, g, lr=lr, momentum=momentum, decay=0.05, damp=0.25, t=t)

    optimizer = SGD(
        lr=(lambda lam, t: lam["lr"]) if learned else 0.2,
        momentum=(lambda lam, t: lam["momentum"]) if learned else 0.75,
        weight_decay=0.05,
        dampening=0.25,
    )
    step = inner_step(loss, optimizer)
    fixed = _batches()
    batches = _drawn_batch if lazy else fixed
    name = f"net, momentum, {'learned' if learned else 'fixed'} rate{', lazy batches' if lazy else ''}"
    problem = Case(step, outer_loss, w0, lam, batches, fixed[0], name=name)
    draws = 5 if dropout or lazy else None
    return Loop(problem, _with_zeros(1), update, momentum_sgd=not learned, draws=draws)


def constant_momentum() -> Loop:
    """The net whose momentum is a constant in every derivative (:class:`metaopt.inner.ConstantSlots`)."""
    loop = small_net(learned=False)

    def update(parts: list[Parts], lam: Tree, batch: Any, t: int) -> list[Parts]:
        w, v = parts
        return loop.update([w, _detached(v)], lam, batch, t)

    step = ConstantSlots(loop.problem.step)
    problem = replace(loop.problem, name="net, momentum held constant", step=step)
    return replace(loop, problem=problem, update=update, momentum_sgd=False)


def reweighted_net() -> Loop:
    """A net on weighted examples: the weights follow the losses, and the update takes them as constants."""
    normal = _normals(6)
    w0 = {"a": normal(3, 4), "b": normal(4)}
    lam = {"slope": _number(0.7), "shift": 0.1 * normal(1)}

    def losses(w: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        hidden = torch.tanh(x @ w["a"])
        error = hidden @ w["b"] - y[:, 0]
        return error.square()

    def weigh(losses: Tensor, lam: Tree) -> Tensor:
        scores = lam["slope"] * losses + lam["shift"]
        weights = torch.sigmoid(scores)
        return weights / weights.sum()

    def inner_loss(w: Tree, lam: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        weighted = reweighted(losses(w, batch), lambda values: weigh(values, lam))
        return weighted.sum()

    def update(parts: list[Parts], lam: Tree, batch: Any, t: int) -> list[Parts]:
        (w,) = parts
        values = losses(_shaped(w, w0), batch)
        weights = weigh(values, lam)
        g = torch.autograd.grad(values, w, weights, create_graph=True)
        new = [x - 0.3 * y for x, y in zip(w, g, strict=True)]
        return [new]

    def outer_loss(w: Tree, lam: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        return losses(w, batch).mean()

    step = inner_step(inner_loss, SGD(lr=0.3))
    batches = _batches()
    problem = Case(step, outer_loss, w0, lam, batches, batches[0], name="reweighted examples")
    return Loop(problem, _with_zeros(0), update)


def adaptive_net() -> Loop:
    """The same net under Adam."""
    loss, outer_loss, w0, lam = _net(0.0)

    def update(parts: list[Parts], lam: Tree, batch: Any, t: int) -> list[Parts]:
        w, m, s = parts
        g = gradient(loss, w, w0, lam, batch)
        return adaptive(w, m, s, g, lr=0.05, betas=(0.8, 0.9), eps=1e-2, t=t)

    step = inner_step(loss, Adam(lr=0.05, betas=(0.8, 0.9), eps=1e-2))
    batches = _batches()
    problem = Case(step, outer_loss, w0, lam, batches, batches[0], name="net, Adam")
    return Loop(problem, _with_zeros(2), update)


def wide(size: int) -> Loop:
    """Many weights, each in a separate bowl around λ that drifts from batch to batch, momentum SGD."""
    normal = _normals(3)
    w0 = {"a": normal(size), "b": normal(7)}
    lam = {"a": normal(size), "b": normal(7)}
    batches = [0.1 * normal() for _ in range(HORIZON)]

    def loss(w: Tree, lam: Tree, batch: Tensor) -> Tensor:
        a = w["a"] - lam["a"] - batch
        b = 0.5 * (w["b"] - lam["b"])
        return _bowl(a) + _bowl(b)

    def update(parts: list[Parts], lam: Tree, batch: Any, t: int) -> list[Parts]:
        w, v = parts
        g = gradient(loss, w, w0, lam, batch)
        return heavy_ball(w, v, g, lr=0.1, momentum=0.5, decay=0.0, damp=0.0, t=t)

    step = inner_step(loss, SGD(lr=0.1, momentum=0.5))

    def outer_loss(w: Tree, lam: Tree, batch: Any) -> Tensor:
        of_a = w["a"].square().mean()
        of_b = w["b"].square().sum()
        return 0.5 * of_a + of_b

    kib = 2 * 8 * (size + 7) // 1024
    problem = Case(step, outer_loss, w0, lam, batches, name=f"{kib} KiB of state, momentum")
    return Loop(problem, _with_zeros(1), update, momentum_sgd=True)


def delay_line(size: int) -> Loop:
    """A custom step that hands tensors on: ``a' = b, b' = c, c' = tanh(a) + λ c``, and a slot likewise."""
    normal = _normals(4)
    w0 = {"a": normal(size), "b": normal(size), "c": normal(size)}
    lam = {"gain": 0.2 * normal(size), "drift": normal()}

    def turn(a: Tensor, b: Tensor, c: Tensor, s: Tensor, lam: Tree, batch: Any) -> tuple[Tensor, ...]:
        gain = lam["gain"] * s
        drift = 0.1 * lam["drift"] * batch
        new = torch.tanh(a) + gain + drift
        return b, c, new, c

    def fn(state: InnerState, lam: Tree, batch: Any) -> InnerState:
        w = state.w
        s = state.slots["s"]
        a, b, c, s = turn(w["a"], w["b"], w["c"], s, lam, batch)
        return InnerState({"a": a, "b": b, "c": c}, {"s": s})

    def init(w: Tree, lam: Tree) -> InnerState:
        s = torch.zeros_like(w["a"])
        return InnerState(w, {"s": s})

    def update(parts: list[Parts], lam: Tree, batch: Any, t: int) -> list[Parts]:
        (a, b, c), (s,) = parts
        *w, s = turn(a, b, c, s, lam, batch)
        return [w, [s]]

    def outer_loss(w: Tree, lam: Tree, batch: Any) -> Tensor:
        product = w["a"] * w["b"]
        return product.mean() + w["c"].square().mean()

    step = custom_step(fn, init)
    batches = [0.1 * t for t in range(HORIZON)]
    kib = 4 * 8 * size // 1024
    problem = Case(step, outer_loss, w0, lam, batches, name=f"{kib} KiB of state, handed on")
    return Loop(problem, lambda w: [tree.leaves(w), [torch.zeros_like(w["a"])]], update)


def loops() -> list[Loop]:
    """The loops that whole runs are verified on, the cheap ones first."""
    return [
        delay_line(3),
        small_net(learned=False),
        adaptive_net(),
        small_net(learned=True),
        small_net(learned=False, lazy=True),
        wide(600),
        wide(9000),
        delay_line(600),
        delay_line(3000),
    ]


# -- parts ---------------------------------------------------------------------------------------
def _net(dropout: float) -> tuple[Any, Any, Tree, Tree]:
    """Inner loss, outer loss, weights and λ of a regression with five tanh units."""
    normal = _normals(1)
    w0 = {"0.weight": normal(3, 5) / 3**0.5, "0.bias": 0.1 * normal(5), "1.weight": normal(5, 1) / 5**0.5}
    lam = {"penalty": 0.3 * normal(5), "shift": 0.2 * normal(3)}

    def mean_square(w: Tree, x: Tensor, y: Tensor, p: float) -> Tensor:
        hidden = torch.tanh(x @ w["0.weight"] + w["0.bias"])
        kept = torch.nn.functional.dropout(hidden, p)
        error = kept @ w["1.weight"] - y
        return error.square().mean()

    def inner_loss(w: Tree, lam: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        fit = mean_square(w, x + lam["shift"], y, dropout)
        squares = w["1.weight"][:, 0].square()
        penalty = (lam["penalty"].exp() * squares).sum()
        return fit + 0.1 * penalty

    def outer_loss(w: Tree, lam: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        fit = mean_square(w, x, y, 0.0)
        return fit + 0.05 * lam["penalty"].square().sum()

    return inner_loss, outer_loss, w0, lam


def _batches() -> list[tuple[Tensor, Tensor]]:
    normal = _normals(2)
    return [(normal(6, 3), normal(6, 1)) for _ in range(HORIZON)]


def _drawn_batch(t: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(6, 3, dtype=torch.float64)
    y = torch.randn(6, 1, dtype=torch.float64)
    return x, y


def _with_zeros(count: int) -> Callable[[Tree], list[Parts]]:
    """The weights, and lists of zeros like them."""

    def start(w: Tree) -> list[Parts]:
        parts = [tree.leaves(w)]
        for _ in range(count):
            zeros = [torch.zeros_like(x) for x in parts[0]]
            parts.append(zeros)
        return parts

    return start


def _normals(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return normal


def _bowl(x: Tensor) -> Tensor:
    heights = (1 + x.square()).sqrt()
    return heights.sum()


def _shaped(flat: Parts, like: Tree) -> Tree:
    _, structure = tree.flatten(like)
    return tree.unflatten(flat, structure)


def _detached(part: Parts) -> Parts:
    return [x.detach() for x in part]


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
