"""Data weights by exact reverse mode, against leaving examples out."""

import json

import torch

from metaopt.experiments import data_weights


def test_prediction_ranks_examples_as_retraining_does(tmp_path):
    config = data_weights.DataWeightsConfig(
        examples=30, steps=120, batch=15, validation=60, hidden=4, lr=0.05, slots=6, weight_decay=0.05
    )
    before = torch.get_rng_state()
    result = data_weights.run(config, tmp_path)
    assert torch.equal(before, torch.get_rng_state())
    assert result.spearman > 0.9
    assert json.loads((tmp_path / "data_weights.json").read_text())["config"]["steps"] == 120
    assert (tmp_path / "data_weights.png").stat().st_size > 1000
    base, without = data_weights.retrain(data_weights.build(config), config)
    assert abs(float(base) - result.validation_loss) < 1e-10
    assert without.std() > 1e-5
