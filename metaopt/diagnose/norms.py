"""How far back an inner run is felt: norms along the reverse sweep, and whether they vanish or explode."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import replay, tree
from metaopt.diagnose.alignment import closeness
from metaopt.diagnose.results import Result
from metaopt.estimators.outer import outer_gradient
from metaopt.estimators.reverse import sweep
from metaopt.inner.state import InnerState
from metaopt.problem import Problem
from metaopt.trajectory import Full
from metaopt.verify.reference import vector


class Lag(NamedTuple):
    """One step of the reverse sweep.

    Attributes:
        k: how many steps before the last one it is.
        cotangent: ``‖α^{(k)}‖``, over weights and slots.
        contribution: ``‖c_k‖``.
        partial: norm of the indirect term truncated after k + 1 steps.
        cosine: of that one to the whole indirect term.
    """

    k: int
    cotangent: float
    contribution: float
    partial: float
    cosine: float


@dataclass(frozen=True, repr=False)
class Norms(Result):
    r"""What :func:`norms` returns.

    The cotangent k steps back is :math:`\alpha^{(k)} = \alpha_T A_T \cdots A_{T-k+1}`. Step
    :math:`T-k` contributes :math:`c_k = \alpha^{(k)} B_{T-k}` to the hypergradient. Truncating at K
    steps leaves :math:`\sum_{k<K} c_k`.

    Attributes:
        problem: its name.
        lags: from the last step to the first.
    """

    problem: str
    lags: tuple[Lag, ...]

    @property
    def rate(self) -> float:
        r"""Factor by which the cotangent changes per step.

        It is :math:`e^s`, with s the least-squares slope of :math:`\log\|\alpha^{(k)}\|` over k.
        Below 1 what happened long ago vanishes, above 1 it explodes. NaN for a single step; 0 where
        the cotangent becomes zero.
        """
        sizes = torch.tensor([lag.cotangent for lag in self.lags], dtype=torch.float64)
        if len(sizes) < 2:
            return math.nan
        if bool((sizes == 0).any()):
            return 0.0
        k = torch.arange(len(sizes), dtype=torch.float64)
        k = k - k.mean()
        return math.exp(float(k @ sizes.log() / (k @ k)))

    def horizon_for(self, cosine: float = 0.99) -> int:
        """The smallest K from which on every truncation points along the whole indirect term at least this well."""
        needed = [lag.k + 2 for lag in self.lags if not lag.cosine >= cosine]
        return min(max(needed, default=1), len(self.lags))

    @property
    @override
    def title(self) -> str:
        needed = f"cosine .99 needs K = {self.horizon_for()} of {len(self.lags)}"
        return f"{self.problem}: the cotangent changes by a factor {self.rate:.3g} per step back; {needed}"

    @override
    def rows(self) -> list[dict[str, Any]]:
        return [lag._asdict() for lag in self.lags]

    @override
    def draw(self, axes: Any) -> None:
        for name in ("cotangent", "contribution", "partial"):
            axes.semilogy([lag.k for lag in self.lags], [getattr(lag, name) for lag in self.lags], ".-", label=name)
        axes.set(xlabel="steps before the last, k", ylabel="norm")
        axes.legend(fontsize="small")


def norms(problem: Problem, horizon: int | None = None) -> Norms:
    """Norms along one exact reverse sweep. Cost: one run and RMD's sweep; memory.

    T states and two vectors like λ per step.

    Args:
        problem: the problem.
        horizon: T, default all batches.

    Raises:
        ValueError: for a horizon the problem does not reach.
    """
    horizon = problem.T if horizon is None else horizon
    if not 1 <= horizon <= problem.T:
        raise ValueError(f"horizon must lie between 1 and {problem.T}, got {horizon}")
    step = problem.step
    lam = tree.detach(problem.lam)
    memory = Full()
    with replay.preserved(problem.w0):
        state = step.init(problem.w0, lam)
        tape = memory.start(state, lam)
        for t in range(horizon):
            state, tape = memory.record(tape, step, state, lam, problem.batches[t])
        _, alpha, _ = outer_gradient(problem.outer_loss, state.w, lam, problem.outer_batch)
        sizes = [_size(InnerState(alpha, None, state.t))]
        partials = []
        for total, cotangent in sweep(
            step, memory.moments(tape, step, state), InnerState(alpha, None, state.t), lam, to_start=False
        ):
            partials.append(vector(tree.filled(total, lam)))
            sizes.append(_size(cotangent))
    return Norms(problem.name, _lags(sizes, partials))


def _lags(sizes: list[float], partials: list[Tensor]) -> tuple[Lag, ...]:
    whole = partials[-1]
    before = torch.zeros_like(partials[-1])
    lags = []
    for k, partial in enumerate(partials):
        lags.append(
            Lag(k, sizes[k], float((partial - before).norm()), float(partial.norm()), closeness(partial, whole).cosine)
        )
        before = partial
    return tuple(lags)


def _size(cotangent: InnerState) -> float:
    """Norm over weights and slots (``None`` is zero)."""
    return float(tree.norm((cotangent.w, {} if cotangent.slots is None else cotangent.slots)))
