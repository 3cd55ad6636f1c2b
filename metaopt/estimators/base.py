r"""What an estimator is.

.. math::
    \frac{d L_{val}}{d\lambda} = \underbrace{\frac{\partial L_{val}}{\partial \lambda}}_{\text{direct}}
      + \underbrace{\alpha_t \frac{d w_t}{d\lambda}}_{\text{indirect}}, \qquad \alpha_t =
      \frac{\partial L_{val}}{\partial w_t}

Every estimator is an approximation (or not) of the linear map :math:`\alpha \mapsto \alpha\,
dw_t/d\lambda`, the response pullback.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

from torch import Tensor
from typing_extensions import Self

from metaopt.estimators.outer import OuterObjective
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.tree import Tree


class Response(NamedTuple):
    """What a pullback returns.

    Attributes:
        lam: ``α · dw_t/dλ``, a pytree like λ; a leaf that Φ does not depend on is ``None``.
        initial: the cotangent of the initial state ``s_0``, where the method has it.
        info: what the method reports about itself (the linear solver's
            :class:`~metaopt.linsolve.Solution`), if anything.
    """

    lam: Tree
    initial: InnerState | None = None
    info: Any = None


Pullback: TypeAlias = Callable[[Tree], Response]


class Terms(NamedTuple):
    """What a hypergradient consists of, before anything is checked.

    A leaf that is ``None`` says "λ plays no part here".

    Attributes:
        outer_loss: ``L_val`` (detached scalar).
        direct: ``∂L_val/∂λ``.
        indirect: ``α · dw_T/dλ``, or an estimate of it.
        initial: ``dL_val/dw_0``, where the method has it.
        info: as in :class:`Response`.
    """

    outer_loss: Tensor
    direct: Tree
    indirect: Tree
    initial: Tree | None = None
    info: Any = None


class FinishedRun(NamedTuple):
    """One complete inner run with λ fixed, for calibration.

    Attributes:
        first: ``s_0``.
        last: ``s_T``.
        batches: ``D_1 … D_T``.
        alpha: cotangent of the last weights, ``∂L_val/∂w_T``.
    """

    first: InnerState
    last: InnerState
    batches: Sequence[Any]
    alpha: Tree


class Traits(NamedTuple):
    """What a method's theory says of it; ``docs/estimators.md`` is made from these and from what is measured.

    Attributes:
        sees: the part of the run whose dependence on λ it takes in.
        high_dimensional: whether neither its cost nor its noise grows with the number of
            hyperparameters.
        bias: where its expectation differs from the exact hypergradient.
    """

    sees: str
    high_dimensional: bool
    bias: str


class Estimator(ABC):
    """A response pullback that is built along the inner run.

    Subclasses are frozen dataclasses: settings only.

    What a method's theory says of it are attributes of its class. Where a setting decides, the
    subclass makes a property of the attribute.

    Attributes:
        traits: see :class:`Traits`; the page "which estimator?" shows them.
        exact: whether the pullback is the true one, of the whole run.
        online: whether λ may move between inner steps. If not, moving it is an error.
        own_size: whether the indirect term comes in another size than the hypergradient's, so that
            it wants a scale-free outer optimiser.
        drops_indirect: whether the pullback is zero by definition.
        linear: whether the pullback is linear in α, as a chain rule around it needs.
        needs_outer_loss: whether the outer loss shapes what is carried along the run
            (:meth:`observe`), so that there is no pullback without one.
        needs_calibration: whether a setting has to be fitted to a run (:meth:`calibrate`) and has
            not been.
        sees_optimizer: whether it sees hyperparameters that enter through the optimiser alone
            (learning rates).
        gives_initial: whether the pullback knows the cotangent of the initial state, at least for
            short runs.
        whole_state: whether the pullback takes an :class:`InnerState` too, with cotangents of slots
            and buffers.
        one_sweep: whether :meth:`pull` takes cotangents of several states of the run at once.
    """

    traits: ClassVar[Traits] = Traits("not stated", False, "not stated")
    exact: ClassVar[bool] = False
    online: ClassVar[bool] = True
    own_size: ClassVar[bool] = False
    drops_indirect: ClassVar[bool] = False
    linear: ClassVar[bool] = True
    needs_outer_loss: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False
    sees_optimizer: ClassVar[bool] = True
    gives_initial: ClassVar[bool] = False
    whole_state: ClassVar[bool] = False
    one_sweep: ClassVar[bool] = False

    @abstractmethod
    def init(self, step: Step, state: InnerState, lam: Tree) -> Any:
        """What is remembered before the first step."""

    @abstractmethod
    def advance(self, step: Step, state: InnerState, lam: Tree, batch: Any, carry: Any) -> tuple[InnerState, Any]:
        """One inner step, remembered. A carry is used once: the new one replaces it."""

    @abstractmethod
    def respond(self, step: Step, state: InnerState, lam: Tree, carry: Any) -> tuple[Tree, Pullback]:
        """``(point, pullback)``.

        The weights at which the outer loss is to be taken, and the linear map ``alpha ->
        Response``.
        """

    def pull(
        self, step: Step, state: InnerState, lam: Tree, carry: Any, cotangents: Mapping[int, InnerState]
    ) -> Response:
        """The pullback of cotangents of several states, by their number ``t``, where :attr:`one_sweep` says so."""
        raise TypeError(f"{type(self).__name__} takes the cotangent of one state at a time")

    def observe(self, step: Step, outer: OuterObjective, state: InnerState, lam: Tree, carry: Any) -> Any:
        """A look at the outer loss after each inner step, before any hyper-step there.

        Returns the new carry. Default: none is taken.
        """
        return carry

    def differentiate(self, step: Step, outer: OuterObjective, state: InnerState, lam: Tree, carry: Any) -> Terms:
        """The two terms of the hypergradient.

        Default: :meth:`respond`'s pullback of the outer loss's own cotangent.

        A method that works from values of the outer loss, or has its own approximation of both
        terms, says so here.
        """
        point, pullback = self.respond(step, state, lam, carry)
        loss, alpha, direct = outer.gradient(point, lam, needs_weights=not self.drops_indirect)
        response = pullback(alpha)
        return Terms(loss, direct, response.lam, response.initial, response.info)

    def reuse(self, carry: Any, info: Any) -> Any:
        """The carry after an online hyper-step that reported ``info``.

        What was found out can serve the next one. Default: unchanged.
        """
        return carry

    def calibrate(self, step: Step, lam: Tree, run: FinishedRun) -> Self:
        """The estimator with settings fitted to a finished run (HyperDistill's algorithm 4).

        Default: itself.
        """
        return self
