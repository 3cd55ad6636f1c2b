"""A module patched by ``higher.monkeypatch`` as a pure function of its parameters."""

from __future__ import annotations

from typing import Any, cast

from metaopt.functional import Params
from metaopt.interop._quiet import Patched


class HigherModel:
    """A patched module as ``model(params, *args, **kwargs) -> out``; :func:`from_higher` makes it.

    Its fast weights and its buffers stay as they are, so that the loop of ``higher`` can go on
    beside it.

    Attributes:
        params: name to fast weight, as the module has it now (detached clones).
    """

    def __init__(self, patched: Patched) -> None:
        """Hold the module, and read the names of its fast weights."""
        if patched.fast_params is None:
            raise ValueError(
                "the patched module holds no fast weights: make it with higher.innerloop_ctx or higher.monkeypatch"
            )
        self._patched = patched
        values = patched.fast_params
        self.params: Params = {name: values[i].detach().clone() for i, name in enumerate(_names(patched))}

    def __call__(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        """Run with ``params``; what the pass does to buffers is thrown away.

        Raises:
            ValueError: if the names are not those of the fast weights.
        """
        if params.keys() != self.params.keys():
            raise ValueError(f"params have the names {sorted(params)}, the patched module has {sorted(self.params)}")
        patched = self._patched
        held = patched._fast_params
        buffers = [(module, module._buffers) for module in patched.modules() if module._buffers]
        patched._fast_params = list(held)
        for module, own in buffers:
            vars(module)["_buffers"] = {name: None if x is None else x.clone() for name, x in own.items()}
        try:
            return patched(*args, params=[params[name] for name in self.params], **kwargs)
        finally:
            patched._fast_params = held
            for module, own in buffers:
                vars(module)["_buffers"] = own

    def __repr__(self) -> str:
        """The module's class, and how many numbers it holds."""
        count = sum(p.numel() for p in self.params.values())
        return f"from_higher({type(self._patched).__name__}, {count:,} parameters)"


def _names(patched: Patched) -> list[str]:
    """Dotted names of the fast weights, in their order; a tied one has its first name."""
    every = [
        f"{path}.{name}" if path else name
        for path, module in patched.named_modules()
        for name in cast(Patched, module)._param_names  # pyright: ignore[reportGeneralTypeIssues]
    ]
    names: dict[int, str] = {}
    for name, position in zip(every, patched._param_mapping, strict=True):
        names.setdefault(position, name)
    return [names[position] for position in sorted(names)]
