"""Python values as plain data that ``torch.load(..., weights_only=True)`` reads: nothing in a file is executed.

A NamedTuple is stored as the name of its class and its fields. It is built again only from a class
that the program has loaded already.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


def pack(value: Any, place: str = "state", shared: Sequence[Tensor] = ()) -> Any:
    """``value`` as numbers, strings, tensors, lists and dicts.

    Args:
        value: what is to be stored.
        place: its name in errors.
        shared: tensors that :func:`unpack` will be given again; of these only the number is stored.

    Raises:
        TypeError: if a part of it has no such form; it names the part.
    """
    if isinstance(value, Tensor):
        number = next((i for i, tensor in enumerate(shared) if tensor is value), None)
        return value.detach().clone() if number is None else {"kind": "shared", "items": number}
    if type(value) in _PLAIN:
        return value
    if type(value) in (dict, Counter, OrderedDict, defaultdict):
        pairs = [[pack(key, place), pack(item, f"{place}[{key!r}]", shared)] for key, item in value.items()]
        return {"kind": "dict", "items": pairs}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        named: Any = value
        return {"kind": "named", "class": _name(value), "items": _packed_items(named._asdict(), place, shared)}
    if type(value) in (list, tuple):
        items = [pack(item, f"{place}[{i}]", shared) for i, item in enumerate(value)]
        return {"kind": type(value).__name__, "items": items}
    if is_dataclass(value) and not isinstance(value, type) and type(value).__module__.startswith("metaopt."):
        settings = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        return {"kind": "settings", "class": _name(value), "items": _packed_items(settings, place, shared)}
    if hasattr(value, "pullback") and hasattr(value, "state"):
        return None  # a step's graph: it is built again from the state, batch and random state beside it
    raise TypeError(f"a checkpoint cannot hold {place}, which is a {type(value).__module__}.{type(value).__qualname__}")


def unpack(packed: Any, shared: Sequence[Tensor] = ()) -> Any:
    """The inverse of :func:`pack`, with the same ``shared`` tensors.

    Raises:
        ValueError: if a class is not known.
    """
    if not isinstance(packed, dict):
        return packed
    kind = packed["kind"]
    items = packed["items"]
    if kind == "shared":
        return shared[items]
    if kind == "dict":
        return {unpack(key): unpack(item, shared) for key, item in items}
    if kind == "list":
        return [unpack(item, shared) for item in items]
    if kind == "tuple":
        return tuple([unpack(item, shared) for item in items])
    cls = _class(packed["class"])
    values = {key: unpack(item, shared) for key, item in items.items()}
    if kind == "named" and issubclass(cls, tuple) and getattr(cls, "_fields", None) == tuple(values):
        return tuple.__new__(cls, values.values())
    if kind == "settings" and is_dataclass(cls) and cls.__module__.startswith("metaopt."):
        return cls(**values)
    raise ValueError(f"{packed['class']} has other fields in this version")


def described(value: Any) -> Any:
    """What tells one configuration from another, as plain data: classes, settings and names of functions."""
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)} with sum {float(value.detach().double().sum()):.17g}"
    if type(value) in _PLAIN:
        return value
    if isinstance(value, dict):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        settings = {field.name: described(getattr(value, field.name)) for field in fields(value) if field.compare}
        return {"class": _name(value), **settings}
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return f"a {type(value).__module__}.{type(value).__qualname__}"


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Where two descriptions differ, ``place: old, now new``."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *[key for key in new if key not in old]]
        found = []
        for key in keys:
            found += differences(old.get(key), new.get(key), f"{place}.{key}" if place else key)
        return found
    return [] if old == new else [f"{place}: {old!r}, now {new!r}"]


def _packed_items(items: dict[str, Any], place: str, shared: Sequence[Tensor]) -> dict[str, Any]:
    return {key: pack(item, f"{place}.{key}", shared) for key, item in items.items()}


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _class(name: str) -> type:
    module, _, cls = name.rpartition(".")
    found = getattr(sys.modules.get(module), cls, None)
    if not isinstance(found, type):
        raise ValueError(f"{name} is not a class of this program")
    return found
