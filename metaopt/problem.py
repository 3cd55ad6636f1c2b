"""A bilevel problem as one noun: Φ, the outer loss, where a run starts, and the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from metaopt import tree
from metaopt.estimators._arguments import check_arguments
from metaopt.estimators.base import Estimator
from metaopt.estimators.hypergradient import Hypergradient, hypergradient
from metaopt.estimators.outer import OuterLoss
from metaopt.estimators.reverse import RMD
from metaopt.estimators.unroll import unroll
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.meta.online import online
from metaopt.meta.report import Reports
from metaopt.meta.tune import tune
from metaopt.tree import Tree


@dataclass(frozen=True, repr=False)
class Problem:
    r"""A bilevel problem, which every way into the library takes apart or whole.

    .. math::
        \min_\lambda\; L_\text{val}(w_T, \lambda), \qquad
        w_t = \Phi(w_{t-1}, \lambda; D_t), \quad t = 1 \dots T

    Each method is the function of the same name with these arguments.

    Attributes:
        step: Φ, from :func:`metaopt.inner_step` or :func:`metaopt.custom_step`.
        outer_loss: ``(w, lam, batch) -> scalar``.
        w0: initial weights, or an :class:`metaopt.InnerState` to go on from.
        lam: hyperparameters; ``None`` where only the initial weights learn.
        batches: ``D_1 … D_T``: a list, a ``DataLoader``, ``mo.cycle(loader)``, or ``t -> D_t``.
        outer_batch: what the outer loss is taken on.
        horizon: T; default: as many steps as there are batches.
        name: what tables call it.

    Raises:
        TypeError: if an argument is something else than it should be; it is named.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 2)
    >>> problem
    Problem(1 weight, 1 hyperparameter, T = 2)
    >>> problem.hypergradient().total  # 1 - (1 - 0.5)^2
    tensor([0.7500])
    """

    step: Step
    outer_loss: OuterLoss
    w0: Tree
    lam: Tree
    batches: Any
    outer_batch: Any = None
    _: KW_ONLY
    horizon: int | None = None
    name: str = "the problem"

    def __post_init__(self) -> None:
        """Refuse what is certainly not meant."""
        check_arguments(self.step, self.w0, self.lam, self.batches, RMD(), self.outer_loss)

    @property
    def T(self) -> int:  # noqa: N802  (as in the equation)
        """The number of inner steps.

        Raises:
            ValueError: if neither the batches nor ``horizon`` tell.
        """
        if self.horizon is not None:
            return self.horizon
        try:
            return len(self.batches)  # pyright: ignore[reportArgumentType]
        except TypeError:
            raise ValueError(
                f"how many inner steps {self.name} takes is not known: batches are a "
                f"{type(self.batches).__name__} without a length; give horizon=T"
            ) from None

    def hypergradient(self, estimator: Estimator = RMD(), *, at: Sequence[int] | None = None) -> Hypergradient:
        """The gradient of the outer loss after the run; see :func:`metaopt.hypergradient`."""
        return hypergradient(
            self.step,
            self.outer_loss,
            self.w0,
            self.lam,
            self.batches,
            self.outer_batch,
            estimator=estimator,
            at=at,
            horizon=self.horizon,
        )

    def unroll(self, estimator: Estimator = RMD(), *, at: Sequence[int] | None = None) -> Any:
        """The last state as one autograd node; see :func:`metaopt.unroll`."""
        return unroll(self.step, self.w0, self.lam, self.batches, estimator=estimator, at=at, horizon=self.horizon)

    def tune(self, estimator: Estimator = RMD(), **options: Any) -> Reports:
        """See :func:`metaopt.tune`: λ moves after each run by ``optimizer=``."""
        return tune(
            self.step,
            self.outer_loss,
            self.w0,
            self.lam,
            self.batches,
            self.outer_batch,
            estimator=estimator,
            horizon=self.horizon,
            **options,
        )

    def online(self, estimator: Estimator, **options: Any) -> Reports:
        """See :func:`metaopt.online`: λ moves at every step, each time by the one ``outer_batch``."""
        return online(
            self.step,
            self.outer_loss,
            self.w0,
            self.lam,
            self.batches,
            lambda t: self.outer_batch,
            estimator=estimator,
            horizon=self.horizon,
            **options,
        )

    def __repr__(self) -> str:
        """The name and the sizes."""
        w = self.w0.w if isinstance(self.w0, InnerState) else self.w0
        sizes = [_count(w, "weight"), _count(self.lam, "hyperparameter")]
        try:
            sizes.append(f"T = {self.T}")
        except ValueError:
            pass
        name = "" if self.name == Problem.name else f"{self.name!r}: "
        return f"{type(self).__name__}({name}{', '.join(sizes)})"


def _count(values: Tree, what: str) -> str:
    numbers = sum(x.numel() for x in tree.floats(values))
    return f"{numbers:,} {what}{'' if numbers == 1 else 's'}"
