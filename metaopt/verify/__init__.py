"""Proving an estimator or a step, ours or a user's: closed forms, plain torch, slow references, checks."""

from metaopt.verify import (
    case,
    cases,
    command,
    formulas,
    loops,
    memory,
    parts,
    reference,
    runs,
    sampled,
    steps,
    strategies,
    subjects,
    tables,
)
from metaopt.verify.case import Case
from metaopt.verify.checks import check
from metaopt.verify.command import run
from metaopt.verify.formulas import Formula, WholeFormula
from metaopt.verify.reference import Estimate, Jacobians
from metaopt.verify.report import Report, Row

__all__ = [
    "Case",
    "Estimate",
    "Formula",
    "Jacobians",
    "Report",
    "Row",
    "WholeFormula",
    "case",
    "cases",
    "check",
    "command",
    "formulas",
    "loops",
    "memory",
    "parts",
    "reference",
    "run",
    "runs",
    "sampled",
    "steps",
    "strategies",
    "subjects",
    "tables",
]
