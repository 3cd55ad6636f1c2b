"""The rotation experiment, on tiny folders of grey pictures and on MNIST's on-disk format."""

import json
import math
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from metaopt.cli import app
from metaopt.experiments import experiment, rotation
from metaopt.experiments.image_data import Source
from metaopt.models.rotation import rotate

METHODS = {method.key: method for method in rotation.METHODS}


def bar(rng, label):
    """A bar from the centre to the right or downwards, in noise."""
    image = rng.integers(0, 30, (16, 16), dtype=np.uint8)
    rows, columns = (slice(7, 9), slice(8, 15)) if label == 0 else (slice(8, 15), slice(7, 9))
    image[rows, columns] += 200
    return image


def in_this_process(run, methods, config, seeds, *, workers):
    return [run(method, config, seed) for method in methods for seed in range(seeds)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of 60 grey pictures, in folders."""
    root = tmp_path_factory.mktemp("bars")
    rng = np.random.default_rng(0)
    for label in range(2):
        (root / f"class{label}").mkdir()
        for i in range(60):
            Image.fromarray(bar(rng, label)).save(root / f"class{label}" / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def config(pictures):
    return rotation.RotationConfig(Source("folder", pictures, 16), train=60, validation=30, test=30, epochs=3, batch=10)


@pytest.mark.parametrize("key", METHODS)
def test_same_seed_same_numbers_and_the_random_state_is_left_alone(config, key):
    before = torch.get_rng_state()
    first, second = (replace(rotation.run(METHODS[key], config, seed=0), seconds=0.0) for _ in range(2))
    assert first == second and not first.failure and len(first.curve) == len(first.angles) == 3
    assert (first.accuracy, first.angle) == (first.curve[-1], first.angles[-1])
    expected = {"baseline": 0.0, "told": 30.0}
    assert first.angle == pytest.approx(expected[key], abs=1e-4) if key in expected else first.angle != 0
    assert torch.equal(before, torch.get_rng_state())


def test_validation_and_test_images_are_turned_and_training_images_are_not(config):
    _, data, _, _ = rotation.prepare(METHODS["baseline"], config, seed=0)
    _, upright, _, _ = rotation.prepare(METHODS["baseline"], replace(config, degrees=0.0), seed=0)
    assert torch.equal(data.train.x, upright.train.x)
    for turned, straight in zip(data[1:], upright[1:], strict=True):
        torch.testing.assert_close(turned.x, rotate(straight.x, torch.tensor(math.pi / 6)))
        assert (turned.x - straight.x).abs().max() > 0.5
    assert [tuple(part.x.shape) for part in data] == [(60, 1, 16, 16), (30, 1, 16, 16), (30, 1, 16, 16)]
    assert [part.y.bincount().tolist() for part in data] == [[30, 30], [15, 15], [15, 15]]


def test_methods_differ_in_the_initial_angle_alone(config):
    (_, a, w, lam), (_, b, v, told) = (rotation.prepare(METHODS[key], config, seed=2) for key in ("evograd", "told"))
    assert (
        torch.equal(a.train.x, b.train.x)
        and torch.equal(a.test.x, b.test.x)
        and all(torch.equal(w[name], v[name]) for name in w)
    )
    assert float(lam["angle"]) == 0 and float(told["angle"]) == pytest.approx(math.pi / 6)


def test_one_step_turns_the_right_way(config):
    found = rotation.run(METHODS["one-step"], replace(config, epochs=10), seed=0)
    assert 5 < found.angle < 60


def test_command_writes_table_pictures_and_json(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "run_all", in_this_process)
    sizes = [
        "--size",
        "16",
        "--train",
        "60",
        "--validation",
        "30",
        "--test",
        "30",
        "--epochs",
        "2",
        "--seeds",
        "1",
        "--workers",
        "1",
    ]
    arguments = ["compare", "rotation", "--data", "folder", "--root", str(pictures), *sizes, "--out", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, "--estimators", "baseline,evograd"])
    assert result.exit_code == 0, result.output
    assert "EvoGrad, K = 2" in result.output and "60 + 30 + 30 images of folder" in result.output
    assert [run["method"] for run in json.loads((tmp_path / "runs.json").read_text())["runs"]] == [
        "baseline",
        "evograd",
    ]
    for name in ("accuracy", "angle"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_mnist_is_read_and_what_cannot_be_is_named(tmp_path):
    arguments = ["compare", "rotation", "--root", str(tmp_path), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "train-images-idx3-ubyte" in "".join(
        line.strip("│ ") for line in result.output.splitlines()
    )
    place = tmp_path / "MNIST" / "raw"
    place.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 5)):
        (place / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + bytes(count * 784))
        (place / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 2049, count) + bytes(k % 10 for k in range(count))
        )
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "but mnist has 20" in result.output
    with pytest.raises(ValueError, match="16×16 or more, got 15×15"):
        rotation.lenet(1, 15, 10)
