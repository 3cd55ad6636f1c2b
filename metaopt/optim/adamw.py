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
    """

    weight_decay: Hyper = 1e-2

    decoupled: ClassVar[bool] = True
