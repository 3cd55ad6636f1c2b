"""Modules that cannot be a pure function of their parameters, each refused with the remedy."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")
_OWN = ("_parameters", "_buffers", "_modules")


def check(module: nn.Module) -> None:
    """Look at a module before it is copied.

    Raises:
        TypeError: if a part of it is scripted, or a wrapper that replicates or shards it.
        ValueError: if it has a parameter that a call could not exchange, or would not treat as
            torch does.
    """
    for name, layer in module.named_modules():
        what = f"the module {name!r} ({type(layer).__name__})" if name else f"the module ({type(layer).__name__})"
        _check_kind(layer, what)
        _check_tensors(layer, what)
    _check_references(module)


def _check_kind(layer: nn.Module, what: str) -> None:
    if isinstance(layer, torch.jit.ScriptModule):
        raise TypeError(
            f"{what} is scripted or traced, and its parameters cannot be exchanged: wrap the nn.Module it was made from"
        )
    if type(layer).__name__ in _WRAPPERS:
        raise TypeError(f"{what} spreads a module over devices: wrap the module inside it, functional(net.module)")
    for kind, name in (("WeightNorm", "weight_norm"), ("SpectralNorm", "spectral_norm")):
        if any(type(hook).__name__ == kind for hook in layer._forward_pre_hooks.values()):
            raise ValueError(
                f"torch.nn.utils.{name} (the hook) has a wrong second derivative; "
                f"use torch.nn.utils.parametrizations.{name}, which functional() replaces by a right one"
            )
    if getattr(layer, "max_norm", None) is not None and isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        raise ValueError(
            f"{what} writes to its weights in the forward pass (max_norm={layer.max_norm}), which a pure function "
            "cannot do: set max_norm to None, and scale the rows in your own forward pass"
        )


def _check_tensors(layer: nn.Module, what: str) -> None:
    for kind, tensors in (("parameter", layer._parameters), ("buffer", layer._buffers)):
        for key, tensor in tensors.items():
            if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
                raise ValueError(
                    f"the {kind} {key!r} of {what} is not initialised yet: run the lazy module once on an example "
                    "batch before wrapping it"
                )
            if tensor is None:
                continue
            hooks = [tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None)]
            if any(hooks):
                raise ValueError(
                    f"the {kind} {key!r} of {what} has a gradient hook, which would never run, since a call gets other "
                    "tensors: remove the hook, and do what it does to the gradients in the optimiser, "
                    "mo.optim.Precondition"
                )


def _check_references(module: nn.Module) -> None:
    """A parameter that is reached in another way than as an attribute is not the one that a call is given."""
    names = {id(p): name for name, p in module.named_parameters(remove_duplicate=False)}
    parts = {id(part): name or "the module itself" for name, part in module.named_modules(remove_duplicate=False)}
    for name, layer in module.named_modules():
        for key, value in vars(layer).items():
            if key in _OWN or (isinstance(layer, nn.RNNBase) and key.startswith("_flat_weight")):
                continue
            for path, found in _reached(value, f"{name}.{key}" if name else key, set()):
                held = _description(found, path, names, parts)
                if held:
                    raise ValueError(
                        f"{held}: a call would use its own values instead of those it is given. Reach it "
                        "as an attribute of the module, self.…, inside forward"
                    )


def _description(found: Any, path: str, names: Mapping[int, str], parts: Mapping[int, str]) -> str | None:
    function = "()" in path
    if isinstance(found, nn.Parameter):
        if id(found) in names:
            return f"{path} refers to the parameter {names[id(found)]!r}"
        return f"{path} holds a parameter that is not registered" if found.requires_grad else None
    if function and id(found) in parts:
        return f"the function {path} refers to a part of the module, {parts[id(found)]!r}"
    if id(found) not in parts and any(p.requires_grad for p in found.parameters()):
        return f"{path} holds a module that is not registered (a list of modules is an nn.ModuleList)"
    return None


def _reached(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Parameter | nn.Module]]:
    """Parameters and modules inside containers and functions, each with the path to it."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Parameter | nn.Module):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _reached(item, f"{path}[{key!r}]", seen)
    elif isinstance(value, list | tuple | set | frozenset | deque):
        for index, item in enumerate(value):
            yield from _reached(item, f"{path}[{index}]", seen)
    elif isinstance(value, partial):
        for item in (value.func, *value.args, *value.keywords.values()):
            yield from _reached(item, path, seen)
    elif isinstance(value, MethodType) and not isinstance(value.__self__, nn.Module):
        yield from _reached(vars(value.__self__) if hasattr(value.__self__, "__dict__") else None, path, seen)
    elif isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            yield from _reached(_contents(cell), f"{path}()", seen)
        yield from _reached(value.__defaults__, f"{path}()", seen)


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
