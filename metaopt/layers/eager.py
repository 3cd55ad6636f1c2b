"""Whether a layer of our own may stand in for torch's: in eager reverse mode, on plain tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
_PLAIN = (Tensor, nn.Parameter)


def eager() -> bool:
    """Neither compiled nor under a transform of torch.func nor in forward mode."""
    return not torch.compiler.is_compiling() and not transformed() and forward_ad._current_level < 0


def plain(*tensors: Tensor) -> bool:
    """Whether none is of a subclass of ``Tensor`` with a behaviour that only torch's own layers know."""
    return all([type(x) in _PLAIN for x in tensors])


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a transform of torch.func is under way, or one of the tensors is many in one (``is_grads_batched``)."""
    return _functorch.peek_interpreter_stack() is not None or any(
        [x is not None and _functorch.is_legacy_batchedtensor(x) for x in tensors]
    )


def followed(*tensors: Tensor) -> bool:
    """Whether one of the tensors is differentiated or mapped, so that an operation in place would lose something."""
    return forward_ad._current_level >= 0 or any(
        [x.requires_grad or _functorch.is_functorch_wrapped_tensor(x) for x in tensors]
    )
