"""Linear solvers for implicit differentiation."""

from metaopt.linsolve.base import Operator, Solution, Solver, solve_from
from metaopt.linsolve.conjugate_gradient import ConjugateGradient
from metaopt.linsolve.estimated_neumann import EstimatedNeumann, Spectrum
from metaopt.linsolve.exact import Exact
from metaopt.linsolve.gmres import GMRES
from metaopt.linsolve.identity import Identity
from metaopt.linsolve.minres import MINRES
from metaopt.linsolve.neumann import Neumann
from metaopt.linsolve.nystrom import Nystrom, Sketch

__all__ = [
    "GMRES",
    "MINRES",
    "ConjugateGradient",
    "EstimatedNeumann",
    "Exact",
    "Identity",
    "Neumann",
    "Nystrom",
    "Operator",
    "Sketch",
    "Solution",
    "Solver",
    "Spectrum",
    "solve_from",
]
