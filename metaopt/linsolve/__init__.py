"""Linear solvers for implicit differentiation."""

from metaopt.linsolve.base import Operator, Solver
from metaopt.linsolve.neumann import Neumann

__all__ = ["Neumann", "Operator", "Solver"]
