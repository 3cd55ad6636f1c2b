"""The many-shot image experiments: their data, determinism, going on after a kill, products, and the command."""

import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from metaopt.cli import app
from metaopt.experiments import many_shot, many_shot_settings
from metaopt.experiments.image_data import Source, load

METHODS = {method.key: method for method in many_shot_settings.METHODS}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Six classes of thirty pictures, in folders: a class is a brightness."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for c in range(6):
        (root / f"class{c}").mkdir()
        for i in range(30):
            pixels = rng.integers(40 * c, 40 * c + 40, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class{c}" / f"{i}.png")
    return root


def config(images: Path, model: str, **settings) -> many_shot_settings.ManyShotConfig:
    found = many_shot_settings.configure(model, Source("folder", images, 8), small=True, meta_iterations=2)
    tiny = {
        "horizon": 4,
        "meta_batch": 2,
        "ways": 2,
        "shots": 3,
        "batch_size": 4,
        "channels": 4,
        "validate_every": 1,
        "validation_tasks": 1,
    }
    return replace(found, **{**tiny, "test_tasks": 3, **settings})


@pytest.mark.parametrize("model", many_shot_settings.MODELS)
def test_same_seed_same_numbers_and_the_random_state_is_left_alone(images, model):
    method = METHODS["hyperdistill-0.99"]
    settings = config(images, model)
    before = torch.get_rng_state()
    first, second = (replace(many_shot.run(method, settings, seed=0), seconds=0.0) for _ in range(2))
    assert first == second
    assert first.curve != many_shot.run(method, settings, seed=1).curve
    assert len(first.curve) == len(first.theta) == len(first.validation) == 2
    assert 0 <= first.accuracy <= 1 and not first.failure
    assert torch.equal(before, torch.get_rng_state())


def test_products_are_those_of_table_2(images):
    settings = config(images, "anil", validate_every=0, test_tasks=1)
    T = settings.horizon
    M = settings.meta_iterations
    products = {
        key: many_shot.run(METHODS[key], settings, seed=0).products
        for key in ("fo", "one-step", "drmad", "rmd", "hyperdistill-0.99")
    }
    hyper_steps = T / 2
    assert products["fo"] == 0
    assert products["one-step"] == hyper_steps
    assert products["drmad"] == 2 * T - 1
    assert products["rmd"] == 2 * T
    assert products["hyperdistill-0.99"] == hyper_steps + (3 * T - 1) / M


def test_hyperdistill_takes_about_56_products_at_the_papers_settings():
    paper = many_shot_settings.ManyShotConfig()
    assert paper.horizon / paper.hyper_steps.every == 50  # 1-step
    assert 50 + (3 * paper.horizon - 1) / paper.calibration_period == pytest.approx(56, abs=0.1)


KILLED = """
import os, pickle, signal, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from metaopt.experiments import many_shot, many_shot_settings
from metaopt.meta import Checkpoint
method, config, folder = pickle.load(open(sys.argv[1], "rb"))
save = Checkpoint.save
def save_and_die(self, path):
    save(self, path)
    os.kill(os.getpid(), signal.SIGKILL)
Checkpoint.save = save_and_die
many_shot.run(method, config, 0, Path(folder))
"""


def test_a_killed_experiment_goes_on_where_it_was(images, tmp_path):
    method = METHODS["hyperdistill-0.99"]
    settings = config(images, "warpgrad", meta_iterations=3)
    job = tmp_path / "job.pkl"
    job.write_bytes(pickle.dumps((method, settings, str(tmp_path))))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for done in (1, 2):
        killed = subprocess.run([sys.executable, "-c", KILLED, str(job)], env=environment, check=False)
        assert killed.returncode == -signal.SIGKILL
        assert many_shot.Checkpoint.load(tmp_path / "hyperdistill-0.99-0.pt").run == done
    resumed = many_shot.run(method, settings, 0, tmp_path)
    plain = many_shot.run(method, settings, 0)
    assert replace(resumed, seconds=0.0) == replace(plain, seconds=0.0)
    with pytest.raises(ValueError, match=r"other settings \(outer_lr: "):
        many_shot.run(method, replace(settings, outer_lr=0.5), 0, tmp_path)


def test_classes_are_split_where_there_are_enough_and_images_otherwise(images):
    by_class = load(Source("folder", images, 8), ways=1, shots=3)
    names = [set(part.names) for part in by_class[:3]]
    assert by_class.by_class and not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])
    by_image = load(Source("folder", images, 8), ways=6, shots=3)
    assert not by_image.by_class
    assert [part.counts().tolist() for part in by_image[:3]] == [[15] * 6, [6] * 6, [9] * 6]
    assert sum(len(part) for part in by_image[:3]) == 180


def test_command_writes_table_pictures_and_json(images, tmp_path, monkeypatch):
    settings = config(images, "meta-weight-net")
    monkeypatch.setattr(many_shot_settings, "configure", lambda *_, **__: settings)
    arguments = [
        "compare",
        "meta-weight-net",
        "--data",
        "folder",
        "--root",
        str(images),
        "--seeds",
        "1",
        "--workers",
        "1",
        "--out",
        str(tmp_path),
    ]
    result = CliRunner().invoke(app, [*arguments, "--estimators", "one-step,hyperdistill-0.9,hyperdistill-0.99"])
    assert result.exit_code == 0, result.output
    assert "HyperDistill, γ = 0.99" in result.output
    assert len(json.loads((tmp_path / "runs.json").read_text())["runs"]) == 3
    for name in ("convergence", "validation", "theta", "cost", "gamma", "weights"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_missing_data_is_named_before_anything_runs(tmp_path):
    result = CliRunner().invoke(
        app,
        ["compare", "anil", "--data", "cifar100", "--root", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")],
    )
    assert result.exit_code == 2
    assert "nowhere" in "".join(line.strip("│ ") for line in result.output.splitlines())
    result = CliRunner().invoke(app, ["compare", "anil", "--data", "imaginary", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "imaginary" in result.output


def test_diagnosis_of_a_finished_run(images, tmp_path, monkeypatch):
    settings = config(images, "warpgrad", meta_batch=1, validate_every=0, test_tasks=1)
    monkeypatch.setattr(many_shot_settings, "configure", lambda *_, **__: settings)
    many_shot.run(METHODS["hyperdistill-0.99"], settings, 0, tmp_path)
    state = tmp_path / "hyperdistill-0.99-0.pt"
    arguments = [
        "diagnose",
        "warpgrad",
        "--data",
        "folder",
        "--problems",
        "1",
        "--every",
        "4",
        "--finished",
        str(state),
        "--out",
        str(tmp_path),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    stages = json.loads((tmp_path / "diagnosis.json").read_text())
    assert [stage["stage"] for stage in stages] == ["before meta-training", "after 2 runs"]
    torch.save({}, state)
    assert CliRunner().invoke(app, arguments).exit_code == 2
