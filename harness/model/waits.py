"""Count how often the host waits for a device: each wait lets the device's queue run empty.

    with Waits() as waits:
        learner.step(7)
    waits.counts        # name of an operation -> how often the host waited for it

It counts on a GPU, and on the meta device inside a `harness.model.footprint.Footprint`, where a method's own code runs
without a device. What libraries do inside one operation of torch is not seen; `torch.cuda.set_sync_debug_mode` sees it
on a GPU.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_READS = frozenset(
    ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive", "unique_dim")
)
"""Operations whose result, or whose size, the host reads."""
_COPIES = frozenset(("_to_copy", "copy_"))
_INDEXED = frozenset(("index", "index_put", "index_put_", "_index_put_impl_"))


class Waits(TorchDispatchMode):
    """Counts operations that make the host wait; a CPU's tensors make nobody wait."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.partition(".")[0]
        result = func(*args, **kwargs)
        if func.namespace == "aten" and _waits(name, args, kwargs, result):
            self.counts[name] += 1
        return result


def _waits(name: str, args: tuple, kwargs: dict, result: Any) -> bool:
    """Return whether the host waits for an operation."""
    if name in _READS:
        return _on_device(args[0])
    if name in _COPIES:
        there, here = (result, args[0]) if name == "_to_copy" else (args[0], args[1])
        goes = kwargs.get("device", there.device) if name == "_to_copy" else there.device
        is_across = (torch.device(goes).type == "cpu") is not (here.device.type == "cpu")
        return is_across and not _is_queued(name, args, kwargs)
    if name in _INDEXED:
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        return _on_device(args[0]) and any(i.device.type == "cpu" or i.dtype == torch.bool for i in indices)
    # a tensor from numbers of the host, such as torch.tensor(1.0, device="cuda")
    return name == "lift_fresh" and _on_device(args[0])


def _is_queued(name: str, args: tuple, kwargs: dict) -> bool:
    return bool(kwargs.get("non_blocking", name == "copy_" and len(args) > 2 and args[2]))


def _on_device(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.device.type != "cpu"
