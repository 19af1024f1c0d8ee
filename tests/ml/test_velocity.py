"""Models that predict velocity (SD 2.1): images are drawn as the model means its prediction.

Methods on such models: `tests/test_every_defense.py` and `tests/test_every_attack.py`.
"""

from __future__ import annotations

import pytest
import torch

from harness.model.pipeline import DiffusionModel
from harness.model.source import resolve_model
from harness.suite.spec import ModelSpec
from tests import tiny

KINDS = ("epsilon", "v_prediction")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Return a function that loads the model of a kind anew."""
    folder = tmp_path_factory.mktemp("velocity")
    for kind in KINDS:
        tiny.save_pipeline(folder / kind, prediction_type=kind)
    torch.set_num_threads(1)

    def load(kind: str) -> DiffusionModel:
        source = resolve_model(ModelSpec(id=str(folder / kind)), "test", folder)
        return DiffusionModel.load(source, torch.device("cpu"))

    return load


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver", "pndm"])
def test_images_of_a_velocity_model(scheduler, both, make_run):
    """Every sampler takes the prediction for what the model says it is."""
    import numpy as np

    from harness.core.sampling import Sampling
    from harness.model.sampling import sample

    settings = Sampling(scheduler=scheduler, steps=4, guidance=2.0, batch_size=1)
    images = [
        np.asarray(next(sample(both(kind), make_run(), ["a purse"], settings, images_per_prompt=1, seed=1))[2])
        for kind in KINDS
    ]

    assert not np.array_equal(*images)
