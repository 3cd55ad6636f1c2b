"""Learned schedules by FDS, on a problem of a second."""

import json

import torch

from metaopt.experiments import schedules
from metaopt.tasks import LabelledImages


def test_schedules_are_learned_from_nothing_and_compared(tmp_path):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (300,), generator=g)
    images = (labels[:, None, None, None] * 120 + torch.randint(100, (300, 1, 2, 2), generator=g)).to(torch.uint8)
    part = LabelledImages(images, labels, ("dark", "light"))
    data = schedules.of_images(part, part, examples=200, validation=100)
    assert abs(float(data.train.x.mean())) < 0.2 and len(data.test.y) == 300
    config = schedules.SchedulesConfig(
        hidden=4, steps=12, batch=20, windows=3, outer_steps=3, searches=2, greedy_rates=(1e-2,)
    )
    before = torch.get_rng_state()
    result = schedules.run(data, config, tmp_path)
    assert torch.equal(before, torch.get_rng_state())
    assert result.validation_losses[-1] < result.validation_losses[0] and result.falls >= 2
    assert result.schedules[0] == {"lr": [0.0] * 3, "momentum": [0.0], "weight_decay": [0.0]}
    assert all(rate > 0 for rate in result.schedules[-1]["lr"]) and result.accuracy > 80
    assert len(result.random_search) == 2 and len(result.greedy) == 1
    assert json.loads((tmp_path / "schedules.json").read_text())["config"]["steps"] == 12
    assert (tmp_path / "schedules.png").stat().st_size > 1000
