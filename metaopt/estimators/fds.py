"""FDS: forward mode with hyperparameters that windows of steps share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from metaopt import tree
from metaopt.estimators.base import Pullback, Response, Terms, Traits
from metaopt.estimators.forward import ForwardCarry, ForwardMode, check_columns
from metaopt.estimators.outer import OuterObjective
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.tree import Tree


@dataclass(frozen=True)
class FDS(ForwardMode):
    r"""Forward mode over windows of steps, e.g. for schedules from :func:`metaopt.optim.schedules.piecewise`.

    .. math::
        \frac{1}{W} \sum_{t \in \text{window}} \frac{d L_{val}}{d\lambda_t} = \frac1W\, \alpha_T Z_T

    The hypergradients of neighbouring steps are noisy measurements of nearly the same thing;
    sharing averages them, for the price of what changes within a window
    (:func:`shared_window_error`), and makes forward mode cheap enough for :math:`10^4` steps.
    Micaelli & Storkey 2021, "Gradient-based hyperparameter optimization over long horizons", `arXiv
    2007.07869 <https://arxiv.org/abs/2007.07869>`__.

    Which entry of λ acts in which step is the inner step's own business: ``SGD(lr=piecewise(lambda
    lam: lam["lr"], T))`` uses entry ``⌊n (t-1) / T⌋`` of n. An entry whose window has not begun has
    a zero column, which takes no product: in window i (from 0) at most i + 1 of a schedule's
    columns do.

    Cost: as :class:`~metaopt.estimators.forward.FMD`, about half of its products for a schedule.
    Memory: as FMD. Bias: none but the factor 1/W (of the direct term as well), as long as there is
    no bound; with one, whatever it cuts off. Online as FMD.

    Args:
        window: W, the steps that share an entry: one number for all of λ, or a pytree like λ of
            numbers.
        bound: elementwise bound on the tangents of the inner gradient (``H Z``, and what λ adds
            inside the loss), against columns that grow without limit over long runs; the paper's is
            1. Inner gradients are clamped by :class:`metaopt.optim.ClipValue` (the paper's: 3).
        columns_at_once: see FMD.

    Raises:
        ValueError: for a window that is neither a number of steps nor a pytree like λ, a bound that is not
            positive, less than one column at once.

    >>> import torch, metaopt as mo
    >>> rates = mo.optim.schedules.piecewise(lambda lam: lam, 4)
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - 1) ** 2).sum(), mo.optim.SGD(lr=rates))
    >>> lam = torch.tensor([0.5, 0.5])
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), lam, [None] * 4, None)
    >>> problem.hypergradient(FDS(window=2)).total
    tensor([0.1250, 0.1250])
    """

    traits: ClassVar[Traits] = Traits(sees="the whole run", high_dimensional=False, bias="one λ for a window of steps")

    window: int | Tree
    bound: float | None = None
    columns_at_once: int | None = None

    def __post_init__(self) -> None:
        check_columns(self, self.columns_at_once)
        for size in tree.leaves(self.window):
            if not isinstance(size, int) or size < 1:
                raise ValueError(
                    "FDS: window is a number of steps of at least 1, or a pytree like lam of such numbers; got "
                    f"{size!r}"
                )
        if self.bound is not None and not self.bound > 0:
            raise ValueError(f"FDS: bound must be positive, got {self.bound}")

    @property
    @override
    def bound_on_products(self) -> float | None:
        return self.bound

    @override
    def init(self, step: Step, state: InnerState, lam: Tree) -> ForwardCarry:
        if not isinstance(self.window, int) and tree.flatten(self.window)[1] != tree.flatten(lam)[1]:
            raise ValueError(
                f"FDS: window has leaves {tree.names(self.window)}, lam {tree.names(lam)}; give one number, or a "
                "pytree like lam"
            )
        return super().init(step, state, lam)

    def respond(self, step: Step, state: InnerState, lam: Tree, carry: ForwardCarry) -> tuple[Tree, Pullback]:
        """The weights, and ``α ↦ α Z / W``."""
        point, summed = super().respond(step, state, lam, carry)

        def pullback(alpha: Tree) -> Response:
            return Response(self._averaged(summed(alpha).lam))

        return point, pullback

    def differentiate(
        self, step: Step, outer: OuterObjective, state: InnerState, lam: Tree, carry: ForwardCarry
    ) -> Terms:
        """Both terms divided by W."""
        terms = super().differentiate(step, outer, state, lam, carry)
        return terms._replace(direct=self._averaged(terms.direct))

    def _averaged(self, gradient: Tree) -> Tree:
        window: Any = tree.map(lambda _: self.window, gradient) if isinstance(self.window, int) else self.window
        return tree.map(lambda x, size: None if x is None else x / size, gradient, window)


def shared_window_error(error: float, drift: float, window: int) -> float:
    r"""FDS's bound :math:`MSE_W \le MSE_1/W + \epsilon^2 (W^2-1)/12` on the mean of W neighbouring hypergradients.

    The mean of W independent estimates has variance :math:`MSE_1/W`; values that change by at most
    :math:`\epsilon` per step have a mean square distance from their mean of at most that of W
    equally spaced points, :math:`\epsilon^2 (W^2-1)/12`: equality for linear drift. So sharing does
    not always help: see :func:`best_window`.

    Args:
        error: ``MSE_1``, of the hypergradient of a single step.
        drift: ε, by how much the expected hypergradients of neighbouring steps differ at most.
        window: W.

    >>> shared_window_error(1.0, 0.0, 10), shared_window_error(0.0, 1.0, 3)
    (0.1, 0.6666666666666666)
    """
    return error / window + drift**2 * (window**2 - 1) / 12


def best_window(error: float, drift: float) -> float:
    r"""Where :func:`shared_window_error` is smallest: :math:`W = (6\, MSE_1 / \epsilon^2)^{1/3}`.

    In steps, to be rounded. Below 1, share nothing.

    Raises:
        ValueError: if there is no drift: then the longest window is the best.

    >>> round(best_window(error=4.5, drift=1.0), 9)
    3.0
    """
    if drift == 0:
        raise ValueError("without drift the error falls with every step shared: use the whole run as the window")
    return (6 * error / drift**2) ** (1 / 3)
