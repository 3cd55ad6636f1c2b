r"""AdamW: Adam with decoupled weight decay, :math:`w \leftarrow (1 - \eta\,\text{wd})\, w` before the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from metaopt.optim.adam import Adam
from metaopt.optim.optimizer import Hyper


@dataclass(frozen=True)
class AdamW(Adam):
    """AdamW, equal to ``torch.optim.AdamW`` step by step; arguments and slots as :class:`Adam`.

    Loshchilov and Hutter 2019, `arXiv 1711.05101 <https://arxiv.org/abs/1711.05101>`__.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 2 * w.sum(), mo.optim.AdamW(lr=0.1))
    >>> step(step.init(torch.zeros(1), None), None, None).w  # the first step is -lr · sign(g)
    tensor([-0.1000])
    """

    weight_decay: Hyper = 1e-2

    decoupled: ClassVar[bool] = True
