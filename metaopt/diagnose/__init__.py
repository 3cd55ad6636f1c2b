"""Measurements on the user's own problem: how close, how biased, how far back, how smooth, how expensive."""

from metaopt.diagnose import results
from metaopt.diagnose.alignment import Alignment, alignment
from metaopt.diagnose.bias import Bias, bias
from metaopt.diagnose.compare import Comparison, calibrated, compare, finished_run
from metaopt.diagnose.costs import Costs, costs
from metaopt.diagnose.norms import Norms, norms
from metaopt.diagnose.preflight import Preflight, preflight
from metaopt.diagnose.results import Result
from metaopt.diagnose.smoothness import Smoothness, smoothness
from metaopt.diagnose.suggest import Sizes, Suggestion, suggest_estimator

__all__ = [
    "Alignment",
    "Bias",
    "Comparison",
    "Costs",
    "Norms",
    "Preflight",
    "Result",
    "Sizes",
    "Smoothness",
    "Suggestion",
    "alignment",
    "bias",
    "calibrated",
    "compare",
    "costs",
    "finished_run",
    "norms",
    "preflight",
    "results",
    "smoothness",
    "suggest_estimator",
]
