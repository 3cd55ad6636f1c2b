"""Settings that make no sense are refused, with the class, the field, the value and what is allowed."""

import dataclasses

import pytest

import metaopt as mo
from metaopt import checks
from metaopt.optim import Optimizer

NAN = float("nan")
SGD = mo.optim.SGD(lr=0.1)
# what a class needs before a field can be set
NEEDED = {
    mo.PES: {"window": 2},
    mo.FDS: {"window": 2},
    mo.trajectory.Last: {"steps": 2},
    mo.optim.SGD: {"lr": 0.1},
    mo.by: {"name": "lr"},
    mo.optim.Groups: {"groups": [(["*"], SGD)]},
    **{
        cls: {"optimizer": SGD}
        for cls in (getattr(mo.optim, name) for name in mo.optim.__all__)
        if isinstance(cls, type) and issubclass(cls, mo.optim.Wrapper)
    },
}
CLASSES = [
    cls
    for cls in (getattr(mo.optim, name) for name in mo.optim.__all__)
    if isinstance(cls, type) and dataclasses.is_dataclass(cls)
]
FIELDS = [
    (cls, field.name) for cls in CLASSES for field in dataclasses.fields(cls) if (cls, field.name) != (mo.by, "name")
]
OUT_OF_RANGE = [
    (mo.optim.SGD, "lr", -1.0),
    (mo.optim.SGD, "lr", NAN),
    (mo.optim.SGD, "momentum", 1.5),
    (mo.optim.SGD, "dampening", -0.1),
    (mo.optim.SGD, "weight_decay", -0.1),
    (mo.optim.SGD, "nesterov", True),
    (mo.optim.Adam, "lr", -1.0),
    (mo.optim.Adam, "lr", float("inf")),
    (mo.optim.Adam, "betas", (0.9, 1.0)),
    (mo.optim.Adam, "betas", (-0.1, 0.9)),
    (mo.optim.Adam, "betas", (0.9, 0.9, 0.9)),
    (mo.optim.Adam, "eps", -1e-8),
    (mo.optim.NAdam, "momentum_decay", -1.0),
    (mo.optim.RMSprop, "alpha", 1.5),
    (mo.optim.Adagrad, "initial_accumulator_value", -1.0),
    (mo.optim.Adadelta, "rho", -0.5),
    (mo.optim.Rprop, "etas", (1.2, 0.5)),
    (mo.optim.Rprop, "step_sizes", (-1.0, 50.0)),
    (mo.optim.Adafactor, "beta2_decay", 0.8),
    (mo.optim.Adafactor, "d", 0.0),
    (mo.optim.Muon, "ns_steps", 0),
    (mo.optim.Muon, "ns_steps", 2.5),
    (mo.optim.EMA, "decay", 1.5),
    (mo.optim.ClipNorm, "max_norm", 0.0),
    (mo.optim.ClipNorm, "max_norm", -1.0),
    (mo.optim.ClipValue, "limit", NAN),
    (mo.optim.Accumulate, "every", 0),
    (mo.optim.Accumulate, "every", True),
    (mo.optim.Accumulate, "every", 1.5),
    (mo.optim.Groups, "groups", [SGD]),
    (mo.optim.Groups, "groups", [("head.*", SGD)]),
    (mo.RMD, "trajectory", mo.RMD()),
    (mo.TruncatedRMD, "steps", -1),
    (mo.TruncatedRMD, "steps", 1.5),
    (mo.FMD, "columns_at_once", 0),
    (mo.FMD, "columns_at_once", 1.5),
    (mo.FDS, "columns_at_once", 0),
    (mo.IFT, "converged", NAN),
    (mo.IFT, "solved", -1.0),
    (mo.IFT, "solver", "cg"),
    (mo.HyperDistill, "gamma", 1.1),
    (mo.HyperDistill, "theta", NAN),
    (mo.HyperDistill, "pi", "one"),
    (mo.HyperDistill, "example_axis", -1),
    (mo.EvoGrad, "copies", 1),
    (mo.EvoGrad, "copies", 2.5),
    (mo.EvoGrad, "sigma", float("inf")),
    (mo.EvoGrad, "temperature", 0.0),
    (mo.EvoGrad, "around", "during"),
    (mo.EvoGrad, "copies_at_once", 0),
    (mo.DARTS, "radius", float("inf")),
    (mo.SAMA, "radius", NAN),
    (mo.SOBA, "rate", float("inf")),
    (mo.F2SA, "multiplier", 0.0),
    (mo.BOME, "eta", NAN),
    (mo.NRES, "pairs", 1.5),
    (mo.NRES, "sigma", 0.0),
    (mo.PES, "window", 1.5),
    (mo.UORO, "sketches", 1.5),
    (mo.ForwardGradient, "directions", 0),
    (mo.ForwardGradient, "noise", "uniform"),
    (mo.linsolve.Neumann, "terms", -1),
    (mo.linsolve.Neumann, "terms", 1.5),
    (mo.linsolve.Neumann, "rate", NAN),
    (mo.linsolve.ConjugateGradient, "iterations", 1.5),
    (mo.linsolve.ConjugateGradient, "tolerance", NAN),
    (mo.linsolve.GMRES, "iterations", 0),
    (mo.linsolve.MINRES, "damping", NAN),
    (mo.linsolve.Nystrom, "rank", 1.5),
    (mo.linsolve.PowerIteration, "iterations", 0),
    (mo.trajectory.Last, "steps", NAN),
    (mo.trajectory.Checkpointed, "slots", 1.5),
    (mo.trajectory.Checkpointed, "every", NAN),
    (mo.trajectory.Budgeted, "bytes", NAN),
    (mo.trajectory.Distilled, "gamma", NAN),
    (mo.trajectory.Offloaded, "device", 3),
    (mo.meta.Reptile, "rate", NAN),
    (mo.meta.FOMAML, "rate", 0.0),
    (mo.meta.HyperSteps, "every", 1.5),
    (mo.meta.HyperSteps, "last", 0),
]


@pytest.mark.parametrize(("cls", "field"), FIELDS, ids=lambda x: getattr(x, "__name__", x))
def test_no_field_of_an_optimiser_takes_nonsense(cls, field):
    with pytest.raises((TypeError, ValueError), match=rf"{cls.__name__}: .*nonsense"):
        cls(**{**NEEDED.get(cls, {}), field: "nonsense"})


@pytest.mark.parametrize(("cls", "field", "value"), OUT_OF_RANGE, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_number_out_of_range_is_named(cls, field, value):
    with pytest.raises((TypeError, ValueError), match=rf"{cls.__name__}: .*{field}"):
        cls(**{**NEEDED.get(cls, {}), field: value})


def test_torchs_optimiser_is_not_one_of_ours():
    class TheirOptimizer:
        pass

    with pytest.raises(
        TypeError, match=r"ClipNorm: optimizer must be of type Optimizer, got .*mo\.interop\.from_torch"
    ):
        mo.optim.ClipNorm(TheirOptimizer())
    with pytest.raises(TypeError, match=r"got the class SGD \(with parentheses it would be an instance\)"):
        mo.optim.ClipNorm(mo.optim.SGD)


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (checks.finite, [0, -1.0], [NAN, float("inf"), "1", None, True]),
        (checks.positive, [1e-9, 3], [0, -1, NAN, float("inf"), "1", False]),
        (checks.non_negative, [0, 3.0], [-1e-9, NAN, float("inf"), "1"]),
        (checks.unit_interval, [0, 1, 0.5], [-0.1, 1.1, NAN, "1"]),
        (checks.count, [1, 7], [0, -3, 1.0, NAN, True, "1", None]),
        (checks.flag, [True, False], [0, 1, "yes", None]),
        (checks.pair, [(1, 2), [1, 2]], [1, (1,), (1, 2, 3)]),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_each_check(check, good, bad):
    for value in good:
        check("Owner", "field", value)
    for value in bad:
        with pytest.raises((TypeError, ValueError), match=f"^Owner: field must .*, got .*{value}"):
            check("Owner", "field", value)


def test_what_gives_a_number_later_passes():
    for value in (Optimizer, lambda lam, t: lam, {"a": 1.0}, [1.0]):
        checks.positive("Owner", "field", value)


@pytest.mark.parametrize("limits", [(NAN, 1.0), (0.0, NAN), (2.0, 1.0), {"lr": (NAN, None)}])
def test_bounds_that_are_not_bounds(limits):
    with pytest.raises(ValueError, match="bounded: "):
        mo.meta.bounded(limits)
