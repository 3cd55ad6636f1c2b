"""Meta-models: each hypergradient against autograd through a hand-written inner loop, stacked tasks, splits, messages."""

from functools import partial

import pytest
import torch
from problems import noise_like
from scipy import ndimage
from torch import nn
from torch.nn.functional import cross_entropy

import metaopt as mo
from metaopt import tree
from metaopt.models import (
    ANIL,
    MAML,
    RTN,
    DataWeights,
    FeatureTransform,
    MetaWeightNet,
    RawWeights,
    Rotation,
    SigmoidAbove,
    SigmoidClamped,
    SigmoidWeights,
    SoftmaxWeights,
    Warp,
    WarpGrad,
    batch_mean,
    batch_norm,
    batch_normalised,
    conv_net,
    group_norm,
    insert,
    no_norm,
    rotate,
)

each_cross_entropy = partial(cross_entropy, reduction="none")

LR = 0.1
MOMENTUM = 0.9
T = 3
TASKS = 2


def images(classes=3, size=6, count=5):
    """One batch per inner step, and one for the outer loss."""
    return [
        (torch.randn(count, 1, size, size, dtype=torch.float64), torch.randint(classes, (count,))) for _ in range(T + 1)
    ]


def net(norm=batch_norm):
    return conv_net(2, 3, classes=3, in_channels=1, image_size=6, norm=norm).double()


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)
    ).double()


def task(model):
    """Inner batches and an outer batch, with what the model's inner loss needs besides."""
    *batches, outer = images()
    if isinstance(model, FeatureTransform):
        batches = [(x, y, model.noise()) for x, y in batches]
    if isinstance(model, DataWeights):
        batches = [(x, y, torch.randperm(model.examples)[: len(y)]) for x, y in batches]
    return batches, outer


MODELS = {
    "anil": lambda: ANIL.of(net(), cross_entropy, weights=["block2.*", "head.*"]),
    "anil, group norm": lambda: ANIL.of(net(group_norm), cross_entropy, weights=["head.*"]),
    "warpgrad": lambda: WarpGrad.of(net(), cross_entropy),
    "warpgrad, linear": lambda: WarpGrad.of(net(), cross_entropy, warp=Warp(activation=nn.Identity)),
    "warpgrad, residual, batch norm": lambda: WarpGrad.of(
        net(no_norm), cross_entropy, warp=Warp(residual=True, norm=batch_norm)
    ),
    "maml": lambda: MAML.of(net(), cross_entropy),
    "maml, proximity": lambda: MAML.of(net(), cross_entropy, proximity=0.5),
    "feature transform": lambda: FeatureTransform.of(net(), cross_entropy),
    "rtn": lambda: RTN.of(net(), cross_entropy, after=["flatten"], bottleneck=2, features=3),
    "rtn, two": lambda: RTN.of(mlp(), cross_entropy, after=["1", "3"], bottleneck=2),
    "raw data weights": lambda: DataWeights.of(net(), each_cross_entropy, examples=9),
    "sigmoid data weights": lambda: DataWeights.of(net(), each_cross_entropy, examples=9, weighting=SigmoidWeights()),
    "softmax data weights": lambda: DataWeights.of(net(), each_cross_entropy, examples=9, weighting=SoftmaxWeights()),
    "rotation": lambda: Rotation.of(net(), cross_entropy, degrees=20),
}

WEIGHT_NETS = {
    "mean": lambda: MetaWeightNet.of(net(no_norm), each_cross_entropy, hidden=5, coefficients=batch_mean),
    "mean, batch norm": lambda: MetaWeightNet.of(
        net(), each_cross_entropy, hidden=5, squash=SigmoidAbove(0.1), coefficients=batch_mean
    ),
    "normalised": lambda: MetaWeightNet.of(net(no_norm), each_cross_entropy, hidden=5, coefficients=batch_normalised),
    "normalised, clamped": lambda: MetaWeightNet.of(
        net(no_norm), each_cross_entropy, hidden=5, squash=SigmoidClamped(0.45), coefficients=batch_normalised
    ),
}
STACKED = MODELS | {f"meta-weight-net, {name}": make for name, make in WEIGHT_NETS.items()}


def by_hand(model, w, lam, batches, outer_batch, gradient=None):
    """``d outer_loss / d lam`` by autograd through the whole loop of heavy-ball steps; ``gradient``: default that of the inner loss."""

    def of_inner_loss(w, lam, batch):
        return torch.autograd.grad(model.inner_loss(w, lam, batch), list(w.values()), create_graph=True)

    gradient = gradient or of_inner_loss
    lam = tree.map(lambda x: x.clone().requires_grad_(), lam)
    w = tree.map(lambda x: x.clone().requires_grad_(), w)
    velocity = tree.zeros_like(w)
    for batch in batches:
        g = gradient(w, lam, batch)
        velocity = {k: MOMENTUM * v + d for (k, v), d in zip(velocity.items(), g, strict=True)}
        w = {k: x - LR * velocity[k] for k, x in w.items()}
    return tree.unflatten(
        torch.autograd.grad(model.outer_loss(w, lam, outer_batch), tree.leaves(lam)), tree.flatten(lam)[1]
    )


def ours(model, w, lam, batches, outer_batch, wrap=lambda loss: loss):
    step = mo.inner_step(wrap(model.inner_loss), mo.optim.SGD(lr=LR, momentum=MOMENTUM))
    return mo.hypergradient(step, wrap(model.outer_loss), w, lam, batches, outer_batch, estimator=mo.RMD())


def same(a, b, tolerance=1e-10):
    for name, x, y in zip(tree.names(a), tree.leaves(a), tree.leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", MODELS)
def test_hypergradient_is_autograd_through_the_loop(name):
    model = MODELS[name]()
    w, lam = model.init()
    batches, outer = task(model)
    expected = by_hand(model, w, lam, batches, outer)
    assert tree.norm(expected) > 1e-3
    same(ours(model, w, lam, batches, outer).total, expected)


@pytest.mark.parametrize("name", STACKED)
def test_stacked_tasks_are_the_sum_over_tasks(name):
    model = STACKED[name]()
    w, lam = model.init()
    tasks = [task(model) for _ in range(TASKS)]
    batches = [tree.stack(batch) for batch in zip(*(batches for batches, _ in tasks), strict=True)]
    outer = tree.stack([outer for _, outer in tasks])
    together = ours(model, mo.replicated(w, TASKS), lam, batches, outer, mo.vmapped)
    alone = [ours(model, w, lam, *each) for each in tasks]
    same(together.total, tree.add(alone[0].total, alone[1].total))
    accuracy = torch.vmap(model.accuracy, in_dims=(0, None, 0))(together.state.w, lam, outer)
    assert accuracy.tolist() == [
        model.accuracy(one.state.w, lam, outer).item() for one, (_, outer) in zip(alone, tasks, strict=True)
    ]


# -- MetaWeightNet: an update that is no gradient --------------------------------------------------
def weighted_update(model, normalised):
    """``Σ_i c_i ∇ℓ_i``, example by example, with every dependence of ``c`` on w and λ in the graph."""

    def gradient(w, lam, batch):
        x, y = batch
        losses = each_cross_entropy(model.model(w, x), y)
        hidden = torch.relu(losses[:, None] * lam["0.weight"].T + lam["0.bias"])
        v = model.squash((hidden @ lam["2.weight"].T + lam["2.bias"])[:, 0])
        c = v / v.sum() if normalised else v / len(y)
        rows = [torch.autograd.grad(loss, list(w.values()), create_graph=True) for loss in losses]
        return [sum(c[i] * row[k] for i, row in enumerate(rows)) for k in range(len(w))]

    return gradient


@pytest.mark.parametrize("name", WEIGHT_NETS)
def test_weight_net_is_autograd_through_the_true_update(name):
    model = WEIGHT_NETS[name]()
    w, lam = model.init()
    *batches, outer = images()
    expected = by_hand(model, w, lam, batches, outer, weighted_update(model, "normalised" in name))
    hg = ours(model, w, lam, batches, outer)
    assert (tree.norm(expected) > 1e-3 and all(x is None for x in tree.leaves(hg.direct))) or tree.norm(hg.direct) == 0
    same(hg.total, expected)
    # what detaching the weights in the inner loss would give: the error is not small
    detached = mo.inner_step(
        lambda w, lam, batch: _detached(model, w, lam, batch), mo.optim.SGD(lr=LR, momentum=MOMENTUM)
    )
    wrong = mo.hypergradient(detached, model.outer_loss, w, lam, batches, outer, estimator=mo.RMD())
    assert tree.norm(tree.sub(wrong.total, expected)) > 1e-4 * tree.norm(expected)


def _detached(model, w, lam, batch):
    losses = each_cross_entropy(model.model(w, batch[0]), batch[1])
    return (model.coefficients(model.weights(lam, losses.detach())) * losses).sum()


@pytest.mark.parametrize("name", WEIGHT_NETS)
@pytest.mark.parametrize("wrap", [lambda loss: loss, mo.vmapped], ids=["one", "stacked"])
def test_weight_nets_step_has_true_products_in_every_form(name, wrap):
    model = WEIGHT_NETS[name]()
    w, lam = model.init()
    batch = images()[0]
    if wrap is mo.vmapped:
        w = mo.replicated(w, 2).w
        batch = tree.stack([batch, images()[1]])
    step = mo.inner_step(wrap(model.inner_loss), mo.optim.SGD(lr=LR, momentum=MOMENTUM))
    state = step.init(w, lam)
    direction, lam_dot, alpha = (noise_like(x) for x in (state, lam, state))
    pushed = step.jvp(state, lam, batch, direction, lam_dot)
    w_bar, lam_bar = step.vjp(state, lam, batch, alpha)
    left = tree.dot(alpha.w, pushed.w) + tree.dot(alpha.slots, pushed.slots)
    right = tree.dot(w_bar.w, direction.w) + tree.dot(w_bar.slots, direction.slots) + tree.dot(lam_bar, lam_dot)
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)
    eps = 1e-6

    def moved(sign):
        at = state._replace(w=tree.add(state.w, tree.scale(sign * eps, direction.w)))
        return step(at, tree.add(lam, tree.scale(sign * eps, lam_dot)), batch).w

    still = step.jvp(state, lam, batch, direction._replace(slots=tree.zeros_like(state.slots)), lam_dot)
    same(still.w, tree.scale(0.5 / eps, tree.sub(moved(1), moved(-1))), 1e-5)


def test_weight_net_with_forward_over_reverse_falls_back():
    model = WEIGHT_NETS["normalised"]()
    w, lam = model.init()
    *batches, outer = images()
    step = mo.inner_step(
        model.inner_loss, mo.optim.SGD(lr=LR, momentum=MOMENTUM), adjoint=mo.inner.ForwardOverReverse()
    )
    with pytest.warns(UserWarning, match="using reverse over reverse"):
        hg = mo.hypergradient(step, model.outer_loss, w, lam, batches, outer, estimator=mo.RMD())
    same(hg.total, ours(model, w, lam, batches, outer).total)


def test_evograd_sees_the_weight_net():
    model = WEIGHT_NETS["normalised"]()
    w, lam = model.init()
    *batches, outer = images()
    step = mo.inner_step(model.inner_loss, mo.optim.SGD(lr=LR))
    hg = mo.hypergradient(
        step, model.outer_loss, w, lam, batches, outer, estimator=mo.EvoGrad(sigma=0.01, temperature=0.05)
    )
    assert tree.norm(hg.total) > 0


def test_weights_curve_floor_and_coefficients():
    losses = torch.linspace(0, 5, 7, dtype=torch.float64)
    for squash in (SigmoidAbove(0.1), SigmoidClamped(0.1)):
        model = MetaWeightNet.of(nn.Linear(2, 2).double(), each_cross_entropy, squash=squash)
        v = model.weights(tree.scale(40.0, model.init()[1]), losses)
        assert v.shape == (7,) and v.min() >= 0.1 and v.max() <= 1
    low = torch.tensor([-9.0], requires_grad=True)
    assert (
        torch.autograd.grad(SigmoidAbove(0.1)(low), low)[0] > 0 == torch.autograd.grad(SigmoidClamped(0.1)(low), low)[0]
    )
    assert batch_mean(v).sum() == pytest.approx(v.mean()) and batch_normalised(v).sum() == pytest.approx(1)
    assert batch_normalised(torch.zeros(3)).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1"):
        SigmoidAbove(1.0)
    scalar = MetaWeightNet.of(nn.Linear(2, 2), cross_entropy)
    with pytest.raises(ValueError, match='reduction="none"'):
        scalar.inner_loss(*scalar.init(), (torch.ones(3, 2), torch.tensor([0, 1, 0])))


# -- MAML -----------------------------------------------------------------------------------------
def test_maml_is_textbook_second_order_maml():
    maml = MAML.of(mlp(), cross_entropy)
    train, test = images()[:2]
    w, phi = maml.init()
    leaves = {k: x.clone().requires_grad_() for k, x in phi.items()}
    losses = [cross_entropy(maml.model(leaves, train[0]), train[1])]
    g = torch.autograd.grad(losses[0], list(leaves.values()), create_graph=True)
    adapted = {k: x - LR * d for (k, x), d in zip(leaves.items(), g, strict=True)}
    outer = cross_entropy(maml.model(adapted, test[0]), test[1])
    textbook = dict(zip(phi, torch.autograd.grad(outer, list(leaves.values()), retain_graph=True), strict=True))
    first_order = dict(zip(phi, torch.autograd.grad(outer, list(adapted.values())), strict=True))
    step = mo.inner_step(maml.inner_loss, mo.optim.SGD(lr=LR))
    exact = mo.hypergradient(step, maml.outer_loss, w, phi, [train], test, estimator=mo.RMD())
    same(exact.total, textbook, 1e-12)
    same(exact.direct, first_order, 1e-12)
    same(
        mo.hypergradient(step, maml.outer_loss, w, phi, [train], test, estimator=mo.FirstOrder()).total,
        first_order,
        1e-12,
    )
    assert tree.norm(exact.indirect) > 1e-4
    same(maml.adapted(exact.state.w, phi), adapted, 1e-12)


def test_maml_is_the_cotangent_of_the_initial_weights():
    maml = MAML.of(mlp(), cross_entropy)
    *batches, outer = images()
    w, phi = maml.init()
    displaced = ours(maml, w, phi, batches, outer)

    def plain(w, lam, batch):
        return lam * cross_entropy(maml.model(w, batch[0]), batch[1])

    step = mo.inner_step(plain, mo.optim.SGD(lr=LR, momentum=MOMENTUM))
    plain = mo.hypergradient(
        step, plain, phi, torch.tensor(1.0, dtype=torch.float64), batches, outer, estimator=mo.RMD()
    )
    same(displaced.total, plain.initial)


def test_implicit_maml_on_a_quadratic():
    """With the pull μ and a converged inner loop, ``dL/dφ = μ (H + μ)⁻¹ ∂L/∂w``: iMAML."""
    mu = 0.7
    x = torch.randn(6, 3, dtype=torch.float64)
    y = torch.randn(6, 1, dtype=torch.float64)
    maml = MAML.of(nn.Linear(3, 1, bias=False).double(), nn.functional.mse_loss, proximity=mu)
    step = mo.inner_step(maml.inner_loss, mo.optim.SGD(lr=0.2))
    hg = mo.hypergradient(
        step,
        maml.outer_loss,
        *maml.init(),
        [(x, y)] * 300,
        (x + 1, y),
        estimator=mo.IFT(mo.linsolve.Neumann(300, rate=0.2)),
    )
    weights = maml.adapted(hg.state.w, maml.init()[1])["weight"].requires_grad_()
    alpha = torch.autograd.grad(nn.functional.mse_loss((x + 1) @ weights.T, y), weights)[0]
    expected = mu * torch.linalg.solve(2 / 6 * x.T @ x + mu * torch.eye(3, dtype=torch.float64), alpha[0])
    torch.testing.assert_close(hg.total["weight"][0], expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="got -1"):
        MAML.of(nn.Linear(1, 1), cross_entropy, proximity=-1)


# -- layers put into a module of the user's ---------------------------------------------------------
def test_feature_transform_follows_its_equation():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), batch_norm(3)).double()
    lft = FeatureTransform.of(net, cross_entropy)
    w, lam = lft.init()
    assert w.keys() == dict(net.named_parameters()).keys() and set(lam) == {"1.inserted.gamma", "1.inserted.beta"}
    assert lam["1.inserted.gamma"].tolist() == pytest.approx([0.3] * 3) and lam[
        "1.inserted.beta"
    ].tolist() == pytest.approx([0.5] * 3)
    x = torch.randn(4, 1, 5, 5, dtype=torch.float64)
    noise = lft.noise()["1.inserted.noise"]
    gamma, beta = torch.randn(2, 3, dtype=torch.float64) / 50

    def softplus(z):
        return torch.log1p(torch.exp(100 * z)) / 100

    expected = (1 + noise[0] * softplus(gamma))[:, None, None] * net(x) + (noise[1] * softplus(beta))[:, None, None]
    seen = FeatureTransform(lft.model, lambda out, y: (out - expected).abs().max(), lft.plain)
    transformed = {"1.inserted.gamma": gamma, "1.inserted.beta": beta}
    assert seen.inner_loss(w, transformed, (x, expected, {"1.inserted.noise": noise})) < 1e-13
    torch.testing.assert_close(lft.predict(w, transformed, x), net(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"draw it with model\.noise"):
        lft.inner_loss(w, lam, (x, expected, {}))
    with pytest.raises(ValueError, match="no layer a BatchNorm1d or BatchNorm2d"):
        FeatureTransform.of(mlp(), cross_entropy)


def test_drawn_noise_is_replayed_by_the_sweep():
    lft = FeatureTransform.of(net(), cross_entropy)
    w, lam = lft.init()
    *batches, outer = images()
    torch.manual_seed(5)
    drawn = ours(lft, w, lam, batches, outer)
    torch.manual_seed(5)
    given = ours(lft, w, lam, [(x, y, lft.noise()) for x, y in batches], outer)
    same(drawn.total, given.total, 1e-14)
    assert tree.norm(drawn.total) > 0
    many = mo.vmapped(lft.inner_loss)
    two = [tree.stack([batch, batch]) for batch in batches]
    losses = [float(many(mo.replicated(w, 2).w, lam, two[0])) for _ in range(2)]
    assert losses[0] != losses[1]


def test_rtn_is_a_gated_residual_on_source_examples_only():
    rtn = RTN.of(mlp(), cross_entropy, after=["1"], bottleneck=2)
    w, lam = rtn.init()
    x, y = images()[0]
    h = x.flatten(1) @ w["1.weight"].T + w["1.bias"]
    inner = torch.relu(h @ lam["1.inserted.down.weight"].T + lam["1.inserted.down.bias"])
    r, s = (inner @ lam["1.inserted.up.weight"].T + lam["1.inserted.up.bias"]).split([5, 1], dim=1)
    rest = (torch.tanh(h + torch.sigmoid(s) * r) @ w["3.weight"].T + w["3.bias"]).tanh() @ w["5.weight"].T + w["5.bias"]
    torch.testing.assert_close(rtn.inner_loss(w, lam, (x, y)), cross_entropy(rest, y), rtol=1e-13, atol=1e-13)
    assert rtn.outer_loss(w, lam, (x, y)) == cross_entropy(rtn.plain(w, x), y) != rtn.inner_loss(w, lam, (x, y))
    with pytest.raises(ValueError, match=r"no layer 7: name some in after=, of \['0', '1'"):
        RTN.of(mlp(), cross_entropy, after=["1", "7"], bottleneck=2)
    with pytest.raises(ValueError, match="channels after Tanh"):
        RTN.of(mlp(), cross_entropy, after=["2"], bottleneck=2)


def test_insertion_leaves_the_users_module_alone_and_calls_each_layer_once():
    module = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    doubled = insert(module, ["0", "1"], lambda layer: _Scaled())
    assert [name for name, _ in module.named_modules()] == ["", "0", "0.0", "1"] and not module[1]._forward_hooks
    x = torch.randn(3, 2)
    torch.testing.assert_close(doubled(doubled.params, x), 2 * module[1](2 * module[0](x)))


class _Scaled(nn.Module):
    def forward(self, x):
        return 2 * x


# -- data weights, rotation -------------------------------------------------------------------------
def test_data_weights_start_as_the_plain_mean():
    x, y = images()[0]
    for weighting, factor in ((RawWeights(), 1), (SigmoidWeights(), 0.5), (SoftmaxWeights(3.0), 1)):
        model = DataWeights.of(net(), each_cross_entropy, examples=8, weighting=weighting)
        w, lam = model.init()
        torch.testing.assert_close(
            model.inner_loss(w, lam, (x, y, torch.arange(5))), factor * model.outer_loss(w, lam, (x, y))
        )
    with pytest.raises(ValueError, match=r"\(x, y, which examples\), got 2 parts"):
        model.inner_loss(w, lam, (x, y))
    with pytest.raises(ValueError, match="each of 8 examples"):
        model.inner_loss(w, lam[:7], (x, y, torch.arange(5)))
    with pytest.raises(ValueError, match="examples must be at least 1, got 0"):
        DataWeights.of(net(), each_cross_entropy, examples=0)


@pytest.mark.parametrize("shape", [(6, 6), (5, 8)])
@pytest.mark.parametrize("degrees", [0.0, 17.0, -75.0, 180.0, 230.0])
def test_rotation_is_scipys(shape, degrees):
    image = torch.randn(1, 1, *shape, dtype=torch.float64)
    ours = rotate(image, torch.tensor(degrees, dtype=torch.float64).deg2rad())
    theirs = ndimage.rotate(image[0, 0].numpy(), degrees, order=1, reshape=False, mode="grid-constant")
    torch.testing.assert_close(ours[0, 0], torch.from_numpy(theirs), rtol=0, atol=1e-9)


def test_rotation_turns_anticlockwise_and_has_every_derivative():
    image = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(rotate(image, torch.tensor(torch.pi / 2)), image.rot90(1, (2, 3)), rtol=0, atol=1e-6)
    angle = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: rotate(image, a), angle, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda a: rotate(image, a), angle)
    with pytest.raises(ValueError, match=r"got shape \(5, 5\)"):
        rotate(image[0, 0], angle)


# -- the split, the net ----------------------------------------------------------------------------
@pytest.mark.parametrize("size", [14, 28, 32, 64])
@pytest.mark.parametrize("norm", [batch_norm, group_norm])
def test_conv_net_takes_every_size(size, norm):
    out = conv_net(4, 4, classes=5, in_channels=3, image_size=size, norm=norm)(torch.randn(2, 3, size, size))
    assert out.shape == (2, 5)
    with pytest.raises(ValueError, match="classes >= 1, got 0"):
        conv_net(4, 4, 0, 3, size)


def test_papers_anil_adapts_the_last_convolution_and_the_classifier():
    w, lam = ANIL.of(conv_net(4, 32, 10, 3, 32), cross_entropy, weights=["block4.*", "head.*"]).init()
    assert {name.split(".")[0] for name in w} == {"block4", "head"}
    assert {name.split(".")[0] for name in lam} == {"block1", "block2", "block3"}
    assert w["head.weight"].shape == (10, 32 * 2 * 2)


def test_papers_warpgrad_has_two_warp_layers_after_each_of_three_blocks():
    net = conv_net(3, 32, 10, 3, 32)
    before = {name: p.clone() for name, p in net.state_dict().items()}
    w, lam = WarpGrad.of(net, cross_entropy).init()
    assert w.keys() == before.keys() == net.state_dict().keys()
    assert {name for name in lam if name.endswith("weight")} == {
        f"warp_block{i}.{j}.weight" for i in (1, 2, 3) for j in (0, 2)
    }
    assert all(p.shape == (32, 32, 3, 3) for name, p in lam.items() if name.endswith("weight"))


def test_linear_warp_is_linear_and_residual_adds_its_input():
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    linear = Warp(activation=nn.Identity)(nn.Conv2d(3, 4, 1)).double()
    zero = linear(torch.zeros_like(x))
    torch.testing.assert_close(linear(2 * x) - zero, 2 * (linear(x) - zero))
    residual = Warp(residual=True)(nn.Conv2d(3, 4, 1)).double()
    torch.testing.assert_close(residual(x) - x, nn.Sequential.forward(residual, x))
    assert not torch.allclose(nn.Sequential.forward(residual, 2 * x), 2 * nn.Sequential.forward(residual, x))
    assert Warp()(nn.Linear(3, 7))(torch.ones(2, 7)).shape == (2, 7)


def test_warp_layers_go_where_they_are_asked_to():
    mlp = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    _, lam = WarpGrad.of(mlp, nn.functional.mse_loss, warp=Warp(layers=1), after=["2"]).init()
    assert set(lam) == {"warp_2.0.weight", "warp_2.0.bias"}
    for wrong in (["1"], ["9"], []):
        with pytest.raises(ValueError, match=r"can follow \['0', '2'\]"):
            WarpGrad.of(mlp, nn.functional.mse_loss, after=wrong)
    with pytest.raises(TypeError, match="Bilinear"):
        WarpGrad.of(nn.Bilinear(2, 2, 1), nn.functional.mse_loss)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="odd, got 2"):
        Warp(kernel_size=2)
    with pytest.raises(TypeError, match="Embedding"):
        Warp()(nn.Embedding(2, 3))


def test_accuracy_counts_classes_only():
    model = ANIL.of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), cross_entropy, weights=["1.*"])
    w, lam = model.init()
    scores = model.predict(w, lam, torch.eye(2))
    assert model.accuracy(w, lam, (torch.eye(2), scores.argmax(1))) == 1
    with pytest.raises(TypeError, match="integer targets"):
        model.accuracy(w, lam, (torch.eye(2), torch.ones(2)))


def test_by_default_only_the_ratios_of_weights_count():
    """With the mean instead, all weights of an ordinary classifier grow to 1, whatever the labels are."""
    model = MetaWeightNet.of(nn.Linear(2, 2), each_cross_entropy)
    w, lam = model.init()
    batch = torch.randn(6, 2), torch.randint(0, 2, (6,))
    constant = {name: torch.zeros_like(p) for name, p in lam.items()}
    for bias in (-3.0, 0.0, 3.0):  # all weights alike, small or large
        constant["2.bias"] = torch.tensor([bias])
        plain = nn.functional.cross_entropy(model.model(w, batch[0]), batch[1])
        torch.testing.assert_close(model.inner_loss(w, constant, batch), plain)
