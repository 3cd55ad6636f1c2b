"""Which inner optimiser stands for which of ``torch.optim``: settings and slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from metaopt import optim
from metaopt.optim.optimizer import Optimizer

WITHOUT_EFFECT = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Settings of ``torch.optim`` that say how an update is computed, not what it is."""

Group = dict[str, Any]


@dataclass(frozen=True)
class Counterpart:
    """How an optimiser of torch becomes one of ours.

    Attributes:
        make: our class.
        settings: names that both have, with the same meaning.
        slots: our slot to torch's key.
        numbers: what torch keeps beside them, from a group's settings and the steps taken.
        decoupled: our class where ``decoupled_weight_decay`` is set, if it has another.
        started: whether torch makes the state before the first step.
        counted: whether torch keeps the number of steps.
    """

    make: Callable[..., Optimizer]
    settings: tuple[str, ...]
    slots: Mapping[str, str]
    numbers: Callable[[Group, float], dict[str, float]] = field(default=lambda group, steps: {})
    decoupled: Callable[..., Optimizer] | None = None
    started: bool = False
    counted: bool = True


def _asgd_numbers(group: Group, steps: float) -> dict[str, float]:
    rate = float(group["lr"])
    return {
        "eta": rate / (1 + group["lambd"] * rate * steps) ** group["alpha"],
        "mu": 1 / max(1.0, steps - group["t0"]),
    }


_MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq"}
_ADAM = ("lr", "betas", "eps", "weight_decay", "amsgrad")

TABLE: dict[type, Counterpart] = {
    torch.optim.SGD: Counterpart(
        optim.SGD,
        ("lr", "momentum", "dampening", "weight_decay", "nesterov"),
        {"momentum": "momentum_buffer"},
        counted=False,
    ),
    torch.optim.Adam: Counterpart(optim.Adam, _ADAM, {**_MOMENTS, "largest": "max_exp_avg_sq"}, decoupled=optim.AdamW),
    torch.optim.AdamW: Counterpart(
        optim.AdamW, _ADAM, {**_MOMENTS, "largest": "max_exp_avg_sq"}, decoupled=optim.AdamW
    ),
    torch.optim.NAdam: Counterpart(
        optim.NAdam,
        ("lr", "betas", "eps", "weight_decay", "momentum_decay", "decoupled_weight_decay"),
        {**_MOMENTS, "product": "mu_product"},
    ),
    torch.optim.RAdam: Counterpart(
        optim.RAdam, ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay"), _MOMENTS
    ),
    torch.optim.Adamax: Counterpart(
        optim.Adamax, ("lr", "betas", "eps", "weight_decay"), {"first": "exp_avg", "largest": "exp_inf"}
    ),
    torch.optim.RMSprop: Counterpart(
        optim.RMSprop,
        ("lr", "alpha", "eps", "weight_decay", "momentum", "centered"),
        {"second": "square_avg", "mean": "grad_avg", "momentum": "momentum_buffer"},
    ),
    torch.optim.Adagrad: Counterpart(
        optim.Adagrad,
        ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"),
        {"sum": "sum"},
        started=True,
    ),
    torch.optim.Adadelta: Counterpart(
        optim.Adadelta, ("lr", "rho", "eps", "weight_decay"), {"second": "square_avg", "delta": "acc_delta"}
    ),
    torch.optim.ASGD: Counterpart(
        optim.ASGD, ("lr", "lambd", "alpha", "t0", "weight_decay"), {"average": "ax"}, _asgd_numbers
    ),
    torch.optim.Rprop: Counterpart(
        optim.Rprop, ("lr", "etas", "step_sizes"), {"previous": "prev", "size": "step_size"}
    ),
    torch.optim.Adafactor: Counterpart(
        optim.Adafactor,
        ("lr", "beta2_decay", "eps", "d", "weight_decay"),
        {"row": "row_var", "column": "col_var", "second": "variance"},
    ),
    torch.optim.Muon: Counterpart(
        optim.Muon,
        ("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn"),
        {"momentum": "momentum_buffer"},
        counted=False,
    ),
}

REFUSED: dict[type, str] = {
    torch.optim.LBFGS: "it calls the loss several times a step; write it as a step with mo.custom_step",
    torch.optim.SparseAdam: "sparse gradients have no second derivative; use torch.optim.Adam over a dense embedding",
}
"""The optimisers of torch that have no counterpart, and what to do."""


def counterpart(optimizer: torch.optim.Optimizer) -> Counterpart:
    """The row of an optimiser.

    Raises:
        TypeError: if there is none.
        ValueError: if an option of it is not known here.
    """
    kind = type(optimizer)
    if kind not in TABLE:
        known = ", ".join(sorted(cls.__name__ for cls in TABLE))
        reason = f" ({REFUSED[kind]})" if kind in REFUSED else ""
        raise TypeError(f"torch.optim.{kind.__name__} has no differentiable counterpart{reason}; there are {known}")
    row = TABLE[kind]
    known_settings = {*row.settings, *WITHOUT_EFFECT, "maximize", "decoupled_weight_decay"}
    for group in optimizer.param_groups:
        for name in sorted(set(optimizer.defaults) - known_settings):
            if group[name]:
                raise ValueError(
                    f"{kind.__name__}: the option {name}={group[name]!r} is not known to metaopt, which would ignore it"
                )
    return row
