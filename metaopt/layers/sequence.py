"""Max pooling takes turns with a ReLU right before it, in a private copy of a sequence of layers.

``pool(relu(x)) = relu(pool(x))``, with the same derivatives. But the ReLU and its derivatives see
fewer numbers then, a quarter of them after 2 × 2 windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

_NEW = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Linear,
    nn.BatchNorm2d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.Tanh,
    nn.GELU,
)
"""Layers that leave their input alone and give a new tensor."""

_SAME = (nn.Flatten, nn.Identity)
"""Layers whose output is their input's memory."""


def forward(layers: list[nn.Module], input: Any) -> Any:
    """One layer after the other."""
    for layer in layers:
        input = layer(input)
    return input


def orders(module: nn.Module) -> list[tuple[nn.Module, list[nn.Module]]]:
    """The sequences inside ``module`` in which a pooling layer comes before its ReLU, each with the new order.

    The ReLU's output is kept for its derivative, so whatever gets it must not write into it. A
    module of the user's own may do so; a layer that follows in the same sequence is looked at.
    """
    sequences = [layer for layer in module.modules() if _is_sequence(layer)]
    if _is_sequence(module):
        chains = [list(_flat(module))]
    else:
        chains = [list(layer.children()) for layer in sequences]

    followers: dict[int, nn.Module] = {}
    for chain in chains:
        followers |= _followers(chain)

    found = []
    for sequence in sequences:
        order = _reordered(sequence, followers)
        if order != list(sequence.children()):
            found.append((sequence, order))
    return found


def _followers(chain: list[nn.Module]) -> dict[int, nn.Module]:
    """For each layer, by its id, the next one that does more than hand its input on."""
    found = {}
    after = None
    for layer in reversed(chain):
        if after is not None:
            found.setdefault(id(layer), after)
        if type(layer) not in _SAME or _watched(layer):
            after = layer
    return found


def _reordered(sequence: nn.Module, followers: dict[int, nn.Module]) -> list[nn.Module]:
    layers = list(sequence.children())
    for index in range(len(layers) - 1):
        relu, pool = layers[index : index + 2]
        after = followers.get(id(pool))
        if _commute(relu, pool) and isinstance(after, nn.Module) and _is_new(after):
            layers[index : index + 2] = pool, relu
    return layers


def _is_new(layer: nn.Module) -> bool:
    return type(layer) in _NEW and not _watched(layer)


def _commute(relu: nn.Module, pool: nn.Module) -> bool:
    """In place, a ReLU may be seen by others; so may be what a hook is given."""
    plain_relu = type(relu) is nn.ReLU and not relu.inplace
    plain_pool = type(pool) is nn.MaxPool2d and not pool.return_indices
    return plain_relu and plain_pool and not _watched(relu) and not _watched(pool)


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    if not _is_sequence(module):
        yield module
        return
    for child in module.children():
        yield from _flat(child)


def _is_sequence(module: nn.Module) -> bool:
    return type(module) is nn.Sequential and not _watched(module) and "forward" not in vars(module)


def _watched(module: nn.Module) -> bool:
    return any([len(value) for name, value in vars(module).items() if name.endswith("_hooks")])
