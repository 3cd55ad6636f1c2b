"""Numbers over seeds, as the papers print them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats


class Summary(NamedTuple):
    """Median over all seeds, mean and 95 % confidence half-width over those that did not fail."""

    median: float
    mean: float
    half_width: float
    failed: int

    def interval(self, digits: int = 2) -> str:
        """``mean ± half-width``; the mean alone where one seed leaves no interval.

        >>> summarise([1.0, 2.0]).interval(), summarise([1.0]).interval(digits=1)
        ('1.50 ± 6.35', '1.0')
        """
        half = f" ± {self.half_width:.{digits}f}" if math.isfinite(self.half_width) else ""
        return f"{self.mean:.{digits}f}{half}"


def summarise(values: Sequence[float], failed_at: float = math.inf) -> Summary:
    """Summary of one result per seed.

    Args:
        values: one number per seed; NaN is a failure.
        failed_at: a value this large is a failure too.

    A failed seed counts as infinitely bad in the median and is left out of the mean, whose interval
    is Student's t.

    >>> summarise([1.0, 2.0, 3.0, float("nan")]).median
    2.5
    """
    if not values:
        raise ValueError("no values to summarise")
    good = [v for v in values if v < failed_at]  # NaN compares false
    median = statistics.median([v if v < failed_at else math.inf for v in values])
    mean = statistics.fmean(good) if good else math.nan
    half = _half_width(good) if len(good) > 1 else math.nan
    failed = len(values) - len(good)
    return Summary(median, mean, half, failed)


def _half_width(values: Sequence[float]) -> float:
    """Half of Student's 95 % confidence interval of the mean."""
    n = len(values)
    quantile = stats.t.ppf(0.975, n - 1)
    return float(quantile * statistics.stdev(values) / math.sqrt(n))
