"""Learning under wrong labels, on a Fashion-MNIST of some hundred images in the true on-disk format."""

import json
import math
import struct
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from metaopt.cli import app
from metaopt.experiments import noisy_labels, rotation
from metaopt.experiments.statistics import summarise

METHODS = {method.key: method for method in noisy_labels.METHODS}


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    """Ten classes: a bright stripe in noise at a place of its own."""
    root = tmp_path_factory.mktemp("fashion")
    place = root / "FashionMNIST" / "raw"
    place.mkdir(parents=True)
    for part, count, seed in (("train", 400, 0), ("t10k", 100, 1)):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 10, count).astype(np.uint8)
        images = rng.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 4] += 150
        (place / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + images.tobytes())
        (place / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())
    return root


@pytest.fixture(scope="module")
def config(fashion):
    return noisy_labels.NoisyLabelsConfig(
        fashion, examples=200, clean=100, hidden=8, weight_net=6, steps=40, batch=20, evaluate_every=10
    )


@pytest.mark.parametrize("key", METHODS)
def test_same_seed_same_numbers_and_the_random_state_is_left_alone(config, key):
    before = torch.get_rng_state()
    first, second = (noisy_labels.run(METHODS[key], config, seed=0) for _ in range(2))
    assert repr(replace(first, seconds=0.0)) == repr(replace(second, seconds=0.0))  # NaN is NaN
    found = noisy_labels.run(METHODS[key], config, seed=1)
    assert found.curve != first.curve and len(found.curve) == len(found.ratios) == 4
    assert found.curve[-1] == found.accuracy and found.ratios[-1] == found.ratio
    assert sum(found.right_losses) + sum(found.wrong_losses) == 200 and not found.failure
    assert math.isnan(found.two_stage) == (METHODS[key].estimator is None)
    assert torch.equal(before, torch.get_rng_state())


def test_every_method_starts_from_the_same_problem(config):
    problems = [noisy_labels.prepare(method, config, seed=3) for method in METHODS.values()]
    for problem, w, lam in problems[1:]:
        assert torch.equal(problem.data.train.y, problems[0][0].data.train.y) and torch.equal(
            problem.wrong, problems[0][0].wrong
        )
        assert all(torch.equal(w[name], problems[0][1][name]) for name in w)
        assert all(torch.equal(lam[name], problems[0][2][name]) for name in lam)
        assert torch.equal(problem.training.batches(7).x, problems[0][0].training.batches(7).x)
    assert 0.25 < problems[0][0].wrong.float().mean() < 0.55


def test_uniform_weights_are_plain_training(config):
    problem, w, lam = noisy_labels.prepare(METHODS["uniform"], config, seed=0)
    net = torch.nn.Sequential(torch.nn.Linear(784, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
    net.load_state_dict(w)
    optimizer = torch.optim.SGD(net.parameters(), lr=config.lr, momentum=config.momentum)
    for t, found, _ in islice(problem.training.run(w, lam, None), 12):
        optimizer.zero_grad()
        batch = problem.training.batches(t)
        torch.nn.functional.cross_entropy(net(batch.x), batch.y).backward()
        optimizer.step()
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-4, atol=1e-6)


def test_the_frozen_net_stays_and_the_others_move(config):
    for key, method in METHODS.items():
        problem, w, lam = noisy_labels.prepare(method, config, seed=0)
        *_, (t, _, last) = problem.training.run(w, lam, method.estimator)
        assert t == config.steps
        assert all(torch.equal(lam[name], last[name]) for name in lam) == (key in ("uniform", "frozen"))


def test_the_second_stage_is_a_plain_run_with_the_weight_net_found(config):
    problem, w, lam = noisy_labels.prepare(METHODS["one-step"], config, seed=0)
    *_, (_, _, found) = problem.training.run(w, lam, METHODS["one-step"].estimator)
    *_, (_, second, _) = problem.training.run(w, found, None)
    assert noisy_labels.run(METHODS["one-step"], config, seed=0).two_stage == problem.accuracy(second, found)


def test_batches_go_through_all_images_before_any_comes_twice(config):
    problem, _, _ = noisy_labels.prepare(METHODS["uniform"], config, seed=0)
    seen = torch.cat([problem.training.batches(t).x for t in range(11, 21)])
    rows = problem.data.train.x
    assert torch.equal(seen[:, 300].sort().values, rows[:, 300].sort().values)
    assert not torch.equal(problem.training.batches(1).x, problem.training.batches(11).x)


def test_ratio_is_that_of_mean_weights(config):
    problem, _, lam = noisy_labels.prepare(METHODS["frozen"], config, seed=0)
    losses = torch.where(problem.wrong, 3.0, 1.0)
    low, high = (float(problem.model.weights(lam, torch.tensor([loss]))) for loss in (1.0, 3.0))
    assert problem.ratio(lam, losses) == pytest.approx(low / high)


def test_a_broken_run_is_reported(config):
    found = noisy_labels.run(METHODS["one-step"], replace(config, lr=1e30), seed=0)
    assert (
        math.isnan(found.accuracy) and math.isnan(found.two_stage) and "not finite" in found.failure
    ) or "nan" in found.failure


@pytest.mark.parametrize("method", [*noisy_labels.METHODS, *rotation.METHODS], ids=lambda method: method.key)
def test_a_finished_run_is_known_again_in_another_process(method):
    assert " at 0x" not in repr(method)


def test_command_writes_table_pictures_and_json(fashion, tmp_path):
    sizes = ["--steps", "20", "--examples", "200", "--clean", "100", "--seeds", "2", "--workers", "1"]
    arguments = [
        "compare",
        "noisy-labels",
        "--root",
        str(fashion),
        *sizes,
        "--out",
        str(tmp_path),
        "--estimators",
        "frozen,one-step",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "frozen random net" in result.output and "40% flip2 noise" in result.output
    saved = json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert [(run["method"], run["seed"]) for run in saved] == [
        ("frozen", 0),
        ("frozen", 1),
        ("one-step", 0),
        ("one-step", 1),
    ]
    for name in ("accuracy", "weights"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_missing_files_are_named(tmp_path):
    result = CliRunner().invoke(
        app, ["compare", "noisy-labels", "--root", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 2 and "nowhere" in "".join(line.strip("│ ") for line in result.output.splitlines())


def test_an_interval_needs_two_seeds():
    assert summarise([1.0, 3.0, float("nan")]).interval(digits=1) == "2.0 ± 12.7"
    assert summarise([1.0]).interval() == "1.00"
