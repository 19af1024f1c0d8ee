"""The state of a training that survives a kill: tensors and optimizers, saved and put back exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from harness.model.run import Run


def require_finite(value: Tensor, name: str) -> float:
    """Return `value` as a number. Raises FloatingPointError when training diverged."""
    number = float(value.detach())
    if not math.isfinite(number):
        raise FloatingPointError(f"{name} is {number}: the training diverged")
    return number


class TrainingState:
    """Trained tensors by name and the optimizers over them.

    State files hold each tensor as "tensor/<name>" and each optimizer slot as "optimizer/<name>/<index>/<slot>".
    Draws are functions of the step, so no state of a random generator is kept.
    """

    def __init__(self, tensors: Mapping[str, Tensor], optimizers: Mapping[str, torch.optim.Optimizer]):
        self.tensors = dict(tensors)
        self.optimizers = dict(optimizers)

    def save(self, run: Run, step: int, numbers: Mapping[str, Any] | None = None) -> None:
        """Keep everything that is needed to go on from `step`."""
        flat = {f"tensor/{name}": tensor for name, tensor in self.tensors.items()}
        for name, optimizer in self.optimizers.items():
            for index, slots in optimizer.state_dict()["state"].items():
                for slot, value in slots.items():
                    flat[f"optimizer/{name}/{index}/{slot}"] = torch.as_tensor(value)
        run.save_state(step, flat, numbers or {})

    def load(self, run: Run) -> tuple[int, dict[str, Any]]:
        """Put back what `save` kept; return (step, numbers), or (0, {}) when nothing was kept."""
        found = run.load_state()
        if found is None:
            return 0, {}
        step, flat, numbers = found
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(flat[f"tensor/{name}"])
        for name, optimizer in self.optimizers.items():
            whole = optimizer.state_dict()
            state: dict[int, dict[str, Tensor]] = {}
            prefix = f"optimizer/{name}/"
            for path, value in flat.items():
                if path.startswith(prefix):
                    index, slot = path[len(prefix) :].split("/")
                    state.setdefault(int(index), {})[slot] = value
            whole["state"] = state
            optimizer.load_state_dict(whole)
        return step, numbers
