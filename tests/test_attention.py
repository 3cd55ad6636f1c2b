"""Attention: right under every estimator, by the kernel with two derivatives where, and only where, two are taken."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import metaopt as mo
from metaopt.inner import MathAttentionWarning

F64 = torch.float64
T = 3


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.mix(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


NETS = {
    "scaled_dot_product_attention": Plain,
    "MultiheadAttention": Heads,
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
    "TransformerEncoderLayer, evaluation": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(),
}
LAM = torch.tensor(1.1, dtype=F64)


class Case:
    def __init__(self, name, adjoint=None):
        torch.manual_seed(0)
        model = mo.functional(NETS[name]().double())
        self.w0 = model.params
        self.data = torch.randn(4, 5, 8, dtype=F64)
        self.loss = lambda w, lam, x: (model(w, x * lam).tanh() - x).square().mean()
        options = {} if adjoint is None else {"adjoint": adjoint}
        self.step = mo.inner_step(self.loss, mo.optim.SGD(lr=0.3, momentum=0.9), **options)

    def by(self, estimator, step=None):
        args = (step or self.step, self.loss, self.w0, LAM, [self.data] * T, self.data)
        return mo.hypergradient(*args, estimator=estimator).total

    def by_autograd(self, last=T):
        """Through the last steps of a plain loop, all of it on the MATH kernel."""
        with sdpa_kernel(SDPBackend.MATH):
            lam = LAM.clone().requires_grad_()
            state = self.step.init(self.w0, lam)
            for t in range(T):
                state = mo.tree.detach(state) if t == T - last else state
                state = self.step(state, lam, self.data)
            return torch.autograd.grad(self.loss(state.w, lam, self.data), lam)[0]


EXACT = {
    "Full": mo.RMD(),
    "Graphs": mo.RMD(mo.trajectory.Graphs()),
    "Checkpointed": mo.RMD(mo.trajectory.Checkpointed("sqrt")),
    "Offloaded": mo.RMD(mo.trajectory.Offloaded(device="cpu")),
    "FMD": mo.FMD(),
    "FMD, one by one": mo.FMD(columns_at_once=1),
    "ForwardGradient": mo.ForwardGradient(),  # of one number, it is exact
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("estimator", EXACT)
def test_exact_estimators_are_autograd_on_the_math_kernel(name, estimator):
    problem = Case(name)
    with pytest.warns(MathAttentionWarning, match="MATH kernel") as said:
        got = problem.by(EXACT[estimator])
    assert len([w for w in said if w.category is MathAttentionWarning]) == 1
    want = problem.by_autograd()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert want.abs() > 1e-4


@pytest.mark.parametrize("adjoint", [mo.inner.ReverseOverReverse(), mo.inner.ForwardOverReverse()])
@pytest.mark.parametrize("last", [1, 2])
@pytest.mark.filterwarnings("ignore::metaopt.inner.MathAttentionWarning")
@pytest.mark.filterwarnings("ignore:forward over reverse is impossible")
def test_truncated_ones_too(adjoint, last):
    problem = Case("MultiheadAttention", adjoint)
    got = problem.by(mo.TruncatedRMD(last))
    torch.testing.assert_close(got, problem.by_autograd(last), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", [mo.DrMAD(), mo.UORO(), mo.HyperDistill(), mo.DARTS(), mo.EvoGrad(), mo.SAMA()])
@pytest.mark.filterwarnings("ignore::metaopt.inner.MathAttentionWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of a population under vmap
def test_approximations_are_those_on_the_math_kernel(estimator):
    problem = Case("MultiheadAttention")
    with sdpa_kernel(SDPBackend.MATH):
        want = Case("MultiheadAttention").by(estimator)
    torch.testing.assert_close(problem.by(estimator), want, rtol=1e-7, atol=1e-9)


@pytest.mark.filterwarnings("default")  # torch's own, while it compiles
def test_compiled_steps():
    problem = Case("MultiheadAttention")
    step = mo.compiled(problem.step, backend="aot_eager")
    torch.testing.assert_close(problem.by(mo.RMD(), step), problem.by_autograd(), rtol=1e-9, atol=1e-12)
    assert step.compilation.refused is None


class Kernels(TorchDispatchMode):
    """Counts calls of the fused kernels."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_scaled_dot_product_" in str(func) and "backward" not in str(func)
        return func(*args, **(kwargs or {}))


def test_plain_steps_keep_the_fast_kernel():
    problem = Case("MultiheadAttention")
    with Kernels() as plain:
        problem.by(mo.FirstOrder())
    assert plain.count >= T
    with Kernels() as swept, pytest.warns(MathAttentionWarning):
        problem.by(mo.RMD())
    assert swept.count == plain.count  # the run and the outer loss, and none of the replays


@pytest.mark.filterwarnings("ignore::metaopt.inner.MathAttentionWarning")
def test_dropout_is_drawn_once_where_the_first_look_is_taken_twice():
    torch.manual_seed(0)
    model = mo.functional(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True).double())
    x = torch.randn(4, 5, 8, dtype=F64)

    def loss(w, lam, x):
        return (model(w, x * lam).tanh() - x).square().mean()

    found = []
    for trajectory in (mo.trajectory.Graphs(), mo.trajectory.Full(), mo.trajectory.Checkpointed("sqrt")):
        torch.manual_seed(3)
        step = mo.inner_step(loss, mo.optim.SGD(lr=0.3))
        outer = lambda w, lam, x: sum(p.sin().sum() for p in w.values())  # noqa: E731
        found.append(mo.hypergradient(step, outer, model.params, LAM, [x] * T, x, estimator=mo.RMD(trajectory)).total)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-12)
