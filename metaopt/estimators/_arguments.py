"""What the ways in say of arguments that are something else than they should be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor  # pyright: ignore[reportMissingImports]

from metaopt import tree
from metaopt.estimators.base import Estimator
from metaopt.inner.contract import Step
from metaopt.tree import Tree


def check_arguments(step: Any, w0: Any, lam: Any, batches: Any, estimator: Any, outer_loss: Any = None) -> None:
    """Refuse what is certainly not meant.

    Raises:
        TypeError: naming the argument, what it is, and what it should be.
        RuntimeError: in inference mode.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("hypergradients need autograd: leave torch.inference_mode() (torch.no_grad() may stay)")
    if not isinstance(step, Step):
        raise TypeError(
            f"step comes from mo.inner_step(inner_loss, optimizer) or mo.custom_step(fn); got {_shown(step)}"
        )
    if outer_loss is not None and not callable(outer_loss):
        raise TypeError(f"outer_loss is a function (w, lam, batch) -> scalar; got {_shown(outer_loss)}")
    check_estimator(estimator)
    check_tree(w0, "w0", "mo.functional(module).params")
    check_tree(lam, "lam", "a tensor, or a dict of tensors")
    check_several(batches, "batches")
    refuse_transforms((w0, lam))


def check_several(batches: Any, name: str) -> None:
    """Raise a ``TypeError`` for a tuple of tensors, which is one batch and not several."""
    if isinstance(batches, tuple) and batches and all(isinstance(x, Tensor) for x in batches):
        raise TypeError(
            f"{name} is a tuple of tensors, which looks like one batch: one batch for each step is a list, [(x, y)] * n"
        )


def refuse_transforms(inputs: Tree) -> None:
    """Raise a ``RuntimeError`` under ``torch.func``'s transforms, which see no node of autograd."""
    if any(isinstance(x, Tensor) and is_functorch_wrapped_tensor(x) for x in tree.leaves(inputs)):
        raise RuntimeError(
            "a run is differentiated by plain autograd and cannot be inside torch.func.grad, jacrev, jvp or vmap: take "
            "torch.autograd.grad or torch.autograd.functional.jacobian of mo.unroll, and stack runs with "
            "mo.vmapped(loss) instead of vmap"
        )


def check_estimator(estimator: Any) -> None:
    """Raise a ``TypeError`` unless it is an estimator."""
    if isinstance(estimator, type) and issubclass(estimator, Estimator):
        raise TypeError(f"estimator is the class {estimator.__name__}: write mo.{estimator.__name__}()")
    if not isinstance(estimator, Estimator):
        raise TypeError(f"estimator is an estimator such as mo.RMD(); got {_shown(estimator)}")


def check_tree(value: Any, name: str, instead: str) -> None:
    """Refuse modules, and iterators and lists of parameters, whose names a pytree would lose."""
    if callable(value):
        raise TypeError(f"{name} is the {type(value).__name__} itself: give {instead}")
    parameters = isinstance(value, Sequence) and bool(value) and all(isinstance(x, nn.Parameter) for x in value)
    if parameters or hasattr(value, "__next__"):
        kind = "a list of parameters" if parameters else f"a {type(value).__name__}"
        raise TypeError(f"{name} is {kind}, and a pytree of named tensors is needed: give {instead}")


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f"the string {value!r}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = getattr(value, "__name__", None)
    return f"the function {name}" if name else f"a {type(value).__name__}"
