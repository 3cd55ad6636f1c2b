"""Several inner steps as one: the same numbers, whatever differentiates them."""

import shutil

import pytest
import torch
from cases import OPTIMIZERS, TRAJECTORIES
from problems import close, noise_like
from test_compiled import problem

import metaopt as mo
from metaopt import tree

BODY = (torch.nn.Dropout(0.5),)
PLAIN = [case for case in OPTIMIZERS if case.plain]
FULL = [case for case in TRAJECTORIES if case.full]


def run(chunked, estimator, optimizer, body=(), compile=False, size=3, steps=7):
    step, loss, w, lam, batches = problem(optimizer, body, compile)
    batches = [*batches, *batches][:steps]  # of seven the last group is shorter
    lam = {
        name: leaf
        for name, leaf in lam.items()
        if name != "spare" and (name != "rate" or getattr(optimizer, "lr", None) is rate)
    }
    torch.manual_seed(3)
    if chunked:
        step = mo.inner.chunked(step)
        batches = mo.inner.in_chunks(batches, size)
    return mo.hypergradient(step, loss, w, lam, batches, problem(optimizer)[4][0], estimator=estimator), step


def rate(lam, t):
    return lam["rate"].exp() / t


@pytest.mark.parametrize("case", FULL, ids=[case.name for case in FULL])
@pytest.mark.parametrize("body", [(), BODY], ids=["plain", "dropout"])
def test_exact_over_chunks(case, body):
    optimizer = mo.optim.SGD(lr=rate, momentum=0.9)
    single, _ = run(False, mo.RMD(), optimizer, body)
    together, _ = run(True, mo.RMD(case.make(3)), optimizer, body)
    assert close(together.total, single.total, 1e-12)
    assert close(together.initial, single.initial, 1e-12)
    assert together.state.t == 7


@pytest.mark.parametrize("case", PLAIN, ids=[case.name for case in PLAIN])
def test_forward_over_chunks(case):
    single, _ = run(False, mo.FMD(), case.make())
    together, _ = run(True, mo.FMD(), case.make())
    assert close(together.total, single.total, 1e-12)


def test_one_chunk_back_is_so_many_steps_back():
    optimizer = mo.optim.Adam(lr=0.05)
    single, _ = run(False, mo.TruncatedRMD(4), optimizer)  # groups of 3: the last two hold 3 + 1
    together, _ = run(True, mo.TruncatedRMD(2), optimizer)
    assert close(together.total, single.total, 1e-12)
    assert float(tree.norm(together.indirect)) > 1e-6


def test_the_work_is_counted_in_steps():
    optimizer = mo.optim.SGD(lr=0.1)
    assert run(True, mo.RMD(), optimizer)[0].cost == run(False, mo.RMD(), optimizer)[0].cost
    assert run(True, mo.TruncatedRMD(2), optimizer)[0].cost == run(False, mo.TruncatedRMD(4), optimizer)[0].cost


def test_jvp_and_vjp_are_transposes():
    step, _, w, lam, batches = problem(mo.optim.SGD(lr=rate, momentum=0.9))
    whole = mo.inner.chunked(step)
    state = step.init(w, lam)
    dot, lam_dot, bar = (noise_like(part) for part in (state, lam, state))
    pushed = whole.jvp(state, lam, batches, dot, lam_dot)
    state_bar, lam_bar = whole.vjp(state, lam, batches, bar)
    forth = tree.dot((pushed.w, pushed.slots), (bar.w, bar.slots))
    back = tree.dot((dot.w, dot.slots), (state_bar.w, state_bar.slots)) + tree.dot(lam_dot, lam_bar)
    assert torch.allclose(forth, back, rtol=1e-11)


@pytest.mark.filterwarnings("default")  # torch's own, while it traces
@pytest.mark.parametrize("body", [(), BODY], ids=["plain", "dropout"])
def test_compiled_chunks_are_eager_steps(body):
    torch._dynamo.reset()
    optimizer = mo.optim.SGD(lr=rate, momentum=0.9)
    single, _ = run(False, mo.RMD(), optimizer, body, steps=4)
    together, step = run(True, mo.RMD(), optimizer, body, compile="aot_eager", size=2, steps=4)
    assert step.compilation.refused is None and step.compilation.seconds > 0
    assert close(together.total, single.total, 1e-10)
    assert close(together.state.w, single.state.w, 1e-10)


def test_bad_input():
    step, loss, w, lam, batches = problem(mo.optim.SGD(lr=0.1))
    lam.pop("spare")
    whole = mo.inner.chunked(step)
    with pytest.raises(TypeError, match=r"list with one batch per inner step.*mo\.inner\.in_chunks"):
        mo.hypergradient(whole, loss, w, lam, [torch.ones(2)], batches[0], estimator=mo.RMD())
    with pytest.raises(TypeError, match="no fixed-point map: this estimator needs single inner steps"):
        mo.hypergradient(whole, loss, w, lam, [batches], batches[0], estimator=mo.IFT(mo.linsolve.Neumann(2, rate=0.1)))
    with pytest.raises(TypeError, match="single inner steps"):
        mo.hypergradient(whole, loss, w, lam, [batches], batches[0], estimator=mo.DARTS())
    with pytest.raises(ValueError, match="at least one batch"):
        mo.inner.in_chunks(batches, 0)


@pytest.mark.filterwarnings("default")  # torch's own, while it compiles
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor():
    torch._dynamo.reset()
    optimizer = mo.optim.SGD(lr=0.1, momentum=0.9)
    single, _ = run(False, mo.RMD(), optimizer, steps=4)
    together, step = run(True, mo.RMD(), optimizer, compile="inductor", size=2, steps=4)
    assert step.compilation.refused is None
    assert close(together.total, single.total, 1e-10)


@pytest.mark.parametrize("way", ["hypergradient", "unroll", "tune"])
@pytest.mark.parametrize(
    "make", [mo.inner.chunked, lambda step, k: mo.compiled(step, steps_at_once=k, backend="aot_eager")]
)
@pytest.mark.filterwarnings("default")  # torch's own, while it compiles
def test_a_run_groups_its_batches_by_itself(way, make):
    step, loss, w, lam, batches = problem(mo.optim.SGD(lr=rate, momentum=0.9))
    del lam["spare"]
    batches = [*batches, *batches][:7]  # the last group is shorter

    def by(step):
        if way == "unroll":
            given = tree.attach(lam)
            state = mo.unroll(step, w, given, batches)
            return torch.autograd.grad(loss(state.w, lam, batches[0]), list(given.values()))
        if way == "tune":
            loop = mo.tune(step, loss, w, lam, batches, batches[0], optimizer=lambda p: torch.optim.SGD(p, 0.1), runs=2)
            return list(list(loop)[-1].lam.values())
        return list(mo.hypergradient(step, loss, w, lam, batches, batches[0]).total.values())

    grouped = make(step, 3)
    assert close(by(grouped), by(step), 1e-10)


def test_online_steps_are_single_ones():
    step, loss, w, lam, batches = problem(mo.optim.SGD(lr=0.1))
    with pytest.raises(ValueError, match="takes single steps"):
        mo.online(
            mo.inner.chunked(step, 2),
            loss,
            w,
            lam,
            batches,
            batches,
            estimator=mo.OneStep(),
            optimizer=lambda p: torch.optim.SGD(p, 0.1),
        )
    with pytest.raises(ValueError, match="steps_at_once must be at least 1"):
        mo.inner.chunked(step, 0)
    with pytest.raises(TypeError, match="an outer loss has none"):
        mo.compiled(loss, steps_at_once=2)
    with pytest.raises(TypeError, match=r"mo\.compiled takes a step from mo\.inner_step"):
        mo.compiled(mo.inner.chunked(step))
