"""Copies between main memory and a device that do not make the host wait for the device.

A GPU works through a queue that the host fills. The host waits whenever it reads a value, and when it copies from
ordinary memory; then the queue runs empty. So a step of training copies to the device by `to_device`, and its numbers
are read together after several steps (`harness.training.loop`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on a device. The given one may be changed at once, unless it is already there.

    A copy to a GPU goes through pinned memory: torch keeps that until the GPU has read it, and the host does not wait.
    """
    if tensor.device.type != "cpu":
        return tensor.to(device)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def on_host(values: Sequence[float | Tensor]) -> list[float]:
    """Return numbers as Python's; those that are tensors of one element by one copy from each device."""
    places: dict[torch.device, list[int]] = {}
    for place, value in enumerate(values):
        if isinstance(value, Tensor):
            places.setdefault(value.device, []).append(place)
    found = [0.0 if isinstance(value, Tensor) else float(value) for value in values]
    for own in places.values():
        read = torch.stack([values[place].detach().double().reshape(()) for place in own]).tolist()
        for place, value in zip(own, read, strict=True):
            found[place] = value
    return found
