"""Proving an estimator or a step, ours or a user's: closed forms, slow references, checks."""

from metaopt.verify import cases, command, formulas, reference
from metaopt.verify.cases import Problem
from metaopt.verify.checks import Report, Row, check
from metaopt.verify.command import run
from metaopt.verify.formulas import Formula
from metaopt.verify.reference import Estimate, Jacobians

__all__ = ["Estimate", "Formula", "Jacobians", "Problem", "Report", "Row", "cases", "check", "command", "formulas", "reference", "run"]
