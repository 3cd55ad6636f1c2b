"""``torch.optim`` optimisers as inner optimisers, and the way back."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from metaopt import tree
from metaopt.inner.state import InnerState
from metaopt.interop._torch_table import Counterpart, counterpart
from metaopt.optim.groups import Frozen, Groups
from metaopt.optim.maximise import Maximise
from metaopt.optim.optimizer import Optimizer
from metaopt.optim.wrapper import Wrapper
from metaopt.tree import Tree


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
        """The given slots (copied), in the structure of ``w``.

        Raises:
            ValueError: if the weights are not like those that the slots belong to.
        """
        fresh, spec = tree.flatten(self.optimizer.init(w))
        given = tree.leaves(self.slots)
        if len(given) != len(fresh):
            raise ValueError(
                f"the optimiser has {len(given)} slots, the weights need {len(fresh)}: they are not the parameters "
                "that it holds; pass the module too, from_torch(optimizer, module)"
            )
        return {"inner": tree.unflatten([_filled(x, like) for x, like in zip(given, fresh, strict=True)], spec)}

    @property
    @override
    def steps_taken(self) -> int:
        return self.steps


def from_torch(optimizer: torch.optim.Optimizer, module: nn.Module | None = None) -> Optimizer:
    """The inner optimiser with the settings, parameter groups and state of a ``torch.optim`` one, which is not touched.

    Every option is taken over or refused by name. ``foreach``, ``fused``, ``capturable`` and
    ``differentiable`` say how torch computes, and change nothing here. ``maximize`` becomes
    :class:`metaopt.optim.Maximise`. A weight without a gradient in a step stays, as in torch.

    Args:
        optimizer: a configured optimiser.
        module: the module whose parameters it holds, so that they are found by name in
            ``mo.functional(module).params``. Parameters that the optimiser does not hold stay
            (:class:`metaopt.optim.Frozen`). It is needed where there are several groups. Without
            it, the weights' leaves are the optimiser's parameters, in its order.

    Returns:
        An optimiser that goes on where this one stands: ``step.init`` gives its slots and its step
        number.

    Raises:
        TypeError: for an optimiser that has no counterpart (LBFGS, SparseAdam, your own).
        ValueError: for an unknown option, hooks on the step, several groups without a module, or
            parameters that are not the module's.

    >>> import torch, metaopt as mo
    >>> net = torch.nn.Linear(2, 1)
    >>> mo.interop.from_torch(torch.optim.AdamW(net.parameters(), lr=0.1), net).lr
    0.1
    """
    row = counterpart(optimizer)
    _refuse_hooks(optimizer)
    parameters = [in_order(group["params"], module) for group in optimizer.param_groups]
    taken = int(max(steps_of(optimizer, p) for mine in parameters for p in mine))
    groups = [
        _group(row, optimizer, group, mine, taken)
        for group, mine in zip(optimizer.param_groups, parameters, strict=True)
    ]
    if _holds_all(parameters, module):
        ours, slots = groups[0]
        return Started(ours, slots, taken) if taken else ours
    if module is None:
        raise ValueError(
            "the optimiser has several groups: pass the module too, from_torch(optimizer, module), so that they can "
            "be named"
        )
    name_of = {id(p): _escaped(name) for name, p in module.named_parameters()}
    named = [([name_of[id(p)] for p in mine], one) for mine, (one, _) in zip(parameters, groups, strict=True)]
    ours = Groups([*named, (["*"], Frozen())])
    slots = {**{str(i): one for i, (_, one) in enumerate(groups)}, str(len(groups)): {}}
    return Started(ours, slots, taken) if taken else ours


def to_torch(state: InnerState, optimizer: torch.optim.Optimizer, module: nn.Module | None = None) -> dict[str, Any]:
    """The state dict with which a ``torch.optim`` optimiser goes on from an inner state.

    The way back from :func:`from_torch`: the settings and groups are the optimiser's, the slots and
    step numbers the state's. The weights go back with :func:`load`.

    Args:
        state: a state of an inner step that :func:`from_torch` of the same ``optimizer`` and
            ``module`` made, or of our optimiser of the same kind.
        optimizer: the optimiser of torch; it is not touched.
        module: the module whose parameters it holds, as in :func:`from_torch`.

    Returns:
        What ``optimizer.load_state_dict`` takes.

    Raises:
        ValueError: if the state is not one of such an optimiser.

    >>> import torch, metaopt as mo
    >>> net = torch.nn.Linear(1, 1, bias=False)
    >>> adam = torch.optim.Adam(net.parameters())
    >>> step = mo.inner_step(lambda w, lam, batch: w["weight"].sum(), mo.interop.from_torch(adam, net))
    >>> state = step(step.init(mo.functional(net).params, None), None, None)
    >>> adam.load_state_dict(mo.interop.to_torch(state, adam, net))
    >>> adam.state[net.weight]["exp_avg"]
    tensor([[0.1000]])
    """
    row = counterpart(optimizer)
    parameters = [in_order(group["params"], module) for group in optimizer.param_groups]
    single = _holds_all(parameters, module)
    slots = _unwrapped(state.slots)
    entries: dict[int, dict[str, Any]] = {}
    for number, (group, mine) in enumerate(zip(optimizer.param_groups, parameters, strict=True)):
        own = slots if single else _unwrapped(slots.get(str(number)))
        entries.update(zip([id(p) for p in mine], _entries(row, group, own, mine, state.t), strict=True))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    numbered = {i: entries[id(p)] for i, p in enumerate(held) if entries[id(p)]}
    return {**optimizer.state_dict(), "state": numbered}


def load(module: nn.Module, params: dict[str, Tensor]) -> None:
    """Write weights into a module, in place: trained ones from a state, or learned initial ones.

    Args:
        module: the module that ``mo.functional`` was given.
        params: names to values, as in ``mo.functional(module).params``; some of them are enough.

    Raises:
        ValueError: if the module has no parameter of a name, or one of another shape.

    >>> import torch
    >>> net = torch.nn.Linear(1, 1)
    >>> load(net, {"weight": torch.tensor([[3.0]])})
    >>> net.weight.item()
    3.0
    """
    own = dict(module.named_parameters())
    for name, value in params.items():
        if name not in own:
            raise ValueError(f"load: the module has no parameter {name!r}; it has {sorted(own)}")
        if own[name].shape != value.shape:
            raise ValueError(f"load: {name!r} has shape {tuple(own[name].shape)}, the value {tuple(value.shape)}")
    with torch.no_grad():
        for name, value in params.items():
            own[name].copy_(value)


def in_order(parameters: list[Tensor], module: nn.Module | None) -> list[Tensor]:
    """Parameters in the module's order, which is that of ``mo.functional(module).params``.

    Those that do not require grad are left out where the module tells their names: they do not
    move.
    """
    if module is None:
        return parameters
    place = {id(p): i for i, p in enumerate(module.parameters())}
    foreign = [tuple(p.shape) for p in parameters if id(p) not in place]
    if foreign:
        raise ValueError(f"the optimiser holds parameters of shapes {foreign} that are not the module's")
    return sorted(parameters, key=lambda p: place[id(p)])


def steps_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> float:
    """Steps a parameter has taken."""
    state = optimizer.state.get(parameter, {})
    if "step" in state:
        return float(state["step"])
    return float(state.get("momentum_buffer") is not None)  # SGD counts no steps: only whether there was one matters


def _group(
    row: Counterpart, optimizer: torch.optim.Optimizer, group: dict[str, Any], parameters: list[Tensor], taken: int
) -> tuple[Optimizer, Tree]:
    """One group as our optimiser, and its slots (lists in the order of the parameters)."""
    make = row.make
    if row.decoupled is not None and group.get("decoupled_weight_decay"):
        make = row.decoupled
    ours = make(**{name: _own(group[name]) for name in row.settings})
    slots = ours.init([p.detach() for p in parameters])
    states = [optimizer.state.get(p, {}) for p in parameters]
    for name in slots:
        if name == "missed":
            slots[name] = [taken - int(steps_of(optimizer, p)) for p in parameters]
            continue
        given = [state.get(row.slots[name]) for state in states]
        slots[name] = [_filled(x, like) for x, like in zip(given, slots[name], strict=True)]
    return (Maximise(ours), {"inner": slots}) if group.get("maximize") else (ours, slots)


def _entries(
    row: Counterpart, group: dict[str, Any], slots: Tree, parameters: list[Tensor], t: int
) -> list[dict[str, Any]]:
    """Torch's state of each parameter of a group; empty for one that has taken no step."""
    if not isinstance(slots, dict) or not set(slots) <= {*row.slots, "missed"}:
        found = sorted(slots) if isinstance(slots, dict) else type(slots).__name__
        raise ValueError(f"to_torch: the state has the slots {found}, torch's optimiser those of {sorted(row.slots)}")
    columns = {name: tree.leaves(slot) for name, slot in slots.items()}
    missed = columns.pop("missed", [0] * len(parameters))
    if any(len(column) != len(parameters) for column in columns.values()):
        raise ValueError(f"to_torch: the optimiser holds {len(parameters)} parameters, the state another number")
    entries: list[dict[str, Any]] = []
    for i, parameter in enumerate(parameters):
        steps = t - missed[i]
        if not steps and not row.started:
            entries.append({})
            continue
        entry: dict[str, Any] = {"step": torch.tensor(float(steps))} if row.counted else {}
        for name, number in row.numbers(group, steps).items():
            entry[name] = torch.tensor(number)
        for name, column in columns.items():
            if column[i].numel():
                value = column[i].detach().clone()
                entry[row.slots[name]] = value if name != "product" else value.reshape(-1)[0]
        _check_shapes(entry, parameter)
        entries.append(entry)
    return entries


def _check_shapes(entry: dict[str, Any], parameter: Tensor) -> None:
    for name, value in entry.items():
        if value.ndim == parameter.ndim and value.ndim and not name.endswith("_var") and value.shape != parameter.shape:
            raise ValueError(
                f"to_torch: {name} has shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}: are the "
                "parameters in another order? Pass the module too"
            )


def _holds_all(parameters: list[list[Tensor]], module: nn.Module | None) -> bool:
    """Whether one group holds everything that there is to be trained."""
    if len(parameters) > 1:
        return False
    return module is None or len(parameters[0]) == len(list(module.parameters()))


def _refuse_hooks(optimizer: torch.optim.Optimizer) -> None:
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise ValueError(
            "the optimiser has hooks on its step, which would be ignored: write what they do as a wrapper from "
            "mo.optim (for instance ClipNorm) and remove them"
        )
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        warnings.warn(
            "a learning rate scheduler is attached to the optimiser: from_torch takes the rate of now for all steps. "
            "Give a schedule as lr of an optimiser from mo.optim, see mo.optim.schedules",
            UserWarning,
            stacklevel=3,
        )


def _unwrapped(slots: Tree) -> Tree:
    """The slots inside :class:`Started` and :class:`metaopt.optim.Maximise`."""
    while isinstance(slots, dict) and set(slots) == {"inner"}:
        slots = slots["inner"]
    return slots


def _own(setting: Any) -> Any:
    """A copy of a setting: torch writes into tensors of rates."""
    return tree.map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, setting)


def _escaped(name: str) -> str:
    """A name as a pattern that matches only itself."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _filled(value: Any, like: Any) -> Any:
    """A slot in the shape and dtype of a fresh one (torch keeps some as one number).

    The fresh one where there is none.
    """
    if value is None or not isinstance(value, Tensor):
        return like if value is None else value
    try:
        return value.detach().to(like.dtype).expand_as(like).clone()
    except RuntimeError:
        raise ValueError(
            f"the optimiser holds a slot of shape {tuple(value.shape)}, the weight needs {tuple(like.shape)}: the "
            "parameters come in another order; pass the module too, from_torch(optimizer, module)"
        ) from None
