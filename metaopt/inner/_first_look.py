"""Checks that a step makes once, since each costs as much as an operation or more."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from metaopt import replay, tree
from metaopt.inner._graph import check_twice_differentiable, leaves, nodes
from metaopt.inner.adjoint import Loss
from metaopt.optim.optimizer import Optimizer, per_leaf
from metaopt.tree import Tree


class UnreachedWeightWarning(UserWarning):
    """The inner loss gave no gradient to a weight, so that the step leaves it where it is."""


class UndeclaredTensorWarning(UserWarning):
    """A loss or an optimiser depends on tensors that require grad and that are neither weights nor λ."""


class MathAttentionWarning(UserWarning):
    """Attention runs on torch's MATH kernel where second derivatives are taken."""


class FirstLook:
    """Whether the inner loss keeps its side of the contract, as its first evaluations show.

    Attributes:
        written: whether it has been seen to leave the weights alone.
        reached: whether its gradient has been looked at.
        unreached: numbers of the weights that it did not reach then.
        undeclared: what to say of other tensors that require grad.
        twice: whether a graph of its gradient has been looked at.
        fused_attention: whether it holds attention by a kernel that is differentiable once only.
    """

    __slots__ = ("_said", "fused_attention", "reached", "twice", "undeclared", "unreached", "written")

    def __init__(self) -> None:
        self.written = self.reached = self.twice = False
        self.fused_attention = self._said = False
        self.unreached: list[int] = []
        self.undeclared: list[str] = []

    def value(self, loss: Loss, w: Tree, lam: Tree, batch: Any) -> Tensor:
        """The loss; if it has written into the weights, that is undone, and an error says so.

        Later evaluations look at version counters alone, which a write through ``.data`` leaves as
        they are.
        """
        leaves = tree.leaves(w)
        before = [x.detach().clone() for x in leaves]
        found = loss(w, lam, batch)
        changed = [not _equal(x.detach(), old) for x, old in zip(leaves, before, strict=True)]
        if any(changed):
            with torch.no_grad():
                for x, old in zip(leaves, before, strict=True):
                    x.detach().copy_(old)
            raise written_into(w, changed)
        self.written = True
        behind = list(nodes([found]))
        names = [node.name() for node in behind]
        self.fused_attention = any([name.startswith("ScaledDotProduct") for name in names])
        if "CheckpointFunctionBackward" in names:
            raise reentrant("second derivatives, and weights that only its inside sees, are lost")
        self.undeclared += said_of_undeclared(behind, tree.floats((w, lam)), "inner_loss")
        return found

    def optimizer(self, optimizer: Optimizer, w: Tree, lam: Tree) -> None:
        """Note settings that require grad; λ reaches an optimiser through a function of it."""
        with torch.enable_grad():
            names = held(optimizer, tree.detach(lam), tree.flatten(w)[1])
        if names:
            self.undeclared.append(
                f"the optimiser's {', '.join(names)} require grad and get no gradient: put them into lam, and give the "
                "optimiser a function of it, lr=lambda lam, t: lam['lr']"
            )

    def gradient(self, g: list[Tensor | None], w: Tree, again: Callable[[], Any]) -> None:
        """Warn of weights without a gradient; ``again`` evaluates the loss once more where there are some."""
        self.reached = True
        self.unreached = [i for i, x in enumerate(g) if x is None]
        if not self.unreached:
            return
        names = tree.dotted_names(w)
        missing = [names[i] for i in self.unreached]
        with replay.preserved(w), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again()
        if any("None of the inputs have requires_grad=True" in str(warning.message) for warning in caught):
            raise reentrant(f"the weights {', '.join(missing)} get no gradient")
        warnings.warn(
            f"the inner loss gives no gradient to the weights {', '.join(missing)}: a step leaves them where they "
            "are. Call the model with the weights that are given, model(w, x), and check for detach; if it is meant, "
            "take them out of w (mo.partition, requires_grad_(False))",
            UnreachedWeightWarning,
            stacklevel=5,
        )

    def speak_of_attention(self) -> None:
        """Say, once, that attention is slower where second derivatives are taken."""
        if self._said:
            return
        self._said = True
        warnings.warn(
            "fused attention is differentiable once only: where second derivatives are taken, it runs on the MATH "
            "kernel, whose memory grows with the square of the context; plain steps keep the fast kernels. For long "
            "contexts take a trajectory that replays (mo.trajectory.Checkpointed), or a first-order estimator",
            MathAttentionWarning,
            stacklevel=5,
        )

    def graph(self, gradient: Tree, w: Tree) -> None:
        """Whether the gradient can be differentiated again."""
        g = [x for x in tree.leaves(gradient) if x is not None]
        if any(x.requires_grad for x in g):
            check_twice_differentiable(g, tree.leaves(w))
            self.twice = True


def written_into(w: Tree, changed: list[bool]) -> RuntimeError:
    """What to say of a loss that changed weights in place."""
    names = [name for name, x in zip(tree.dotted_names(w), changed, strict=True) if x]
    return RuntimeError(
        f"the inner loss changed the weights {', '.join(names)} in place. A step is a function of its arguments: "
        "work on a copy, w.clone(), or do what it does in the optimiser (mo.optim) or in mo.custom_step"
    )


def reentrant(what: str) -> RuntimeError:
    """What to say of reentrant checkpointing."""
    return RuntimeError(
        f"reentrant checkpointing inside the inner loss cannot be differentiated through: {what}. Pass "
        "use_reentrant=False to torch.utils.checkpoint.checkpoint (transformers: "
        'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}))'
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or bool(((a == b) | (a != a)).all())  # NaN is not equal to itself


def said_of_undeclared(behind: Iterable[Any], known: Iterable[Tensor], what: str) -> list[str]:
    """What to say of leaves among the nodes behind a loss that are not behind ``known``."""
    own: set[int] = set()
    for x in known:
        if x.grad_fn is None:
            own.add(id(x))
        else:
            own.update([id(leaf) for leaf in leaves(nodes([x]))])
    found = [leaf for leaf in leaves(behind) if id(leaf) not in own]
    if not found:
        return []
    shapes = ", ".join(str(tuple(leaf.shape)) for leaf in found[:4])
    return [
        f"{what} depends on {len(found)} tensor(s) that require grad and are neither weights nor lam "
        f"(shapes {shapes}): they get no gradient. Call model(w, x), not net(x); put them into lam, declare them to "
        "mo.unroll with closed_over=[...], or detach them"
    ]


def warn_of(undeclared: list[str]) -> None:
    """Warn of each tensor that requires grad and is neither a weight nor λ."""
    for what in undeclared:
        warnings.warn(what, UndeclaredTensorWarning, stacklevel=4)


def held(optimizer: Optimizer, lam: Tree, spec: tree.Spec) -> list[str]:
    """Names of the hyperparameters whose values require grad though λ does not."""
    names: list[str] = []
    for name in optimizer.hypers:
        setting = getattr(optimizer, name)
        if isinstance(setting, float | int):
            continue
        values = per_leaf(setting, lam, 1, spec, name, pair=isinstance(setting, tuple))
        if any([x.requires_grad for x in tree.floats(values)]):
            names.append(f"{type(optimizer).__name__}.{name}")
    for inside in optimizer.parts:
        names += held(inside, lam, spec)
    return names
