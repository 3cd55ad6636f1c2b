"""``nn.Module`` to pure function, and the split of its parameters into weights and hyperparameters.

The user's module is copied once and never touched again. A call puts the given tensors into
pre-resolved slots of the private copy, runs ``forward`` and takes them out again: what
:func:`torch.func.functional_call` does, without its per-call look-up, which costs a small net as
much as the forward pass itself. Between calls the slots hold nothing that could be computed with,
so that whatever runs a part of the module later (``torch.utils.checkpoint`` inside it, when it
recomputes) fails instead of using other values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from metaopt.layers import batch_norm
from metaopt.layers.lean import twice_differentiable

Params: TypeAlias = dict[str, Tensor]


class FunctionalModel:
    """A module as a pure function ``model(params, *args, **kwargs) -> out``.

    Attributes:
        params: name to parameter (detached clones; a tied parameter appears once, under its first
            name).
        buffers: name to buffer (clones), as they were when the module was wrapped.

    Dropout, batch statistics and every other choice that depends on training mode follow the mode
    the module had when wrapped; :meth:`train` and :meth:`eval` give the same function in the other
    mode.

    >>> model = functional(nn.Linear(2, 1))
    >>> sorted(model.params)
    ['bias', 'weight']
    >>> model(model.params, torch.ones(5, 2)).shape
    torch.Size([5, 1])
    """

    def __init__(self, module: nn.Module) -> None:
        """Copy ``module`` (see :func:`functional`)."""
        self._module = twice_differentiable(copy.deepcopy(module))
        self.params: Params = {name: p.detach().clone() for name, p in self._module.named_parameters()}
        self.buffers: Params = {name: b.detach().clone() for name, b in self._module.named_buffers()}
        self._whole = copy.deepcopy(self._module)
        self._param_slots = _slots(self._module, "_parameters", dict(self._module.named_parameters()))
        self._buffer_slots = _slots(self._module, "_buffers", dict(self._module.named_buffers()))
        for holder, key in (
            place for slots in (self._param_slots, self._buffer_slots) for places in slots.values() for place in places
        ):
            holder[key] = _ABSENT

    def __call__(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        """Run with ``params``; buffers are as captured, and what the forward pass does to them is thrown away.

        Running statistics that a layer in training mode would only move, not use, are not even
        computed: such a layer can be mapped over tasks.
        """
        _check_names(params, self._param_slots, "params")
        if (
            torch.compiler.is_compiling()
        ):  # the compiler follows torch's own way of swapping; what that costs is paid once
            fresh = {name: buffer.clone() for name, buffer in self.buffers.items()}
            return torch.func.functional_call(self._whole, {**params, **fresh}, args, kwargs)
        if not self._buffer_slots:
            with _swapped(self._param_slots, params):
                return self._module(*args, **kwargs)
        idle = self._idle_statistics()
        fresh = {name: None if name in idle else buffer.clone() for name, buffer in self.buffers.items()}
        with _swapped(self._param_slots, params), _swapped(self._buffer_slots, fresh):
            return self._module(*args, **kwargs)

    def with_buffers(self, params: Params, buffers: Params, *args: Any, **kwargs: Any) -> tuple[Any, Params]:
        """Run with ``params`` and ``buffers``.

        Returns:
            The output, and the buffers after the pass (running statistics, …). The given ones are
            not changed.
        """
        if not self._buffer_slots:
            return self(params, *args, **kwargs), {}
        _check_names(params, self._param_slots, "params")
        _check_names(buffers, self._buffer_slots, "buffers")
        fresh = {name: buffer.clone() for name, buffer in buffers.items()}
        with _swapped(self._param_slots, params), _swapped(self._buffer_slots, fresh):
            out = self._module(*args, **kwargs)
            after = {name: places[0][0][places[0][1]] for name, places in self._buffer_slots.items()}
        return out, after

    def train(self, mode: bool = True) -> FunctionalModel:
        """The same function in training mode (``mode=True``) or evaluation mode; this one stays as it is."""
        with _swapped(self._param_slots, self.params), _swapped(self._buffer_slots, self.buffers):
            other = FunctionalModel(self._module)
        other._module.train(mode)
        other._whole.train(mode)
        other.params, other.buffers = self.params, self.buffers
        return other

    def eval(self) -> FunctionalModel:
        """The same function in evaluation mode; this one stays as it is."""
        return self.train(False)

    def _idle_statistics(self) -> set[str]:
        layers = [
            (name, layer) for name, layer in self._module.named_modules() if type(layer) in _NORMS and layer.training
        ]
        return {f"{name}.{buffer}" if name else buffer for name, layer in layers for buffer in layer._buffers}

    def __repr__(self) -> str:
        """Class name of the module and how many numbers it holds."""
        count = sum(p.numel() for p in self.params.values())
        return f"functional({type(self._module).__name__}, {count:,} parameters)"


def functional(module: nn.Module) -> FunctionalModel:
    """Wrap any ``nn.Module`` as a pure function of its parameters.

    The module is never mutated: parameters and buffers are cloned, and later changes of the module
    are not seen.

    Three layers are made differentiable twice on the way. Torch's fused ``weight_norm`` has a wrong
    second derivative, so the private copy computes ``g · v / ‖v‖`` from plain operations. In
    training mode ``spectral_norm`` holds its singular vectors constant, as if they did not depend
    on the weight; the private copy differentiates its power iterations too (the two agree once
    those have converged). The second derivative of batch norm by batch statistics is right in
    torch, but slow and large; the private copy has one that is neither. Max pooling over 2 × 2
    windows is made faster, too, and comes before a ReLU that stands before it in an
    ``nn.Sequential``: the same function. Under ``torch.vmap`` a linear layer takes fewer
    operations.

    Raises:
        TypeError: if ``module`` is no ``nn.Module``.
        ValueError: if it has parameters that are not initialised yet (lazy modules), no parameters
            at all, or one of the old hooks ``torch.nn.utils.weight_norm`` and
            ``torch.nn.utils.spectral_norm``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"functional() wraps an nn.Module, got {type(module).__name__}; a plain function needs no wrapping"
        )
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"parameter {name!r} is not initialised yet: run the lazy module once on an example batch before "
                "wrapping it"
            )
    for submodule in module.modules():
        for kind, name in (("WeightNorm", "weight_norm"), ("SpectralNorm", "spectral_norm")):
            if any(type(hook).__name__ == kind for hook in submodule._forward_pre_hooks.values()):
                raise ValueError(
                    f"torch.nn.utils.{name} (the hook) has a wrong second derivative; "
                    f"use torch.nn.utils.parametrizations.{name}, which functional() replaces by a right one"
                )
    model = FunctionalModel(module)
    if not model.params:
        raise ValueError(f"{type(module).__name__} has no parameters, so there is nothing to differentiate")
    return model


def partition(params: Params, weights: Sequence[str] | Callable[[str], bool]) -> tuple[Params, Params]:
    """Split parameters into weights ``w`` (adapted by the inner loop) and hyperparameters ``lam`` (the rest).

    Args:
        params: name to tensor.
        weights: glob patterns of the names that are weights, or a predicate on the name.

    Raises:
        ValueError: if a pattern matches no name, or if one of the two sides would be empty.

    >>> w, lam = partition({"body.weight": torch.ones(1), "head.weight": torch.ones(1)}, weights=["head.*"])
    >>> list(w), list(lam)
    (['head.weight'], ['body.weight'])
    """
    if isinstance(weights, str):
        weights = [weights]
    if not callable(weights):
        for pattern in weights:
            if not any(fnmatchcase(name, pattern) for name in params):
                raise ValueError(f"the pattern {pattern!r} matches no parameter; names are {list(params)}")
    chosen = weights if callable(weights) else lambda name: any(fnmatchcase(name, pattern) for pattern in weights)
    w = {name: p for name, p in params.items() if chosen(name)}
    lam = {name: p for name, p in params.items() if name not in w}
    if not w or not lam:
        empty = "weights" if not w else "hyperparameters"
        raise ValueError(
            f"the split leaves no {empty} (of {list(params)}); a model whose parameters are all weights needs no "
            "partition"
        )
    return w, lam


def merge(w: Params, lam: Params) -> Params:
    """Put the two sides of :func:`partition` back together.

    Raises:
        ValueError: if a name stands on both sides.
    """
    both = w.keys() & lam.keys()
    if both:
        raise ValueError(f"these parameters are both weights and hyperparameters: {sorted(both)}")
    return {**w, **lam}


# -- slots ---------------------------------------------------------------------------------------
_NORMS = (
    *batch_norm.LEAN.values(),
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
_Places: TypeAlias = list[tuple[dict[str, Any], str]]


class _Absent:
    """What stands in a slot between calls."""

    _MESSAGE = (
        "a part of a module was run outside of the call that gave it its parameters: torch.utils.checkpoint inside a "
        "module recomputes after the "
        "call, when they are gone. Switch it off in the module, and put it around the whole call instead: "
        "checkpoint(model, params, x, "
        "use_reentrant=False)"
    )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(cls._MESSAGE)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("__") else RuntimeError(self._MESSAGE)


_ABSENT: Any = _Absent()


def _slots(module: nn.Module, kind: str, tensors: dict[str, Tensor]) -> dict[str, _Places]:
    """For each name every place (owner's dictionary, key) that holds this very tensor: tied parameters have several."""
    name_of = {id(tensor): name for name, tensor in tensors.items()}
    slots: dict[str, _Places] = {name: [] for name in tensors}
    for submodule in module.modules():
        holder = getattr(submodule, kind)
        for key, tensor in holder.items():
            if tensor is not None:
                slots[name_of[id(tensor)]].append((holder, key))
    return slots


@contextmanager
def _swapped(slots: dict[str, _Places], tensors: Mapping[str, Tensor | None]) -> Iterator[None]:
    originals = [(holder, key, holder[key]) for places in slots.values() for holder, key in places]
    try:
        for name, places in slots.items():
            for holder, key in places:
                holder[key] = tensors[name]
        yield
    finally:
        for holder, key, tensor in originals:
            holder[key] = tensor


def _check_names(given: Params, slots: dict[str, _Places], what: str) -> None:
    if given.keys() != slots.keys():
        missing, extra = sorted(slots.keys() - given.keys()), sorted(given.keys() - slots.keys())
        raise ValueError(f"{what} do not fit the module: missing {missing}, unknown {extra}")
