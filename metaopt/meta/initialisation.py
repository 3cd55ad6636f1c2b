"""How the initial weights φ learn from finished inner runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from typing_extensions import override

from metaopt import checks, tree
from metaopt.tree import Tree


class Initialisation(Protocol):
    """A rule ``(phi, w_T, alpha_T) -> phi``; ``w_T`` and ``alpha_T`` have the task axis first."""

    @property
    def needs_alpha(self) -> bool:
        """Whether the outer gradient at ``w_T`` is needed; where it is not, ``alpha`` is ``None``."""
        ...

    def update(self, phi: Tree, last: Tree, alpha: Tree) -> Tree:
        """The initial weights of the next run, one set for all tasks."""
        ...


@dataclass(frozen=True)
class Reptile(Initialisation):
    r""":math:`\phi \leftarrow \phi - \eta\,(\phi - \overline{w_T})`, the mean over tasks.

    Nichol et al. 2018, `arXiv 1803.02999 <https://arxiv.org/abs/1803.02999>`__.

    Args:
        rate: η; 1 puts φ at the mean of the last weights.
    """

    rate: float = 1.0

    def __post_init__(self) -> None:
        checks.positive(self, "rate", self.rate)

    @property
    @override
    def needs_alpha(self) -> bool:
        return False

    @override
    def update(self, phi: Tree, last: Tree, alpha: Tree) -> Tree:
        return tree.map(lambda p, w: torch.lerp(p, w.mean(0), self.rate), phi, last)


@dataclass(frozen=True)
class FOMAML(Initialisation):
    r""":math:`\phi \leftarrow \phi - \eta\,\sum_i \alpha^{(i)}_T`: first-order MAML, Finn et al.

    2017, `arXiv 1703.03400 <https://arxiv.org/abs/1703.03400>`__.

    The sum over tasks is the derivative of the stacked outer loss; with the mean over tasks as
    outer loss it is the mean.

    Args:
        rate: η.
    """

    rate: float = 1e-3

    def __post_init__(self) -> None:
        checks.positive(self, "rate", self.rate)

    @property
    @override
    def needs_alpha(self) -> bool:
        return True

    @override
    def update(self, phi: Tree, last: Tree, alpha: Tree) -> Tree:
        return tree.map(lambda p, a: p - self.rate * a.sum(0), phi, alpha)


@dataclass(frozen=True)
class Fixed(Initialisation):
    """φ stays as it is."""

    @property
    @override
    def needs_alpha(self) -> bool:
        return False

    @override
    def update(self, phi: Tree, last: Tree, alpha: Tree) -> Tree:
        return phi
