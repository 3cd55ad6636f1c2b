"""``nn.Module`` to pure function, and the split of its parameters into weights and hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from metaopt import tree
from metaopt.layers import refused
from metaopt.layers.lean import idle, twice_differentiable
from metaopt.layers.statistics import Idle, moving
from metaopt.skeleton import Skeleton, sharing_copy

Params: TypeAlias = dict[str, Tensor]
Statistics: TypeAlias = Literal["frozen", "batch"]

_IDLE: Any = Idle()


class WithBuffers(NamedTuple):
    """Weights, and the buffers that a forward pass moves, for :func:`metaopt.inner_step_with_buffers`.

    Attributes:
        params: name to weight.
        buffers: name to floating-point buffer.
    """

    params: Params
    buffers: Params


class FunctionalModel:
    """A module as a pure function ``model(params, *args, **kwargs) -> out``, also in threads.

    Attributes:
        params: name to parameter that is trained (detached clones; a tied parameter appears once,
            under its first name).
        frozen: name to parameter that is not: constants of the model, the module's own tensors and
            no copies of them.
        buffers: name to buffer (clones), as they were when the module was wrapped.

    Dropout, batch statistics and every other choice that depends on training mode follow the mode
    the module had when wrapped; :meth:`train` and :meth:`eval` give the same function in the other
    mode, with the same tensors.

    >>> model = functional(nn.Linear(2, 1))
    >>> sorted(model.params)
    ['bias', 'weight']
    >>> model(model.params, torch.ones(5, 2)).shape
    torch.Size([5, 1])
    """

    def __init__(self, template: nn.Module, params: Params, frozen: Params, buffers: Params) -> None:
        """Hold a module and what its tensors are called (see :func:`functional`, which makes both)."""
        self.params = params
        self.frozen = frozen
        self.buffers = buffers
        self._template = template
        self._idle = idle(template)
        self._versions = _versions(frozen)
        self._stale: list[str] = []
        self._seen = False
        self._free: list[Skeleton] = []

    def __call__(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        """Run with ``params``; buffers are as captured, and what the forward pass does to them is thrown away.

        Running statistics that a layer in training mode would only move, not use, are not even
        computed: such a layer can be mapped over tasks.

        Raises:
            ValueError: if the names are not those of the parameters, or running statistics were
                never said to be meant as they are (see :meth:`eval`).
            RuntimeError: if the forward pass writes to a parameter, or a frozen one was written to.
        """
        self._check(params)
        if self._stale:
            raise ValueError(_stale_message(self._stale))
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        if torch.compiler.is_compiling():  # the compiler follows torch's own way of swapping
            return torch.func.functional_call(self._template, {**params, **buffers}, args, kwargs)
        for name in self._idle:
            buffers[name] = _IDLE
        return self._run(params, buffers, args, kwargs)[0]

    @property
    def moving(self) -> WithBuffers:
        """The weights and the buffers that can move, as a state carries them.

        Raises:
            ValueError: if a running statistic is a plain average (``momentum=None``): it needs a
                count, which a state does not carry.
        """
        for name, layer in self._template.named_modules():
            if name in moving(self._template) and getattr(layer, "momentum", 0.1) is None:
                raise ValueError(
                    f"the running statistics of {name!r} are plain averages (momentum=None), whose count is an "
                    "integer that a state does not carry: give the layer a momentum"
                )
        buffers = {name: x for name, x in self.buffers.items() if x.is_floating_point()}
        return WithBuffers(self.params, buffers)

    def with_buffers(self, params: Params, buffers: Params, *args: Any, **kwargs: Any) -> tuple[Any, Params]:
        """Run with ``params`` and ``buffers``.

        Running statistics of batch and instance norm and the vectors of spectral norm are
        differentiable functions of the old ones and of the inputs, and may be mapped over tasks.
        Integer buffers may be left out: they are then as they were when the module was wrapped.

        Returns:
            The output, and the buffers after the pass (running statistics, …). The given ones are
            not changed.
        """
        self._check(params)
        counts = {name: x for name, x in self.buffers.items() if not x.is_floating_point()}
        buffers = {**counts, **buffers}
        _check_names(buffers, self.buffers, "buffers")
        if torch.compiler.is_compiling() and self.buffers:
            raise RuntimeError("with_buffers does not run inside torch.compile: leave this step as it is")
        fresh = {name: buffer.clone() for name, buffer in buffers.items()}
        return self._run(params, fresh, args, kwargs)

    def train(self, mode: bool = True) -> FunctionalModel:
        """The same function in training mode (``mode=True``) or evaluation mode; this one stays as it is."""
        return self._in_mode(mode, [])

    def eval(self, *, statistics: Statistics | None = None) -> FunctionalModel:
        """The same function in evaluation mode; this one stays as it is.

        Args:
            statistics: what normalisation layers take whose running statistics a training pass
                moves. ``"frozen"``: those from when the module was wrapped. ``"batch"``: those of
                the batch, as in training mode. Default: none, since a run by ``model(params, …)``
                has moved none; the statistics come with :meth:`with_buffers`.
        """
        if statistics not in (None, "frozen", "batch"):
            raise ValueError(f"statistics are 'frozen' or 'batch', got {statistics!r}")
        moved = moving(self._template)
        other = self._in_mode(False, moved if statistics == "batch" else [])
        other._stale = moved if statistics is None else []
        return other

    def to(self, where: torch.device | torch.dtype | str) -> FunctionalModel:
        """The same function on another device or in another dtype; this one stays as it is.

        Weights, λ and batches follow with :func:`metaopt.tree.to`.
        """
        held = [*self._template.parameters(), *self._template.buffers()]
        template = sharing_copy(self._template, {id(x): tree.to(x, where) for x in held})
        found = {name: p.detach() for name, p in template.named_parameters()}
        params = {name: found[name] for name in self.params}
        frozen = {name: found[name] for name in self.frozen}
        other = FunctionalModel(template, params, frozen, dict(template.named_buffers()))
        other._stale = self._stale
        return other

    def _in_mode(self, mode: bool, in_training: Sequence[str]) -> FunctionalModel:
        template = sharing_copy(self._template, {}).train(mode)
        for name in in_training:
            template.get_submodule(name).train()
        other = FunctionalModel(template, self.params, self.frozen, self.buffers)
        other._versions = self._versions
        return other

    def _check(self, params: Params) -> None:
        _check_names(params, self.params, "params", self.frozen)
        if self._versions and self._versions != _versions(self.frozen):
            raise RuntimeError(
                "a frozen parameter was written to after the module was wrapped, and the model holds it without a "
                "copy: wrap copy.deepcopy(module), or wrap it again"
            )

    def _run(self, params: Params, buffers: Params, args: Any, kwargs: Any) -> tuple[Any, Params]:
        if not self._seen:
            given = params
            params = {name: p.clone() for name, p in given.items()}
        try:
            skeleton = self._free.pop()
        except IndexError:
            skeleton = Skeleton(self._template, self.params, self.buffers)
        skeleton.fill(params, buffers)
        out = skeleton.module(*args, **kwargs)
        after = skeleton.buffers()
        if not self._seen:
            _check_unwritten(params, self._template)
            self._seen = True
        if not skeleton.in_use():  # nor after an error, whose traceback holds it
            skeleton.clear()
            self._free.append(skeleton)
        return out, after

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the copies that calls use."""
        return {**vars(self), "_free": [], "_versions": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the parts over; what is frozen counts its changes from now on."""
        vars(self).update(state)
        self._versions = _versions(self.frozen)

    def __repr__(self) -> str:
        """Class name of the module and how many numbers it holds."""
        count = sum(p.numel() for p in self.params.values())
        frozen = sum(p.numel() for p in self.frozen.values())
        constant = f", {frozen:,} frozen" if frozen else ""
        return f"functional({type(self._template).__name__}, {count:,} parameters{constant})"


def functional(
    module: nn.Module, *, trainable: str | Sequence[str] | Callable[[str], bool] | None = None
) -> FunctionalModel:
    """Wrap any ``nn.Module`` as a pure function of its trained parameters.

    The module is never mutated. Trained parameters and buffers are cloned, so that later changes of
    the module are not seen. Frozen parameters are held once, in the module's own memory; writing to
    them afterwards makes the next call an error.

    Layers whose derivatives are wrong or slow in torch compute in another way on the private copy,
    with the same numbers. Torch's fused ``weight_norm`` has a wrong second derivative; here it is
    ``g · v / ‖v‖`` from plain operations. In training mode ``spectral_norm`` holds its singular
    vectors constant; here its power iterations are differentiated too (the two agree once those
    have converged). The second derivative of batch norm by batch statistics is right in torch, but
    slow and large. Max pooling over 2 × 2 windows is faster, and comes before a ReLU that stands
    before it. Under ``torch.vmap`` a linear layer takes fewer operations. A part that
    ``torch.compile`` made is run as what it was made from.

    Args:
        module: in the mode (training, evaluation) in which the model is to be.
        trainable: which parameters are in ``model.params``: glob patterns of names, or a predicate
            on the name. Default: those that require grad. ``"*"`` is all of them.

    Raises:
        TypeError: if ``module`` is not an ``nn.Module``, is scripted, cannot be copied, or wraps the
            module for several devices.
        ValueError: if nothing would be trained, a parameter is not initialised yet (lazy modules) or
            has a gradient hook, or the module reaches parameters by another way than its
            attributes; and for ``Embedding(max_norm=…)`` and the old hooks
            ``torch.nn.utils.weight_norm`` and ``torch.nn.utils.spectral_norm``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"functional() wraps an nn.Module, got {type(module).__name__}; a plain function needs no wrapping"
        )
    refused.check(module)
    found = dict(module.named_parameters())
    if not found:
        raise ValueError(f"{type(module).__name__} has no parameters, so there is nothing to differentiate")
    chosen = _trained(found, trainable)

    params = {name: found[name].detach().clone() for name in chosen}
    frozen = {name: p.detach() for name, p in found.items() if name not in params}
    captured = dict(module.named_buffers())
    buffers = {name: buffer.detach().clone() for name, buffer in captured.items()}
    held = {name: x.detach() for name, x in {**params, **frozen, **buffers}.items()}  # requires_grad_ may come to ours
    template = sharing_copy(module, {id(x): held[name] for name, x in {**found, **captured}.items()})
    twice_differentiable(template)
    return FunctionalModel(template, params, frozen, buffers)


def partition(params: Params, weights: str | Sequence[str] | Callable[[str], bool]) -> tuple[Params, Params]:
    """Split parameters into weights ``w`` (adapted by the inner loop) and hyperparameters ``lam`` (the rest).

    Args:
        params: name to tensor.
        weights: glob patterns of the names that are weights, or a predicate on the name.

    Raises:
        TypeError: if ``params`` is not a dictionary.
        ValueError: if a pattern matches no name, or if one of the two sides would be empty.

    >>> w, lam = partition({"body.weight": torch.ones(1), "head.weight": torch.ones(1)}, weights=["head.*"])
    >>> list(w), list(lam)
    (['head.weight'], ['body.weight'])
    """
    _check_mapping(params, "params")
    chosen = tree.matching(params, weights, "parameter")
    w = {name: params[name] for name in chosen}
    lam = {name: p for name, p in params.items() if name not in w}
    if not w or not lam:
        empty = "hyperparameters" if w else "weights"
        raise ValueError(
            f"the split leaves no {empty} (of {list(params)}); a model whose parameters are all weights needs no "
            "partition"
        )
    return w, lam


def merge(w: Params, lam: Params) -> Params:
    """Put the two sides of :func:`partition` back together.

    Raises:
        TypeError: if a side is not a dictionary.
        ValueError: if a name stands on both sides.
    """
    if type(w) is not dict or type(lam) is not dict:
        _check_mapping(w, "w")
        _check_mapping(lam, "lam")
    both = w.keys() & lam.keys()
    if both:
        raise ValueError(f"these parameters are both weights and hyperparameters: {sorted(both)}")
    return {**w, **lam}


# -- checks --------------------------------------------------------------------------------------
def _trained(found: Mapping[str, nn.Parameter], trainable: Any) -> list[str]:
    if trainable is None:
        chosen = [name for name, p in found.items() if p.requires_grad]
    else:
        chosen = tree.matching(found, trainable, "parameter")
    if not chosen:
        raise ValueError(
            f"all {len(found)} parameters are frozen (requires_grad=False), so there is nothing to train: say which "
            "are trained, functional(module, trainable=['head.*'])"
        )
    for name in chosen:
        if not (found[name].is_floating_point() or found[name].is_complex()):
            raise ValueError(f"the parameter {name!r} is {found[name].dtype} and cannot be trained")
    return chosen


def _check_mapping(given: Any, what: str) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} is a dictionary of names to tensors, as model.params is; got {type(given).__name__}")


def _check_names(given: Params, expected: Params, what: str, frozen: Params | None = None) -> None:
    if type(given) is not dict:
        _check_mapping(given, what)
    if given.keys() == expected.keys():
        return
    missing = sorted(expected.keys() - given.keys())
    extra = sorted(given.keys() - expected.keys())
    constants = sorted(frozen.keys() & given.keys()) if frozen else []
    hint = f"; {constants} are frozen: wrap with trainable=… to give them" if constants else ""
    raise ValueError(f"{what} do not fit the module: missing {missing}, unknown {extra}{hint}")


def _versions(frozen: Params) -> list[int]:
    """How often each frozen parameter was written to; tensors made in inference mode do not count that."""
    return [p._version for p in frozen.values() if not p.is_inference()]


def _check_unwritten(params: Params, template: nn.Module) -> None:
    """Fresh copies that a first call has been given are as they were made."""
    written = [name for name, p in params.items() if p._version]
    if written:
        owner = template.get_submodule(written[0].rpartition(".")[0])
        raise RuntimeError(
            f"the forward pass writes to the parameter {written[0]!r}, held by {type(owner).__name__}, which a pure "
            "function cannot do: compute with a changed copy of it in forward"
        )


def _stale_message(layers: list[str]) -> str:
    named = ", ".join(repr(name) for name in layers[:3]) + (", …" if len(layers) > 3 else "")
    return (
        f"evaluation mode uses running statistics of {named}, and a run by model(params, …) has not moved them. "
        "Say which are meant: model.eval(statistics='frozen') for those of the wrapped module, 'batch' for the "
        "batch's own; mo.inner_step_with_buffers carries them in the state"
    )
