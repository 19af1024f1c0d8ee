"""A frozen model beside the one that is trained, which it should agree with or is measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.model.pipeline import DiffusionModel
from harness.model.run import Run


def predicted(teacher: DiffusionModel, run: Run, noisy: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
    """Return a frozen model's prediction, fp32, without a graph; count its passes."""
    with torch.no_grad(), run.autocast():
        said = teacher.denoise(noisy, timesteps, embeddings)
    run.ledger.forward_passes += len(noisy)
    return said.float()


def require_same_prediction(model: DiffusionModel, teacher: DiffusionModel) -> None:
    """Raise ValueError if a student and its teacher predict different things."""
    kinds = [each.pipeline.scheduler.config.prediction_type for each in (model, teacher)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"the student predicts {kinds[0]}, its teacher {kinds[1]}; they must predict the same")
