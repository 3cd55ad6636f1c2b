"""Proving an estimator or a step, ours or a user's: closed forms, slow references, checks; diagnosing one on a problem of your own."""

from metaopt.verify import cases, command, formulas, memory, reference, results, sampled, strategies
from metaopt.verify.alignment import Alignment, alignment
from metaopt.verify.bias import Bias, bias
from metaopt.verify.cases import Problem
from metaopt.verify.checks import Report, Row, check
from metaopt.verify.command import run
from metaopt.verify.compare import Comparison, calibrated, compare, finished_run
from metaopt.verify.costs import Costs, costs
from metaopt.verify.formulas import Formula, WholeFormula
from metaopt.verify.norms import Norms, norms
from metaopt.verify.reference import Estimate, Jacobians
from metaopt.verify.results import Result
from metaopt.verify.smoothness import Smoothness, smoothness
from metaopt.verify.suggest import Suggestion, suggest_estimator

__all__ = [
    "Alignment",
    "Bias",
    "Comparison",
    "Costs",
    "Estimate",
    "Formula",
    "Jacobians",
    "Norms",
    "Problem",
    "Report",
    "Result",
    "Row",
    "Smoothness",
    "Suggestion",
    "WholeFormula",
    "alignment",
    "bias",
    "calibrated",
    "cases",
    "check",
    "command",
    "compare",
    "costs",
    "finished_run",
    "formulas",
    "memory",
    "norms",
    "reference",
    "results",
    "run",
    "sampled",
    "smoothness",
    "strategies",
    "suggest_estimator",
]
