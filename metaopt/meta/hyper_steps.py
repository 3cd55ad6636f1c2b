"""When λ moves during an inner run."""

from __future__ import annotations

from dataclasses import dataclass

from metaopt import checks


@dataclass(frozen=True)
class HyperSteps:
    """λ moves after every ``every``-th inner step, among the ``last`` ones of the run.

    Args:
        every: at least 1.
        last: at least 1; ``None``: all of them.
    """

    every: int = 1
    last: int | None = None

    def __post_init__(self) -> None:
        checks.count(self, "every", self.every)
        if self.last is not None:
            checks.count(self, "last", self.last)

    def due(self, t: int, horizon: int | None) -> bool:
        """Whether a hyper-step follows inner step ``t`` of ``horizon``."""
        if self.last is not None and (horizon is None or t <= horizon - self.last):
            return False
        return t % self.every == 0

    def check(self, horizon: int | None) -> None:
        """Raise a ``ValueError`` if λ would never move in a run of ``horizon`` steps."""
        if horizon is None:
            if self.last is not None:
                raise ValueError(f"{self}: the last steps of a run are known only with horizon=T")
            return
        if horizon and not any(self.due(t, horizon) for t in range(horizon, max(0, horizon - self.every), -1)):
            raise ValueError(
                f"{self} never moves lam in a run of {horizon} steps: take a smaller every or a larger last"
            )
