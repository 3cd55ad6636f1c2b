r"""Training written out in plain torch: the reference that shares no line with the engine.

A :class:`Loop` holds one bilevel problem twice: as a :class:`Case`, and as a function ``(w, lam,
batches) -> w_T`` in which every update is spelled out and autograd keeps the whole graph. Nothing
in that function comes from ``metaopt.optim``, ``metaopt.inner`` or a trajectory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from metaopt.verify.cases import Case

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
                    parts = [[x.detach() for x in part] for part in parts]
                batch = p.batches(t) if callable(p.batches) else p.batches[t - 1]
                parts = self.update(parts, lam, batch, t)
            generator = torch.get_rng_state()
            w = tree.unflatten(parts[0], tree.flatten(w0)[1])
            loss = p.outer_loss(w, lam, p.outer_batch)
            inputs = tree.floats(lam) + tree.floats(w0)
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
        filled = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, inputs, strict=True)]
        count = len(tree.floats(lam))
        return Truth(vector(filled[:count]), vector(filled[count:]), vector(tree.detach(w)), generator)


# -- update rules --------------------------------------------------------------------------------
def gradient(loss: Callable[[Tree, Tree, Any], Tensor], w: Parts, like: Tree, lam: Tree, batch: Any) -> Parts:
    """The inner gradient with its graph."""
    w = [x if x.requires_grad else x.requires_grad_() for x in w]
    return list(torch.autograd.grad(loss(tree.unflatten(w, tree.flatten(like)[1]), lam, batch), w, create_graph=True))


def heavy_ball(w: Parts, v: Parts, g: Parts, *, lr: Any, momentum: Any, decay: Any, damp: float, t: int) -> list[Parts]:
    """``torch.optim.SGD``'s documented update: decay into the gradient; dampening from the second step on."""
    g = [x + decay * y for x, y in zip(g, w, strict=True)]
    share = 1.0 if t == 1 else 1.0 - damp
    v = [momentum * x + share * y for x, y in zip(v, g, strict=True)]
    return [[x - lr * y for x, y in zip(w, v, strict=True)], v]


def adaptive(w: Parts, m: Parts, s: Parts, g: Parts, *, lr: Any, betas: Any, eps: float, t: int) -> list[Parts]:
    """Adam's documented update (Kingma and Ba 2015, algorithm 1)."""
    one, two = betas
    m = [one * x + (1 - one) * y for x, y in zip(m, g, strict=True)]
    s = [two * x + (1 - two) * y * y for x, y in zip(s, g, strict=True)]
    new = []
    for x, first, second in zip(w, m, s, strict=True):
        corrected = first / (1 - one**t)
        new.append(x - lr * corrected / ((second / (1 - two**t)).sqrt() + eps))
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
    name = f"net, momentum, {'learned' if learned else 'fixed'} rate" + (", lazy batches" if lazy else "")
    problem = Case(
        inner_step(loss, optimizer),
        outer_loss,
        w0,
        lam,
        _drawn_batch if lazy else _batches(),
        _batches()[0],
        name=name,
    )
    return Loop(problem, _with_zeros(1), update, momentum_sgd=not learned, draws=5 if dropout or lazy else None)


def constant_momentum() -> Loop:
    """The net whose momentum is a constant in every derivative (:class:`metaopt.inner.ConstantSlots`)."""
    loop = small_net(learned=False)

    def update(parts: list[Parts], lam: Tree, batch: Any, t: int) -> list[Parts]:
        w, v = parts
        return loop.update([w, [x.detach() for x in v]], lam, batch, t)

    problem = replace(loop.problem, name="net, momentum held constant", step=ConstantSlots(loop.problem.step))
    return replace(loop, problem=problem, update=update, momentum_sgd=False)


def reweighted_net() -> Loop:
    """A net on weighted examples: the weights follow the losses, and the update takes them as constants."""
    normal = _normals(6)
    w0 = {"a": normal(3, 4), "b": normal(4)}
    lam = {"slope": _number(0.7), "shift": 0.1 * normal(1)}

    def losses(w: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (torch.tanh(x @ w["a"]) @ w["b"] - y[:, 0]).square()

    def weigh(losses: Tensor, lam: Tree) -> Tensor:
        weights = torch.sigmoid(lam["slope"] * losses + lam["shift"])
        return weights / weights.sum()

    def inner_loss(w: Tree, lam: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        return reweighted(losses(w, batch), lambda values: weigh(values, lam)).sum()

    def update(parts: list[Parts], lam: Tree, batch: Any, t: int) -> list[Parts]:
        (w,) = parts
        values = losses(tree.unflatten(w, tree.flatten(w0)[1]), batch)
        g = torch.autograd.grad(values, w, weigh(values, lam), create_graph=True)
        return [[x - 0.3 * y for x, y in zip(w, g, strict=True)]]

    def outer_loss(w: Tree, lam: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        return losses(w, batch).mean()

    step = inner_step(inner_loss, SGD(lr=0.3))
    problem = Case(step, outer_loss, w0, lam, _batches(), _batches()[0], name="reweighted examples")
    return Loop(problem, _with_zeros(0), update)


def adaptive_net() -> Loop:
    """The same net under Adam."""
    loss, outer_loss, w0, lam = _net(0.0)

    def update(parts: list[Parts], lam: Tree, batch: Any, t: int) -> list[Parts]:
        w, m, s = parts
        g = gradient(loss, w, w0, lam, batch)
        return adaptive(w, m, s, g, lr=0.05, betas=(0.8, 0.9), eps=1e-2, t=t)

    step = inner_step(loss, Adam(lr=0.05, betas=(0.8, 0.9), eps=1e-2))
    return Loop(Case(step, outer_loss, w0, lam, _batches(), _batches()[0], name="net, Adam"), _with_zeros(2), update)


def wide(size: int) -> Loop:
    """Many weights, each in a separate bowl around λ that drifts from batch to batch, momentum SGD."""
    normal = _normals(3)
    w0 = {"a": normal(size), "b": normal(7)}
    lam = {"a": normal(size), "b": normal(7)}
    batches = [0.1 * normal(()) for _ in range(HORIZON)]

    def loss(w: Tree, lam: Tree, batch: Tensor) -> Tensor:
        return _bowl(w["a"] - lam["a"] - batch) + _bowl(0.5 * (w["b"] - lam["b"]))

    def update(parts: list[Parts], lam: Tree, batch: Any, t: int) -> list[Parts]:
        w, v = parts
        g = gradient(loss, w, w0, lam, batch)
        return heavy_ball(w, v, g, lr=0.1, momentum=0.5, decay=0.0, damp=0.0, t=t)

    step = inner_step(loss, SGD(lr=0.1, momentum=0.5))

    def outer_loss(w: Tree, lam: Tree, batch: Any) -> Tensor:
        return 0.5 * w["a"].square().mean() + w["b"].square().sum()

    kib = 2 * 8 * (size + 7) // 1024
    return Loop(
        Case(step, outer_loss, w0, lam, batches, name=f"{kib} KiB of state, momentum"),
        _with_zeros(1),
        update,
        momentum_sgd=True,
    )


def delay_line(size: int) -> Loop:
    """A custom step that hands tensors on: ``a' = b, b' = c, c' = tanh(a) + λ c``, and a slot likewise."""
    normal = _normals(4)
    w0 = {"a": normal(size), "b": normal(size), "c": normal(size)}
    lam = {"gain": 0.2 * normal(size), "drift": normal(())}

    def turn(a: Tensor, b: Tensor, c: Tensor, s: Tensor, lam: Tree, batch: Any) -> tuple[Tensor, ...]:
        return b, c, torch.tanh(a) + lam["gain"] * s + 0.1 * lam["drift"] * batch, c

    def fn(state: InnerState, lam: Tree, batch: Any) -> InnerState:
        w = state.w
        a, b, c, s = turn(w["a"], w["b"], w["c"], state.slots["s"], lam, batch)
        return InnerState({"a": a, "b": b, "c": c}, {"s": s})

    def init(w: Tree, lam: Tree) -> InnerState:
        return InnerState(w, {"s": torch.zeros_like(w["a"])})

    def update(parts: list[Parts], lam: Tree, batch: Any, t: int) -> list[Parts]:
        (a, b, c), (s,) = parts
        *w, s = turn(a, b, c, s, lam, batch)
        return [w, [s]]

    def outer_loss(w: Tree, lam: Tree, batch: Any) -> Tensor:
        return (w["a"] * w["b"]).mean() + w["c"].square().mean()

    problem = Case(
        custom_step(fn, init),
        outer_loss,
        w0,
        lam,
        [0.1 * t for t in range(HORIZON)],
        name=f"{4 * 8 * size // 1024} KiB of state, handed on",
    )
    return Loop(problem, lambda w: [tree.leaves(w), [torch.zeros_like(w["a"])]], update)


def loops() -> list[Loop]:
    """All of them, the cheap ones first."""
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

    def error(w: Tree, x: Tensor, y: Tensor, p: float) -> Tensor:
        hidden = torch.tanh(x @ w["0.weight"] + w["0.bias"])
        return (torch.nn.functional.dropout(hidden, p) @ w["1.weight"] - y).square().mean()

    def inner_loss(w: Tree, lam: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        penalty = (lam["penalty"].exp() * w["1.weight"][:, 0].square()).sum()
        return error(w, x + lam["shift"], y, dropout) + 0.1 * penalty

    def outer_loss(w: Tree, lam: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        return error(w, *batch, 0.0) + 0.05 * lam["penalty"].square().sum()

    return inner_loss, outer_loss, w0, lam


def _batches() -> list[tuple[Tensor, Tensor]]:
    normal = _normals(2)
    return [(normal(6, 3), normal(6, 1)) for _ in range(HORIZON)]


def _drawn_batch(t: int) -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)


def _with_zeros(count: int) -> Callable[[Tree], list[Parts]]:
    """The weights, and lists of zeros like them."""

    def start(w: Tree) -> list[Parts]:
        flat = tree.leaves(w)
        return [flat, *[[torch.zeros_like(x) for x in flat] for _ in range(count)]]

    return start


def _normals(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: Any) -> Tensor:
        size: Sequence[int] = shape[0] if shape and isinstance(shape[0], tuple) else shape
        return torch.randn(size, generator=generator, dtype=torch.float64)

    return normal


def _bowl(x: Tensor) -> Tensor:
    return (1 + x.square()).sqrt().sum()


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
