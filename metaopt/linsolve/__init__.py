"""Linear solvers for implicit differentiation."""

from metaopt.linsolve.base import Operator, Solution, Solver, solve_from
from metaopt.linsolve.conjugate_gradient import ConjugateGradient
from metaopt.linsolve.exact import Exact
from metaopt.linsolve.gmres import GMRES
from metaopt.linsolve.identity import Identity
from metaopt.linsolve.minres import MINRES
from metaopt.linsolve.neumann import Neumann
from metaopt.linsolve.nystrom import Nystrom, Sketch
from metaopt.linsolve.power_iteration import PowerIteration, Spectrum

__all__ = [
    "GMRES",
    "MINRES",
    "ConjugateGradient",
    "Exact",
    "Identity",
    "Neumann",
    "Nystrom",
    "Operator",
    "PowerIteration",
    "Sketch",
    "Solution",
    "Solver",
    "Spectrum",
    "solve_from",
]
