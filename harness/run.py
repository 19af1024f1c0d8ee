"""What a method gets besides the model: seeds, a folder to resume from, progress, and the ledger."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.seeds import mix

if TYPE_CHECKING:
    import torch

CHECKPOINT_INTERVAL_S = 20.0


@dataclass
class Ledger:
    """What a stage cost."""

    forward_passes: float = 0.0  # UNet passes over one sample
    backward_passes: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)  # by phase: load, encode, train, sample, score
    peak_memory_bytes: int = 0
    numbers: dict[str, float] = field(default_factory=dict)  # what a method wants to tell, such as a final loss

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the wall time of the block to the phase `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def as_json(self) -> dict[str, Any]:
        """Return the ledger as JSON values."""
        return {
            "forward_passes": self.forward_passes,
            "backward_passes": self.backward_passes,
            "seconds": {k: round(v, 4) for k, v in self.seconds.items()},
            "peak_memory_bytes": self.peak_memory_bytes,
            "numbers": self.numbers,
        }


@dataclass
class Run:
    """The surroundings of one stage."""

    seed: int | None
    device: torch.device
    precision: str  # fp32 | bf16 (autocast over fp32 weights)
    folder: Path  # survives a kill; what `save_state` wrote lies here
    ledger: Ledger = field(default_factory=Ledger)
    report: Callable[[int, int], None] = lambda done, total: None
    track: Callable[[str, float, int], None] = lambda name, value, step: None
    checkpoint_interval_s: float = CHECKPOINT_INTERVAL_S
    _last_checkpoint: float = field(default_factory=time.monotonic)

    def seed_for(self, *axes: str | int) -> int:
        """Return a seed for one purpose of this stage, such as ("noise", step). Raises ValueError without a seed."""
        if self.seed is None:
            raise ValueError("this stage declared that it uses no seed; add 'seed' to the method's `uses`")
        return mix(self.seed, *axes)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context in which the model computes."""
        import torch

        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def is_checkpoint_due(self) -> bool:
        """Tell whether the interval since the last `save_state` has passed."""
        return time.monotonic() - self._last_checkpoint >= self.checkpoint_interval_s

    def save_state(self, step: int, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Keep what is needed to go on from `step`, in place of what was kept before."""
        from safetensors.torch import save

        temporary = self.folder / ".state.writing"
        header = json.dumps({"step": step, "numbers": dict(numbers), "ledger": self.ledger.as_json()})
        # one file, so that tensors and step can never be of two moments
        data = save({k: t.detach().to("cpu").contiguous() for k, t in tensors.items()}, {"state": header})
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / "state.safetensors")
        self._last_checkpoint = time.monotonic()

    def drop_state(self) -> None:
        """Forget what was kept: the stage starts over."""
        (self.folder / "state.safetensors").unlink(missing_ok=True)

    def load_state(self) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]] | None:
        """Return (step, tensors, numbers) of the last `save_state`, or None when there is none."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / "state.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                header = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError):
            return None  # damaged: starting over is right, only slower
        earlier = header["ledger"]
        self.ledger.forward_passes = earlier["forward_passes"]
        self.ledger.backward_passes = earlier["backward_passes"]
        self.ledger.seconds = dict(earlier["seconds"])
        return header["step"], tensors, header["numbers"]
