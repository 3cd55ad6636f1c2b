"""Meta-models and image tasks."""

import pytest
import torch

import metaopt as mo
from metaopt.models import MetaSGD
from metaopt.tasks import label_noise


def test_meta_sgd_is_autograd_through_the_loop():
    meta_sgd = MetaSGD.of(
        torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double(),
        torch.nn.functional.mse_loss,
        rate=0.1,
    )
    batches = [(torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)) for _ in range(4)]
    w, lam = meta_sgd.init()
    hg = mo.hypergradient(
        mo.inner_step(meta_sgd.inner_loss, meta_sgd.optimizer),
        meta_sgd.outer_loss,
        w,
        lam,
        batches[:3],
        batches[3],
        estimator=mo.RMD(),
    )
    lr = {k: x.clone().requires_grad_() for k, x in lam["lr"].items()}
    initial = {k: x.clone().requires_grad_() for k, x in lam["initial"].items()}
    mse = torch.nn.functional.mse_loss
    at = initial
    for x, y in batches[:3]:
        g = torch.autograd.grad(mse(meta_sgd.model(at, x), y), list(at.values()), create_graph=True)
        at = {k: p - lr[k] * d for (k, p), d in zip(at.items(), g, strict=True)}
    x, y = batches[3]
    expected = torch.autograd.grad(mse(meta_sgd.model(at, x), y), [*lr.values(), *initial.values()])
    for ours, theirs in zip([*hg.total["lr"].values(), *hg.total["initial"].values()], expected, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="rate"):
        MetaSGD.of(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, rate=0.0)


@pytest.mark.parametrize(
    ("noise", "targets", "wrong"),
    [(label_noise.uniform, 9, 0.36), (label_noise.flip, 1, 0.4), (label_noise.flip2, 2, 0.4)],
)
def test_label_noise_has_its_rate_and_targets(noise, targets, wrong):
    clean = torch.arange(10).repeat(2000)
    before = torch.get_rng_state()
    noisy = noise(clean, 10, 0.4, seed=1)
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(clean, torch.arange(10).repeat(2000))
    assert torch.equal(noisy, noise(clean, 10, 0.4, seed=1)) and not torch.equal(noisy, noise(clean, 10, 0.4, seed=2))
    changed = noisy != clean
    assert abs(changed.double().mean() - wrong) < 0.02  # six standard errors
    assert [len(noisy[changed & (clean == c)].unique()) for c in range(10)] == [targets] * 10
    assert torch.equal(noise(clean, 10, 0.0, seed=1), clean)


def test_bad_labels_are_named():
    with pytest.raises(TypeError, match="float32"):
        label_noise.flip(torch.ones(3), 10, 0.4, 0)
    with pytest.raises(ValueError, match=r"probability, got 1\.5"):
        label_noise.flip(torch.arange(3), 10, 1.5, 0)
    with pytest.raises(ValueError, match="too few"):
        label_noise.flip2(torch.arange(2), 2, 0.4, 0)
    with pytest.raises(ValueError, match="0 … 9, got 0 … 11"):
        label_noise.uniform(torch.arange(12), 10, 0.4, 0)
