"""Proving an estimator or a step, ours or a user's: closed forms, slow references, checks."""

from metaopt.verify import cases, command, formulas, memory, reference, sampled, strategies
from metaopt.verify.cases import Problem
from metaopt.verify.checks import Report, Row, check
from metaopt.verify.command import run
from metaopt.verify.formulas import Formula, WholeFormula
from metaopt.verify.reference import Estimate, Jacobians

__all__ = [
    "Estimate",
    "Formula",
    "Jacobians",
    "Problem",
    "Report",
    "Row",
    "WholeFormula",
    "cases",
    "check",
    "command",
    "formulas",
    "memory",
    "reference",
    "run",
    "sampled",
    "strategies",
]
