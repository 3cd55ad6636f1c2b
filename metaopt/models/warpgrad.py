"""WarpGrad: layers between the layers, which are not adapted, precondition the gradients of those that are."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from typing_extensions import override

from metaopt import checks
from metaopt.functional import Params, functional, merge, partition
from metaopt.models.base import Loss, MetaModel
from metaopt.models.conv_net import Norm, no_norm

WarpFactory: TypeAlias = Callable[[nn.Module], nn.Module]
"""``last convolution or linear layer below -> warp module`` that keeps the shape."""

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_PREFIX = "warp_"


@dataclass(frozen=True)
class Warp:
    """How a warp module is built.

    Layers that keep the number of channels, 3×3 after a 2d convolution and dense after a linear
    layer.

    Args:
        layers: how many, ≥ 1; the HyperDistill paper has two.
        activation: between the layers, e.g. ``nn.ReLU``; ``nn.Identity`` gives a linear warp.
        norm: after each layer, e.g. ``batch_norm`` (2d convolutions only).
        residual: whether the input is added to the output.
        kernel_size: of the convolutions, odd.

    >>> Warp(layers=1, activation=nn.Identity)(nn.Conv2d(3, 8, 3))
    Sequential(
      (0): Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    )
    """

    layers: int = 2
    activation: Callable[[], nn.Module] = nn.ReLU
    norm: Norm = no_norm
    residual: bool = False
    kernel_size: int = 3

    def __post_init__(self) -> None:
        checks.count(self, "layers", self.layers)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"a warp keeps the size of the image, so its kernel_size is odd, got {self.kernel_size}")

    def __call__(self, below: nn.Module) -> nn.Module:
        """The warp module above ``below``."""
        modules: list[nn.Module] = []
        for index in range(self.layers):
            layer, channels = self._layer(below)
            parts = [layer, self.norm(channels)]
            if index < self.layers - 1:
                parts.append(self.activation())
            modules += [part for part in parts if not isinstance(part, nn.Identity)]
        kind = _Residual if self.residual else nn.Sequential
        return kind(*modules)

    def _layer(self, below: nn.Module) -> tuple[nn.Module, int]:
        if isinstance(below, nn.Linear):
            return nn.Linear(below.out_features, below.out_features), below.out_features
        if isinstance(below, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            kind = (
                nn.Conv1d if isinstance(below, nn.Conv1d) else nn.Conv2d if isinstance(below, nn.Conv2d) else nn.Conv3d
            )
            return kind(
                below.out_channels, below.out_channels, self.kernel_size, padding=self.kernel_size // 2
            ), below.out_channels
        raise TypeError(
            f"Warp knows what follows convolutions and linear layers, not {type(below).__name__}: give warp=, a "
            "function of that layer"
        )


@dataclass(frozen=True)
class WarpGrad(MetaModel):
    r"""A sequential net with warp layers between its children.

    .. math::
        f(x;\, w, \lambda) = h^{(L)} \circ \omega^{(L-1)} \circ h^{(L-1)} \circ \dots \circ
        \omega^{(1)} \circ h^{(1)}(x), \qquad w = \text{task layers } h, \quad \lambda = \text{warp
        layers } \omega

    The inner loop sees :math:`\nabla_{h^{(i)}} L`, which has passed through the warp layers above:
    learned, they warp its geometry. Flennerhag et al. 2020, `arXiv 1909.00025
    <https://arxiv.org/abs/1909.00025>`__.

    ``lam`` is the warp layers, ``w`` all the rest, under its old names.

    Args:
        model: the wrapped net, warp layers included; :meth:`of` puts them in.
        loss: ``(prediction, target) -> scalar``.

    >>> from metaopt.models import conv_net
    >>> net = conv_net(3, 32, classes=10, in_channels=3, image_size=32)
    >>> warpgrad = WarpGrad.of(net, nn.functional.cross_entropy)
    >>> w, lam = warpgrad.init()
    >>> sorted(w)[:3], len(lam), sorted(lam)[0]
    (['block1.conv.bias', 'block1.conv.weight', 'block1.norm.bias'], 12, 'warp_block1.0.bias')
    """

    @classmethod
    def of(
        cls, sequential: nn.Sequential, loss: Loss, *, warp: WarpFactory = Warp(), after: Sequence[str] | None = None
    ) -> WarpGrad:
        """Warp layers put into your own net, which stays as it is.

        Args:
            sequential: the net; its children are the layers or blocks.
            loss: ``(prediction, target) -> scalar``.
            warp: a :class:`Warp`, or any function of the last convolution or linear layer of the
                child below.
            after: names of the children that a warp module follows; default: every one that holds a
                convolution or linear layer, the last such excepted.

        Raises:
            TypeError: if the net is not sequential.
            ValueError: if ``after`` names no child, or one without a convolution or linear layer,
                if there is nowhere to put a warp layer, or if a child is called ``warp_…``.
        """
        if not isinstance(sequential, nn.Sequential):
            raise TypeError(f"warp layers go between the children of an nn.Sequential, got {type(sequential).__name__}")
        children = dict(sequential.named_children())
        if any(name.startswith(_PREFIX) for name in children):
            raise ValueError(
                f"the prefix {_PREFIX!r} marks warp layers: rename the children of the net, {list(children)}"
            )
        below = {
            name: layers[-1]
            for name, child in children.items()
            if (layers := [m for m in child.modules() if isinstance(m, _LAYERS)])
        }
        chosen = list(below)[:-1] if after is None else list(after)
        wrong = [name for name in chosen if name not in below]
        if wrong or not chosen:
            raise ValueError(
                f"warp layers can follow {list(below)[:-1]} (children with a convolution or linear layer), got "
                f"after={chosen}"
            )
        warped: OrderedDict[str, nn.Module] = OrderedDict()
        for name, child in children.items():
            warped[name] = child
            if name in chosen:
                reference = next(below[name].parameters())
                warped[_PREFIX + name] = warp(below[name]).to(reference.device, reference.dtype)
        return cls(functional(nn.Sequential(warped)), loss)

    def init(self) -> tuple[Params, Params]:
        """``(w, lam)`` at the module's own initial values."""
        return partition(self.model.params, lambda name: not name.startswith(_PREFIX))

    @override
    def predict(self, w: Params, lam: Params, x: Any) -> Any:
        return self.model(merge(w, lam), x)


class _Residual(nn.Sequential):
    """A block with a shortcut around it, ``x + f(x)``."""

    def forward(self, input: Tensor) -> Tensor:
        return input + super().forward(input)
