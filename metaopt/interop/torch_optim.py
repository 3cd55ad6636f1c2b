"""``torch.optim`` optimisers as inner optimisers: same settings, same groups, same state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metaopt import optim, tree
from metaopt.optim.groups import Groups
from metaopt.optim.optimizer import Optimizer
from metaopt.optim.wrapper import Wrapper
from metaopt.tree import Tree

# torch's class -> (ours, settings taken over, our slot -> torch's key)
_FIRST_SECOND = {"first": "exp_avg", "second": "exp_avg_sq"}
_ADAM = ("lr", "betas", "eps", "weight_decay", "amsgrad")
_TABLE: dict[type, tuple[Callable[..., Optimizer], tuple[str, ...], dict[str, str]]] = {
    torch.optim.SGD: (
        optim.SGD,
        ("lr", "momentum", "dampening", "weight_decay", "nesterov"),
        {"momentum": "momentum_buffer"},
    ),
    torch.optim.Adam: (optim.Adam, _ADAM, {**_FIRST_SECOND, "largest": "max_exp_avg_sq"}),
    torch.optim.AdamW: (optim.AdamW, _ADAM, {**_FIRST_SECOND, "largest": "max_exp_avg_sq"}),
    torch.optim.NAdam: (
        optim.NAdam,
        ("lr", "betas", "eps", "weight_decay", "momentum_decay", "decoupled_weight_decay"),
        {**_FIRST_SECOND, "product": "mu_product"},
    ),
    torch.optim.RAdam: (optim.RAdam, ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay"), _FIRST_SECOND),
    torch.optim.Adamax: (
        optim.Adamax,
        ("lr", "betas", "eps", "weight_decay"),
        {"first": "exp_avg", "largest": "exp_inf"},
    ),
    torch.optim.RMSprop: (
        optim.RMSprop,
        ("lr", "alpha", "eps", "weight_decay", "momentum", "centered"),
        {"second": "square_avg", "mean": "grad_avg", "momentum": "momentum_buffer"},
    ),
    torch.optim.Adagrad: (
        optim.Adagrad,
        ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"),
        {"sum": "sum"},
    ),
    torch.optim.Adadelta: (
        optim.Adadelta,
        ("lr", "rho", "eps", "weight_decay"),
        {"second": "square_avg", "delta": "acc_delta"},
    ),
    torch.optim.ASGD: (optim.ASGD, ("lr", "lambd", "alpha", "t0", "weight_decay"), {"average": "ax"}),
    torch.optim.Rprop: (optim.Rprop, ("lr", "etas", "step_sizes"), {"previous": "prev", "size": "step_size"}),
    torch.optim.Adafactor: (
        optim.Adafactor,
        ("lr", "beta2_decay", "eps", "d", "weight_decay"),
        {"row": "row_var", "column": "col_var", "second": "variance"},
    ),
    torch.optim.Muon: (
        optim.Muon,
        ("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn"),
        {"momentum": "momentum_buffer"},
    ),
}


@dataclass(frozen=True)
class Started(Wrapper):
    """An optimiser that goes on from given slots, after ``steps`` steps.

    Args:
        optimizer: the optimiser.
        slots: its slots.
        steps: steps taken so far.
    """

    slots: Tree = None
    steps: int = 0

    def init(self, w: Tree) -> Tree:
        """The given slots (copied), in the structure of ``w``."""
        return {"inner": tree.unflatten(tree.leaves(tree.clone(self.slots)), tree.flatten(self.optimizer.init(w))[1])}

    @property
    def steps_taken(self) -> int:
        """As given."""
        return self.steps


def from_torch(optimizer: torch.optim.Optimizer, module: nn.Module | None = None) -> Optimizer:
    """The inner optimiser with the settings, parameter groups and state of a ``torch.optim`` one, which is not touched.

    Args:
        optimizer: a configured optimiser. ``foreach``, ``fused``, ``capturable`` and
            ``differentiable`` change nothing here; ``maximize`` becomes
            :class:`metaopt.optim.Maximise`.
        module: the module whose parameters it holds. Needed where there are several groups, to find
            them by name in ``mo.functional(module).params``; with one group the weights' leaves
            must come in the optimiser's order.

    Returns:
        An optimiser that goes on where this one stands: ``step.init`` gives its slots and its step
            number.

    Raises:
        TypeError: for an optimiser that has no counterpart (L-BFGS calls the loss several times a
            step; sparse gradients have no use here).
        ValueError: if several groups come without a module, hold foreign parameters, or have taken
            different numbers of steps.
    """
    if type(optimizer) not in _TABLE:
        known = ", ".join(sorted(cls.__name__ for cls in _TABLE))
        raise TypeError(f"torch.optim.{type(optimizer).__name__} has no differentiable counterpart; there are {known}")
    parameters = [in_order(group["params"], module) for group in optimizer.param_groups]
    groups = [_group(optimizer, group, mine) for group, mine in zip(optimizer.param_groups, parameters, strict=True)]
    steps = {int(steps_of(optimizer, p)) for mine in parameters for p in mine}
    if len(steps) != 1:
        raise ValueError(f"the parameters have taken different numbers of steps: {sorted(steps)}")
    (taken,) = steps
    if len(groups) == 1:
        ours, slots = groups[0]
    elif module is None:
        raise ValueError(
            "the optimiser has several groups: pass the module too, from_torch(optimizer, module), so that they can "
            "be named"
        )
    else:
        name_of = {id(p): _escaped(name) for name, p in module.named_parameters()}
        ours = Groups(
            [([name_of[id(p)] for p in mine], one) for mine, (one, _) in zip(parameters, groups, strict=True)]
        )
        slots = {str(i): one for i, (_, one) in enumerate(groups)}
    return Started(ours, slots, taken) if taken else ours


def _group(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameters: list[Tensor]) -> tuple[Optimizer, Tree]:
    """One group as our optimiser, and its slots (lists in the order of the parameters)."""
    make, settings, keys = _TABLE[type(optimizer)]
    ours = make(**{name: group[name] for name in settings})
    state = [optimizer.state.get(p, {}) for p in parameters]
    fresh = ours.init([p.detach() for p in parameters])
    slots = {
        slot: [_filled(s.get(keys[slot]), start) for s, start in zip(state, fresh[slot], strict=True)] for slot in fresh
    }
    return (optim.Maximise(ours), {"inner": slots}) if group.get("maximize") else (ours, slots)


def in_order(parameters: list[Tensor], module: nn.Module | None) -> list[Tensor]:
    """Parameters in the module's order, which is that of ``mo.functional(module).params``."""
    if module is None:
        return parameters
    place = {id(p): i for i, p in enumerate(module.parameters())}
    foreign = [tuple(p.shape) for p in parameters if id(p) not in place]
    if foreign:
        raise ValueError(f"the optimiser holds parameters of shapes {foreign} that are not the module's")
    return sorted(parameters, key=lambda p: place[id(p)])


def _escaped(name: str) -> str:
    """A name as a pattern that matches only itself."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _filled(value: Tensor | None, start: Tensor) -> Tensor:
    """Torch's slot, in our shape and dtype (torch keeps some as one number).

    The fresh slot where torch has none yet.
    """
    return start if value is None else value.detach().to(start.dtype).expand_as(start).clone()


def steps_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> float:
    """Steps a parameter has taken."""
    state = optimizer.state.get(parameter, {})
    if "step" in state:
        return float(state["step"])
    return float(state.get("momentum_buffer") is not None)  # SGD counts no steps: only whether there was one matters
