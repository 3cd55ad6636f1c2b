"""A hyperparameter of an optimiser that stands in λ under a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from metaopt import checks, tree
from metaopt.tree import Tree


@dataclass(frozen=True)
class by:  # noqa: N801  (used as a function is)
    r"""``(lam, t) -> transform(lam[name])``, for any hyperparameter of an inner optimiser.

    What stands in λ under the name may be one tensor, a pytree like the weights (a value per
    number), or a dictionary of glob patterns (a value per layer).

    Args:
        name: key in λ; dots go into nested dictionaries, ``"rates.head"``.
        transform: applied to each tensor there, for instance :data:`metaopt.optim.positive`.
        per_step: whether the first axis counts the steps t = 1 … T.

    Raises:
        KeyError: if λ has nothing under that name.
        IndexError: if there are fewer values than steps.

    >>> import torch
    >>> rate = by("log_lr", torch.exp)
    >>> rate({"log_lr": torch.tensor(0.0)}, 1)
    tensor(1.)
    >>> by("lr", per_step=True)({"lr": torch.tensor([0.1, 0.2])}, 2)
    tensor(0.2000)
    """

    name: str
    transform: Callable[[Tensor], Tensor] | None = None
    per_step: bool = False

    def __post_init__(self) -> None:
        checks.instance(self, "name", self.name, str, 'for instance mo.by("lr")')
        if self.transform is not None:
            checks.function(self, "transform", self.transform, "tensor -> tensor")
        checks.flag(self, "per_step", self.per_step)

    def __call__(self, lam: Tree, t: int) -> Any:
        """The value at step ``t``."""
        found = lam
        for key in self.name.split("."):
            found = _entry(found, key, self.name)
        if self.per_step:
            found = tree.map(lambda x: self._of_step(x, t), found)
        return found if self.transform is None else tree.map(self.transform, found)

    def _of_step(self, values: Tensor, t: int) -> Tensor:
        if values.ndim == 0 or t > len(values):
            count = 1 if values.ndim == 0 else len(values)
            raise IndexError(
                f"mo.by({self.name!r}, per_step=True): step {t} needs a value, and lam holds {count}: give it one "
                "for each step"
            )
        return values[t - 1]


def _entry(found: Tree, key: str, name: str) -> Tree:
    if isinstance(found, Mapping) and key in found:
        return found[key]
    if isinstance(found, Sequence) and key.isdigit() and int(key) < len(found):
        return found[int(key)]
    if key in getattr(found, "_fields", ()):
        return getattr(found, key)
    there = list(found) if isinstance(found, Mapping) else f"a {type(found).__name__}"
    raise KeyError(f"mo.by({name!r}): lam has no {key!r} there; it holds {there}")
