"""Where a user's own code meets ours: each wrong argument, forgotten tensor and number that is not finite is named, with the remedy."""

import functools

import pytest
import torch
from torch import nn

import metaopt as mo

T = 3


def inner_loss(w, lam, x):
    return ((w["a"] - lam["b"] * x) ** 2).sum()


def outer_loss(w, lam, x):
    return (w["a"] - x).pow(2).sum()


STEP = mo.inner_step(inner_loss, mo.optim.SGD(lr=0.1))


def adam(params):
    return torch.optim.Adam(params, lr=0.1)


def arguments(**changes):
    given = {
        "step": STEP,
        "outer_loss": outer_loss,
        "w0": {"a": torch.zeros(2)},
        "lam": {"b": torch.tensor(0.5)},
        "batches": [torch.ones(2)] * T,
        "estimator": mo.OneStep(),
    }
    return {**given, **changes}


def by_hypergradient(**changes):
    return mo.hypergradient(**{"outer_batch": torch.ones(2), **arguments(**changes)})


def by_online(**changes):
    given = {"outer_batches": [torch.ones(2)] * T, "optimizer": adam, **arguments(**changes)}
    return list(mo.online(**given))


def by_tune(**changes):
    return list(mo.tune(**{"outer_batch": torch.ones(2), "optimizer": adam, "runs": 2, **arguments(**changes)}))


def by_unroll(**changes):
    given = arguments(**changes)
    given.pop("outer_loss")
    lam = given["lam"]
    if isinstance(lam, dict):
        given["lam"] = {name: x.clone().requires_grad_() if x.is_floating_point() else x for name, x in lam.items()}
    state = mo.unroll(**given)
    state.w["a"].sum().backward()
    return state


WAYS = [by_hypergradient, by_online, by_tune, by_unroll]
WITH_OUTER = [by_hypergradient, by_online, by_tune]


def ids(ways):
    return [way.__name__.removeprefix("by_") for way in ways]


WRONG = {
    "a class for an estimator": ({"estimator": mo.RMD}, "estimator is the class RMD: write mo.RMD()"),
    "a string for an estimator": ({"estimator": "rmd"}, "estimator is an estimator such as mo.RMD.*the string 'rmd'"),
    "a bound method for an estimator": (
        {"estimator": mo.RMD().respond},
        "estimator is an estimator.*the function respond",
    ),
    "a loss for a step": ({"step": inner_loss}, "step comes from mo.inner_step.*the function inner_loss"),
    "an optimiser for a step": ({"step": mo.optim.SGD(lr=0.1)}, "step comes from mo.inner_step.*a SGD"),
    "a module for weights": ({"w0": nn.Linear(2, 1)}, "w0 is the Linear itself: give mo.functional"),
    "a model for weights": ({"w0": mo.functional(nn.Linear(2, 1))}, "w0 is the FunctionalModel itself"),
    "a list of parameters": ({"w0": list(nn.Linear(2, 1).parameters())}, "w0 is a list of parameters"),
    "a generator of parameters": ({"w0": nn.Linear(2, 1).parameters()}, "w0 is a generator"),
    "integer hyperparameters": ({"lam": {"b": torch.tensor(1)}}, "lam at .*int64; hyperparameters are floating-point"),
    "one batch for a list of them": ({"batches": (torch.ones(2), torch.ones(2))}, "batches is a tuple of tensors"),
    "a tensor for batches": ({"batches": torch.ones(2)}, "batches gives one batch per inner step"),
    "a number for batches": ({"batches": 3}, "batches gives one batch per inner step"),
    "no batch at all": ({"batches": []}, "batches is empty"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("way", WAYS, ids=ids(WAYS))
def test_wrong_arguments_are_named_with_the_remedy(way, wrong):
    changes, match = WRONG[wrong]
    with pytest.raises((TypeError, ValueError), match=match):
        way(**changes)


@pytest.mark.parametrize("way", WITH_OUTER, ids=ids(WITH_OUTER))
def test_an_outer_loss_that_is_not_a_function(way):
    with pytest.raises(TypeError, match="outer_loss is a function"):
        way(outer_loss=torch.tensor(1.0))


@pytest.mark.parametrize("given", [torch.ones(2), [torch.ones(2)]], ids=["a tensor", "one batch"])
def test_one_outer_batch_online(given):
    with pytest.raises((TypeError, ValueError), match="outer_batches"):
        by_online(outer_batches=given)


@pytest.mark.parametrize("way", WAYS, ids=ids(WAYS))
def test_inference_mode(way):
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        way()


# -- tensors from where nobody looked ---------------------------------------------------------------
class Net:
    """The user's own module, and the model that was made of it."""

    def __init__(self):
        torch.manual_seed(0)
        self.net = nn.Linear(2, 1)
        self.model = mo.functional(self.net)


ESTIMATORS = [mo.RMD(), mo.FMD(), mo.OneStep(), mo.TruncatedRMD(2), mo.DrMAD(), mo.EvoGrad(), mo.HyperDistill()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("way", WITH_OUTER, ids=ids(WITH_OUTER))
def test_an_outer_loss_that_does_not_see_the_weights_is_refused(way, estimator):
    given = Net()
    step = mo.inner_step(
        lambda w, lam, x: given.model(w, x).pow(2).mean() + lam["b"] * w["weight"].pow(2).sum(), mo.optim.SGD(lr=0.1)
    )
    if way is by_online and not estimator.online:
        return
    with pytest.raises(ValueError, match=r"outer_loss does not depend on the weights.*model\(w, x\), not net\(x\)"):
        way(
            step=step,
            w0=given.model.params,
            outer_loss=lambda w, lam, x: given.net(x).pow(2).mean() + 0 * lam["b"],
            estimator=estimator,
        )


@pytest.mark.parametrize("way", WAYS, ids=ids(WAYS))
def test_undeclared_tensors_in_the_inner_loss_are_spoken_of(way):
    given = Net()
    step = mo.inner_step(
        lambda w, lam, x: (w["a"] - given.net(x).sum()).pow(2).sum() + lam["b"] * w["a"].pow(2).sum(),
        mo.optim.SGD(lr=0.1),
    )
    with pytest.warns(mo.UndeclaredTensorWarning, match=r"inner_loss depends on 2 tensor.*model\(w, x\), not net\(x\)"):
        way(step=step)


@pytest.mark.parametrize("way", WITH_OUTER, ids=ids(WITH_OUTER))
def test_undeclared_tensors_in_the_outer_loss_are_spoken_of(way):
    given = Net()
    with pytest.warns(mo.UndeclaredTensorWarning, match="outer_loss depends on 2 tensor"):
        way(outer_loss=lambda w, lam, x: (w["a"] - given.net(x).sum()).pow(2).sum())


@pytest.mark.parametrize(
    "make",
    [
        lambda lr: mo.optim.SGD(lr=lr),
        lambda lr: mo.optim.ClipNorm(mo.optim.SGD(lr=lr)),
        lambda lr: mo.optim.Groups([(["a"], mo.optim.SGD(lr=lr))]),
        lambda lr: mo.optim.SGD(lr=lambda lam, t: lr * 2),
    ],
    ids=["itself", "wrapped", "in a group", "through a function"],
)
@pytest.mark.parametrize("way", WAYS, ids=ids(WAYS))
def test_tensors_held_by_the_optimiser_are_spoken_of(way, make):
    lr = torch.tensor(0.1, requires_grad=True)
    with pytest.warns(mo.UndeclaredTensorWarning, match=r"the optimiser's SGD.lr require grad.*lr=lambda lam, t"):
        way(step=mo.inner_step(inner_loss, make(lr)))


@pytest.mark.parametrize("way", WAYS, ids=ids(WAYS))
def test_nothing_is_said_where_all_is_declared(way, recwarn):
    way()
    assert not [w for w in recwarn if issubclass(w.category, mo.UndeclaredTensorWarning)]


# -- hyperparameters that an estimator cannot see ----------------------------------------------------
@pytest.mark.filterwarnings("ignore::metaopt.estimators.NotConvergedWarning")
@pytest.mark.parametrize(
    "estimator", [mo.EvoGrad(), mo.SAMA(), mo.SOBA(), mo.F2SA(), mo.BOME()], ids=lambda e: type(e).__name__
)
def test_a_learning_rate_is_said_not_to_be_seen(estimator):
    step = mo.inner_step(lambda w, lam, x: (w["a"] - x).pow(2).sum(), mo.optim.SGD(lr=lambda lam, t: lam["b"]))
    with pytest.raises(
        ValueError, match=f"{type(estimator).__name__} sees no influence of lam at .*through the optimiser"
    ):
        by_hypergradient(step=step, lam={"b": torch.tensor(0.1)}, estimator=estimator)


# -- numbers that are not finite ---------------------------------------------------------------------
NAN = float("nan")
NON_FINITE = {
    "in a batch": ({"batches": [torch.ones(2), torch.tensor([1.0, NAN]), torch.ones(2)]}, r"the batch of step 2"),
    "in lam": ({"lam": {"b": torch.tensor(NAN)}}, r"in lam\['b'\]"),
    "in the weights": ({"w0": {"a": torch.tensor([0.0, NAN])}}, r"the initial state at .*'a'"),
    "by divergence": (
        {
            "step": mo.inner_step(lambda w, lam, x: (w["a"] - lam["b"] * x).pow(4).sum(), mo.optim.SGD(lr=1e12)),
            "batches": [torch.ones(2)] * 5,
        },
        r"(inner loss of|state after) step \d.*learning rate",
    ),
}


@pytest.mark.parametrize("estimator", [mo.RMD(), mo.FMD(), mo.OneStep(), mo.DrMAD()], ids=repr)
@pytest.mark.parametrize("what", NON_FINITE)
def test_the_first_number_that_is_not_finite_is_named_with_its_step(what, estimator):
    changes, match = NON_FINITE[what]
    with pytest.raises(FloatingPointError, match=f"The first number that is not finite is in .*{match}|{match}"):
        by_hypergradient(estimator=estimator, **changes)


# -- names in messages -------------------------------------------------------------------------------
def test_every_name_of_ours_in_a_message_exists():
    import ast
    import re
    from pathlib import Path

    missing = []
    for path in Path(mo.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                continue
            for name in re.findall(r"\bmo\.([A-Za-z_][\w.]*\w)", node.value):
                try:
                    functools.reduce(getattr, name.split("."), mo)
                except AttributeError:
                    missing.append(f"{path.name}: mo.{name}")
    assert not missing


def test_tuples_that_are_one_batch_are_not_taken_for_several():
    step, outer, w, lam, batches = bowl()
    pair = (torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(TypeError, match="outer_batch is a tuple of tensors, which looks like one batch"):
        mo.hypergradient(step, outer, w, lam, batches, pair, at=(1, 2))
    with pytest.raises(TypeError, match="outer_batches is a tuple of tensors, which looks like one batch"):
        mo.online(step, outer, w, lam, batches, pair, estimator=mo.OneStep(), optimizer=torch.optim.SGD)


def test_transforms_around_a_run_are_refused():
    step, outer, w, lam, batches = bowl()
    with pytest.raises(RuntimeError, match=r"cannot be inside torch\.func\.grad, jacrev, jvp or vmap"):
        torch.vmap(lambda lam: mo.hypergradient(step, outer, w, lam, batches, None).total)(torch.stack([lam, lam]))


def test_ragged_tasks_are_not_vmapped():
    loss = mo.vmapped(lambda w, lam, x: (w - x).square().mean())
    with pytest.raises(TypeError, match=r"take mo\.looped\(loss\)"):
        loss(torch.zeros(2), None, mo.meta.Ragged([torch.ones(2), torch.ones(3)]))


def test_a_torch_optimiser_is_sent_to_interop():
    net = torch.nn.Linear(1, 1)
    with pytest.raises(TypeError, match=r"got torch's SGD: mo\.interop\.from_torch"):
        mo.inner_step(lambda w, lam, b: w.sum(), torch.optim.SGD(net.parameters(), 0.1))


def bowl():
    step = mo.inner_step(lambda w, lam, _: 0.5 * (w - lam).square().sum(), mo.optim.SGD(lr=0.1))
    return step, lambda w, lam, _: w.sum(), torch.zeros(2), torch.ones(2), [None] * 3


def test_a_custom_step_may_differentiate_where_only_lam_requires_grad():
    def fn(state, lam, batch):
        (g,) = torch.autograd.grad(((state.w - 1) ** 2).sum(), state.w, create_graph=True)
        return state._replace(w=state.w - lam * g)

    step = mo.custom_step(fn)
    lam = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    state = step.init(torch.zeros(3, dtype=torch.float64), lam)
    for _ in range(2):
        state = step(state, lam, None)
    (found,) = torch.autograd.grad(state.w.sum(), lam)
    torch.testing.assert_close(found, 3 * 4 * (1 - 2 * lam.detach()))  # w_2 = 1 - (1 - 2λ)²
    problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(3).double(), lam.detach(), [None] * 2)
    assert mo.verify.check(mo.RMD(), problem=problem).passed
