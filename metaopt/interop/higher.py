"""``higher`` as a way in: its patched modules as models, its optimisers as inner optimisers."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast, overload

import torch
from torch import Tensor, nn

from metaopt import tree
from metaopt.interop._quiet import Patched
from metaopt.interop._quiet import optim as differentiable
from metaopt.interop.higher_model import HigherModel
from metaopt.interop.torch_optim import in_order, steps_of
from metaopt.optim.optimizer import Optimizer
from metaopt.tree import Tree

# numbers that an optimiser keeps in its state, all of them known from its settings and the steps
# taken so far
_NUMBERS: dict[type, Callable[[dict[str, Any], int], dict[str, float]]] = {
    torch.optim.ASGD: lambda group, taken: {
        "eta": group["lr"] / (1 + group["lambd"] * group["lr"] * taken) ** group["alpha"],
        "mu": 1 / max(1, taken - group["t0"]),
    },
}


class Place(NamedTuple):
    """One parameter: where ``higher`` keeps it, what its state consists of, and how it begins."""

    group: int
    position: int
    shape: torch.Size
    slots: tuple[str, ...]
    numbers: tuple[str, ...]
    initial: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class FromHigher(Optimizer):
    """An optimiser of `higher`; made by :func:`from_higher`.

    Slots: those of `higher`'s state that are tensors.
    """

    prototype: Any
    kind: type
    places: tuple[Place, ...]
    taken: int

    hypers: ClassVar[tuple[str, ...]] = ()

    @property
    def steps_taken(self) -> int:
        """Steps the optimiser had taken."""
        return self.taken

    def init(self, w: Tree) -> Tree:
        """The slots as the optimiser has them, zeros where it has none yet.

        Raises:
            ValueError: if the weights are not like the optimiser's parameters.
        """
        flat, spec = tree.flatten(w)
        held = [tuple(place.shape) for place in self.places]
        given = [tuple(leaf.shape) for leaf in flat]
        if len(held) != len(given) or any(one[len(one) - len(p) :] != p for one, p in zip(given, held, strict=True)):
            raise ValueError(
                f"the optimiser holds parameters of shapes {held}, the weights have shapes {given}: they must come "
                "in the same order"
            )
        names = dict.fromkeys(name for place in self.places for name in place.slots)
        return {
            name: tree.unflatten(
                [_filled(place.initial.get(name), leaf) for place, leaf in zip(self.places, flat, strict=True)], spec
            )
            for name in names
        }

    def update(self, g: Tree, w: Tree, slots: Tree, lam: Tree, t: int) -> tuple[Tree, Tree]:
        """`higher`'s own update, on a copy that holds this state."""
        flat, spec = tree.flatten(w)
        gradients = tree.leaves(g)
        before = {name: tree.leaves(slot) for name, slot in slots.items()}
        live = copy.copy(self.prototype)
        live.param_groups = [{**group, "params": list(group["params"])} for group in self.prototype.param_groups]
        live.state = [defaultdict(dict) for _ in live.param_groups]
        grouped = [[None] * len(group["params"]) for group in live.param_groups]
        for i, place in enumerate(self.places):
            live.param_groups[place.group]["params"][place.position] = flat[i]
            own = {name: before[name][i] for name in place.slots}
            live.state[place.group][place.position] = self._state(place, own, t - 1)
            grouped[place.group][place.position] = gradients[i]
        live._update(grouped)
        states = [live.state[place.group][place.position] for place in self.places]
        new_w = [live.param_groups[place.group]["params"][place.position] for place in self.places]
        after = {}
        for name, leaves in before.items():
            new = [state.get(name, old) for state, old in zip(states, leaves, strict=True)]
            after[name] = tree.unflatten(new, spec)
        return tree.unflatten(new_w, spec), after

    def _state(self, place: Place, slots: dict[str, Tensor], taken: int) -> dict[str, Any]:
        """One parameter's state; before the first step an empty one, which ``higher`` fills."""
        if taken == 0 and not place.initial:
            return {}
        group = self.prototype.param_groups[place.group]
        numbers = {"step": taken, **_NUMBERS.get(self.kind, lambda group, taken: {})(group, taken)}
        return {**{name: numbers[name] for name in place.numbers}, **slots}


@overload
def from_higher(what: torch.nn.Module, module: None = None) -> HigherModel: ...
@overload
def from_higher(
    what: torch.optim.Optimizer | differentiable.DifferentiableOptimizer, module: nn.Module | None = None
) -> FromHigher: ...
def from_higher(what: Any, module: nn.Module | None = None) -> FromHigher | HigherModel:
    """A model or an inner optimiser from what ``higher`` uses; nothing of it is touched.

    Three lines change an inner loop of ``higher`` into any estimator::

        with higher.innerloop_ctx(net, optimizer) as (fast, steps):
            model = from_higher(fast)
            step = mo.inner_step(lambda w, lam, batch: loss(model(w, batch), lam), from_higher(steps))
            hg = mo.hypergradient(step, outer_loss, model.params, lam, batches, outer_batch)

    λ acts through the losses. For learned rates use :func:`metaopt.interop.from_torch` or
    :mod:`metaopt.optim`. The conventions of ``higher`` are kept: its Adam adds ``eps`` before the
    bias correction, and where a second moment is 0 its derivative is cut to 0.

    Args:
        what: a module patched by ``higher.monkeypatch``; a differentiable optimiser of ``higher``; or
            a ``torch.optim`` optimiser of a type that ``higher`` knows (SGD, Adam, RMSprop,
            Adagrad, Adadelta, Adamax, ASGD, Rprop, and what ``higher.register_optim`` has added).
            An optimiser that has taken steps goes on from there.
        module: the module whose parameters a ``torch.optim`` optimiser holds. With it the weights'
            leaves come in the module's order; without it, in the optimiser's.

    Raises:
        TypeError: for anything else, an optimiser that ``higher`` does not know, or one whose state
            has numbers that are not known from the settings.
        ValueError: for settings that ``higher`` ignores, parameters of another module, different
            numbers of steps, a gradient callback, or an override that requires grad.

    >>> import torch, metaopt as mo
    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = from_higher(torch.optim.SGD([weight], lr=0.5))
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w[0] - lam) ** 2).sum(), optimizer)
    >>> problem = mo.Problem(step, lambda w, lam, _: w[0].sum(), [torch.zeros(1)], torch.ones(1), [None] * 2, None)
    >>> problem.hypergradient(mo.RMD()).total
    tensor([0.7500])
    """
    if isinstance(what, Patched):
        return HigherModel(what)
    if isinstance(what, differentiable.DifferentiableOptimizer):
        return _of_differentiable(what)
    if not isinstance(what, torch.optim.Optimizer):
        raise TypeError(
            "from_higher takes a module patched by higher, an optimiser of higher or one of torch.optim; got "
            f"{type(what).__name__}"
        )
    return _of_torch(what, module)


def _of_torch(optimizer: torch.optim.Optimizer, module: nn.Module | None) -> FromHigher:
    kind = type(optimizer)
    if kind not in differentiable._opt_mapping:
        names = [kind.__name__ for kind in differentiable._opt_mapping]  # pyright: ignore[reportAttributeAccessIssue]
        known = ", ".join(sorted(names))
        raise TypeError(f"higher has no differentiable {kind.__name__}; it has {known}. See mo.interop.from_torch")
    for group in optimizer.param_groups:
        for setting in ("maximize", "decoupled_weight_decay"):
            if group.get(setting):
                raise ValueError(f"higher ignores {setting}=True of {kind.__name__}: use mo.interop.from_torch")
    parameters = in_order([p for group in optimizer.param_groups for p in group["params"]], module)
    steps = {int(steps_of(optimizer, p)) for p in parameters}
    if len(steps) != 1:
        raise ValueError(f"the parameters have taken different numbers of steps: {sorted(steps)}")
    (taken,) = steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # its warnings about RMSprop and Rprop
        prototype = differentiable.get_diff_optim(optimizer, parameters)
    states = [optimizer.state.get(p, {}) for p in parameters]
    return _made(prototype, kind, parameters, states, taken)


def _of_differentiable(optimizer: differentiable.DifferentiableOptimizer) -> FromHigher:
    """The same of an optimiser that ``higher`` has made already."""
    if optimizer._grad_callback is not None:
        raise ValueError("a gradient callback is not taken over: use mo.optim.ClipNorm or mo.optim.Precondition")
    for group in optimizer.param_groups:
        learned = [name for name, value in group.items() if isinstance(value, Tensor) and value.requires_grad]
        if learned:
            raise ValueError(
                f"the override of {learned} requires grad, and λ does not reach an optimiser of higher: use "
                f'mo.optim with {learned[0]}=mo.by("{learned[0]}"), and put it into lam'
            )
    if optimizer._fmodel is None:
        raise ValueError("the optimiser of higher has no patched module: make both with higher.innerloop_ctx")
    kinds: Mapping[type, type] = cast(Any, differentiable._opt_mapping)
    (kind,) = [torch_kind for torch_kind, theirs in kinds.items() if type(optimizer) is theirs]
    fast: list[Tensor] = list(optimizer._fmodel.fast_params or ())
    at = {
        position: (g, i) for g, group in enumerate(optimizer._group_to_param_list) for i, position in enumerate(group)
    }
    if sorted(at) != list(range(len(fast))):
        raise ValueError(
            f"the optimiser of higher holds {len(at)} of {len(fast)} parameters: freeze the others "
            "(requires_grad_(False)) and use mo.interop.from_torch"
        )
    states = [optimizer.state[at[i][0]].get(at[i][1], {}) for i in range(len(fast))]
    steps = {int(state.get("step", bool(state))) for state in states}
    if len(steps) != 1:
        raise ValueError(f"the parameters have taken different numbers of steps: {sorted(steps)}")
    return _made(optimizer, kind, fast, states, steps.pop())


def _made(
    prototype: Any, kind: type, parameters: Sequence[Tensor], states: Sequence[Mapping[str, Any]], taken: int
) -> FromHigher:
    places = [
        _place(prototype, state, kind, parameter, i, taken)
        for i, (parameter, state) in enumerate(zip(parameters, states, strict=True))
    ]
    return FromHigher(prototype, kind, tuple(places), taken)


def _place(prototype: Any, state: Mapping[str, Any], kind: type, parameter: Tensor, position: int, taken: int) -> Place:
    """Where a parameter is; its slots are found by one update with a zero gradient."""
    group, index = next(
        (g, mapping.index(position)) for g, mapping in enumerate(prototype._group_to_param_list) if position in mapping
    )  # the same order as optimizer.param_groups
    settings = prototype.param_groups[group]
    own = {name: value for name, value in state.items() if value is not None}
    known = {"step": taken, **_NUMBERS.get(kind, lambda settings, taken: {})(settings, taken)}
    initial = {
        name: value.detach().clone() for name, value in own.items() if name not in known and isinstance(value, Tensor)
    }
    probe = copy.copy(prototype)
    probe.param_groups = [{**settings, "params": [parameter.detach()]}]
    start = {name: value for name, value in known.items() if name in own}
    probe.state = [defaultdict(dict, {0: {**initial, **start}})]
    probe._update([[torch.zeros_like(parameter)]])
    found = probe.state[0][0]
    slots = tuple(name for name, value in found.items() if isinstance(value, Tensor) and name not in known)
    numbers = tuple(name for name in found if name not in slots)
    unknown = [name for name in numbers if name not in known]
    if unknown:
        raise TypeError(
            f"higher's {kind.__name__} keeps {', '.join(unknown)} in its state, which is not a tensor: that cannot be "
            "replayed"
        )
    return Place(group, index, parameter.shape, slots, numbers, initial)


def _filled(value: Tensor | None, like: Tensor) -> Tensor:
    """A slot in the shape and dtype of its weight."""
    return torch.zeros_like(like) if value is None else value.to(like).expand_as(like).clone()
